"""`Client`: carries out the steps of `calls` and waits for each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
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


class Client(Calls):
    """Submits jobs to workers. Several threads may use one client; close it when they are done.

    A request that fails raises RequestFailed, after its tries. A job that fails raises the class
    of `errors` that the worker raised.
    """

    _http: httpx2.Client | None = None

    def submit(self, payload: Payload, s3_config: Mapping[str, Any] | None = None) -> SubmittedJob:
        """Queue a job, on the endpoint of its family that has the least load."""
        return SubmittedJob(self, self._run(self._submitting(payload, s3_config)))

    def run(
        self,
        payload: Payload,
        timeout_s: float = 600,
        s3_config: Mapping[str, Any] | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> Document:
        """Submit a job and wait for its document. Raises the JobError that it failed with."""
        job = self.submit(payload, s3_config)
        for progress in job.progress(timeout_s):
            if on_progress:
                on_progress(progress)
        return job.result()

    def runsync(
        self, payload: Payload, wait_s: float = 90, s3_config: Mapping[str, Any] | None = None
    ) -> Document:
        """`run` in one request, for a job that takes `wait_s` at most."""
        return self._run(self._running_at_once(payload, wait_s, s3_config))

    def stream(self, payload: Payload, timeout_s: float = 600) -> Iterator[str]:
        """The pieces of a chat's reply, as they are written."""
        return self.submit({**payload, "stream": True}).stream(timeout_s)

    def job(
        self, endpoint: str, id: str, user_id: str | None = None, worker: str | None = None
    ) -> SubmittedJob:
        """A job that was submitted before, by its `endpoint`, `id`, `user_id` and `worker`."""
        return SubmittedJob(self, self._state_of(endpoint, JobName(id, user_id, worker)))

    def health(self, family: str | None = None) -> dict[str, Any]:
        """What each of a family's endpoints says of its jobs and workers, or each of all."""
        return self._run(self._health(family))

    def download(self, document: Document, folder: str | Path) -> list[Path]:
        """Write each asset of a document to a folder, as `0.png` and so on; their paths."""
        return [
            assets.write(Path(folder), name, self.fetch(asset))
            for asset, name in assets.files_of(document)
        ]

    def fetch(self, asset: Asset) -> bytes:
        """The bytes of an asset. ValueError if its place is unknown."""
        source = assets.source_of(asset, self._place)
        return source if isinstance(source, bytes) else self._run(assets.fetching(source))

    def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        if self._http:
            self._http.close()
            self._http = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        """The value of the steps. Their items are dropped."""
        walk = self._walk(steps)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                value: T = end.value
                return value

    def _walk(self, steps: Steps[T]) -> Generator[Any, None, T]:
        """Carry out the steps, and yield their items."""
        answer: Any = None
        error: RequestFailed | None = None
        with contextlib.closing(steps), _Connection(self._open()) as connection:
            while True:
                try:
                    command = steps.throw(error) if error else steps.send(answer)
                except StopIteration as end:
                    value: T = end.value
                    return value
                answer = error = None
                match command:
                    case Item():
                        yield command.value
                    case Pause():
                        time.sleep(command.seconds)
                    case _:
                        try:
                            answer = connection.do(command)
                        except RequestFailed as exc:
                            error = exc

    def _open(self) -> httpx2.Client:
        if self._http is None:
            self._http = httpx2.Client(verify=tls())
        return self._http


class _Connection:
    """Sends requests, and holds the response of the one that streams."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http
        self._request: Request | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._opened.close()

    def do(self, command: Request | NextChunk) -> Answer | bytes | None:
        """The answer to a command. Raises RequestFailed if there is none."""
        request = command if isinstance(command, Request) else self._request
        assert request
        try:
            return self._send(command) if isinstance(command, Request) else next(self._chunks, None)
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as exc:
            raise failed(request, exc) from exc

    def _send(self, request: Request) -> Answer:
        if not request.streams:
            response = self._http.request(**options_of(request))
            return answer_of(response, response.content)
        self._opened.close()
        response = self._opened.enter_context(self._http.stream(**options_of(request)))
        self._request, self._chunks = request, response.iter_bytes()
        return answer_of(response, b"" if response.is_success else response.read())


class SubmittedJob:
    """A job at its service.

    Another process finds it by its `endpoint`, `id`, `user_id` and `worker`.
    """

    def __init__(self, client: Client, state: JobState) -> None:
        self._client, self._state = client, state
        self.id, self.user_id = state.name.id, state.name.user_id
        #: The worker that has the job, if a load balancer has named it.
        self.worker = state.name.worker

    @property
    def endpoint(self) -> str:
        """The id of the RunPod endpoint, or the URL of the server."""
        return self._state.service.name

    def status(self) -> Outcome:
        """The job's state now."""
        return self._client._run(state_now(self._state, 600))

    def result(self, timeout_s: float = 600) -> Document:
        """Wait for the document, with growing waits between polls, also through an outage.

        Raises the JobError that the job ended with. After `timeout_s` raises StillUnderWay, or
        RequestFailed if the server does not answer.
        """
        return self._client._run(following(self._state, timeout_s))

    def progress(self, timeout_s: float = 600) -> Iterator[Progress]:
        """Each new progress of the job until its end. Raises the errors of `result`."""
        yield from self._client._walk(following(self._state, timeout_s))

    def stream(self, timeout_s: float = 600) -> Iterator[str]:
        """A streamed reply, piece by piece. `result` has the document at once afterwards.

        RunPod sends each piece once: if an answer is lost, its pieces are lost. Then no more
        pieces are yielded until the end, where the rest of the reply comes in one piece. Raises
        the errors of `result`.
        """
        yield from self._client._walk(streaming(self._state, timeout_s))

    def cancel(self) -> None:
        """Stop the job at its next step. NotSupported at the SDK's test server."""
        self._client._run(self._state.service.cancel(self._state.name))

    def __repr__(self) -> str:
        return f"SubmittedJob(endpoint={self.endpoint!r}, id={self.id!r})"
