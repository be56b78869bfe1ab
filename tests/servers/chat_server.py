"""A chat server that speaks OpenAI's protocol, in this process or in one of its own.

It behaves like vLLM: it lists its models, counts tokens, streams with usage, refuses what is too
long, and stops when the connection closes. It writes letters by a seed, a token each. In a process
of its own (`python -m tests.servers.chat_server --port N`) it starts a child, and ends where a
message says so.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.servers.local_server import Answer, LocalServer, Request, json_answer

#: The reply ends by itself after so many tokens, unless it is constrained.
REPLY_TOKENS = 200

#: What the chat format adds to each message, and to the conversation, in tokens.
MESSAGE_TOKENS, FORMAT_TOKENS = 4, 3

#: A process prints at its start which of these variables it has.
ENVIRONMENT = ("HF_TOKEN", "VLLM_LOGGING_LEVEL", "WORKER_API_KEY")

#: A message with this text ends the server while it answers. With one of the next two the stream
#: breaks off, and the server is ill; it ends when it has been asked for its health often enough, or
#: never. The last one is answered with an error, and nothing else is wrong.
DIE = "Please end now."
DIE_SLOWLY = "Please end later."
HANG = "Please answer no more."
FAIL = "Please fail."

#: How often a server that ends later is asked for its health first.
NUM_HEALTH_CHECKS = 3


@dataclass(frozen=True)
class Behaviour:
    """What kind of server this is."""

    models: tuple[str, ...] = ("tiny",)
    owner: str = "vllm"
    context: int = 512
    counts_tokens: bool = True
    counts_usage: bool = True
    key: str | None = None
    #: The reply, instead of letters.
    says: str | None = None
    #: Seconds between two tokens.
    pace_s: float = 0.0


class ChatServer(LocalServer):
    """Keeps the bodies of the requests, and how many streams were cut off by their readers."""

    def __init__(self, behaviour: Behaviour | None = None, port: int = 0, **changes: Any) -> None:
        super().__init__(port)
        self.behaviour = behaviour or Behaviour(**changes)
        self.bodies: list[dict[str, Any]] = []
        self.num_writing = self.num_abandoned = 0
        self.is_ill = self.is_ending = False
        self.num_health_checks = 0

    def answer(self, request: Request) -> Answer:
        is_known = request.headers.get("Authorization") == f"Bearer {self.behaviour.key}"
        if self.behaviour.key and not is_known:
            return _refusal(401, "invalid_api_key", "a key is needed")
        if request.path == "/health":
            return self._health()
        if request.path == "/v1/models":
            owner = self.behaviour.owner
            data = [{"id": name, "owned_by": owner} for name in self.behaviour.models]
            return json_answer({"object": "list", "data": data})
        body = json.loads(request.body)
        if request.path == "/tokenize" and self.behaviour.counts_tokens:
            counts = {"count": num_tokens(body), "max_model_len": self.behaviour.context}
            return json_answer(counts)
        if request.path in ("/v1/chat/completions", "/v1/completions"):
            return self._complete(body, is_chat="messages" in body)
        return _refusal(404, "not_found", request.path)

    def _health(self) -> Answer:
        self.num_health_checks += 1
        if self.is_ending and self.num_health_checks >= NUM_HEALTH_CHECKS:
            os._exit(3)
        return Answer(503 if self.is_ill else 200)

    def _complete(self, body: dict[str, Any], is_chat: bool) -> Answer:
        with self.changed:
            self.bodies.append(body)
        prompt_tokens, context = num_tokens(body), self.behaviour.context
        if prompt_tokens > context:
            message = f"This model's maximum context length is {context} tokens."
            return _refusal(400, "input_tokens", message)
        if FAIL in json.dumps(body):
            return _refusal(500, None, "Internal server error")
        if len(body.get("stop", [])) > 4:
            return _refusal(400, "body.stop", "List should have at most 4 items")
        pieces = self._pieces(body, prompt_tokens, is_chat)
        return Answer(200, headers={"Content-Type": "text/event-stream"}, pieces=pieces)

    def _pieces(self, body: dict[str, Any], prompt_tokens: int, is_chat: bool) -> Iterator[bytes]:
        with self.changed:
            self.num_writing += 1
            self.changed.notify_all()
        is_whole = False
        try:
            yield from self._events(body, prompt_tokens, is_chat)
            is_whole = True
        finally:
            with self.changed:
                self.num_writing -= 1
                self.num_abandoned += not is_whole
                self.changed.notify_all()

    def _events(self, body: dict[str, Any], prompt_tokens: int, is_chat: bool) -> Iterator[bytes]:
        schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema", {})
        if schema.get("type") == "zebra":
            # vLLM looks at a schema only when the stream has begun.
            yield (
                b"data: " + _refusal(400, None, "Grammar error: Invalid type: zebra").body + b"\n\n"
            )
            return
        text, reason = reply_to(body, self.behaviour.context - prompt_tokens)
        if self.behaviour.says:
            text, reason = self.behaviour.says[: body["max_tokens"]], "length"
        if is_chat:
            yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for letter in text:
            self.closing.wait(self.behaviour.pace_s)
            part = {"delta": {"content": letter}} if is_chat else {"text": letter}
            yield _event({"choices": [{**part, "finish_reason": None}]})
            if DIE in json.dumps(body):
                os._exit(3)
            if DIE_SLOWLY in json.dumps(body) or HANG in json.dumps(body):
                self.is_ill, self.is_ending = True, DIE_SLOWLY in json.dumps(body)
                raise OSError
        part = {"delta": {}} if is_chat else {"text": ""}
        yield _event({"choices": [{**part, "finish_reason": reason}]})
        if self.behaviour.counts_usage:
            total = prompt_tokens + len(text)
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(text)}
            yield _event({"choices": [], "usage": {**usage, "total_tokens": total}})
        yield b"data: [DONE]\n\n"


def num_tokens(body: Mapping[str, Any]) -> int:
    """A token is a byte."""
    if "prompt" in body:
        return len(body["prompt"].encode())
    texts = [message["content"] for message in body["messages"]]
    return sum(len(text.encode()) + MESSAGE_TOKENS for text in texts) + FORMAT_TOKENS


def reply_to(body: Mapping[str, Any], room: int) -> tuple[str, str]:
    """The text, and why it ends. The same greedy request, or the same seed, gives the same text."""
    if "response_format" in body:
        format_ = body["response_format"]
        schema = format_.get("json_schema", {}).get("schema", {"type": "object"})
        text = json.dumps(instance_of(schema))
    else:
        prompt = json.dumps(body.get("messages", body.get("prompt")))
        seed = f"{body.get('seed')}" if body.get("seed") is not None else str(random.random())
        numbers = random.Random(prompt if body["temperature"] == 0 else seed + prompt)
        text = "".join(numbers.choices("abcdefgh ", k=REPLY_TOKENS))
    at = [text.find(stop) for stop in body.get("stop", []) if stop in text]
    text = text[: min(at)] if at else text
    most = min(body["max_tokens"], room)
    return text[:most], "length" if len(text) >= most and not at else "stop"


def instance_of(schema: Mapping[str, Any]) -> Any:
    """A value that fits a simple schema."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        return {name: instance_of(each) for name, each in properties.items()}
    return {"string": "a", "integer": 1, "number": 1, "boolean": True}.get(schema.get("type", ""))


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _refusal(status: int, param: str | None, message: str) -> Answer:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return json_answer({"error": error}, status)


def main() -> None:
    """Serve until SIGTERM; print what a log should not have when a request comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--key")
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--children", help="a file for the pids of the server and its child")
    given = parser.parse_args()
    print("loading", given.model, given.key, flush=True)
    if given.children:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(given.children, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
    print([name for name in ENVIRONMENT if name in os.environ], flush=True)
    behaviour = Behaviour(models=(given.model,), key=given.key, pace_s=given.pace)

    class Talkative(ChatServer):
        def note(self, request: Request, answer: Answer | None) -> None:
            print("INFO:", request.path, request.body.decode(), flush=True)
            print(f"ValueError: {request.body.decode()}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Talkative(behaviour, given.port):
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main()
