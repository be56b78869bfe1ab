"""LoRAs: found by name or fetched from an allowed host, at work for one job, gone after it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.models import sdxl as models
from ourvidz_serverless.models.loras import LoraShelf
from ourvidz_serverless.references import Policy
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.weights import plain

SMALL: dict[str, Any] = {
    "prompt": plain("a red circle"),
    "negative_prompt": None,
    "seeds": [3],
    "width": 64,
    "height": 64,
    "num_inference_steps": 10,
    "guidance_scale": 6.0,
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> LoraShelf:
    """A folder with a LoRA that PEFT made for the pocket UNet, and a file that is none."""
    folder = tmp_path_factory.mktemp("loras")
    unet = models.load(Settings())._pipe.unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    torch.manual_seed(0)
    weights = get_peft_model_state_dict(unet)
    save_file({f"unet.{key}": value for key, value in weights.items()}, folder / "bold.safetensors")
    save_file({"something": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "broken.safetensors").write_bytes(b"not weights")
    return LoraShelf(folder)


def render(model: Any, **options: Any) -> np.ndarray:
    (picture,) = model.generate(**{**SMALL, **options})
    return picture.astype(int)


def test_a_lora_changes_the_picture_by_its_scale(sdxl: Any, shelf: LoraShelf) -> None:
    path = shelf.path("bold")
    without = render(sdxl)

    little, much = (
        np.abs(render(sdxl, loras=[(path, scale)]) - without).mean() for scale in (0.1, 1.0)
    )

    assert 0 < little < much


def test_a_lora_is_gone_after_its_job(sdxl: Any, shelf: LoraShelf) -> None:
    before = render(sdxl)
    render(sdxl, loras=[(shelf.path("bold"), 1.0)])

    assert np.array_equal(render(sdxl), before)


def test_a_lora_is_gone_after_a_job_that_was_stopped(sdxl: Any, shelf: LoraShelf) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = render(sdxl)
    with pytest.raises(KeyboardInterrupt):
        render(sdxl, loras=[(shelf.path("bold"), 1.0)], step=stop)

    assert np.array_equal(render(sdxl), before)


@pytest.mark.parametrize("name", ["other", "broken"])
def test_a_file_that_is_no_lora_is_refused_and_leaves_nothing(
    sdxl: Any, shelf: LoraShelf, name: str
) -> None:
    before = render(sdxl)

    with pytest.raises(ModelLoadError, match=f"{name} is no LoRA of this model"):
        render(sdxl, loras=[(shelf.path(name), 1.0)])

    assert np.array_equal(render(sdxl), before)


def test_a_name_that_nothing_lies_under_is_refused(shelf: LoraShelf) -> None:
    with pytest.raises(InvalidPrompt, match=r"config\.loras: there is no missing"):
        shelf.path("missing")


def test_without_a_folder_there_are_no_loras() -> None:
    with pytest.raises(InvalidPrompt, match="SDXL_LORA_DIR"):
        LoraShelf(None).path("bold")


def test_a_url_is_refused_unless_hosts_are_allowed(shelf: LoraShelf) -> None:
    with pytest.raises(InvalidPrompt, match="LORA_HOSTS"):
        shelf.fetch("https://loras.example/bold.safetensors", lambda: 10.0)


def test_a_url_of_another_host_is_refused(shelf: LoraShelf) -> None:
    strict = LoraShelf(shelf.folder, Policy(frozenset({"loras.example"})))

    with pytest.raises(ModelLoadError, match="allow-list"):
        strict.fetch("https://elsewhere.example/bold.safetensors", lambda: 10.0)


def test_a_url_that_was_fetched_once_is_not_fetched_again(shelf: LoraShelf, tmp_path: Path) -> None:
    kept = LoraShelf(tmp_path, Policy(frozenset({"loras.example"})))
    path = kept.path("https://loras.example/bold.safetensors?signature=1")
    path.parent.mkdir()
    path.write_bytes(shelf.path("bold").read_bytes())

    assert kept.fetch("https://loras.example/bold.safetensors?signature=2", lambda: 10.0) == path
