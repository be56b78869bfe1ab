"""The form of RunPod's Hub as it is, deployed: the real handler in RunPod's loop.

No model hub can be reached from here. A local one has the repository that the form names, at the
revision that it names. Its files are those of the pocket SDXL, in the published form.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from builder import hub_listing, presets
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.settings import Settings, read_for_worker
from tests.files import ROOT
from tests.servers import hub as hub_server
from tests.servers.handler import start
from tests.servers.hub import Hub
from tests.servers.runpod import Platform

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The Hub with the form's repository, whose networks are the pocket SDXL's."""
    folder = tmp_path_factory.mktemp("published")
    loader.load(Settings()).networks.pipe.save_pretrained(folder)
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    repository, _, revision = hub_listing.defaults()["SDXL_MODEL"].partition("@")
    with pytest.MonkeyPatch.context() as patched, Hub(repository, files) as server:
        patched.setattr(hub_server, "REVISION", revision)
        yield server


def test_the_form_as_it_is_starts_a_worker_that_answers_with_a_picture(
    hub: Hub, platform: Platform, tmp_path: Path
) -> None:
    env = {**hub_listing.defaults(), "MODEL_DIRS": str(tmp_path / "models")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    job = json.loads((ROOT / ".runpod/tests.json").read_text())["tests"][0]["input"]
    job["config"] |= {"resolution": "192x192", "num_inference_steps": 10}

    with start(platform, cwd=tmp_path, **env) as worker:
        id = platform.submit(job)
        status = platform.wait_for_status(id, "COMPLETED")

    (asset,) = status["output"]["assets"]
    assert picture(asset["url"]).size == (192, 192)
    assert list((tmp_path / "models").glob("models--*/snapshots/*/unet/*.safetensors"))
    assert "cannot start" not in worker.log


def test_a_checkpoint_with_fewer_blocks_than_sdxl_generates_as_the_trials_does(
    tmp_path: Path,
) -> None:
    # Segmind-Vega has no attention in the middle, and counts of transformers that differ by layer
    # (arXiv:2401.02677).
    published = loader.load(Settings()).networks.pipe
    published.save_pretrained(tmp_path)
    UNet2DConditionModel.from_config(
        {
            **published.unet.config,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [0, 0, [1], [2]],
            "reverse_transformer_layers_per_block": [[2, 1], [1, 1], 0, 0],
        }
    ).save_pretrained(tmp_path / "unet")

    model = loader.load(Settings(sdxl_model=str(tmp_path)))

    model.warm_up()


def picture(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head.startswith("data:image/") and head.endswith(";base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_passes_the_checks_of_a_start_on_runpod(
    preset: presets.Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**preset.env, "RUNPOD_ENDPOINT_ID": "ep1"}.items():
        monkeypatch.setenv(name, value)

    served: Any = read_for_worker().served

    assert [family.name for family in served] == list(preset.families)
