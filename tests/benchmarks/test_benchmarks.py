"""The benchmarks run at their smallest, and the document holds their tables. No figure counts."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import all as every
from benchmarks import (
    architectures,
    chat,
    cold_arms,
    cold_start,
    memory,
    overhead,
    report,
    sdxl,
    wan,
)
from benchmarks.store import Upload, union_s
from benchmarks.turns import Turns, control_of, take_turns
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_cuda_graph import FakeCudaGraphs
from tests.fakes.tiny_chat import CPU, tiny_network

# --- the document ---


@pytest.mark.parametrize("name", every.NAMES)
def test_the_document_holds_every_table(name: str) -> None:
    text = every.DOCUMENT.read_text(encoding="utf-8")

    module = importlib.import_module(f"benchmarks.{name}")

    assert f"### `python -m benchmarks.{name}`" in text
    for title in getattr(module, "TITLES", ()):
        assert f"**{title}**" in text


def test_the_tables_are_written_between_the_marks_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(f"before\n{every.BEGIN}\nold\n{every.END}\nafter\n")

    every.write(document, "new \\1")

    assert document.read_text() == f"before\n{every.BEGIN}\n\nnew \\1\n{every.END}\nafter\n"


def test_a_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("nothing")

    with pytest.raises(ValueError, match="has no"):
        every.write(document, "new")

    assert document.read_text() == "nothing"


# --- from end to end ---


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_runs_them_apart_and_gathers_what_they_write(tmp_path: Path) -> None:
    path = tmp_path / "found.json"

    every.main(["--tiny", "--only", "post,wan", "--json", str(path)])

    found = json.loads(path.read_text())
    assert [each["benchmark"] for each in found] == ["post", "wan"]
    assert found[0]["machine"]["threads"] == 1
    for document in found:
        titles = [table["title"] for table in document["tables"]]
        assert titles == list(importlib.import_module(f"benchmarks.{document['benchmark']}").TITLES)
        assert all(table["rows"] for table in document["tables"])


def test_all_ends_badly_where_one_fails(capfd: pytest.CaptureFixture[str]) -> None:
    before = every.DOCUMENT.read_text(encoding="utf-8")

    with pytest.raises(SystemExit, match="failed: missing"):
        every.main(["--only", "missing", "--docs"])

    assert every.DOCUMENT.read_text(encoding="utf-8") == before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_worker_is_measured_beside_its_pipeline_and_a_straight_line_handler(
    tmp_path: Path,
) -> None:
    path = tmp_path / "found.json"

    overhead.main(["--tiny", "--upload-ms", "5", "--json", str(path)])

    backlog, tail = json.loads(path.read_text())["tables"]
    arms = ["pipeline", "worker", "straight"]
    assert [row[1] for row in backlog["rows"]] == 2 * arms  # with jobs of two lengths
    assert all(row[2] > 0 for row in backlog["rows"])
    assert "64x64, 10, 50 steps" in backlog["note"]
    ((jobs, median_ms, worst_ms),) = tail["rows"]
    assert jobs == 8
    assert 0 < median_ms <= worst_ms


def test_what_an_arm_loses_is_seconds_over_the_pipeline() -> None:
    took = {"pipeline": [1.0, 1.0], "worker": [0.9, 0.9], "straight": [2.0, 2.0]}
    backlogs = {name: [overhead.Backlog(each, 0.5) for each in took[name]] for name in took}

    rows = [dict(zip(overhead.HEADERS, row, strict=True)) for row in overhead.rows_of(backlogs)]

    assert [row["s lost a job"] for row in rows] == [None, pytest.approx(-0.1), 1.0]
    assert not [header for header in overhead.HEADERS if "against" in header]


@pytest.mark.parametrize("restless", ["pipeline", "straight"])
def test_nothing_is_lost_or_won_where_one_of_both_controls_is_off(restless: str) -> None:
    took = {"pipeline": [1.0, 1.0], "straight": [2.0, 2.0]}
    took[restless] = [1.0, 3.0]
    backlogs = {name: [overhead.Backlog(each, 0.5) for each in took[name]] for name in took}

    _, straight = overhead.rows_of(backlogs)

    assert straight[overhead.HEADERS.index("s lost a job")] == report.UNSTEADY


@pytest.mark.parametrize("name", ["sdxl", "chat"])
def test_both_arms_make_the_same(name: str, tmp_path: Path) -> None:
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


# --- what a GPU would run, on networks of the same kinds and a thousandth of the size ---


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full-size configurations, made small enough for a CPU."""
    smaller: dict[str, dict[str, Any]] = {
        "SDXL_UNET": {
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "transformer_layers_per_block": 1,
            "attention_head_dim": [2, 4, 4],
            "cross_attention_dim": 96,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64 + 6 * 8,
        },
        "SDXL_VAE": {"block_out_channels": (32,) * 4, "layers_per_block": 1},
        "SDXL_TEXT": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "SDXL_TEXT_2": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
        },
        "WAN_TRANSFORMER": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 32,
            "ffn_dim": 32,
            "num_layers": 1,
        },
        "WAN_VAE": {"base_dim": 8, "num_res_blocks": 1},
        "WAN_TEXT": {
            "vocab_size": 2000,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 4,
        },
        "QWEN_7B": {
            "vocab_size": 500,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    }
    for name, changes in smaller.items():
        monkeypatch.setattr(architectures, name, {**getattr(architectures, name), **changes})


def test_exact_levers_change_no_pixel_by_more_than_one_grey_level() -> None:
    rows = sdxl.lever_rows(Settings(), sdxl.Shape(1, 64, 2), rounds=1)

    assert [row[0] for row in rows] == list(sdxl.ARMS)
    once, last = (row[-1] for row in rows)
    assert once == 0
    assert int(str(last)) <= 1


@pytest.mark.usefixtures("shrunk")
def test_full_size_pictures_are_written_loaded_and_compared() -> None:
    shapes = [sdxl.Shape(1, 64, 2)]

    ((name, pace, *_, floor_ms, share),) = sdxl.full_rows(shapes, 1, 1.0, "cpu", torch.float32)

    assert name == "1 of 64x64, 2 steps"
    assert isinstance(pace, float)
    assert isinstance(floor_ms, float)
    assert share == f"{floor_ms * pace / 10:.0f} %"


@pytest.mark.usefixtures("shrunk")
def test_full_size_videos_are_written_loaded_and_compared() -> None:
    shapes = [wan.Shape(64, 48, 5, 2)]

    ((name, seconds, *_, floor_s, share),) = wan.full_rows(shapes, 1, 1.0, "cpu", torch.float32)

    assert name == "5 frames of 64x48, 2 steps"
    assert isinstance(seconds, float)
    assert isinstance(floor_s, float)
    assert share == f"{100 * floor_s / seconds:.0f} %"


@pytest.mark.usefixtures("shrunk")
def test_a_full_size_chat_model_answers_and_one_stream_has_a_floor() -> None:
    scale = chat.Scale(prompt=8, reply=2, alone=1, rounds=1)

    table = chat.full_table((1, 2), scale, 1e12, Settings(device="cpu"))

    alone, two = table.rows
    assert isinstance(alone[-2], float)
    assert two[-2:] == [None, None]


def test_an_engine_that_replays_is_compared_with_one_that_does_not() -> None:
    scale, fake_graphs = chat.Scale(prompt=8, reply=8, alone=1, rounds=1), FakeCudaGraphs()

    replayed = chat.Arms(tiny_network(), CPU, scale, fake_graphs).row(2)
    eager = chat.Arms(tiny_network(), CPU, scale).row(2)

    column = chat.HEADERS.index("without graphs")
    assert isinstance(replayed[column], float)
    assert eager[column] is None
    assert fake_graphs.num_replayed > 0


def test_engine_and_generate_read_the_same_tokens() -> None:
    arms = chat.Arms(tiny_network(), CPU, chat.Scale(prompt=64, reply=3))
    read: list[int] = []
    arms.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel())
    )
    engine, prompts = arms.engine(1, None), arms.prompts[:1]
    arms.answer_all(engine, prompts)
    arms.answer_all(engine, arms.alike[:1], keep=True)
    read.clear()

    arms.answer_all(engine, prompts)
    ours = sum(read)
    read.clear()
    arms.generate(prompts)

    assert ours == sum(read) == 64 + 3 - 1


def test_what_is_kept_is_measured_apart() -> None:
    arms = chat.Arms(tiny_network(), CPU, chat.Scale(prompt=64, reply=3))
    engine = arms.engine(1, None)
    arms.answer_all(engine, arms.alike[:1], keep=True)

    plain, kept = arms.ask(engine, arms.prompts[1]), arms.ask(engine, arms.alike[1], keep=True)
    for each in (plain, kept):
        "".join(each)

    assert (plain.num_reused, kept.num_reused) == (0, 32)


#: Runs one arm, then tells which modules it has imported.
IMPORTED = """
import json, sys
from benchmarks import cold_arms
cold_arms.main()
print(json.dumps([name for name in sys.modules if sys.modules[name]]))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_floor_of_a_start_imports_nothing_that_an_arm_spares() -> None:
    def imported(arm: str) -> set[str]:
        command = [sys.executable, "-c", IMPORTED, arm, str(cold_start.POCKET)]
        env = {**os.environ, "BENCHMARK_BEGAN": "0", "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, cwd=cold_start.ROOT, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return set(json.loads(run.stdout.splitlines()[-1]))

    floor = imported("libraries")
    others = ("libraries and SDK", "from_single_file", "worker, file")
    assert {*others, *cold_start.FLOOR} < set(cold_arms.ARMS)
    arms = {arm: imported(arm) for arm in others}

    assert "runpod" not in floor
    for arm, modules in arms.items():
        assert floor <= modules, arm
        assert "runpod.serverless" in modules, arm  # each of them could be a worker


# --- what is counted ---


def test_decoding_a_longer_video_takes_no_more_memory_than_its_latents() -> None:
    peaks = []
    for frames in (9, 33):
        *_, decoding, _ = memory.row(memory.Shape("wan", (96, 64), frames), is_full=False)
        peaks.append(float(str(decoding)))

    # Six latent frames more, of sixteen channels, twelve by eight, in fp32, and copies of them.
    assert 0 <= peaks[1] - peaks[0] < 0.5


def test_pictures_are_decoded_one_at_a_time() -> None:
    peaks = []
    for count in (1, 4):
        *_, decoding, _ = memory.row(memory.Shape("sdxl", (128, 128), count), is_full=False)
        peaks.append(float(str(decoding)))

    assert 0 <= peaks[1] - peaks[0] < 0.5


#: As their authors' pages and files have them.
PARAMETERS = {
    "unet": 2_567_463_684,
    "vae": 83_653_863,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
}


def test_the_full_size_is_the_published_one() -> None:
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
def test_the_floor_in_the_document_is_counted() -> None:
    text = every.DOCUMENT.read_text(encoding="utf-8")

    tera = architectures.sdxl_flops(1024, 30) / 1e12

    assert f"| SDXL, 30 guided steps and the decoding | {tera:.0f} T | {tera / 989:.2f} s |" in text


# --- their parts ---


def test_a_control_is_the_earlier_runs_over_the_later_ones() -> None:
    assert control_of([1.0, 3.0, 9.0, 4.0, 4.0]) == 0.5
    assert control_of([1.0]) is None


@pytest.mark.parametrize("control", [0.92, 1.0, 1.08])
def test_a_ratio_is_told_where_the_control_is_near_one(control: float) -> None:
    assert report.trusted(1.63, control) == 1.63


@pytest.mark.parametrize("control", [2.7, 0.4, None])
def test_no_ratio_is_told_where_the_control_is_off_or_missing(control: float | None) -> None:
    assert report.trusted(1.63, 1.0, control) == report.UNSTEADY


def test_arms_that_took_turns_tell_no_ratio_where_the_control_is_off() -> None:
    assert Turns(a=[1.0, 1.0], b_first=[2.0], b_second=[2.0]).told == 2.0
    assert Turns(a=[1.0, 1.0], b_first=[2.7], b_second=[1.0]).told == report.UNSTEADY


def test_no_figure_in_the_document_stands_beside_a_control_that_is_off() -> None:
    rows = list(controlled_rows(every.DOCUMENT.read_text(encoding="utf-8")))

    assert rows
    for row in rows:
        if row["control"] and not 1 / report.CONTROL <= float(row["control"]) <= report.CONTROL:
            assert report.UNSTEADY in row.values(), row


def controlled_rows(text: str) -> Iterator[dict[str, str]]:
    """The rows of a document's tables that have a column `control`, by header."""
    headers: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            headers = []
        elif not headers:
            headers = cells
        elif "control" in headers and set(cells) != {"---"}:
            yield dict(zip(headers, cells, strict=True))


def test_arms_take_turns() -> None:
    order: list[str] = []

    turns = take_turns(lambda: order.append("a"), lambda: order.append("b"), rounds=2)

    assert "".join(order) == "abbaabba"
    assert [len(each) for each in (turns.a, turns.b_first, turns.b_second)] == [4, 2, 2]


def test_a_ratio_is_of_medians() -> None:
    turns = Turns(a=[1, 1, 9], b_first=[2, 3], b_second=[3, 30])

    assert (turns.ratio, turns.control) == (3, 2.5 / 16.5)


def test_uploads_at_once_count_once() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (5.0, 6.0)]

    assert union_s([Upload("key", *span) for span in spans]) == 4.0


def test_a_table_is_the_same_after_its_way_through_json() -> None:
    table = report.table("title", ["a", "b"], [["x", 1.25], [None, 1234.5]], "A note.")

    read = report.from_dict(json.loads(json.dumps(report.as_dict(table))))

    assert str(read) == str(table)
    assert "| x | 1.25 |\n|  | 1234 |\n\nA note." in str(table)


def test_a_row_has_a_cell_for_each_header() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        report.table("title", ["a", "b"], [["x"]])
