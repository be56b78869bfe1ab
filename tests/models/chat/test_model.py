"""The chat models of a worker."""

import pytest

from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.models.chat.model import Chat
from tests.fakes.devices import fake_ledger
from tests.fakes.tiny_chat import CPU, ask, tiny_chat_model


def test_a_model_that_the_worker_does_not_have_is_unavailable() -> None:
    model, ledger = tiny_chat_model(), fake_ledger(1 << 30)
    chat = Chat({"qwen_instruct": model}, CPU, 512, ledger)

    with pytest.raises(WorkerUnavailable, match="qwen_base is not served here"):
        ask(chat, ("user", "Hello"), model="qwen_base", max_tokens=9)
