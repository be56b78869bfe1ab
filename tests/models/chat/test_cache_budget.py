"""Chat's weights and caches fit the device, or the start fails with one line."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.model import Chat
from ourvidz_serverless.models.chat.request import ModelName
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import ask, rest_of, tiny_folder

MIB = 1 / 1024


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def load(place: str, mib: float, **changes: Any) -> Chat:
    asked = {"chat_instruct_model": place, "chat_context": 512, "vram_budget_gb": mib * MIB}
    return chat_loader.load(Settings(families=("chat",), device="cpu", **{**asked, **changes}))


def claimed(chat: Chat) -> int:
    return max(row.num_bytes + row.reserved_bytes for row in chat.ledger.report())


BUDGETS = [0.1, 0.2, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 6, 9, 16, 64]


@pytest.mark.parametrize("mib", BUDGETS)
def test_a_worker_that_starts_can_answer_its_longest_conversation(place: str, mib: float) -> None:
    try:
        chat = load(place, mib)
    except ModelLoadError as refused:
        assert re.match("CHAT_(CONTEXT|INSTRUCT_MODEL): ", refused.message)
        assert "\n" not in refused.message and mib < 4
        return

    reply = ask(chat, ("user", "x" * 470), max_tokens=8, temperature=0)

    assert rest_of(reply)
    assert claimed(chat) <= chat.ledger.memory.total_bytes


def test_many_conversations_fit_the_memory_that_a_worker_claims(place: str) -> None:
    chat = load(place, 6)
    messages = ("system", "be brief. " * 10), ("user", "x" * 200)

    replies = [ask(chat, *messages, max_tokens=40, seed=i) for i in range(16)]

    assert all(rest_of(each) for each in replies)
    assert chat.models["qwen_instruct"].engine.batch_limit.size == 64


def test_cached_prefixes_take_a_part_of_the_cached_tokens(place: str) -> None:
    limits = load(place, 6).models["qwen_instruct"].engine.limits

    assert 0 < limits.prefix_tokens <= limits.kv_tokens / 3


def test_a_cache_setting_that_does_not_fit_fails_the_start(place: str) -> None:
    with pytest.raises(ModelLoadError, match=r"^CHAT_KV_TOKENS: 1000000 tokens do not fit"):
        load(place, 6, chat_kv_tokens=1_000_000)


def test_prefixes_get_the_memory_that_a_cache_setting_leaves(place: str) -> None:
    chat = load(place, 6, chat_kv_tokens=2048)

    limits = chat.models["qwen_instruct"].engine.limits
    assert limits.kv_tokens == 2048
    assert 0 < limits.prefix_tokens <= 16384
    assert claimed(chat) <= chat.ledger.memory.total_bytes


def test_two_models_that_replace_each_other_fit_the_device(place: str, tmp_path: Path) -> None:
    chat = load(place, 4, chat_base_model=tiny_folder(tmp_path))

    for model in get_args(ModelName):
        assert rest_of(ask(chat, ("user", "x"), model=model, max_tokens=3))
    assert claimed(chat) <= chat.ledger.memory.total_bytes


def test_on_a_cpu_the_cache_fits_the_memory_of_the_host(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ourvidz_serverless.models.memory.device_memory.host_memory", lambda: (6 << 20, 6 << 20)
    )

    chat = load(place, 0, vram_budget_gb=None)

    assert rest_of(ask(chat, ("user", "x"), max_tokens=3))
    assert claimed(chat) <= 6 << 20


def test_wans_enhancer_has_a_shorter_context_if_memory_is_short(place: str) -> None:
    settings = Settings(families=("wan",), device="cpu", chat_context=4096, vram_budget_gb=12 * MIB)
    ledger = open_ledger(settings)
    device = Device.choose(settings, torch.float32, ledger.memory)

    chat = chat_loader.load_enhancer(place, settings, device, ledger)

    assert rest_of(ask(chat, ("user", "x" * 900), max_tokens=3))
    assert claimed(chat) <= ledger.memory.total_bytes
    with pytest.raises(InvalidPrompt):
        ask(chat, ("user", "x" * 4000), max_tokens=3)
