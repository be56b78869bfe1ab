"""What the refusals and failures of a chat server mean."""

import json
from typing import Any

import pytest

from ourvidz_serverless.errors import PromptTooLong
from ourvidz_serverless.models.chat.server.failures import of_fault
from ourvidz_serverless.net.retries import Fault


def fault(status: int | None, retry_after: str | None = None, **error: Any) -> Fault:
    return Fault(status, retry_after, json.dumps({"error": error}).encode())


@pytest.mark.parametrize(
    "error",
    [
        # OpenAI, vLLM, SGLang and TGI.
        {"code": "context_length_exceeded", "message": "Too many tokens: zebra"},
        {"param": "input_tokens", "message": "This model's maximum context length is 512 tokens."},
        {"message": "The input (900 tokens) is longer than the model's context length"},
        {"message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 512"},
    ],
)
def test_a_prompt_that_is_too_long_is_recognized_in_the_words_of_each_server(
    error: dict[str, Any],
) -> None:
    failure = of_fault(fault(400, **error))

    assert isinstance(failure, PromptTooLong)
    assert failure.message.startswith("messages: ")


@pytest.mark.parametrize(
    ("error", "field"),
    [
        ({"param": "body.stop", "message": "List should have at most 4 items"}, "stop"),
        ({"message": "temperature must be in [0, 2], got 9.0."}, "temperature"),
        ({"message": "Grammar error: Invalid type: zebra", "param": None}, "response_format"),
        ({"message": "`max_new_tokens` must be <= 512"}, "max_tokens"),
        ({"message": "zebra"}, "messages"),
    ],
)
def test_a_refusal_names_our_field_and_repeats_nothing_of_the_server(
    error: dict[str, Any], field: str
) -> None:
    failure = of_fault(fault(400, **error))

    assert failure.code == "INVALID_PROMPT"
    assert failure.message == f"{field}: the model does not take the value"


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (None, "WORKER_UNAVAILABLE", True),
        (429, "WORKER_UNAVAILABLE", True),
        (503, "WORKER_UNAVAILABLE", True),
        (500, "INTERNAL_ERROR", True),
        (401, "INTERNAL_ERROR", True),
        (404, "INTERNAL_ERROR", True),
    ],
)
def test_a_failure_of_the_server_may_be_retried(
    status: int | None, code: str, retryable: bool
) -> None:
    failure = of_fault(fault(status, "7", message="zebra"))

    assert (failure.code, failure.retryable) == (code, retryable)
    assert "zebra" not in failure.message
    assert not {"inf", "nan"} & {failure.message[at : at + 3] for at in range(80)}


@pytest.mark.parametrize("body", [b"", b"zebra", b"[1]", b'{"error": "zebra"}', b'{"error": null}'])
def test_a_refusal_without_openais_error_is_a_refusal_too(body: bytes) -> None:
    assert of_fault(Fault(422, body=body)).message == "messages: the model does not take the value"
