"""A missing, cut off, corrupt or unsuitable checkpoint is reported in one clear line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder import pocket_sdxl
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.sdxl import loader as sdxl
from ourvidz_serverless.models.wan import loader as wan
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import tiny_folder
from tests.files import ROOT

#: The setting of each kind of checkpoint, and the file in it that is broken.
PLACES = {
    "sdxl file": ("SDXL_MODEL", "."),
    "sdxl folder": ("SDXL_MODEL", "unet/diffusion_pytorch_model.safetensors"),
    "sdxl folder's text": ("SDXL_MODEL", "text_encoder/model.safetensors"),
    "sdxl tiny VAE": ("SDXL_TINY_VAE", "diffusion_pytorch_model.safetensors"),
    "wan": ("WAN_MODEL", "transformer/diffusion_pytorch_model.safetensors"),
    "wan's text": ("WAN_MODEL", "text_encoder/model.safetensors"),
    "chat": ("CHAT_INSTRUCT_MODEL", "model.safetensors"),
}
LOADERS = {"sdxl": sdxl.load, "wan": wan.load, "chat": chat_loader.load}


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_off_in_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def corrupt(path: Path) -> None:
    path.write_bytes(b"\xa7" * 64 + path.read_bytes()[64:])


def a_git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[len(tensors) // 2]]
    save_file(tensors, path, metadata={"format": "pt"})


def of_another_width(path: Path) -> None:
    tensors = load_file(path)
    widest = max(tensors, key=lambda name: tensors[name].numel())
    tensors[widest] = torch.cat([tensors[widest]] * 2)
    save_file(tensors, path, metadata={"format": "pt"})


def another_models(path: Path) -> None:
    save_file({"blocks.0.weight": torch.zeros(4, 4)}, path, metadata={"format": "pt"})


#: Faults, and the messages that they cause.
FAULTS: dict[Callable[[Path], None], str] = {
    cut_off: r"{file} is cut off: it has \d+ bytes of \d+ or more",
    cut_off_in_its_header: r"{file} is cut off: it has 40 bytes of \d+ or more",
    corrupt: "{file} is not a safetensors file, or is corrupt",
    a_git_lfs_pointer: "{file} is not a safetensors file, or is corrupt",
    without_a_tensor: (
        r"1 of \d+ tensors are missing in it, such as [\w.]+|has not all tensors of SDXL's"
    ),
    of_another_width: (
        r"[\w.]+ is [\dx]+, where the configuration has [\dx]+|[\w.]+ expected shape .* but got"
    ),
    another_models: r"(\d+) of \1 tensors are missing in it, such as|no tensor of it begins with",
    Path.unlink: "there (is no|are no) .*safetensors|there is nothing at",
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An intact checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    pocket_sdxl.load().save_pretrained(folder / "sdxl")
    shutil.copy(ROOT / "pocket/sdxl.safetensors", folder / "file.safetensors")
    (folder / "file").symlink_to(ROOT / "pocket/sdxl")
    return {
        "sdxl file": folder / "file.safetensors",
        "sdxl folder": folder / "sdxl",
        "sdxl tiny VAE": ROOT / "pocket/sdxl_tiny_vae",
        "wan": ROOT / "pocket/wan",
        "chat": Path(tiny_folder(folder / "chat")),
    }


def load(kind: str, place: Path) -> Any:
    family = re.split("[ ']", kind)[0]
    setting = PLACES[kind][0].lower()
    extra = {"wan_enhancer_model": None} if family == "wan" else {}
    return LOADERS[family](Settings(families=(family,), **{setting: str(place)}, **extra))


def broken(kind: str, intact: dict[str, Path], folder: Path, fault: Any) -> tuple[Path, Path]:
    """A copy of a kind's checkpoint with a fault in it, and the file that has it."""
    source = intact[kind.split("'")[0]]
    place = folder / source.name
    if source.is_dir():
        shutil.copytree(source, place)
    else:
        shutil.copy(source, place)
        place.with_suffix("").symlink_to(source.with_suffix(""))
    fault(place / PLACES[kind][1])
    return place, place / PLACES[kind][1]


@pytest.mark.parametrize("kind", ["sdxl file", "sdxl folder", "sdxl tiny VAE", "wan", "chat"])
def test_the_intact_checkpoints_load(kind: str, intact: dict[str, Path]) -> None:
    assert load(kind, intact[kind])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("kind", PLACES)
def test_a_broken_checkpoint_is_one_line_that_names_the_setting(
    kind: str, fault: Callable[[Path], None], intact: dict[str, Path], tmp_path: Path
) -> None:
    place, file = broken(kind, intact, tmp_path, fault)

    with pytest.raises(ModelLoadError) as wrong:
        load(kind, place)

    line = wrong.value.message
    name = f"{file.parent.name}/{file.name}"
    assert line.startswith(f"{PLACES[kind][0]}: ")
    assert "\n" not in line
    # Callers get this line if an evicted model does not load again, so it has no path.
    if fault is not Path.unlink:
        assert str(tmp_path) not in line
    assert re.search(FAULTS[fault].replace("{file}", re.escape(name)), line), line


@pytest.mark.parametrize(
    ("kind", "other", "line"),
    [
        ("sdxl folder", "wan", "there is no text_encoder_2/config.json in it"),
        ("sdxl folder", "chat", "there is no text_encoder/config.json in it"),
        ("sdxl tiny VAE", "sdxl folder", "there is no config.json in it"),
        ("wan", "sdxl folder", "there is no transformer/config.json in it"),
        ("wan", "chat", "there is no model_index.json in it"),
        ("chat", "wan", "there is no config.json in it"),
        ("chat", "sdxl folder", "there is no config.json in it"),
    ],
)
def test_a_folder_of_another_family_is_reported_as_unsuitable(
    kind: str, other: str, line: str, intact: dict[str, Path]
) -> None:
    with pytest.raises(ModelLoadError) as wrong:
        load(kind, intact[other])

    assert wrong.value.message.startswith(f"{PLACES[kind][0]}: {intact[other].name} does not load")
    assert line in wrong.value.message
