"""Quantised chat models still answer, and take less memory."""

import json
import subprocess
import sys
from typing import Any

import pytest

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.settings import Settings
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import run_handler

POCKET = pytest.mark.skipif(
    not chat_loader.POCKET.exists(), reason="`make chat` builds the pocket model"
)


def report(*which: str) -> Any:
    """What a process that has torchao reports."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.quantized_chat", *which],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return report("tiny", str(tmp_path_factory.mktemp("tiny")))


@pytest.mark.deep
@POCKET
def test_the_quantised_pocket_model_answers_and_takes_less_memory() -> None:
    pocket = report("pocket")

    for name in ("int8", "fp8"):
        assert "Paris" in pocket[name]["reply"]
        assert pocket[name]["bytes"] < pocket["full_bytes"] / 2


def test_a_quantised_model_that_was_dropped_is_read_again_and_replies_the_same(
    quantized: Any,
) -> None:
    dropped = quantized["dropped"]

    assert dropped["has_moved"]
    assert dropped["after"] == dropped["before"]
    assert dropped["bytes"] < quantized["full_bytes"]


def test_steps_of_a_quantised_model_are_replayed(quantized: Any) -> None:
    replayed = quantized["replayed"]

    assert replayed["with"] == replayed["without"]
    assert replayed["num_replayed"] > 0


@pytest.mark.parametrize("kind", ["Qwen3Config", "Gemma3TextConfig"])
def test_a_quantised_model_of_another_architecture_says_what_transformers_generates(
    quantized: Any, kind: str
) -> None:
    ours, theirs = quantized["others"][kind]

    assert ours == theirs != ""


def test_a_quantisation_that_the_device_cannot_run_is_refused_before_anything_is_read() -> None:
    settings = Settings(
        families=("chat",),
        chat_instruct_model="/no/such/model",
        chat_quantization="int4",
        device="cpu",
    )

    with pytest.raises(ModelLoadError) as refused:
        chat_loader.load(settings)

    assert refused.value.message == "CHAT_QUANTIZATION: int4 runs on CUDA in bfloat16 only"


def test_a_worker_does_not_start_with_a_quantisation_that_it_cannot_run() -> None:
    run = run_handler(FAMILIES="chat", CHAT_QUANTIZATION="int4", DEVICE="cpu")

    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        "cannot start: CHAT_QUANTIZATION: int4 runs on CUDA in bfloat16 only"
    )
