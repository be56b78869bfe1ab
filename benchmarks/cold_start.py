"""From nothing to ready: a worker's start, stage by stage, against what cannot be avoided.

    python -m benchmarks.cold_start --size full     SDXL's own size, 14 GB on the disk
    python -m benchmarks.cold_start --quick         the pocket model, files in memory, two rounds

The floor is the larger of two: the imports that every arm makes, torch's and diffusers' alone, and
one plain read of the weights. The peers are handlers around diffusers' two loaders, which import
RunPod's SDK as the worker does. Every arm is a process of its own, one at a time, in fp16; `cold`
is after the kernel was told to forget the weights (not the libraries). `ready` is when a job could
be taken; the worker's has its file in memory then, the peers' map it and pay with the first job:
`first picture` is the sum.

A virtual machine hands memory that has been free for a second or two back to its host, and waits
when it touches it again. Right after the kernel forgot 7 GB a read of 7 GB took 5 s, ten seconds
later 16 s: an arm that reads at once would win against one that reads a little later. So every cold
arm starts after a rest.

Memory is the highest: `peak` with the pages of mapped files, which the kernel takes back when it
wants, `anonymous` without: what is held twice stands there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.cold_arms import ARMS
from benchmarks.turns import control_of

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "pocket" / "sdxl.safetensors"

#: What shows that it runs.
FEWEST = ("read", "worker, file")

#: What no start of an arm that paints can do without.
FLOOR = ("read", "libraries")
STAGES = ("interpreter", "imports", "read", "build", "wait")
HEADERS = [
    "arm",
    *STAGES,
    "ready",
    "control",
    "of the floor",
    "first job",
    "first picture",
    "CPU",
    "peak MiB",
    "anonymous MiB",
]

#: How often memory is looked at, in seconds.
LOOK_S = 0.02

#: Until a virtual machine has handed back what was forgotten, in seconds.
REST_S = 12.0

Run = Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=("pocket", "full"), default="pocket")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written, once")
    parser.add_argument("--rounds", type=int, default=3, help="each arm once in each")
    options = parser.parse_args(argv)
    is_short = options.quick or options.tiny
    with _folder(options.folder) as folder:
        file = POCKET if options.tiny else _write(folder, options.size)
        tables = [
            _table(
                cache,
                file,
                arms=FEWEST if options.tiny else tuple(ARMS),
                rounds=1 if options.tiny else 2 if is_short else options.rounds,
            )
            for cache in (["warm"] if is_short else ["warm", "cold"])
        ]
    report.finish("cold_start", tables, options.json, size=options.size)


@contextmanager
def _folder(asked: Path | None) -> Iterator[Path]:
    if asked:
        asked.mkdir(parents=True, exist_ok=True)
        yield asked
        return
    with tempfile.TemporaryDirectory(prefix="cold-start-") as folder:
        yield Path(folder)


def _write(folder: Path, size: str) -> Path:
    """The checkpoint, written by a process that goes with all that it took."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.checkpoints import write_sdxl;"
        "write_sdxl(Path(sys.argv[1]), sys.argv[2])"
    )
    folder = folder / size
    folder.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", code, folder, size], check=True, cwd=ROOT)
    return folder / "sdxl.safetensors"


def _table(cache: str, file: Path, arms: Sequence[str], rounds: int) -> report.Table:
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    order = list(arms)
    for turn in range(rounds):
        for arm in order if turn % 2 == 0 else order[::-1]:
            prepare(cache, files(arm, file))
            runs[arm].append(start(arm, file))
    floor = max((runs[arm] for arm in FLOOR if arm in runs), key=_ready_s)
    rows = [[arm, *_row(each, floor)] for arm, each in runs.items()]
    size = file.stat().st_size
    note = f"Seconds, of the files' {size / 1e9:.2f} GB; {rounds} rounds. "
    note += f"Floor: {_ready_s(floor):.2f} s."
    return report.table(f"SDXL, {cache} cache", HEADERS, rows, note)


def _row(runs: list[Run], floor: list[Run]) -> list[object]:
    ready, controls = _ready_s(runs), [_control(each) for each in (runs, floor)]
    stages = [_middle(runs, stage) for stage in STAGES]
    first = _middle(runs, "first job")
    memory = [round(_middle(runs, name)) for name in ("peak", "anonymous")]
    return [
        *(stage or None for stage in stages),
        ready,
        controls[0],
        report.trusted(ready / _ready_s(floor), *controls),
        first or None,
        ready + first if first else None,
        _middle(runs, "cpu"),
        *memory,
    ]


def _ready_s(runs: list[Run]) -> float:
    return _middle(runs, "ready")


def _control(runs: list[Run]) -> float | None:
    return control_of([run["ready"] for run in runs])


def _middle(runs: list[Run], name: str) -> float:
    return median(run.get(name, 0.0) for run in runs)


def start(arm: str, file: Path) -> Run:
    """The stages of one start in seconds, its memory in MiB."""
    env = {
        **{name: value for name, value in os.environ.items() if "RUNPOD" not in name},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "BENCHMARK_BEGAN": str(time.time()),
    }
    command = [sys.executable, "-m", "benchmarks.cold_arms", arm, str(file)]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            peak = anonymous = 0
            while process.poll() is None:
                now = _memory(process.pid)
                peak, anonymous = max(peak, now[0]), max(anonymous, now[1])
                time.sleep(LOOK_S)
            assert process.stdout
            told = process.stdout.read().strip()
        if process.returncode:
            log.seek(0)
            sys.exit(f"{arm} failed:\n{log.read()[-2000:].decode(errors='replace')}")
    stages = _parse(told)
    ready = sum(stages.get(stage, 0.0) for stage in STAGES)
    return {**stages, "ready": ready, "peak": peak / 1024, "anonymous": anonymous / 1024}


def _parse(told: str) -> dict[str, float]:
    stages: dict[str, float] = json.loads(told.splitlines()[-1])
    return stages


def _memory(pid: int) -> tuple[int, int]:
    """What a process has held at most, and holds without files now, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    facts = dict(line.split(":", 1) for line in lines)
    peak, anonymous = (facts.get(name, "0 kB").split()[0] for name in ("VmHWM", "RssAnon"))
    return int(peak), int(anonymous)


def files(arm: str, file: Path) -> list[Path]:
    """What an arm reads: the one file, or the folder's."""
    is_folder = arm in ("from_pretrained", "worker, folder")
    return sorted(file.with_suffix("").rglob("*.safetensors")) if is_folder else [file]


def prepare(cache: str, paths: list[Path]) -> None:
    """Files in the page cache, or forgotten for a while."""
    if cache == "warm":
        warm(paths)
    else:
        forget(paths)
        time.sleep(REST_S)


def forget(paths: list[Path]) -> None:
    """Have the kernel drop files' pages."""
    os.sync()
    for path in paths:
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(paths: list[Path]) -> None:
    """Have the kernel hold files' pages."""
    for path in paths:
        with path.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass


if __name__ == "__main__":
    main()
