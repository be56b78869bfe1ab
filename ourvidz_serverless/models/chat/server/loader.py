"""Chat by a server: started if it has to be, awaited, and asked for its models."""

from __future__ import annotations

import shlex
import shutil
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ourvidz_serverless.errors import JobError, ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat.places import pocket
from ourvidz_serverless.models.chat.request import ChatRequest, ModelName, SamplingParams
from ourvidz_serverless.models.chat.server.client import ServerClient
from ourvidz_serverless.models.chat.server.model import ServerChat
from ourvidz_serverless.models.chat.server.process import ServerProcess, free_port
from ourvidz_serverless.models.chat.server.translation import FIELDS_OF_OWNER, Served
from ourvidz_serverless.models.loading import checkpoints
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.settings import Settings

#: How often a server that starts is asked whether it answers, in seconds.
POLL_S = 0.5

#: How long one of these questions may take, in seconds.
TRY_S = 5.0

#: How long the first token of a model may take, in seconds: the server may compile first.
FIRST_REPLY_S = 300.0

HELLO = (("user", "Hello"),)


def load(settings: Settings) -> ServerChat:
    """The models of `CHAT_SERVER_URL`, or of the server that `CHAT_SERVER_COMMAND` starts.

    It returns when each of them has generated a token. Raises ModelLoadError with one line.
    """
    process, url = _start(settings)
    try:
        chat = _connect(settings, url, process)
    except BaseException:
        if process:
            process.close()
        raise
    if process:
        process.expect_prompts()
    return chat


def _start(settings: Settings) -> tuple[ServerProcess | None, str]:
    """The server's process, if this worker starts it, and its URL."""
    port = free_port()
    url = settings.chat_server_url or f"http://127.0.0.1:{port}"
    if settings.chat_server_command is None:
        return None, url
    words = shlex.split(settings.chat_server_command)
    if shutil.which(words[0]) is None:
        raise ModelLoadError(f"CHAT_SERVER_COMMAND: there is no program {words[0]}")
    values = {"{port}": str(port), "{model}": _model_folder(settings, words)}
    for mark, value in values.items():
        words = [word.replace(mark, value) for word in words]
    log.info("starting the chat server %s", words[0])
    return ServerProcess(words, _key(settings)), url


def _model_folder(settings: Settings, words: Iterable[str]) -> str:
    if not any("{model}" in word for word in words):
        return ""
    variable, place = "CHAT_INSTRUCT_MODEL", settings.chat_instruct_model
    if place == "pocket":
        return str(pocket(variable))
    return str(checkpoints.find(variable, place, settings.model_dirs))


def _key(settings: Settings) -> str | None:
    key = settings.chat_server_api_key
    return key.get_secret_value() if key else None


def _connect(settings: Settings, url: str, process: ServerProcess | None) -> ServerChat:
    client = ServerClient(url, _key(settings))
    listed = _Waiting(client, process, settings.chat_server_start_s).models()
    models: dict[ModelName, Served] = {
        "qwen_instruct": _find("CHAT_SERVER_MODEL", settings.chat_server_model, listed, settings)
    }
    if base := settings.chat_server_base_model:
        models["qwen_base"] = _find("CHAT_SERVER_BASE_MODEL", base, listed, settings)
    chat = ServerChat(client, models, process, _context(client, models))
    for name, variable in (
        ("qwen_instruct", "CHAT_SERVER_MODEL"),
        ("qwen_base", "CHAT_SERVER_BASE_MODEL"),
    ):
        if name in models:
            _try(chat, name, variable)
    log.info("the chat server serves %s", ", ".join(each.name for each in models.values()))
    return chat


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A wait for a server that starts."""

    client: ServerClient
    process: ServerProcess | None
    within_s: float

    def models(self) -> list[Mapping[str, Any]]:
        """What the server lists, as soon as it lists a model."""
        variable = "CHAT_SERVER_COMMAND" if self.process else "CHAT_SERVER_URL"
        ends = time.monotonic() + self.within_s
        while time.monotonic() < ends:
            if self.process and self.process.exit_code is not None:
                code = self.process.exit_code
                raise ModelLoadError(
                    f"{variable}: the server ended with code {code}; the log has its last lines"
                )
            try:
                if listed := self.client.models(min(TRY_S, ends - time.monotonic())):
                    return listed
            except Fault as fault:
                if fault.status in (401, 403):
                    raise ModelLoadError("CHAT_SERVER_API_KEY: the server refuses it") from None
            time.sleep(POLL_S)
        raise ModelLoadError(
            f"{variable}: the server does not answer within {self.within_s:g} seconds"
        )


def _find(
    variable: str, name: str | None, listed: Iterable[Mapping[str, Any]], settings: Settings
) -> Served:
    """The model of a setting among those that the server lists; without a name the only one."""
    owners = {str(each.get("id")): str(each.get("owned_by", "")) for each in listed}
    names = ", ".join(owners)
    if name is None and len(owners) > 1:
        raise ModelLoadError(f"{variable}: Field required, since the server has {names}")
    found = name or next(iter(owners))
    if found not in owners:
        raise ModelLoadError(f"{variable}: the server has no {found}, but {names}")
    fields = FIELDS_OF_OWNER.get(owners[found].lower(), frozenset())
    fields = frozenset(settings.chat_server_fields) or fields
    salts = settings.chat_cache_salt == "user"
    if salts and "cache_salt" not in fields:
        raise ModelLoadError("CHAT_CACHE_SALT: the server is not known to have cache_salt")
    return Served(found, fields, salts)


def _context(client: ServerClient, models: Mapping[ModelName, Served]) -> int | None:
    """The tokens of the server's context; None if it does not count tokens."""
    messages = [{"role": role, "content": text} for role, text in HELLO]
    try:
        counts = client.count_tokens({"model": models["qwen_instruct"].name, "messages": messages})
    except Fault:
        counts = None
    return counts[1] if counts else None


def _try(chat: ServerChat, name: ModelName, variable: str) -> None:
    """Generate a token; raises ModelLoadError if that fails, or if tokens are not counted."""
    ends = time.monotonic() + FIRST_REPLY_S

    def check() -> None:
        if time.monotonic() > ends:
            raise ModelLoadError(f"{variable}: no reply within {FIRST_REPLY_S:g} seconds")

    reply = chat.generate(ChatRequest(HELLO, SamplingParams(max_tokens=1), name), check)
    try:
        deque(reply, maxlen=0)
    except ModelLoadError:
        raise
    except JobError as exc:
        raise ModelLoadError(f"{variable}: the server lists it, and {exc.message}") from None
    if not reply.stats.num_prompt:
        raise ModelLoadError(
            f"{variable}: the server does not count the tokens of a stream, which is needed"
        )
