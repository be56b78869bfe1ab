"""Loading by a repository's name, in halves, and without maps where maps are slow."""

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.loading import readahead
from ourvidz_serverless.models.sdxl import pipeline as models
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import tiny_folder

REPOSITORY = "tiny/painter"
NETWORKS = {
    "text_encoder/model",
    "text_encoder_2/model",
    "unet/diffusion_pytorch_model",
    "vae/diffusion_pytorch_model",
}


@pytest.fixture(scope="module")
def hub_cache(sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MODEL_DIRS with the pocket SDXL as a repository, whole and in halves."""
    folder = tmp_path_factory.mktemp("models")
    snapshot = folder / "models--tiny--painter" / "snapshots" / "0123"
    sdxl._pipe.save_pretrained(snapshot)
    halves = models.load(Settings(dtype="float16"))
    halves._vae.to(torch.float16)
    halves._pipe.save_pretrained(snapshot, variant="fp16")
    return folder


def load(folder: Path, **settings: Any) -> Any:
    return models.load(Settings(sdxl_model=REPOSITORY, model_dirs=(folder,), **settings))


def mapped(folder: Path) -> set[str]:
    """Those weights in a folder that are mapped into this process, without their endings."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = [Path(line.split()[-1]) for line in lines if str(folder) in line]
    return {f"{path.parent.name}/{path.name}".removesuffix(".safetensors") for path in paths}


def read_ahead(folder: Path) -> set[str]:
    """Those weights that are read while Python imports, named likewise."""
    settings = Settings(sdxl_model=REPOSITORY, model_dirs=(folder,), dtype="float16")
    return {f"{path.parent.name}/{path.stem}" for path in readahead.files(settings)}


def picture(model: Any) -> Any:
    rendered = model.generate(
        prompt=models.plain("a red circle"),
        negative_prompt=None,
        seeds=[1],
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=6.0,
    )
    return next(iter(rendered))


def test_a_repository_is_loaded_by_its_name(hub_cache: Path, sdxl: Any) -> None:
    assert (picture(load(hub_cache)) == picture(sdxl)).all()


def test_weights_on_a_disk_are_mapped(hub_cache: Path) -> None:
    model = load(hub_cache)

    assert mapped(hub_cache) == NETWORKS
    del model


def test_weights_behind_a_network_are_read_and_are_the_same(hub_cache: Path, sdxl: Any) -> None:
    model = load(hub_cache, mmap_weights="never")

    assert mapped(hub_cache) == set()
    assert (picture(model) == picture(sdxl)).all()


def test_halves_are_read_where_halves_are_wanted(hub_cache: Path) -> None:
    model = load(hub_cache, dtype="float16")

    assert mapped(hub_cache) == {f"{network}.fp16" for network in NETWORKS}
    del model


def test_halves_are_read_where_there_is_nothing_else(hub_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(hub_cache, tmp_path / "models", ignore=shutil.ignore_patterns("*l.safetensors"))

    model = load(tmp_path / "models", mmap_weights="never")

    assert model._unet.dtype == torch.float32


def test_halves_in_several_pieces_are_found_under_their_writers_names(
    hub_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(hub_cache, tmp_path / "models", ignore=shutil.ignore_patterns("*.safetensors"))
    halves, snapshot = load(hub_cache, dtype="float16"), next(tmp_path.glob("models/*/*/*"))
    for name, network in halves._pipe.components.items():
        if isinstance(network, torch.nn.Module):
            # A tensor of its own each: what shares memory stays in one file.
            network.float().half().save_pretrained(
                snapshot / name, variant="fp16", max_shard_size="100KB"
            )

    model = load(tmp_path / "models", dtype="float16")

    pieces = {f"{path.parent.name}/{path.stem}" for path in snapshot.rglob("*.safetensors")}
    assert all("-of-" in piece for piece in pieces)
    assert mapped(tmp_path) == pieces
    assert read_ahead(tmp_path / "models") == pieces
    del model


def test_chat_is_mapped_from_a_disk_and_read_from_elsewhere(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    settings = {"families": ("chat",), "chat_instruct_model": str(tmp_path)}

    elsewhere = chat_loader.load(Settings(**settings, mmap_weights="never"))
    assert mapped(tmp_path) == set()
    on_disk = chat_loader.load(Settings(**settings))

    assert len(mapped(tmp_path)) == 1
    del elsewhere, on_disk
