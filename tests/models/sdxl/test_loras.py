"""LoRAs are found by name or downloaded from an allowed host, and act in one job only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY as METADATA
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.deadline import NEVER
from ourvidz_serverless.errors import (
    Cancelled,
    DeviceLost,
    InvalidPrompt,
    ModelLoadError,
    OutOfMemory,
)
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.memory.device import as_job_error
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.loras import LoraStore, applied
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.local_worker import sdxl_payload
from tests.fakes.recorded_progress import RecordedProgress
from tests.fakes.tiny_sdxl import through_diffusers, write_lora


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LoraStore:
    """A folder with a LoRA that PEFT made for the pocket UNet, and a file that is none."""
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "bold.safetensors", "to_q", "to_v")
    save_file({"something": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "broken.safetensors").write_bytes(b"not weights")
    return LoraStore(folder)


def render(model: SdxlModel, *loras: tuple[Path, float], **changes: Any) -> np.ndarray:
    (picture,) = tiny_sdxl.render(model, loras=loras, **changes)
    return picture.astype(int)


def test_a_lora_changes_the_picture_by_its_scale(sdxl: Any, store: LoraStore) -> None:
    path = store.path("bold", "ann")
    without = render(sdxl)

    little, much = (np.abs(render(sdxl, (path, scale)) - without).mean() for scale in (0.1, 1.0))

    assert 0 < little < much


def test_a_picture_with_a_lora_equals_diffusers_pipelines(sdxl: Any, store: LoraStore) -> None:
    lora = (store.path("bold", "ann"), 0.7)

    ours = render(sdxl, lora)
    with applied(sdxl.networks.pipe, [lora]):
        theirs = through_diffusers(sdxl.networks.pipe)

    assert np.array_equal(ours, theirs)


# --- what diffusers writes into a file's header ---


def save_with_metadata(path: Path, adapters: Any = ("unet",), **config: Any) -> None:
    """A LoRA that diffusers' own `save_lora_weights` wrote, with its adapter metadata."""
    pipe = loader.load(Settings()).networks.pipe
    layers, metadata = {}, {}
    torch.manual_seed(0)
    for name in adapters:
        network = getattr(pipe, name)
        targets = ["to_q", "to_v"] if name == "unet" else ["q_proj", "v_proj"]
        network.add_adapter(
            LoraConfig(**{"r": 4, "target_modules": targets, "init_lora_weights": False, **config})
        )
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
        metadata[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    pipe.save_lora_weights(path.parent, **layers, **metadata, weight_name=path.name)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 1},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"to_q": 16}},
        {"lora_alpha": 8, "rank_pattern": {"to_q": 2}},
        {"lora_alpha": 16, "lora_dropout": 0.5},
        {"lora_alpha": 16, "adapters": ("unet", "text_encoder", "text_encoder_2")},
    ],
    ids=str,
)
def test_a_lora_with_adapter_metadata_equals_diffusers_loading_the_same_file(
    sdxl: Any, tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tmp_path / "strong.safetensors"
    save_with_metadata(path, **config)
    theirs = loader.load(Settings()).networks.pipe
    theirs.load_lora_weights(tmp_path, weight_name=path.name)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        getattr(theirs, name).eval()

    ours = render(sdxl, (path, 1.0))

    assert np.array_equal(ours, through_diffusers(theirs))


@pytest.mark.parametrize(
    "entry",
    [
        # Changes the checkpoint's own weights, and leaves them changed.
        {"init_lora_weights": "pissa"},
        # Imports a module of that name.
        {"megatron_config": {}, "megatron_core": "antigravity"},
        {"modules_to_save": ["conv_out"]},
        # Matched against each layer's name as a regular expression, for hours.
        {"target_modules": "(([a-z.]+)+)+!"},
        {"alpha_pattern": {"(([a-z.]+)+)+!": 2}},
        {"r": "four"},
        {"no_such_entry": 1},
    ],
    ids=str,
)
def test_unsafe_or_unknown_adapter_metadata_of_a_lora_is_refused(
    sdxl: Any, tmp_path: Path, entry: dict[str, Any]
) -> None:
    path = tmp_path / "odd.safetensors"
    save_with_metadata(path, lora_alpha=16)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[METADATA])
    header |= {f"unet.{name}": value for name, value in entry.items()}
    save_file(load_file(path), path, metadata={METADATA: json.dumps(header)})

    with pytest.raises(ModelLoadError, match=r"^config\.loras: odd "):
        render(sdxl, (path, 1.0))


def test_a_tensor_whose_name_is_a_regular_expression_is_refused(sdxl: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"unet.(([a-z.]+)+)+!.lora_B.weight": torch.zeros(4, 4)}, path)

    with pytest.raises(
        ModelLoadError, match=r"^config\.loras: odd has a tensor with characters in its name"
    ):
        render(sdxl, (path, 1.0))


def test_a_job_with_a_distilled_lora_makes_its_picture_in_one_step(
    sdxl: Any, store: LoraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdxl, "loras", store)
    config = {"num_inference_steps": 1, "loras": [{"name": "bold", "distilled": True}]}
    job = Envelope.of({"input": sdxl_payload(config=config)}).job(Settings())
    context = JobContext(Stop(), lambda progress: None, Bounds(60))

    (picture,) = jobs.run(job, sdxl, {}, context)

    assert picture.metadata["steps"] == 1
    assert picture.pixels.std() > 10


def test_a_lora_is_gone_after_its_job(sdxl: Any, store: LoraStore) -> None:
    before = render(sdxl)
    render(sdxl, (store.path("bold", "ann"), 1.0))

    assert np.array_equal(render(sdxl), before)


def test_a_lora_is_gone_after_a_job_that_was_stopped(sdxl: Any, store: LoraStore) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = render(sdxl)
    with pytest.raises(KeyboardInterrupt):
        render(sdxl, (store.path("bold", "ann"), 1.0), progress=RecordedProgress(on_step=stop))

    assert np.array_equal(render(sdxl), before)


def test_a_lora_is_gone_after_a_stop_between_images_whose_error_is_kept(
    sdxl: Any, store: LoraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdxl, "loras", store)
    stop = Stop()
    context = JobContext(stop, lambda progress: None, Bounds(60))
    config = {"num_images": 3, "loras": [{"name": "bold"}]}
    pictures = jobs.run(
        Envelope.of({"input": sdxl_payload(config=config)}).job(Settings()), sdxl, {}, context
    )
    next(pictures)
    stop.set()

    with pytest.raises(Cancelled) as remembered:
        next(pictures)

    assert sdxl.networks.pipe.get_list_adapters() == {}
    assert remembered.traceback


@pytest.mark.parametrize("name", ["other", "broken"])
def test_a_file_that_is_not_a_lora_is_refused_and_changes_nothing(
    sdxl: Any, store: LoraStore, name: str
) -> None:
    before = render(sdxl)

    with pytest.raises(ModelLoadError, match=f"{name} is no LoRA of this model"):
        render(sdxl, (store.path(name, "ann"), 1.0))

    assert np.array_equal(render(sdxl), before)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), DeviceLost),
    ],
)
def test_a_device_that_fails_while_a_lora_loads_is_reported_as_the_devices_error(
    sdxl: Any,
    store: LoraStore,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise error

    # Where diffusers moves the LoRA's tensors to the device.
    monkeypatch.setattr(sdxl.networks.unet, "load_lora_adapter", fail)

    with pytest.raises(type(error)) as failed:
        render(sdxl, (store.path("bold", "ann"), 1.0))

    assert type(as_job_error(failed.value)) is expected


def test_a_lora_name_without_a_file_is_refused(store: LoraStore) -> None:
    with pytest.raises(InvalidPrompt, match=r"config\.loras: there is no missing"):
        store.path("missing", "ann")


@pytest.mark.parametrize("url", ["https://[", "https://[loras.example]/bold"])
def test_an_invalid_lora_url_is_refused(store: LoraStore, url: str) -> None:
    with pytest.raises(InvalidPrompt, match=r"^config\.loras: Input should be an https URL$"):
        store.fetch(url, "ann", NEVER)


def test_without_a_folder_there_are_no_loras() -> None:
    with pytest.raises(InvalidPrompt, match="SDXL_LORA_DIR"):
        LoraStore(None).path("bold", "ann")


def test_a_lora_url_is_refused_unless_hosts_are_allowed(store: LoraStore) -> None:
    with pytest.raises(InvalidPrompt, match="LORA_HOSTS"):
        store.fetch("https://loras.example/bold.safetensors", "ann", NEVER)


def test_a_lora_url_of_another_host_is_refused(store: LoraStore) -> None:
    strict = LoraStore(store.folder, Policy(frozenset({"loras.example"})))

    with pytest.raises(ModelLoadError, match="allow-list"):
        strict.fetch("https://elsewhere.example/bold.safetensors", "ann", NEVER)
