"""The chat models of a worker."""

from typing import Any

import pytest
from transformers import Qwen3Config

from ourvidz_serverless.errors import InvalidPrompt, WorkerUnavailable
from ourvidz_serverless.models.chat.model import Chat, ChatModel
from ourvidz_serverless.models.chat.request import ChatRequest, SamplingParams
from ourvidz_serverless.models.chat.tokenizer import THINK, ChatTokenizer
from tests.fakes.devices import fake_ledger
from tests.fakes.tiny_chat import (
    CPU,
    ask,
    rest_of,
    tiny_chat,
    tiny_chat_model,
    tiny_decoder,
)
from tests.models.chat.test_template import ALWAYS, QWEN_3, qwen_3


def test_a_model_that_the_worker_does_not_have_is_unavailable() -> None:
    model, ledger = tiny_chat_model(), fake_ledger(1 << 30)
    chat = Chat({"qwen_instruct": model}, CPU, 512, ledger)

    with pytest.raises(WorkerUnavailable, match="qwen_base is not served here"):
        ask(chat, ("user", "Hello"), model="qwen_base", max_tokens=9)


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match=r"^logit_bias: 259 is no token .*, which has 259$"):
        ask(tiny_chat(), ("user", "Hello"), max_tokens=9, logit_bias={259: 1.0})


# --- thoughts ---


def thinker(template: str = QWEN_3) -> Chat:
    """A chat model whose template knows thoughts."""
    tokenizer = qwen_3(template)
    network = tiny_decoder(Qwen3Config, vocab_size=len(tokenizer))
    model, ledger = ChatModel(network, ChatTokenizer(tokenizer), CPU), fake_ledger(1 << 30)
    ledger.register(model, "qwen_instruct", "chat")
    return Chat({"qwen_instruct": model}, CPU, 512, ledger)


def request(thinking: bool = True, **options: Any) -> ChatRequest:
    schema = options.pop("schema", None)
    sampling = SamplingParams(max_tokens=5, temperature=0, **options)
    return ChatRequest((("user", "Rain?"),), sampling, schema=schema, thinking=thinking)


def test_thoughts_are_counted_and_are_not_in_the_reply() -> None:
    begin = qwen_3().convert_tokens_to_ids(THINK)

    reply = thinker().generate(request(logit_bias={begin: 100}))

    assert rest_of(reply) == ""
    assert (reply.stats.num_thought, reply.stats.num_completion) == (5, 5)
    assert reply.stats.finish_reason == "length"


def test_a_model_that_always_thinks_does_so_without_being_asked() -> None:
    reply = thinker(ALWAYS).generate(request(thinking=False))

    assert rest_of(reply) == ""
    assert reply.stats.num_thought == 5


def test_a_model_that_was_not_asked_to_think_replies_at_once() -> None:
    reply = thinker().generate(request(thinking=False))

    assert len(rest_of(reply)) == 5
    assert reply.stats.num_thought == 0


def test_a_model_that_does_not_think_refuses_to_be_asked() -> None:
    with pytest.raises(InvalidPrompt, match=r"^thinking: Input should be false"):
        tiny_chat().generate(request())


@pytest.mark.parametrize(("template", "thinking"), [(QWEN_3, True), (ALWAYS, False)])
def test_a_reply_with_thoughts_cannot_fit_a_schema(template: str, thinking: bool) -> None:
    with pytest.raises(InvalidPrompt, match=r"^response_format: Input should be text"):
        thinker(template).generate(request(thinking, schema={"type": "object"}))
