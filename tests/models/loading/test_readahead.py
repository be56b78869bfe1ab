"""The files that are read and checked while Python imports, and what a family imports."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES, SAFETY_WEIGHTS
from ourvidz_serverless.models.loading import readahead
from ourvidz_serverless.models.loading.readahead import ReadAhead
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.sdxl import loader as models
from ourvidz_serverless.settings import Settings
from tests.fakes.devices import FakeMemory, FakeModel
from tests.files import ROOT
from tests.patience import PATIENCE_S

POCKET = ROOT / "pocket"


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.zeros(4)}, path)
    return path


def names(folder: Path, **settings: Any) -> list[str]:
    return [str(path.relative_to(folder)) for path in readahead.files(Settings(**settings))]


# --- which files ---


def test_the_pocket_models_are_not_read_ahead() -> None:
    assert readahead.files(Settings(families=("sdxl", "chat", "wan"))) == []


def test_a_single_file_checkpoint_is_read_ahead(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")

    assert names(tmp_path, sdxl_model=str(tmp_path / "x.safetensors")) == ["x.safetensors"]


def test_only_the_files_of_a_folder_that_its_family_loads_are_read_ahead(tmp_path: Path) -> None:
    for name in ("unet/a", "vae/a", "vae_1_0/a", "text_encoder/a", "text_encoder_2/a", "whole"):
        write(tmp_path / f"{name}.safetensors")

    assert names(tmp_path, sdxl_model=str(tmp_path)) == [
        f"{network}/a.safetensors" for network in ("text_encoder", "text_encoder_2", "unet", "vae")
    ]


@pytest.mark.parametrize(("dtype", "chosen"), [("float16", "a.fp16"), ("float32", "a")])
def test_weights_in_two_precisions_are_read_ahead_in_the_one_of_the_dtype(
    dtype: str, chosen: str, tmp_path: Path
) -> None:
    write(tmp_path / "unet/a.safetensors")
    write(tmp_path / "unet/a.fp16.safetensors")

    found = names(tmp_path, sdxl_model=str(tmp_path), dtype=dtype)

    assert found == [f"unet/{chosen}.safetensors"]


def test_every_shard_of_a_sharded_model_is_read_ahead(tmp_path: Path) -> None:
    for part in ("model-1-of-2", "model-2-of-2"):
        write(tmp_path / f"{part}.safetensors")

    found = names(tmp_path, families=("chat",), chat_instruct_model=str(tmp_path))

    assert found == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]


def test_weights_of_families_that_are_not_served_are_not_read_ahead(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")

    assert names(tmp_path, families=("chat",), sdxl_model=str(tmp_path / "x.safetensors")) == []


def test_the_records_list_every_setting_that_names_weights() -> None:
    weights = [each for family in FAMILIES.values() for each in family.weights]
    listed = {each.setting.lower() for each in (*weights, SAFETY_WEIGHTS)}

    ends = ("_model", "_vae", "_ip_adapter")
    named = {name for name in Settings.model_fields if name.endswith(ends)}
    assert listed == {name for name in named if not name.startswith(("chat_server_", "require_"))}


@pytest.mark.parametrize(("command", "found"), [("serve {model}", ["a.safetensors"]), (None, [])])
def test_of_chat_by_a_server_only_the_weights_that_its_command_names_are_read_ahead(
    tmp_path: Path, command: str | None, found: list[str]
) -> None:
    write(tmp_path / "a.safetensors")
    engine = {"chat_engine": "openai", "chat_server_command": command}

    chosen = names(tmp_path, families=("chat",), chat_instruct_model=str(tmp_path), **engine)

    assert chosen == found


def test_the_files_that_are_read_ahead_are_those_that_the_loader_maps(tmp_path: Path) -> None:
    pipe = models.load(Settings()).networks.pipe
    pipe.save_pretrained(tmp_path / "sdxl")
    AutoencoderTiny(decoder_block_out_channels=(8,) * 4).save_pretrained(tmp_path / "tiny")
    settings = Settings(sdxl_model=str(tmp_path / "sdxl"), sdxl_tiny_vae=str(tmp_path / "tiny"))

    model = models.load(settings)

    mapped = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
    }
    assert mapped == set(map(str, readahead.files(settings)))
    del model


# --- checks before torch is imported ---


def test_a_missing_checkpoint_is_an_error_before_it_is_loaded() -> None:
    with pytest.raises(ModelLoadError, match="SDXL_MODEL: there is nothing at /no/such/model"):
        ReadAhead.of(Settings(sdxl_model="/no/such/model"))


def test_a_file_that_is_cut_off_is_an_error_before_it_is_loaded(tmp_path: Path) -> None:
    file = write(tmp_path / "vae/a.safetensors")
    file.write_bytes(file.read_bytes()[:-4])

    with pytest.raises(ModelLoadError, match=r"WAN_MODEL: .* as WAN 2\.1 \(vae/a\.saf.* cut off"):
        ReadAhead.of(Settings(families=("wan",), wan_model=str(tmp_path)))


def test_importing_the_handler_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, handler; print(sorted({'torch', 'runpod', 'fastapi'} & set(sys.modules)))"

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert run.stdout.strip() == "[]"


# --- reading ---


def test_waiting_ends_when_all_files_are_read_and_a_missing_file_is_no_error(
    tmp_path: Path,
) -> None:
    reading = ReadAhead([tmp_path / "gone", write(tmp_path / "x.safetensors")]).start()

    reading.wait()

    assert reading.paths_read == [tmp_path / "x.safetensors"]


def test_preloading_waits_until_the_files_are_read() -> None:
    ledger, model, read = Ledger(FakeMemory(100)), FakeModel(10), threading.Event()
    ledger.register(model, "model", "none")
    ledger.wait_for_files = lambda: None if read.wait(PATIENCE_S) else pytest.fail("not read")
    preloading = threading.Thread(target=ledger.preload, args=(model,))

    preloading.start()
    assert model.place == "host"
    read.set()
    preloading.join(PATIENCE_S)

    assert model.place == "device"


# --- copies ---


@pytest.mark.parametrize("mmap", ["always", "never"])
def test_sdxls_weights_are_views_of_the_file_except_one_transposed_tensor(mmap: Any) -> None:
    settings = Settings(
        sdxl_model=str(POCKET / "sdxl.safetensors"), dtype="float16", mmap_weights=mmap
    )

    pipe = models.load(settings).networks.pipe

    tensors = [
        tensor
        for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        for tensor in network.parameters()
    ]
    storages = {each.untyped_storage().data_ptr() for each in tensors}
    # OpenCLIP's projection is transposed, which makes the one copy.
    assert len(storages) == 2
    copied = pipe.text_encoder_2.text_projection.weight
    assert copied.untyped_storage().nbytes() == copied.nbytes


def test_loading_weights_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()

    models.load(Settings())

    assert torch.equal(torch.get_rng_state(), before)
