"""The comparison of chat's engines: its requests, the CPU time of processes, its table."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chat_peers
from benchmarks.chat_peers import HEADERS, NUM_ONE_BY_ONE, WORKLOADS, Comparison, Replies, Request
from tests.fakes.tiny_chat import tiny_network
from tests.files import ROOT
from tests.patience import PATIENCE_S

MIXED = WORKLOADS["mixed"]


def test_the_requests_of_two_turns_have_the_same_lengths_and_share_no_beginning() -> None:
    first, second = (MIXED.requests(turn, 1000) for turn in (0, 1))

    assert [(len(ids), count) for ids, count in first] == [
        (len(ids), count) for ids, count in second
    ]
    assert first != second == MIXED.requests(1, 1000)


def test_the_requests_of_one_workload_begin_with_the_same_800_tokens() -> None:
    requests = WORKLOADS["shared"].requests(0, 1000)

    assert len({tuple(ids[:800]) for ids, _ in requests}) == 1
    assert len({tuple(ids[800:816]) for ids, _ in requests}) == len(requests) == 16


def test_the_workers_engine_and_generate_answer_alike() -> None:
    requests = [([5, 6, 7], 4), ([8] * 20, 3)]
    network = tiny_network()

    own, theirs = (chat_peers.ARMS[name](network)(requests) for name in ("builtin", "generate"))

    assert own == theirs
    assert list(map(len, own)) == [4, 3]


def test_the_cpu_time_of_an_engine_is_that_of_all_of_its_processes() -> None:
    spend = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spend!r}]); input()"
    engine = subprocess.Popen([sys.executable, "-c", code], stdin=-1, start_new_session=True)
    try:
        seen = chat_peers.cpu_seconds(engine.pid)
        while seen < 0.3 and engine.poll() is None:
            seen = chat_peers.cpu_seconds(engine.pid)
    finally:
        engine.communicate(b"\n", timeout=PATIENCE_S)

    assert seen >= 0.3


class FakeArm:
    """An engine of a known pace, in tokens a CPU-second."""

    def __init__(self, pace: float, paces: Sequence[float] = ()) -> None:
        self.paces = [*paces] or [pace, pace]
        self.num_asked: list[int] = []

    def measure(self, requests: Sequence[Request]) -> tuple[Replies, float]:
        replies = [ids[:1] * count for ids, count in requests]
        self.num_asked.append(len(requests))
        return replies, sum(map(len, replies)) / self.paces.pop(0)


def row_of(**arms: Any) -> dict[str, object]:
    row = Comparison(MIXED, 1000).row(arms, num_turns=2)
    return dict(zip(HEADERS, row, strict=True))


def test_a_row_has_each_engines_pace_and_ratios_of_the_same_run() -> None:
    slow = FakeArm(25)
    row = row_of(builtin=FakeArm(100), batched=FakeArm(80), generate=slow, vllm=FakeArm(200))

    assert row["the worker's engine"] == pytest.approx(100)
    ratios = [row[f"times {name}"] for name in ("batched", "`generate`", "vLLM")]
    assert ratios == pytest.approx([1.25, 4, 0.5])
    assert row["replies equal"] == f"{2 * NUM_ONE_BY_ONE} of {2 * NUM_ONE_BY_ONE}"
    assert slow.num_asked == [NUM_ONE_BY_ONE] * 2


def test_an_engine_that_is_not_there_has_empty_cells() -> None:
    row = row_of(builtin=FakeArm(100), batched=FakeArm(80), generate=FakeArm(25))

    assert (row["vLLM"], row["times vLLM"]) == (None, None)


def test_an_unsteady_machine_gives_no_ratio() -> None:
    own = FakeArm(0, paces=[100, 60])

    row = row_of(builtin=own, batched=FakeArm(80), generate=FakeArm(25))

    assert row["times batched"] == "control off, no figure"


def test_vllm_is_left_out_with_a_sentence_where_there_is_no_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "vllm" not in chat_peers.commands(tmp_path, tmp_path / "none")
    assert "vLLM is left out" in capsys.readouterr().out


def test_the_document_has_the_tables_columns() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")

    assert f"| {' | '.join(HEADERS)} |" in text
