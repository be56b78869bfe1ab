"""The chat models of a worker."""

import pytest

from ourvidz_serverless.errors import InvalidPrompt, WorkerUnavailable
from ourvidz_serverless.models.chat.model import Chat
from tests.fakes.devices import fake_ledger
from tests.fakes.tiny_chat import CPU, ask, tiny_chat, tiny_chat_model


def test_a_model_that_the_worker_does_not_have_is_unavailable() -> None:
    model, ledger = tiny_chat_model(), fake_ledger(1 << 30)
    chat = Chat({"qwen_instruct": model}, CPU, 512, ledger)

    with pytest.raises(WorkerUnavailable, match="qwen_base is not served here"):
        ask(chat, ("user", "Hello"), model="qwen_base", max_tokens=9)


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match=r"^logit_bias: 259 is no token .*, which has 259$"):
        ask(tiny_chat(), ("user", "Hello"), max_tokens=9, logit_bias={259: 1.0})
