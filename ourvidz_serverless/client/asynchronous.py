"""`AsyncClient`: carries out the steps of `calls` with `await`. It reads as `sync` does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx2

from ourvidz_serverless.client import assets
from ourvidz_serverless.client.calls import Calls, JobState, following, state_now, streaming
from ourvidz_serverless.client.outcome import Asset, Document, Outcome, Progress
from ourvidz_serverless.client.routes import Payload
from ourvidz_serverless.client.services import JobName
from ourvidz_serverless.client.steps import (
    Answer,
    Item,
    NextChunk,
    Pause,
    Request,
    RequestFailed,
    Steps,
    T,
)
from ourvidz_serverless.client.transport import answer_of, failed, options_of, tls

OnProgress = Callable[[Progress], None]


class AsyncClient(Calls):
    """`Client` for asyncio: the same methods, to be awaited, and to be iterated with `async for`.

    Use one client in one event loop; close it when its jobs are done.
    """

    _http: httpx2.AsyncClient | None = None

    async def submit(
        self, payload: Payload, s3_config: Mapping[str, Any] | None = None
    ) -> AsyncSubmittedJob:
        """Queue a job, on the endpoint of its family that has the least load."""
        return AsyncSubmittedJob(self, await self._run(self._submitting(payload, s3_config)))

    async def run(
        self,
        payload: Payload,
        timeout_s: float = 600,
        s3_config: Mapping[str, Any] | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> Document:
        """Submit a job and wait for its document. Raises the JobError that it failed with."""
        job = await self.submit(payload, s3_config)
        async for progress in job.progress(timeout_s):
            if on_progress:
                on_progress(progress)
        return await job.result()

    async def runsync(
        self, payload: Payload, wait_s: float = 90, s3_config: Mapping[str, Any] | None = None
    ) -> Document:
        """`run` in one request, for a job that takes `wait_s` at most."""
        return await self._run(self._running_at_once(payload, wait_s, s3_config))

    async def stream(self, payload: Payload, timeout_s: float = 600) -> AsyncIterator[str]:
        """The pieces of a chat's reply, as they are written."""
        job = await self.submit({**payload, "stream": True})
        async for piece in job.stream(timeout_s):
            yield piece

    def job(
        self, endpoint: str, id: str, user_id: str | None = None, worker: str | None = None
    ) -> AsyncSubmittedJob:
        """A job that was submitted before, by its `endpoint`, `id`, `user_id` and `worker`."""
        return AsyncSubmittedJob(self, self._state_of(endpoint, JobName(id, user_id, worker)))

    async def health(self, family: str | None = None) -> dict[str, Any]:
        """What each of a family's endpoints says of its jobs and workers, or each of all."""
        return await self._run(self._health(family))

    async def download(self, document: Document, folder: str | Path) -> list[Path]:
        """Write each asset of a document to a folder, as `0.png` and so on; their paths."""
        return [
            assets.write(Path(folder), name, await self.fetch(asset))
            for asset, name in assets.files_of(document)
        ]

    async def fetch(self, asset: Asset) -> bytes:
        """The bytes of an asset. ValueError if its place is unknown."""
        source = assets.source_of(asset, self._place)
        return source if isinstance(source, bytes) else await self._run(assets.fetching(source))

    async def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        if self._http:
            await self._http.aclose()
            self._http = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        """The value of the steps. Their items are dropped."""
        end: list[T] = []
        async with contextlib.aclosing(self._walk(steps, end)) as walk:
            async for _ in walk:
                pass
        return end[0]

    async def _walk(self, steps: Steps[T], end: list[T]) -> AsyncGenerator[Any, None]:
        """Carry out the steps, and yield their items. Their value is put in `end`."""
        answer: Any = None
        error: RequestFailed | None = None
        async with _Connection(self._open()) as connection:
            with contextlib.closing(steps):
                while True:
                    try:
                        command = steps.throw(error) if error else steps.send(answer)
                    except StopIteration as stop:
                        end.append(stop.value)
                        return
                    answer = error = None
                    match command:
                        case Item():
                            yield command.value
                        case Pause():
                            await asyncio.sleep(command.seconds)
                        case _:
                            try:
                                answer = await connection.do(command)
                            except RequestFailed as exc:
                                error = exc

    def _open(self) -> httpx2.AsyncClient:
        if self._http is None:
            self._http = httpx2.AsyncClient(verify=tls())
        return self._http


class _Connection:
    """Sends requests, and holds the response of the one that streams."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self._request: Request | None = None
        self._chunks: AsyncIterator[bytes]
        self._opened = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._opened.aclose()

    async def do(self, command: Request | NextChunk) -> Answer | bytes | None:
        """The answer to a command. Raises RequestFailed if there is none."""
        request = command if isinstance(command, Request) else self._request
        assert request
        try:
            if isinstance(command, Request):
                return await self._send(command)
            return await anext(self._chunks, None)
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as exc:
            raise failed(request, exc) from exc

    async def _send(self, request: Request) -> Answer:
        if not request.streams:
            response = await self._http.request(**options_of(request))
            return answer_of(response, response.content)
        await self._opened.aclose()
        opening = self._http.stream(**options_of(request))
        response = await self._opened.enter_async_context(opening)
        self._request, self._chunks = request, response.aiter_bytes()
        return answer_of(response, b"" if response.is_success else await response.aread())


class AsyncSubmittedJob:
    """A job at its service.

    Another process finds it by its `endpoint`, `id`, `user_id` and `worker`.
    """

    def __init__(self, client: AsyncClient, state: JobState) -> None:
        self._client, self._state = client, state
        self.id, self.user_id = state.name.id, state.name.user_id
        #: The worker that has the job, if a load balancer has named it.
        self.worker = state.name.worker

    @property
    def endpoint(self) -> str:
        """The id of the RunPod endpoint, or the URL of the server."""
        return self._state.service.name

    async def status(self) -> Outcome:
        """The job's state now."""
        return await self._client._run(state_now(self._state, 600))

    async def result(self, timeout_s: float = 600) -> Document:
        """Wait for the document, as `SubmittedJob.result` does."""
        return await self._client._run(following(self._state, timeout_s))

    async def progress(self, timeout_s: float = 600) -> AsyncIterator[Progress]:
        """Each new progress of the job until its end. Raises the errors of `result`."""
        walk = self._client._walk(following(self._state, timeout_s), [])
        async with contextlib.aclosing(walk):
            async for progress in walk:
                yield progress

    async def stream(self, timeout_s: float = 600) -> AsyncIterator[str]:
        """A streamed reply, piece by piece, as `SubmittedJob.stream` gives it."""
        walk = self._client._walk(streaming(self._state, timeout_s), [])
        async with contextlib.aclosing(walk):
            async for piece in walk:
                yield piece

    async def cancel(self) -> None:
        """Stop the job at its next step. NotSupported at the SDK's test server."""
        await self._client._run(self._state.service.cancel(self._state.name))

    def __repr__(self) -> str:
        return f"AsyncSubmittedJob(endpoint={self.endpoint!r}, id={self.id!r})"
