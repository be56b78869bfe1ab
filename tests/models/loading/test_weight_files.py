"""Loading by a repository's name, in half precision, and with or without memory maps."""

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.loading import readahead
from ourvidz_serverless.models.sdxl import loader as models
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import tiny_folder
from tests.fakes.tiny_sdxl import render

REPOSITORY = "tiny/painter"
NETWORKS = {
    "text_encoder/model",
    "text_encoder_2/model",
    "unet/diffusion_pytorch_model",
    "vae/diffusion_pytorch_model",
}


@pytest.fixture(scope="module")
def hub_cache(sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MODEL_DIRS with the pocket SDXL as a repository, in full and half precision."""
    folder = tmp_path_factory.mktemp("models")
    snapshot = folder / "models--tiny--painter" / "snapshots" / "0123"
    sdxl.networks.pipe.save_pretrained(snapshot)
    half = models.load(Settings(dtype="float16"))
    half.networks.vae.to(torch.float16)
    half.networks.pipe.save_pretrained(snapshot, variant="fp16")
    return folder


def load(folder: Path, **settings: Any) -> Any:
    return models.load(Settings(sdxl_model=REPOSITORY, model_dirs=(folder,), **settings))


def mapped(folder: Path) -> set[str]:
    """The weights in a folder that are mapped into this process, as folder/file without suffix."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = [Path(line.split()[-1]) for line in lines if str(folder) in line]
    return {f"{path.parent.name}/{path.name}".removesuffix(".safetensors") for path in paths}


def read_ahead(folder: Path) -> set[str]:
    """The weights that are read ahead, named in the same way."""
    settings = Settings(sdxl_model=REPOSITORY, model_dirs=(folder,), dtype="float16")
    return {f"{path.parent.name}/{path.stem}" for path in readahead.files(settings)}


def picture(model: Any) -> Any:
    (rendered,) = render(model, steps=4)
    return rendered


def test_a_repository_is_loaded_by_its_name(hub_cache: Path, sdxl: Any) -> None:
    assert (picture(load(hub_cache)) == picture(sdxl)).all()


def test_weights_on_a_disk_are_mapped(hub_cache: Path) -> None:
    model = load(hub_cache)

    assert mapped(hub_cache) == NETWORKS
    del model


def test_weights_that_are_read_instead_of_mapped_paint_the_same(hub_cache: Path, sdxl: Any) -> None:
    model = load(hub_cache, mmap_weights="never")

    assert mapped(hub_cache) == set()
    assert (picture(model) == picture(sdxl)).all()


def test_half_precision_weights_are_loaded_for_a_half_precision_dtype(hub_cache: Path) -> None:
    model = load(hub_cache, dtype="float16")

    assert mapped(hub_cache) == {f"{network}.fp16" for network in NETWORKS}
    del model


def test_half_precision_weights_are_loaded_if_there_are_no_others(
    hub_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(hub_cache, tmp_path / "models", ignore=shutil.ignore_patterns("*l.safetensors"))

    model = load(tmp_path / "models", mmap_weights="never")

    assert model.networks.unet.dtype == torch.float32


def test_sharded_half_precision_weights_are_found_under_the_names_that_diffusers_writes(
    hub_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(hub_cache, tmp_path / "models", ignore=shutil.ignore_patterns("*.safetensors"))
    half, snapshot = load(hub_cache, dtype="float16"), next(tmp_path.glob("models/*/*/*"))
    for name, network in half.networks.pipe.components.items():
        if isinstance(network, torch.nn.Module):
            # Copies, since tensors that share memory are written into one file.
            network.float().half().save_pretrained(
                snapshot / name, variant="fp16", max_shard_size="100KB"
            )

    model = load(tmp_path / "models", dtype="float16")

    shards = {f"{path.parent.name}/{path.stem}" for path in snapshot.rglob("*.safetensors")}
    assert all("-of-" in shard for shard in shards)
    assert mapped(tmp_path) == shards
    assert read_ahead(tmp_path / "models") == shards
    del model


def test_chat_weights_are_mapped_or_read_as_the_setting_says(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    settings = {"families": ("chat",), "chat_instruct_model": str(tmp_path)}

    elsewhere = chat_loader.load(Settings(**settings, mmap_weights="never"))
    assert mapped(tmp_path) == set()
    on_disk = chat_loader.load(Settings(**settings))

    assert len(mapped(tmp_path)) == 1
    del elsewhere, on_disk
