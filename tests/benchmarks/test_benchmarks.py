"""Every benchmark runs at its smallest size, and docs/benchmarks.md has its tables.

No figure is checked.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import all as all_benchmarks
from benchmarks import (
    architectures,
    chat,
    cold_start,
    cold_start_variants,
    memory,
    overhead,
    report,
    sdxl,
    wan,
)
from benchmarks.baselines import load_baseline_pipeline
from benchmarks.dry_run.depth import small
from benchmarks.interleaved_timing import InterleavedTiming, control_ratio, time_interleaved
from benchmarks.slow_storage import Upload, union_s
from ourvidz_serverless.models.sdxl import loader as sdxl_loader
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_cuda_graph import FakeCudaGraphs
from tests.fakes.tiny_chat import CPU, tiny_network
from tests.patience import PATIENCE_S
from tests.servers import warm_python

# --- the document ---


@pytest.mark.parametrize("name", all_benchmarks.NAMES)
def test_the_document_has_every_table_of_a_benchmark(name: str) -> None:
    text = all_benchmarks.DOCUMENT.read_text(encoding="utf-8")

    module = importlib.import_module(f"benchmarks.{name}")

    assert f"### `python -m benchmarks.{name}`" in text
    for title in getattr(module, "TITLES", ()):
        assert f"**{title}**" in text


def test_the_tables_are_written_between_the_documents_markers_and_nowhere_else(
    tmp_path: Path,
) -> None:
    document = tmp_path / "benchmarks.md"
    begin, end = "<!-- tables: begin -->", "<!-- tables: end -->"
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")

    report.write(document, "tables", "new \\1")

    assert document.read_text() == f"before\n{begin}\n\nnew \\1\n{end}\nafter\n"


def test_a_document_without_markers_is_not_changed(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("nothing")

    with pytest.raises(ValueError, match="has no"):
        report.write(document, "tables", "new")

    assert document.read_text() == "nothing"


# --- from end to end ---


def start_warm(command: Sequence[str]) -> int:
    """A process that need not import torch; `test_cold_start` has one that `all` starts itself."""
    env = {**os.environ, **warm_python.ENVIRONMENT}
    return warm_python.run(command, env=env, timeout=PATIENCE_S).returncode


def test_all_runs_each_benchmark_and_collects_its_json(tmp_path: Path) -> None:
    path = tmp_path / "found.json"

    all_benchmarks.main(["--tiny", "--only", "delivery,wan", "--json", str(path)], start_warm)

    found = json.loads(path.read_text())
    assert [each["benchmark"] for each in found] == ["delivery", "wan"]
    assert found[0]["machine"]["threads"] == 1
    for document in found:
        titles = [table["title"] for table in document["tables"]]
        assert titles == list(importlib.import_module(f"benchmarks.{document['benchmark']}").TITLES)
        assert all(table["rows"] for table in document["tables"])


def test_all_exits_with_an_error_and_keeps_the_document_if_a_benchmark_fails(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = all_benchmarks.DOCUMENT.read_text(encoding="utf-8")

    with pytest.raises(SystemExit, match="failed: missing"):
        all_benchmarks.main(["--only", "missing", "--docs"])

    assert all_benchmarks.DOCUMENT.read_text(encoding="utf-8") == before


@pytest.mark.deep
def test_overhead_measures_the_pipeline_the_worker_and_the_baseline_handler(
    tmp_path: Path,
) -> None:
    path = tmp_path / "found.json"

    overhead.main(["--tiny", "--upload-ms", "5", "--json", str(path)])

    backlog, tail = json.loads(path.read_text())["tables"]
    variants = ["pipeline", "worker", "baseline handler"]
    assert [row[1] for row in backlog["rows"]] == 2 * variants  # with jobs of two lengths
    assert all(row[2] > 0 for row in backlog["rows"])
    assert "64x64, 10, 12 steps" in backlog["note"]
    ((jobs, median_ms, worst_ms),) = tail["rows"]
    assert jobs == 8
    assert 0 < median_ms <= worst_ms


def test_a_variant_loses_its_seconds_beyond_those_of_the_pipeline() -> None:
    took = {"pipeline": [1.0, 1.0], "worker": [0.9, 0.9], "baseline handler": [2.0, 2.0]}
    backlogs = {name: [overhead.Backlog(each, 0.5) for each in took[name]] for name in took}

    rows = [dict(zip(overhead.HEADERS, row, strict=True)) for row in overhead.rows_of(backlogs)]

    assert [row["s lost a job"] for row in rows] == [None, pytest.approx(-0.1), 1.0]
    assert not [header for header in overhead.HEADERS if "against" in header]


@pytest.mark.parametrize("unsteady", ["pipeline", "baseline handler"])
def test_no_loss_is_reported_if_one_of_both_controls_is_off(unsteady: str) -> None:
    took = {"pipeline": [1.0, 1.0], "baseline handler": [2.0, 2.0]}
    took[unsteady] = [1.0, 3.0]
    backlogs = {name: [overhead.Backlog(each, 0.5) for each in took[name]] for name in took}

    _, baseline = overhead.rows_of(backlogs)

    assert baseline[overhead.HEADERS.index("s lost a job")] == report.UNSTEADY


@pytest.mark.parametrize("name", ["sdxl", "chat"])
def test_the_worker_and_its_baseline_give_the_same_results(name: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    module = importlib.import_module(f"benchmarks.{name}")

    module.main(["--tiny", "--json", str(path)])

    pocket, full, *others = tables = json.loads(path.read_text())["tables"]
    assert tuple(each["title"] for each in tables) == module.TITLES
    assert all(each["rows"] for each in others)
    for row in pocket["rows"]:
        facts = dict(zip(pocket["headers"], row, strict=True))
        assert facts.get("greatest difference", 0) <= 1
        assert facts.get("replies equal", "1 of 1") == "1 of 1"
    if not torch.cuda.is_available():
        assert {row[1] for row in full["rows"]} == {report.NOT_MEASURED}
        assert {cell for row in full["rows"] for cell in row[2:]} == {None}


# --- the code for a GPU, on networks of the same classes and a thousandth of the size ---


@pytest.fixture
def shrunk() -> Iterator[None]:
    """The full-size configurations, made small enough for a CPU."""
    with small():
        yield


def test_exact_levers_change_no_pixel_by_more_than_one_grey_level() -> None:
    rows = sdxl.lever_rows(Settings(), sdxl.Shape(1, 64, 2), rounds=1)

    assert [row[0] for row in rows] == list(sdxl.LEVERS_MEASURED)
    once, last = (row[-1] for row in rows)
    assert once == 0
    assert int(str(last)) <= 1


@pytest.mark.usefixtures("shrunk")
def test_a_full_size_sdxl_is_written_loaded_and_compared() -> None:
    shapes = [sdxl.Shape(1, 64, 2)]

    ((name, pace, *_, floor_ms, share),) = sdxl.full_rows(shapes, 1, 1.0, "cpu", torch.float32)

    assert name == "1 of 64x64, 2 steps"
    assert isinstance(pace, float)
    assert isinstance(floor_ms, float)
    assert share == f"{floor_ms * pace / 10:.0f} %"


@pytest.mark.usefixtures("shrunk")
def test_a_full_size_wan_is_written_loaded_and_compared() -> None:
    shapes = [wan.Shape(64, 48, 5, 2)]

    ((name, seconds, *_, floor_s, share),) = wan.full_rows(shapes, 1, 1.0, "cpu", torch.float32)

    assert name == "5 frames of 64x48, 2 steps"
    assert isinstance(seconds, float)
    assert isinstance(floor_s, float)
    assert share == f"{100 * floor_s / seconds:.0f} %"


@pytest.mark.usefixtures("shrunk")
def test_a_full_size_chat_model_replies_and_only_a_single_stream_has_a_floor() -> None:
    scale = chat.Scale(prompt=8, reply=2, one_by_one=1, rounds=1)

    table = chat.full_table((1, 2), scale, 1e12, Settings(device="cpu"))

    alone, two = table.rows
    assert isinstance(alone[-2], float)
    assert two[-2:] == [None, None]


def test_an_engine_with_cuda_graphs_is_compared_with_one_without() -> None:
    scale, fake_graphs = chat.Scale(prompt=8, reply=8, one_by_one=1, rounds=1), FakeCudaGraphs()

    replayed = chat.Comparison(tiny_network(), CPU, scale, fake_graphs).row(2)
    eager = chat.Comparison(tiny_network(), CPU, scale).row(2)

    column = chat.HEADERS.index("without graphs")
    assert isinstance(replayed[column], float)
    assert eager[column] is None
    assert fake_graphs.num_replayed > 0


def test_engine_and_generate_compute_the_same_number_of_tokens() -> None:
    comparison = chat.Comparison(tiny_network(), CPU, chat.Scale(prompt=64, reply=3))
    read: list[int] = []
    comparison.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel())
    )
    engine, prompts = comparison.engine(1, None), comparison.prompts[:1]
    comparison.answer_all(engine, prompts)
    read.clear()

    comparison.answer_all(engine, prompts)
    by_engine = sum(read)
    read.clear()
    comparison.generate(prompts)

    assert by_engine == sum(read) == 64 + 3 - 1


def test_only_the_engine_that_keeps_pages_reuses_tokens() -> None:
    comparison = chat.Comparison(tiny_network(), CPU, chat.Scale(prompt=64, reply=3))

    def second_reuses(keeps_pages: bool) -> int:
        engine = comparison.engine(1, None, keeps_pages)
        for _ in range(2):
            "".join(asked := comparison.ask(engine, comparison.prefixed(1)[0]))
        return asked.num_reused

    assert (second_reuses(False), second_reuses(True)) == (0, 32)


#: Runs each variant in a process of its own, which writes the names of the modules that it has
#: imported. The processes are forked after the import of torch and CLIP, which all of them need.
IMPORTED = """
import json, os, sys
sys.modules["torchao"] = None
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from benchmarks import cold_start_variants
file, folder, *variants = sys.argv[1:]
for variant in variants:
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0, variant
        continue
    sys.argv[1:] = variant, file
    cold_start_variants.main()
    with open(os.path.join(folder, variant), "w") as found:
        json.dump([name for name in sys.modules if sys.modules[name]], found)
    break
"""


@pytest.mark.deep
def test_each_variant_of_a_cold_start_imports_all_that_the_floor_imports(tmp_path: Path) -> None:
    floor, others = "libraries", ("libraries and SDK", "from_single_file", "worker, file")
    assert {*others, *cold_start.FLOOR} < set(cold_start_variants.VARIANTS)
    command = [sys.executable, "-c", IMPORTED, str(cold_start.POCKET), str(tmp_path)]
    env = {**os.environ, "BENCHMARK_BEGAN": "0", "HF_HUB_OFFLINE": "1"}

    run = subprocess.run(
        [*command, floor, *others],
        cwd=cold_start.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert run.returncode == 0, run.stderr
    modules = {each: set(json.loads((tmp_path / each).read_text())) for each in (floor, *others)}
    assert "diffusers" in modules[floor] and "runpod" not in modules[floor]
    for variant in others:
        assert modules[floor] <= modules[variant], variant
        assert "runpod.serverless" in modules[variant], variant  # each of them could be a worker


# --- counted figures ---


def test_decoding_a_longer_video_takes_only_the_memory_of_its_longer_latents() -> None:
    peaks = []
    for frames in (9, 17):
        *_, decoding, _ = memory.row(memory.Shape("wan", (96, 64), frames), is_full=False)
        peaks.append(float(str(decoding)))

    # Two latent frames more, of sixteen channels, twelve by eight, in fp32, and copies of them.
    assert 0 <= peaks[1] - peaks[0] < 0.5


def test_four_pictures_are_decoded_in_the_memory_of_one() -> None:
    peaks = []
    for count in (1, 4):
        *_, decoding, _ = memory.row(memory.Shape("sdxl", (128, 128), count), is_full=False)
        peaks.append(float(str(decoding)))

    assert 0 <= peaks[1] - peaks[0] < 0.5


#: By the authors' pages and files.
PARAMETERS = {
    "unet": 2_567_463_684,
    "vae": 83_653_863,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
}


def test_the_full_size_networks_have_the_published_number_of_parameters() -> None:
    with architectures.made_on("meta", torch.float16):
        pictures, videos = architectures.sdxl(), architectures.wan()
        chat_network = architectures.chat()

    sizes = {name: parameters(getattr(pictures, name)) for name in PARAMETERS}
    assert sizes == PARAMETERS
    assert parameters(videos.transformer) == 1_418_996_800
    assert parameters(videos.text_encoder) == 5_680_910_336
    assert parameters(chat_network) == 7_615_616_512
    assert torch.get_default_dtype() == torch.float32


def parameters(network: Any) -> int:
    return sum(each.numel() for each in network.parameters())


@pytest.mark.slow
def test_the_document_has_the_counted_floor_of_sdxl() -> None:
    text = all_benchmarks.DOCUMENT.read_text(encoding="utf-8")

    tera = architectures.sdxl_flops(1024, 30) / 1e12

    assert f"| SDXL, 30 guided steps and the decoding | {tera:.0f} T | {tera / 989:.2f} s |" in text


# --- parts of the benchmarks ---


def test_a_control_ratio_is_the_earlier_runs_over_the_later_ones() -> None:
    assert control_ratio([1.0, 3.0, 9.0, 4.0, 4.0]) == 0.5
    assert control_ratio([1.0]) is None


@pytest.mark.parametrize("control", [0.92, 1.0, 1.08])
def test_a_ratio_is_reported_if_the_control_is_near_one(control: float) -> None:
    assert report.trusted(1.63, control) == 1.63


@pytest.mark.parametrize("control", [2.7, 0.4, None])
def test_no_ratio_is_reported_if_the_control_is_off_or_missing(control: float | None) -> None:
    assert report.trusted(1.63, 1.0, control) == report.UNSTEADY


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.97, "about 1"), (1.04, "about 1"), (0.94, 0.94), (1.06, 1.06)]
)
def test_a_ratio_that_claims_nothing_is_about_1(ratio: float, said: float | str) -> None:
    assert report.trusted_ratio(ratio, 1.0) == said
    assert report.trusted_ratio(ratio, 2.0) == report.UNSTEADY


def test_sdxl_is_timed_with_another_prompt_in_each_run() -> None:
    model, pipe = sdxl_loader.load(Settings()), load_baseline_pipeline()

    with sdxl.counted(model.networks.pipe) as counts:
        sdxl.measure(model, pipe, sdxl.Shape(1, 64, 1), rounds=1)

    # One run that is compared and two that are timed, each by both text encoders.
    assert counts["text"] == 3 * 2


def test_interleaved_timing_has_no_trusted_ratio_if_the_control_is_off() -> None:
    steady = InterleavedTiming(a=[1.0, 1.0], b_first=[2.0], b_second=[2.0])
    unsteady = InterleavedTiming(a=[1.0, 1.0], b_first=[2.7], b_second=[1.0])

    assert steady.trusted_ratio == 2.0
    assert unsteady.trusted_ratio == report.UNSTEADY


def test_the_document_has_no_ratio_in_a_row_whose_control_is_off() -> None:
    rows = list(controlled_rows(all_benchmarks.DOCUMENT.read_text(encoding="utf-8")))

    assert rows
    for row in rows:
        if row["control"] and not 1 / report.CONTROL <= float(row["control"]) <= report.CONTROL:
            assert report.UNSTEADY in row.values(), row


def controlled_rows(text: str) -> Iterator[dict[str, str]]:
    """The rows, by header, of a document's tables with a column `control`."""
    headers: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            headers = []
        elif not headers:
            headers = cells
        elif "control" in headers and set(cells) != {"---"}:
            yield dict(zip(headers, cells, strict=True))


def test_interleaved_timing_runs_a_b_b_a_in_each_round() -> None:
    order: list[str] = []

    timing = time_interleaved(lambda: order.append("a"), lambda: order.append("b"), rounds=2)

    assert "".join(order) == "abbaabba"
    assert [len(each) for each in (timing.a, timing.b_first, timing.b_second)] == [4, 2, 2]


def test_a_ratio_is_one_of_medians() -> None:
    timing = InterleavedTiming(a=[1, 1, 9], b_first=[2, 3], b_second=[3, 30])

    assert (timing.ratio, timing.control) == (3, 2.5 / 16.5)


def test_the_seconds_of_concurrent_uploads_count_once() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (5.0, 6.0)]

    assert union_s([Upload("key", *span) for span in spans]) == 4.0


def test_a_table_survives_a_round_trip_through_json() -> None:
    table = report.table("title", ["a", "b"], [["x", 1.25], [None, 1234.5]], "A note.")

    read = report.from_dict(json.loads(json.dumps(report.as_dict(table))))

    assert str(read) == str(table)
    assert "| x | 1.25 |\n|  | 1234 |\n\nA note." in str(table)


def test_a_row_without_a_cell_for_each_header_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        report.table("title", ["a", "b"], [["x"]])
