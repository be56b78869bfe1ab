"""`make gpu`: parts in processes of their own, a time limit, and one folder of results.

Where there is no GPU it runs on small networks, and no figure is checked.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import counted, findings, part, runner
from benchmarks.gpu.findings import Fact, Findings, Stage
from benchmarks.gpu.runner import Outcome, Part
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.summary import Summary, Test, file_name, read_tests
from tests.files import ROOT

GIB = 2**30

# --- parts ---


def run_parts(folder: Path, seconds: float, *parts: Part) -> list[Outcome]:
    return list(runner.run_all(parts, seconds, folder / "log.txt"))


def python(name: str, code: str, seconds: float = 60) -> Part:
    return Part(name, "", seconds, ["-S", "-c", code])


def test_a_part_that_hangs_or_crashes_costs_only_itself(tmp_path: Path) -> None:
    outcomes = run_parts(
        tmp_path,
        60,
        python("hangs", "print('began', flush=True); import time; time.sleep(1000)", seconds=1),
        python("crashes", "import os; os.abort()"),
        python("fails", "raise SystemExit(3)"),
        python("works", "print('worked')"),
    )

    assert [each.state for each in outcomes] == ["stopped", "failed", "failed", "ended"]
    assert [each.why for each in outcomes[1:]] == [
        "it ended by signal 6; see log.txt",
        "it ended with code 3; see log.txt",
        "",
    ]
    log = (tmp_path / "log.txt").read_text()
    assert "=== hangs\nbegan" in log and "=== works\nworked" in log


def test_the_processes_that_a_stopped_part_has_started_end_with_it(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time\nwhile True:\n open({str(alive)!r}, 'w').close(); time.sleep(0.01)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"

    run_parts(tmp_path, 60, python("has a child", code, seconds=1))

    alive.unlink(missing_ok=True)
    subprocess.run(["sleep", "0.1"], check=True)
    assert not alive.exists()


def test_a_part_without_time_is_not_reached_and_says_so(tmp_path: Path) -> None:
    (outcome,) = run_parts(tmp_path, 2, python("late", ""))

    assert (outcome.state, outcome.why) == ("not reached", "2 s were left")


def test_a_part_is_told_how_many_seconds_it_has(tmp_path: Path) -> None:
    run_parts(tmp_path, 1000, Part("told", "", 40, ["-S", "-c", "print('{seconds}')"]))

    assert "40" in (tmp_path / "log.txt").read_text()


def test_a_part_that_is_cut_off_keeps_what_it_had_found(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    Findings(file, 60).add(Fact("speed", 3, "GB/s"))
    with file.open("a") as written:
        written.write('{"kind": "Fact", "wh')

    assert list(findings.read(file)) == [Fact("speed", 3, "GB/s")]


# --- the summary ---

STAGE = Stage("a job", "worker", "decoding", 0.2, 4, 1.0, 5 * GIB, 1)
COUNTED = {
    "a job": {
        "decoding": {"waits": 1, "peak_bytes": 5 * GIB, "floor_s": {"H200": 0.1, "H100": 0.15}}
    }
}


def summary(*found: Any, tests: Sequence[Test] = (), card: str = "NVIDIA H200") -> Summary:
    return Summary(card, [], [*found], tests, COUNTED)


def with_(**changes: Any) -> Stage:
    return Stage(**{**{name: getattr(STAGE, name) for name in STAGE.__slots__}, **changes})


def test_what_is_as_it_was_counted_disagrees_with_nothing() -> None:
    assert list(summary(STAGE).disagreements()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seconds": 0.05}, "faster than its floor (50 ms, and 100 ms)"),
        ({"seconds": 0.9}, "9.0 times its floor (900 ms, 100 ms)"),
        ({"peak_bytes": 9 * GIB}, "a peak of 9.0 GiB, and 5.0 were counted"),
        ({"waits": 7}, "the host waited 7 times, and 1 were counted"),
    ],
)
def test_what_is_not_as_it_was_counted_is_named(changes: dict[str, Any], said: str) -> None:
    (line,) = summary(with_(**changes)).disagreements()

    assert line == f"a job, decoding, by worker: {said}"


def test_a_peer_is_not_held_to_the_workers_counts() -> None:
    assert not list(summary(with_(who="diffusers", waits=7)).disagreements())


def test_a_failed_test_is_named_with_its_first_line() -> None:
    xml = """<testsuites><testsuite>
        <testcase classname="tests.gpu.test_wan" name="test_a" time="1.5"/>
        <testcase classname="tests.gpu.test_wan" name="test_b" time="0">
            <failure message="assert 1 == 2&#10;more">...</failure></testcase>
        <testcase classname="tests.gpu.test_wan" name="test_c" time="0">
            <skipped message="needs two"/></testcase>
    </testsuite></testsuites>"""

    tests = list(read_tests(xml))

    assert [each.result for each in tests] == ["passed", "failed", "skipped"]
    (line,) = summary(tests=tests).disagreements()
    assert line == "The test test_wan::test_b failed: assert 1 == 2"


def test_a_stage_stands_beside_its_floor_on_this_card_and_beside_its_peer() -> None:
    measured, *_ = summary(STAGE, with_(who="diffusers", seconds=0.3)).tables()

    ours, theirs = (dict(zip(measured.headers, row, strict=True)) for row in measured.rows)
    assert (ours["floor, ms"], ours["share of the floor"]) == (100, "50 %")
    assert theirs["times the worker's"] == pytest.approx(1.5)
    assert theirs["floor, ms"] is None


def test_a_card_without_a_data_sheet_has_no_floor() -> None:
    assert summary(STAGE, card="Voodoo 2").floor_s(STAGE) is None
    assert file_name("NVIDIA H200") == "nvidia-h200"


def test_every_benchmarked_job_has_counts() -> None:
    jobs = {str(job) for size in SIZES.values() for job in (*size.sdxl, *size.wan, *size.chat)}

    assert jobs == set(counted.read())


# --- the whole command ---


def in_this_process(command: Sequence[str], seconds: float, log: IO[bytes]) -> int:
    """Runs a part where torch is imported already. pytest's parts are left out."""
    if command[1] == "benchmarks.gpu.part":
        part.main(command[2:])
    return 0


@pytest.mark.slow
def test_the_dry_form_leaves_one_folder_with_all_that_a_card_would_be_asked(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "gpu"
    parts = "machine,sdxl,chat,wan,levers"

    command.main(["--device", "cpu", "--only", parts, "--out", str(folder)], in_this_process)

    assert {each.name for each in folder.iterdir()} == {"summary.md", "summary.json", "log.txt"}
    found = json.loads((folder / "summary.json").read_text())
    assert [each["state"] for each in found["parts"]] == ["ended"] * 5
    stages = [each for each in found["findings"] if each["kind"] == "Stage"]
    peers = {"worker", "diffusers", "transformers"}
    assert peers <= {each["who"] for each in stages}
    assert all(each["seconds"] > 0 for each in stages)
    assert not [
        each
        for each in found["findings"]
        if "failed" in each.get("what", "") and "cudnn" not in each["what"]
    ]
    differences = [
        each["value"]
        for each in found["findings"]
        if each.get("what", "").endswith("mean difference")
    ]
    # Pictures in one batch may differ in their last bits.
    assert len(differences) == 4 and max(differences) < 0.01


def test_a_run_that_is_asked_to_end_writes_what_it_has(tmp_path: Path) -> None:
    def end(command: Sequence[str], seconds: float, log: IO[bytes]) -> int:
        command_end()
        return 0

    def command_end() -> None:
        raise SystemExit("it was asked to end")

    folder = tmp_path / "gpu"
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--only", "machine,sdxl", "--out", str(folder)], end)

    found = json.loads((folder / "summary.json").read_text())
    assert found["not_reached"] == ["machine", "sdxl"]


def test_each_part_has_a_module_or_a_file_of_tests() -> None:
    for name, _, _ in command.TABLE:
        if name.startswith("tests "):
            assert (ROOT / command.TESTS / f"test_{name.removeprefix('tests ')}.py").exists()
        else:
            assert (ROOT / "benchmarks" / "gpu" / f"{name}.py").exists()


def test_each_file_of_tests_on_a_device_is_a_part() -> None:
    files = {each.stem.removeprefix("test_") for each in (ROOT / command.TESTS).glob("test_*.py")}

    assert files == {
        name.removeprefix("tests ") for name, *_ in command.TABLE if name.startswith("tests ")
    }
