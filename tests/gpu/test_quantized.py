"""Quantised chat on a real device, in a process that may import torchao."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.files import ROOT
from tests.gpu.devices import DEVICE, ON_A_DEVICE
from tests.patience import PATIENCE_S

pytestmark = ON_A_DEVICE

#: The quantisations and the most bytes that they leave of a network in bf16. Embeddings stay.
MOST = {"int8": 0.8, "fp8": 0.8, "int4": 0.6}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("weights")
    run = subprocess.run(
        [sys.executable, "-m", "tests.fakes.quantized_chat", "device", str(folder), DEVICE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    made: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return made


@pytest.mark.parametrize("name", MOST)
def test_a_quantised_model_is_smaller_and_answers_the_same_after_it_left_the_device(
    found: dict[str, Any], name: str
) -> None:
    if "error" in found[name]:
        assert DEVICE == "cpu" and name == "int4", found[name]["error"]
        pytest.skip(found[name]["error"])

    assert found[name]["before"] == found[name]["after"] != ""
    assert found[name]["bytes"] < MOST[name] * found["none"]["bytes"]
