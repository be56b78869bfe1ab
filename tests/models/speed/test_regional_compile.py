"""Blocks that are compiled in the background, with the real compiler, in separate processes."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.speed import regional_compile
from tests.fakes import compiling
from tests.fakes.devices import FakeMemory, FakeModel
from tests.files import ROOT
from tests.patience import PATIENCE_S, wait_until
from tests.servers import warm_python

#: Each test starts a compiler in a new process.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch compiles for a CPU with g++, and there is none"
)


def serve(folder: Path, what: str = "network", **environment: str) -> Any:
    done = warm_python.run(
        ["-m", "tests.fakes.compiling", what, str(folder)],
        cwd=ROOT,
        env={**os.environ, **warm_python.ENVIRONMENT, **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def first(folder: Path) -> Any:
    return serve(folder)


@needs_compiler
def test_jobs_are_eager_until_their_shape_is_compiled_and_other_shapes_stay_eager(
    first: Any,
) -> None:
    assert first["compiled_calls"] == {
        "first job": 0,
        "second job": 0,
        "once ready": 2,
        "another shape": 0,
        "changed by a LoRA": 0,
    }


@needs_compiler
def test_compiled_blocks_give_the_results_of_eager_ones_within_rounding(first: Any) -> None:
    assert first["difference"] < 1e-6
    assert first["other_difference"] == 0


@needs_compiler
def test_nothing_is_compiled_inside_a_job(first: Any) -> None:
    # Both blocks share one graph, since only their weights differ. The second shape came only after
    # that, and was not compiled.
    assert first["graphs"] == first["graphs_before"] == 1


@needs_compiler
def test_the_next_process_uses_the_code_that_the_last_one_compiled(
    first: Any, folder: Path
) -> None:
    assert (first["hits"], first["misses"]) == (0, 1)

    again = serve(folder)

    assert (again["hits"], again["misses"]) == (1, 0)
    assert again["compiled_calls"] == first["compiled_calls"]
    (place,) = folder.iterdir()
    assert "-torch2." in place.name and "-diffusers0." in place.name


@needs_compiler
def test_a_block_is_compiled_for_more_shapes_than_torch_allows_by_default(folder: Path) -> None:
    served = serve(folder, "shapes")

    assert (served["num_ready"], served["log"]) == (compiling.MANY_SHAPES, [])


@pytest.mark.deep
@needs_compiler
def test_wans_compiled_blocks_work_with_presets_stops_and_moves(folder: Path) -> None:
    report = serve(folder, "wan")

    full, shallow = 8 * 3, report["shallow_forwards"]
    assert report["compiled_calls"] == {
        "first job": 0,
        "second job": 0,
        "once ready": full,
        # Only the second block is skipped: the first decides, and the hints come before it.
        "with a preset": full - shallow,
        "stopped at the second of four steps": full // 2,
        "after its weights are read again": full,
    }
    assert shallow > 0
    assert report["first_difference"] == report["later_difference"] == 0
    assert max(report["difference"], report["preset_difference"]) <= 1
    # One graph for the blocks that both networks have, one for the blocks that make hints.
    assert (report["hits"], report["misses"]) == (0, 2)


def test_a_job_calls_modules_while_the_compiler_traces_in_another_thread() -> None:
    began, ended = threading.Event(), threading.Event()

    def traced(value: Any) -> Any:
        began.set()
        assert ended.wait(PATIENCE_S)
        return value

    def compile_it() -> None:
        with regional_compile.isolated_tracing():
            torch.fx.symbolic_trace(traced)

    thread = threading.Thread(target=compile_it)
    thread.start()
    try:
        assert began.wait(PATIENCE_S)
        made = torch.nn.Linear(2, 3)(torch.zeros(1, 2))
    finally:
        ended.set()
        thread.join(PATIENCE_S)

    assert made.shape == (1, 3)


def test_compiling_brings_no_model_back_to_the_device_and_goes_on_after_its_next_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the compiler does is not this test's concern, only when it is asked.
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    memory = FakeMemory(10)
    ledger = Ledger(memory)
    own, other = (ledger.register(FakeModel(8, memory), name, "fake") for name in ("own", "other"))
    network = compiling.PlainNetwork()
    blocks = regional_compile.CompiledBlocks(network, own)

    def job() -> None:
        with torch.inference_mode(), blocks.job():
            network(torch.zeros(1, 4, 16))

    with other.using():
        job()
        job()
        wait_until(lambda: not blocks.is_compiling)
    assert blocks.num_ready == 0
    assert {row.name: row.state for row in ledger.report()} == {"own": "host", "other": "device"}
    with own.using():
        job()
        wait_until(lambda: blocks.num_ready)

    assert not blocks.is_broken


def test_a_shape_that_does_not_fit_the_memory_stays_eager_and_may_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*call: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda forward, **options: fail)
    network = compiling.PlainNetwork()
    handle = Ledger(FakeMemory(10)).register(FakeModel(8), "own", "fake")
    blocks = regional_compile.CompiledBlocks(network, handle)

    for _ in range(3):
        with handle.using(), torch.inference_mode(), blocks.job():
            network(torch.zeros(1, 4, 16))
        wait_until(lambda: not blocks.is_compiling)

    assert (blocks.num_ready, blocks.is_broken) == (0, False)


def test_a_missing_compiler_is_one_warning_and_jobs_stay_eager(tmp_path: Path) -> None:
    served = serve(tmp_path, PATH="/nowhere")

    assert served["is_broken"]
    assert set(served["compiled_calls"].values()) == {0}
    assert served["difference"] == 0
    (line,) = served["log"]
    assert line.startswith("COMPILE: eager from now on")
