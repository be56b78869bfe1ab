"""Chat's weights and caches fit the device, or the start fails with one line."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.engine import EngineLimits
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


@pytest.fixture(scope="module")
def wide_place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose hidden states are wider than all else that a forward computes."""
    return tiny_folder(tmp_path_factory.mktemp("wide"), layers=1, hidden=512)


def load(place: str, mib: float, **changes: Any) -> Chat:
    asked = {"chat_instruct_model": place, "chat_context": 512, "vram_budget_gb": mib * MIB}
    asked["families"] = ("chat",)
    return chat_loader.load(Settings(device="cpu", **{**asked, **changes}))


def limits(chat: Chat) -> EngineLimits:
    return chat.models["qwen_instruct"].engine.limits


def most_tokens(place: str, mib: float) -> int:
    """The most tokens that fit, as the refusal of a larger `CHAT_KV_TOKENS` says."""
    with pytest.raises(ModelLoadError) as refused:
        load(place, mib, chat_kv_tokens=1_000_000)
    found = re.search(r" (\d+) do$", refused.value.message)
    assert found
    return int(found[1])


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


@pytest.mark.parametrize("mib", [11.6, 12.3, 13, 14, 15, 16, 20])
def test_a_worker_with_wide_hidden_states_can_answer_its_longest_conversation(
    wide_place: str, mib: float
) -> None:
    try:
        chat = load(wide_place, mib)
    except ModelLoadError:
        assert mib < 16
        return

    assert rest_of(ask(chat, ("user", "x" * 470), max_tokens=8, temperature=0))


def test_a_device_without_room_for_a_forward_has_room_for_no_token(place: str) -> None:
    with pytest.raises(ModelLoadError, match=r"CHAT_INSTRUCT_MODEL, 0 tokens do$"):
        load(place, 0.5)


def test_many_conversations_fit_the_memory_that_a_worker_claims(place: str) -> None:
    chat = load(place, 6)
    messages = ("system", "be brief. " * 10), ("user", "x" * 200)

    replies = [ask(chat, *messages, max_tokens=40, seed=i) for i in range(16)]

    assert all(rest_of(each) for each in replies)
    assert chat.models["qwen_instruct"].engine.batch_limit.size == 64


def test_cached_prefixes_take_a_part_of_the_cached_tokens(place: str) -> None:
    chosen = limits(load(place, 6))

    assert 0 < chosen.prefix_tokens <= chosen.kv_tokens / 3


def test_a_model_claims_the_memory_of_its_prefixes_beside_that_of_its_cache(place: str) -> None:
    def reserved(prefix_tokens: int) -> int:
        chat = load(place, 6, chat_kv_tokens=1024, chat_prefix_tokens=prefix_tokens)
        return sum(row.reserved_bytes for row in chat.ledger.report())

    assert reserved(512) == 1.5 * reserved(0) > 0


def test_a_cache_setting_that_does_not_fit_fails_the_start(place: str) -> None:
    with pytest.raises(ModelLoadError, match=r"^CHAT_KV_TOKENS: 1000000 tokens do not fit"):
        load(place, 6, chat_kv_tokens=1_000_000)


def test_the_refusal_of_a_cache_setting_names_the_most_tokens_that_fit(tmp_path: Path) -> None:
    place, mib = tiny_folder(tmp_path, layers=8, hidden=512), 52
    most = most_tokens(place, mib)

    chat = load(place, mib, chat_kv_tokens=most)

    assert limits(chat).kv_tokens == most
    assert claimed(chat) <= chat.ledger.memory.total_bytes
    with pytest.raises(ModelLoadError):
        load(place, mib, chat_kv_tokens=most + 1)


@pytest.mark.parametrize("mib", [2.5, 2.52, 2.54, 3])
def test_the_caches_take_no_more_tokens_than_fit_where_memory_is_short(
    place: str, mib: float
) -> None:
    chosen = limits(load(place, mib))

    assert chosen.kv_tokens + chosen.prefix_tokens <= most_tokens(place, mib)


def test_one_model_has_the_cache_that_two_models_share(place: str, tmp_path: Path) -> None:
    one = limits(load(place, 32))
    two = limits(load(place, 32, chat_base_model=tiny_folder(tmp_path)))

    assert one.kv_tokens > 1.5 * two.kv_tokens


def test_chat_caches_less_on_a_device_that_serves_other_families_too(place: str) -> None:
    alone = limits(load(place, 32))
    beside = limits(load(place, 32, families=("chat", "sdxl")))

    assert alone.kv_tokens > 2 * beside.kv_tokens


def test_prefixes_get_the_memory_that_a_cache_setting_leaves(place: str) -> None:
    chat = load(place, 6, chat_kv_tokens=2048)

    assert limits(chat).kv_tokens == 2048
    assert 0 < limits(chat).prefix_tokens <= 16384
    assert claimed(chat) <= chat.ledger.memory.total_bytes


def test_two_models_that_replace_each_other_fit_the_device(place: str, tmp_path: Path) -> None:
    chat = load(place, 4, chat_base_model=tiny_folder(tmp_path))

    for model in get_args(ModelName):
        assert rest_of(ask(chat, ("user", "x"), model=model, max_tokens=3, temperature=0))
    assert claimed(chat) <= chat.ledger.memory.total_bytes


def test_on_a_cpu_the_cache_fits_the_memory_of_the_host(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ourvidz_serverless.models.memory.device_memory.host_memory", lambda: (6 << 20, 6 << 20)
    )

    chat = load(place, 0, vram_budget_gb=None)

    assert rest_of(ask(chat, ("user", "x"), max_tokens=3, temperature=0))
    assert claimed(chat) <= 6 << 20


def test_wans_enhancer_has_a_shorter_context_if_memory_is_short(place: str) -> None:
    settings = Settings(families=("wan",), device="cpu", chat_context=4096, vram_budget_gb=12 * MIB)
    ledger = open_ledger(settings)
    device = Device.choose(settings, torch.float32, ledger.memory)

    chat = chat_loader.load_enhancer(place, settings, device, ledger)

    assert rest_of(ask(chat, ("user", "x" * 900), max_tokens=3, temperature=0))
    assert claimed(chat) <= ledger.memory.total_bytes
    with pytest.raises(InvalidPrompt):
        ask(chat, ("user", "x" * 4000), max_tokens=3)
