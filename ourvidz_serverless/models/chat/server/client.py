"""HTTP with a server that speaks OpenAI's protocol: its models, counts of tokens, streams.

The streams are server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)
whose data is one JSON object each, and `[DONE]` at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.net.transport import Stream, Transport

#: How long a short request may take, in seconds.
SHORT_S = 10.0

#: How long one wait for the server may be before the job is checked again, in seconds. The
#: connection waits in steps that are much shorter.
WAIT_S = 5.0

#: How long a server that lives may take to say so, in seconds.
HEALTH_S = 5.0

#: The largest answer to a short request. One to `/tokenize` lists the tokens.
MAX_BYTES = 4_000_000

DONE = b"[DONE]"


class ServerClient:
    """The server at a URL, which may end with `/v1` as an OpenAI client has it.

    Safe to call from any thread. Its methods raise Fault.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._transport = Transport({"Content-Type": "application/json", **headers})

    def models(self, within_s: float = SHORT_S) -> list[Mapping[str, Any]]:
        """What `GET /v1/models` lists."""
        answer = self._transport.send("GET", f"{self.url}/v1/models", within_s=within_s)
        listed = answer.json()
        data = listed.get("data") if isinstance(listed, dict) else None
        return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []

    def is_alive(self) -> bool:
        """Whether the server answers `GET /health`, as vLLM, SGLang and TGI do, without a 5xx.

        vLLM answers 503 from the death of its engine to its own end. A server that has no such path
        answers 404, and lives.
        """
        try:
            self._transport.send("GET", f"{self.url}/health", within_s=HEALTH_S)
        except Fault as fault:
            return fault.status is not None and fault.status < 500
        return True

    def count_tokens(self, body: Mapping[str, Any]) -> tuple[int, int] | None:
        """The tokens of a prompt, and of the context, by vLLM's `POST /tokenize`.

        None if the server does not have it.
        """
        data = json.dumps(body).encode()
        url = f"{self.url}/tokenize"
        try:
            answer = self._transport.send(
                "POST", url, within_s=SHORT_S, data=data, max_bytes=MAX_BYTES
            ).json()
        except Fault as fault:
            if fault.status in (None, 401, 403, 429) or fault.status >= 500:
                raise
            return None
        counts = (answer.get("count"), answer.get("max_model_len"))
        return counts if all(isinstance(each, int) for each in counts) else None

    def open(self, path: str, body: Mapping[str, Any], check: Check) -> Stream:
        """The stream that answers a request, once the server has accepted it.

        What `check` raises, at any moment until the end of the stream, closes the connection.
        """

        def remaining_s() -> float:
            check()
            return WAIT_S

        data = json.dumps(body).encode()
        deadline = Deadline(remaining_s, NEVER.sleep)
        return self._transport.stream("POST", self.url + path, deadline=deadline, data=data)


def events_of(stream: Stream) -> Iterator[Mapping[str, Any]]:
    """The objects that a stream holds, to `[DONE]` or to its end; raises Fault."""
    for line in stream.lines():
        name, _, data = line.partition(b":")
        data = data.strip()
        if name != b"data" or data == DONE:
            continue
        try:
            event = json.loads(data)
        except ValueError as exc:
            stream.close()
            raise Fault(None) from exc
        if isinstance(event, dict):
            yield event
