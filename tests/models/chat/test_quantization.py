"""Quantised chat models still answer, and take less memory."""

from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.model import Chat, ChatModel
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_cuda_graph import FakeCudaGraphs
from tests.fakes.tiny_chat import CPU, ask, generate_text, tiny_folder
from tests.patience import PATIENCE_S
from tests.servers.handler import run_handler

QUESTION = ("user", "What is the capital of France?")
POCKET = pytest.mark.skipif(
    not chat_loader.POCKET.exists(), reason="`make chat` builds the pocket model"
)


def load(**settings: Any) -> tuple[Chat, int]:
    """The chat models, and the measured bytes of the only one."""
    chat = chat_loader.load(Settings(families=("chat",), **settings))
    (row,) = chat.ledger.report()
    return chat, row.num_bytes


def reply(chat: Chat) -> str:
    return "".join(ask(chat, QUESTION, temperature=0, max_tokens=12))


@pytest.mark.slow
@POCKET
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_quantised_pocket_model_answers_and_takes_less_memory(name: str) -> None:
    _, full = load()
    chat, quantized = load(chat_quantization=name)

    assert "Paris" in reply(chat)
    assert quantized < full / 2


def test_a_quantised_model_that_was_dropped_is_read_again_and_replies_the_same(
    tmp_path: Path,
) -> None:
    place = tiny_folder(tmp_path)
    _, full = load(chat_instruct_model=place)
    chat, quantized = load(chat_instruct_model=place, chat_quantization="int8")
    before = reply(chat)

    wish = chat.ledger.request_move("qwen_instruct", "disk", force=True)
    assert wish.is_done.wait(PATIENCE_S) and wish.error is None

    assert reply(chat) == before
    assert quantized < full


def test_steps_of_a_quantised_model_are_replayed(tmp_path: Path) -> None:
    place, fake_graphs = Path(tiny_folder(tmp_path)), FakeCudaGraphs()

    def read() -> Any:
        return chat_loader.read_folder(place, CPU, True, "int8")

    def say_hello(model: ChatModel) -> str:
        return generate_text(model, "hello", max_tokens=40)

    expected = say_hello(ChatModel(*read(), CPU))

    assert say_hello(ChatModel(*read(), CPU, capture=fake_graphs)) == expected
    assert fake_graphs.num_replayed > 0


def test_a_quantisation_that_the_device_cannot_run_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ModelLoadError) as refused:
        load(chat_instruct_model="/no/such/model", chat_quantization="int4", device="cpu")

    assert refused.value.message == "CHAT_QUANTIZATION: int4 runs on CUDA in bfloat16 only"


def test_a_worker_does_not_start_with_a_quantisation_that_it_cannot_run() -> None:
    run = run_handler(FAMILIES="chat", CHAT_QUANTIZATION="int4", DEVICE="cpu")

    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        "cannot start: CHAT_QUANTIZATION: int4 runs on CUDA in bfloat16 only"
    )
