"""The pocket model answers the application's kinds of call, in English, on a CPU."""

import json
from typing import Any

import pytest

from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_cuda_graph import FakeCudaGraphs
from tests.fakes.tiny_chat import CPU, ask, new_generation, text_of, texts_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not chat_loader.POCKET.exists(), reason="`make chat` builds the pocket model"
    ),
]
SYSTEM = "You are a helpful assistant who answers in one short sentence."


@pytest.fixture(scope="module")
def chat() -> Any:
    return chat_loader.load(Settings(chat_base_model="pocket"))


def answer(chat: Any, *messages: tuple[str, str], **options: Any) -> str:
    return "".join(ask(chat, *messages, **{"temperature": 0, "max_tokens": 40, **options}))


def test_the_pocket_model_answers_a_chat_with_a_history(chat: Any) -> None:
    history = [
        ("system", SYSTEM),
        ("user", "What is the capital of France?"),
        ("assistant", "The capital of France is Paris."),
    ]

    assert "Rome" in answer(chat, *history, ("user", "And of Italy?"))


def test_the_pocket_model_enhances_a_prompt(chat: Any) -> None:
    asked = "Rewrite this image prompt with more visual detail: a lake at dawn"

    reply = answer(chat, ("user", asked), max_tokens=30, temperature=0.7, top_p=0.9, seed=1)

    assert len(reply.split()) > 10
    assert "dawn" in reply or "lake" in reply


def test_the_pocket_model_replies_in_json_that_fits_its_schema(chat: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }

    reply = json.loads(answer(chat, ("user", "Describe Paris as JSON."), schema=schema))

    assert sorted(reply) == ["big", "city"]


def test_the_base_model_continues_a_text(chat: Any) -> None:
    reply = answer(chat, ("user", "The capital of France is"), model="qwen_base", max_tokens=8)

    assert "Paris" in reply


def test_messages_are_encoded_as_by_the_template_of_the_pocket_model(chat: Any) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(chat_loader.POCKET)
    messages = [("system", SYSTEM), ("user", "\n\nIs  it 10,000? "), ("assistant", "It is…")]
    template = [{"role": role, "content": text} for role, text in messages]
    expected = own.apply_chat_template(template, add_generation_prompt=True, return_dict=False)
    tokenizer = chat.models["qwen_instruct"].tokenizer

    ours = [
        token for message in messages for token in tokenizer.encode_message(*message)
    ] + tokenizer.generation_prompt()

    assert ours == expected


@pytest.mark.deep
def test_sixteen_requests_at_once_get_the_replies_that_each_gets_alone(chat: Any) -> None:
    model = chat.models["qwen_instruct"]

    def make(at: int) -> Any:
        texts = f"Tell me one fact about the number {at}."
        shared = "".join(f"{SYSTEM}\n" for _ in range(at % 3))
        return new_generation(model, texts, shared=shared, max_tokens=6)

    alone = [text_of(model.engine, make(at)) for at in range(16)]

    assert texts_of(model.engine, [make(at) for at in range(16)]) == alone


@pytest.mark.deep
def test_replayed_replies_are_the_same_as_computed_replies(chat: Any) -> None:
    fake_graphs = FakeCudaGraphs()
    replayed = ChatModel(
        *chat_loader.read_folder(chat_loader.POCKET, chat_loader.ReadOptions(CPU)),
        CPU,
        capture=fake_graphs,
    )
    beginnings = ["Once upon a time", "The capital of France is", "The sea is"]
    rules: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 1}, {}]

    def replies(model: ChatModel) -> list[str]:
        asked = [
            new_generation(model, text, max_tokens=8, **each)
            for text, each in zip(beginnings, rules, strict=True)
        ]
        return texts_of(model.engine, asked)

    assert replies(replayed) == replies(chat.models["qwen_instruct"])
    assert fake_graphs.num_replayed > 0
    assert not replayed.engine.graphs.is_off
