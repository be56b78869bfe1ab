"""The chat models of a server that speaks OpenAI's protocol, as jobs call them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ourvidz_serverless.errors import DeviceLost, PromptTooLong, WorkerUnavailable
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat import truncation
from ourvidz_serverless.models.chat.request import ChatRequest, ModelName, SamplingParams
from ourvidz_serverless.models.chat.server import failures
from ourvidz_serverless.models.chat.server.client import ServerClient
from ourvidz_serverless.models.chat.server.process import ServerProcess
from ourvidz_serverless.models.chat.server.replies import ServerReply
from ourvidz_serverless.models.chat.server.translation import (
    Served,
    check_texts,
    options_of,
    prompt_of,
)
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.net.transport import Stream

#: The options on which the tokens of a prompt depend.
FORMAT_FIELDS = ("model", "chat_template_kwargs")

#: Tokens that a chat format may add to a conversation: of each message, and beside all of them.
FORMAT_TOKENS = 16
SYSTEM_TOKENS = 256

#: How long a server of this worker may fail to answer, after a failed request, until it is given
#: up, in seconds. vLLM looks every five seconds whether its engine lives, and then takes some more
#: to end (`VLLM_WATCHDOG_TIME_S`, vllm/entrypoints/launchers/launcher.py, 0.32).
DYING_S = 60.0

#: How often it is asked meanwhile, in seconds.
POLL_S = 0.5


class ServerDevice:
    """The server in the place of a device: this process computes nothing."""

    is_cuda = False

    def __init__(self, client: ServerClient) -> None:
        self._client, self.url = client, client.url

    def check(self) -> None:
        """Ask the server for its models; raises RuntimeError if it does not list them."""
        try:
            self._client.models()
        except Fault as fault:
            raise RuntimeError(f"the chat server does not list its models: {fault}") from None

    def reset_peak(self) -> None:
        """Nothing to do: the server's memory is not measured here."""

    def peak_mb(self) -> None:
        """None: the server's memory is not measured here."""


class ServerChat:
    """A `TextModel` behind which a server answers. Safe to call from any thread.

    `context` is the server's, in tokens, if it counts tokens (`/tokenize`). A conversation that is
    too long for it is then refused before it is sent; else the server refuses it.
    """

    def __init__(
        self,
        client: ServerClient,
        models: Mapping[ModelName, Served],
        process: ServerProcess | None = None,
        context: int | None = None,
    ) -> None:
        self.device = ServerDevice(client)
        self._client, self._models, self._process = client, models, process
        self._context = context

    def on_lost(self, report: Callable[[], None]) -> None:
        """Call `report` when the server ends that this worker started."""
        if self._process:
            self._process.on_end(report)

    def warm_up(self) -> None:
        """Generate one token with each model."""
        for name in self._models:
            hello = ChatRequest((("user", "Hello"),), SamplingParams(max_tokens=1), name)
            deque(self.generate(hello), maxlen=0)

    def generate(self, request: ChatRequest, check: Check = lambda: None) -> ServerReply:
        """The server's reply; the request is sent when the iteration begins.

        See `TextModel.generate`. Raises DeviceLost if the server of this worker has ended.
        """
        if request.model not in self._models:
            served = ", ".join(self._models)
            raise WorkerUnavailable(
                f"model: {request.model} is not served here; this worker has {served}"
            )
        check_texts(request.messages)
        options = options_of(request, self._models[request.model])

        def raise_failure(fault: Fault) -> NoReturn:
            self._raise_failure(fault, check)

        return ServerReply(lambda: self._open(request, options, check), check, raise_failure)

    def _open(
        self, request: ChatRequest, options: Mapping[str, Any], check: Check
    ) -> tuple[Stream, int]:
        """The stream of a reply, and how many messages `truncate` removed for it."""
        groups = truncation.droppable(request.messages) if request.truncate else []
        if self._context and self._may_be_too_long(request):
            kept = self._kept(request, options, groups, check)
            return self._send(request, options, kept, check), len(request.messages) - len(kept)
        return self._send_what_fits(request, options, groups, check)

    def _may_be_too_long(self, request: ChatRequest) -> bool:
        """Whether it is worth to count tokens: a token is a byte of text or more."""
        num_bytes = sum(len(text.encode()) + FORMAT_TOKENS for _, text in request.messages)
        return num_bytes + SYSTEM_TOKENS + request.sampling.max_tokens > (self._context or 0)

    def _kept(
        self,
        request: ChatRequest,
        options: Mapping[str, Any],
        groups: Sequence[Sequence[int]],
        check: Check,
    ) -> list[int]:
        """The places of the messages that fit the context, by the server's count of tokens."""
        room, num_tokens = (self._context or 0) - request.sampling.max_tokens, 0
        format_ = {name: options[name] for name in FORMAT_FIELDS if name in options}

        def fits(count: int) -> bool:
            nonlocal num_tokens
            check()
            kept = truncation.kept(len(request.messages), groups[:count])
            counted = self._client.count_tokens({**format_, **prompt_of(request, kept)[1]})
            num_tokens = counted[0] if counted else 0
            return num_tokens <= room

        count = truncation.fewest(len(groups), fits)
        if count is None:
            raise PromptTooLong(
                f"messages: {num_tokens} tokens, where the context has room for {max(room, 0)} "
                "beside max_tokens"
            )
        return truncation.kept(len(request.messages), groups[:count])

    def _send_what_fits(
        self,
        request: ChatRequest,
        options: Mapping[str, Any],
        groups: Sequence[Sequence[int]],
        check: Check,
    ) -> tuple[Stream, int]:
        """The same by the server's refusals: it is asked until it accepts the conversation."""
        accepted: dict[int, Stream] = {}
        refusal = Fault(None)

        def fits(count: int) -> bool:
            nonlocal refusal
            kept = truncation.kept(len(request.messages), groups[:count])
            try:
                accepted[count] = self._send(request, options, kept, check)
            except Fault as fault:
                if not failures.is_too_long(fault):
                    raise
                refusal = fault
            return count in accepted

        try:
            count = truncation.fewest(len(groups), fits)
            if count is None:
                raise refusal
            return accepted.pop(count), sum(map(len, groups[:count]))
        finally:
            for stream in accepted.values():
                stream.close()

    def _send(
        self,
        request: ChatRequest,
        options: Mapping[str, Any],
        kept: Sequence[int],
        check: Check,
    ) -> Stream:
        path, prompt = prompt_of(request, kept)
        return self._client.open(path, {**options, **prompt}, check)

    def _raise_failure(self, fault: Fault, check: Check) -> NoReturn:
        """Raise what a fault means. If the server of this worker is lost, the device is."""
        log.warning("the chat server: %s", fault)
        is_of_request = fault.status is not None and fault.status < 500
        if self._process and not is_of_request and self._is_lost(self._process, check):
            raise DeviceLost(
                "the device failed, and with it this worker; another one can do the job"
            ) from None
        raise failures.of_fault(fault) from None

    def _is_lost(self, process: ServerProcess, check: Check) -> bool:
        """Whether a server that failed a request ends, or does not answer within `DYING_S`.

        False as soon as it answers: then it failed this request alone.
        """
        until = time.monotonic() + DYING_S
        while not process.ends_within(POLL_S):
            if self._client.is_alive():
                return False
            if time.monotonic() >= until:
                log.error("the chat server does not answer, and does not end")
                return True
            check()
        return True
