"""The generation before the first job: it counts for nothing, and finds a model that cannot."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless import models
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker
from tests.fakes.tiny_chat import tiny_folder
from tests.files import ROOT


def load(settings: Settings) -> dict[str, Any]:
    return models.load(settings, models.open_ledger(settings))


def chat_settings(folder: Path, **settings: Any) -> Settings:
    return Settings(families=("chat",), chat_instruct_model=tiny_folder(folder), **settings)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="ourvidz")
    return caplog


# --- when ---


def test_a_cpu_has_nothing_to_warm(told: pytest.LogCaptureFixture) -> None:
    load(Settings())

    assert "warm" not in told.text


def test_sdxl_paints_a_picture(told: pytest.LogCaptureFixture) -> None:
    load(Settings(warm_up="always"))

    assert "sdxl is warm after" in told.text


def test_chat_says_a_word_by_each_model(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    chat = load(chat_settings(tmp_path, warm_up="always"))["chat"]

    assert [model.engine.num_forwards > 0 for model in set(chat.models.values())] == [True]
    assert "chat is warm after" in told.text


def test_wan_generates_with_each_network(wan_settings: Settings) -> None:
    wan = load(wan_settings)["wan"]
    computed = []
    for route, network in wan.networks.items():
        network.transformer.register_forward_hook(lambda *_, route=route: computed.append(route))

    wan.warm_up()

    assert set(computed) == {"t2v", "vace"}


# --- what it leaves behind ---


def test_it_is_no_job_and_stores_nothing(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    worker = Worker.of(Settings(warm_up="always", storage_url=f"file:{tmp_path / 'assets'}"))

    assert "sdxl is warm after" in told.text
    assert not any(worker.health()["jobs"].values())
    assert not list(tmp_path.rglob("*.png"))


# --- a model that loads, and cannot ---


def test_a_model_that_does_not_generate_ends_the_start(tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(ROOT / "pocket/sdxl", config)
    # A token that the text encoder has no embedding of.
    vocabulary = config / "tokenizer/vocab.json"
    tokens = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps({**tokens, "<|endoftext|>": 99_999}))
    settings = {"sdxl_model": str(ROOT / "pocket/sdxl.safetensors"), "sdxl_config": config}

    assert load(Settings(**settings))
    with pytest.raises(ModelLoadError, match=r"SDXL_MODEL: it loads, and does not generate \(In"):
        load(Settings(**settings, warm_up="always"))


def test_one_that_has_no_room_to_does_not() -> None:
    # For the weights there is room, and for a picture not: a job's own affair.
    assert load(Settings(warm_up="always", vram_budget_gb=0.0112))
