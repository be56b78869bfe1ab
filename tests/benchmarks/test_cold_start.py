"""The benchmark of a start: it runs to its end, and its parts do what they say."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints, cold_start
from builder import pocket_sdxl
from ourvidz_serverless.models.sdxl import loader as models
from ourvidz_serverless.settings import Settings


@pytest.mark.slow
def test_a_start_is_told_stage_by_stage(tmp_path: Path) -> None:
    cold_start.main(["--tiny", "--json", str(tmp_path / "found.json")])

    (table,) = json.loads((tmp_path / "found.json").read_text())["tables"]
    rows = {row[0]: dict(zip(table["headers"], row, strict=True)) for row in table["rows"]}
    worker = rows["worker, file"]
    assert set(rows) == {"read", "worker, file"}
    assert all(worker[name] > 0 for name in ("imports", "build", "first job", "CPU", "peak MiB"))
    assert worker["anonymous MiB"] <= worker["peak MiB"]
    assert rows["read"]["ready"] <= worker["ready"]


def test_a_checkpoint_of_random_weights_is_the_same_as_a_file_and_as_a_folder(
    tmp_path: Path,
) -> None:
    file = checkpoints.write_sdxl(tmp_path, "pocket")

    one = models.load(Settings(sdxl_model=str(file), dtype="float16")).networks.pipe
    other = models.load(
        Settings(sdxl_model=str(file.with_suffix("")), dtype="float16")
    ).networks.pipe

    for name in models.NETWORKS:
        mine, theirs = (getattr(pipe, name).state_dict() for pipe in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_full_sizes_names_are_those_it_was_published_with() -> None:
    with torch.device("meta"):
        vae = checkpoints.AutoencoderKL(**checkpoints.VAE_IN_HALF)

    names = {pocket_sdxl._vae_key(name) for name in vae.state_dict()}

    assert {"decoder.mid.attn_1.q.weight", "encoder.mid.attn_1.proj_out.bias"} <= names
    assert not [name for name in names if "attentions" in name]
