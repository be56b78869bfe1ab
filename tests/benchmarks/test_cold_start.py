"""The benchmark of a cold start."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import all as all_benchmarks
from benchmarks import checkpoints
from builder import pocket_sdxl
from ourvidz_serverless.models.sdxl import loader as models
from ourvidz_serverless.settings import Settings


@pytest.mark.deep
def test_cold_start_reports_the_seconds_of_each_stage(tmp_path: Path) -> None:
    path = tmp_path / "found.json"

    all_benchmarks.main(["--tiny", "--only", "cold_start", "--json", str(path)])

    (document,) = json.loads(path.read_text())
    (table,) = document["tables"]
    rows = {row[0]: dict(zip(table["headers"], row, strict=True)) for row in table["rows"]}
    worker = rows["worker, file"]
    assert set(rows) == {"read", "worker, file"}
    assert all(worker[name] > 0 for name in ("imports", "build", "first job", "CPU", "peak MiB"))
    assert worker["anonymous MiB"] <= worker["peak MiB"]
    assert rows["read"]["ready"] <= worker["ready"]


def test_the_single_file_of_random_weights_equals_the_folder(
    tmp_path: Path,
) -> None:
    file = checkpoints.write_sdxl(tmp_path, "pocket")

    single = models.load(Settings(sdxl_model=str(file), dtype="float16")).networks.pipe
    folder = models.load(
        Settings(sdxl_model=str(file.with_suffix("")), dtype="float16")
    ).networks.pipe

    for name in models.CLASSES:
        expected, found = (getattr(pipe, name).state_dict() for pipe in (single, folder))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_full_size_checkpoint_has_the_published_names_of_weights() -> None:
    with torch.device("meta"):
        vae = checkpoints.AutoencoderKL(**checkpoints.VAE_FP16)

    names = {pocket_sdxl.vae_key(name) for name in vae.state_dict()}

    assert {"decoder.mid.attn_1.q.weight", "encoder.mid.attn_1.proj_out.bias"} <= names
    assert not [name for name in names if "attentions" in name]
