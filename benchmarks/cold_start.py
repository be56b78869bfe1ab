"""A worker's start, stage by stage, against a floor: what no start can do without.

    python -m benchmarks.cold_start --size full     SDXL's own size, 14 GB on the disk
    python -m benchmarks.cold_start --quick         the pocket model, files in memory, two rounds

The floor is the larger of two: the imports of torch and diffusers that every variant with a model
needs, and one plain read of the weights. The baselines are handlers around diffusers' two loaders.
They import RunPod's SDK as the worker does. Each variant is a process, one at a time, in fp16.
`cold` means that the kernel has dropped the weights (not the libraries) from the page cache.
`ready` is when a job could be taken. By then the worker has read its file. The baselines map the
file and read it in the first job, so compare `first picture`, which is the sum.

A virtual machine hands memory that has been free for a second or two back to its host, and waits
when it touches that memory again. Right after the kernel dropped 7 GB a read of 7 GB took 5 s; ten
seconds later it took 16 s. A variant that reads at once would win against one that reads a little
later. So every cold start comes after a rest.

Memory figures are peaks. `peak` includes the pages of mapped files, which the kernel may drop.
`anonymous` does not: weights that are held twice show there.
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
from benchmarks.cold_start_variants import VARIANTS
from benchmarks.interleaved_timing import control_ratio

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "pocket" / "sdxl.safetensors"

#: The variants of `--tiny`.
FEWEST = ("read", "worker, file")

#: The floor is the slower one of these.
FLOOR = ("read", "libraries")
STAGES = ("interpreter", "imports", "read", "build", "wait")
HEADERS = [
    "variant",
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

#: Seconds from one reading of a process's memory to the next.
SAMPLE_S = 0.02

#: Seconds until a virtual machine has handed dropped pages back to its host.
REST_S = 12.0

Run = Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=("pocket", "full"), default="pocket")
    parser.add_argument("--folder", type=Path, help="a folder that keeps the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each variant")
    options = parser.parse_args(argv)
    is_short = options.quick or options.tiny
    with _folder(options.folder) as folder:
        file = POCKET if options.tiny else _write(folder, options.size)
        tables = [
            _table(
                cache,
                file,
                variants=FEWEST if options.tiny else tuple(VARIANTS),
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
    """The path of the checkpoint. Another process writes it, so that its memory is freed."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.checkpoints import write_sdxl;"
        "write_sdxl(Path(sys.argv[1]), sys.argv[2])"
    )
    folder = folder / size
    folder.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", code, folder, size], check=True, cwd=ROOT)
    return folder / "sdxl.safetensors"


def _table(cache: str, file: Path, variants: Sequence[str], rounds: int) -> report.Table:
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    for index in range(rounds):
        for variant in variants if index % 2 == 0 else variants[::-1]:
            prepare(cache, files(variant, file))
            runs[variant].append(start(variant, file))
    floor = max((runs[variant] for variant in FLOOR if variant in runs), key=_ready_s)
    rows = [[variant, *_row(each, floor)] for variant, each in runs.items()]
    size = file.stat().st_size
    note = f"Seconds, of the files' {size / 1e9:.2f} GB; {rounds} rounds. "
    note += f"Floor: {_ready_s(floor):.2f} s."
    return report.table(f"SDXL, {cache} cache", HEADERS, rows, note)


def _row(runs: list[Run], floor: list[Run]) -> list[object]:
    ready = _ready_s(runs)
    controls = [control_ratio([run["ready"] for run in each]) for each in (runs, floor)]
    stages = [_median(runs, stage) for stage in STAGES]
    first = _median(runs, "first job")
    memory = [round(_median(runs, name)) for name in ("peak", "anonymous")]
    return [
        *(stage or None for stage in stages),
        ready,
        controls[0],
        report.trusted(ready / _ready_s(floor), *controls),
        first or None,
        ready + first if first else None,
        _median(runs, "cpu"),
        *memory,
    ]


def _ready_s(runs: list[Run]) -> float:
    return _median(runs, "ready")


def _median(runs: list[Run], name: str) -> float:
    return median(run.get(name, 0.0) for run in runs)


def start(variant: str, file: Path) -> Run:
    """The stages of one start in seconds, and its memory in MiB."""
    env = {
        **{name: value for name, value in os.environ.items() if "RUNPOD" not in name},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "BENCHMARK_BEGAN": str(time.time()),
    }
    command = [sys.executable, "-m", "benchmarks.cold_start_variants", variant, str(file)]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            peak = anonymous = 0
            while process.poll() is None:
                now = _memory(process.pid)
                peak, anonymous = max(peak, now[0]), max(anonymous, now[1])
                time.sleep(SAMPLE_S)
            assert process.stdout
            output = process.stdout.read().strip()
        if process.returncode:
            log.seek(0)
            sys.exit(f"{variant} failed:\n{log.read()[-2000:].decode(errors='replace')}")
    stages: dict[str, float] = json.loads(output.splitlines()[-1])
    ready = sum(stages.get(stage, 0.0) for stage in STAGES)
    return {**stages, "ready": ready, "peak": peak / 1024, "anonymous": anonymous / 1024}


def _memory(pid: int) -> tuple[int, int]:
    """A process's peak memory so far, and its memory now without mapped files, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    facts = dict(line.split(":", 1) for line in lines)
    peak, anonymous = (facts.get(name, "0 kB").split()[0] for name in ("VmHWM", "RssAnon"))
    return int(peak), int(anonymous)


def files(variant: str, file: Path) -> list[Path]:
    """The files that a variant reads: the single file, or those of the folder."""
    is_folder = variant in ("from_pretrained", "worker, folder")
    return sorted(file.with_suffix("").rglob("*.safetensors")) if is_folder else [file]


def prepare(cache: str, paths: list[Path]) -> None:
    """With a `warm` cache read the files into the page cache, else drop them and rest."""
    if cache == "warm":
        for path in paths:
            with path.open("rb", buffering=0) as opened:
                while opened.read(8 << 20):
                    pass
        return
    os.sync()
    for path in paths:
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(REST_S)


if __name__ == "__main__":
    main()
