"""The warm-up: a generation before the first job, which finds a model that cannot generate."""

import gc
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
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="ourvidz")
    return caplog


# --- when a model is warmed up ---


def test_no_model_is_warmed_up_on_a_cpu_by_default(log: pytest.LogCaptureFixture) -> None:
    load(Settings())

    assert "warm" not in log.text


def test_the_warm_up_of_sdxl_makes_a_picture(log: pytest.LogCaptureFixture) -> None:
    load(Settings(warm_up="always"))

    assert "sdxl is warm after" in log.text


def test_the_warm_up_of_chat_generates_with_each_model(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    chat = load(chat_settings(tmp_path, warm_up="always"))["chat"]

    assert [model.engine.num_computed > 0 for model in set(chat.models.values())] == [True]
    assert "chat is warm after" in log.text


def test_the_warm_up_of_wan_generates_with_each_network(wan_settings: Settings) -> None:
    wan = load(wan_settings)["wan"]
    computed = []
    for route, network in wan.networks.items():
        network.transformer.register_forward_hook(lambda *_, route=route: computed.append(route))

    wan.warm_up()

    assert set(computed) == {"t2v", "vace"}


# --- what remains after a warm-up ---


def test_a_warm_up_counts_as_no_job_and_stores_nothing(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    worker = Worker.of(Settings(warm_up="always", storage_url=f"file:{tmp_path / 'assets'}"))

    assert "sdxl is warm after" in log.text
    assert not any(worker.health()["jobs"].values())
    assert not list(tmp_path.rglob("*.png"))


def test_what_lives_at_the_start_is_left_out_of_searches_for_garbage(tmp_path: Path) -> None:
    before: list[object] = []

    Worker.of(Settings(storage_url=f"file:{tmp_path}"))

    after: list[object] = []
    searched = [each for each in gc.get_objects() if each is before or each is after]
    assert [each is after for each in searched] == [True]


# --- a model that loads and does not generate ---


def test_a_model_that_does_not_generate_ends_the_start(tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(ROOT / "pocket/sdxl", config)
    # The text encoder has no embedding for this token.
    vocabulary = config / "tokenizer/vocab.json"
    tokens = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps({**tokens, "<|endoftext|>": 99_999}))
    settings = {"sdxl_model": str(ROOT / "pocket/sdxl.safetensors"), "sdxl_config": config}

    assert load(Settings(**settings))
    with pytest.raises(ModelLoadError, match=r"SDXL_MODEL: it loads, and does not generate \(In"):
        load(Settings(**settings, warm_up="always"))


def test_a_warm_up_that_runs_out_of_memory_does_not_end_the_start() -> None:
    # The weights fit, and a picture does not. That fails a job, not the start.
    assert load(Settings(warm_up="always", vram_budget_gb=0.0112))
