"""LangChain and LiteLLM against a worker: replies, streams, JSON by a schema, pictures, refusals.

Both packages take 430 MB, so they are no part of `make test`. A worker with the pocket models, and
an environment of their own:

    SERVE=http HOST=127.0.0.1 FAMILIES=chat,sdxl .venv/bin/python handler.py
    python -m venv clients
    clients/bin/pip install langchain-openai==1.7.4 litellm==1.110.2
    clients/bin/python tests/prove_openai_clients.py http://127.0.0.1:8000/v1
"""

import argparse
import base64
import os
from typing import Any

# LiteLLM downloads a table of prices when it is imported, unless it is told to use its own.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

FRANCE = "What is the capital of France?"
#: The pocket model's greedy reply.
PARIS = "The capital of France is Paris."


class City(BaseModel):
    name: str


def prove_langchain(url: str, key: str) -> None:
    model = ChatOpenAI(
        model="qwen_instruct", base_url=url, api_key=key, temperature=0, max_retries=0
    )
    reply = model.invoke(FRANCE)
    assert reply.content == PARIS
    assert reply.usage_metadata["total_tokens"] == 24
    pieces = list(model.stream(FRANCE, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == PARIS
    assert sum(piece.usage_metadata["total_tokens"] for piece in pieces if piece.usage_metadata)
    city = model.with_structured_output(City, method="json_schema").invoke(FRANCE)
    assert isinstance(city, City)
    refused = _error(lambda: model.bind_tools([City]).invoke(FRANCE))
    assert "tools: not supported by this worker" in refused


def prove_litellm(url: str, key: str) -> None:
    base: dict[str, Any] = {"api_base": url, "api_key": key}
    chat = {"model": "openai/qwen_instruct", "temperature": 0, **base}
    messages = [{"role": "user", "content": FRANCE}]
    reply = litellm.completion(**chat, messages=messages)
    assert (reply.choices[0].message.content, reply.usage.total_tokens) == (PARIS, 24)
    stream = litellm.completion(**chat, messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == PARIS
    picture = litellm.image_generation(
        model="openai/sdxl", prompt="green hills", size="128x128", **base
    )
    assert base64.b64decode(picture.data[0].b64_json).startswith(b"\x89PNG")
    unknown = {**chat, "model": "openai/unknown"}
    assert "does not exist" in _error(lambda: litellm.completion(**unknown, messages=messages))


def _error(call: Any) -> str:
    try:
        call()
    except Exception as exc:
        return str(exc)
    raise AssertionError("the call was not refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("key", nargs="?", default="none", help="the worker's key")
    given = parser.parse_args()
    for prove in (prove_langchain, prove_litellm):
        prove(given.url, given.key)
        print(f"{prove.__name__}: as it should be")


if __name__ == "__main__":
    main()
