"""What a job costs besides its model: seconds lost under a backlog, for jobs of several lengths.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --lengths 1,8 --side 1024

Three variants run alternately, each with the pocket SDXL, the same prompt, seeds, size and steps:

    pipeline            diffusers' pipeline called in a loop, nothing delivered: the floor
    worker              handler.py behind RunPod's real loop: storage, thumbnails, signed callbacks
    baseline handler    written as RunPod's public workers are (`benchmarks/baseline_handler.py`)

A variant loses the difference between its seconds a job and the pipeline's. This is a difference
and not a ratio: while a job runs, RunPod's SDK asks for the next one once a second. A handler with
one job at a time therefore loses time by where in that second its job ends, not by how long the
job took.

The platform, the storage (each upload takes `--upload-ms`) and the callback's receiver are HTTP
servers in this process, which record when each request came and was answered. The worker uses the
device for the seconds that the job's document calls `generate`. It released the device `deliver`
seconds before the storage had taken the job's last file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import report
from benchmarks.baselines import PROMPT, baseline_picture, load_baseline_pipeline
from benchmarks.interleaved_timing import control_ratio, timed
from benchmarks.slow_storage import BUCKET, SlowStorage, union_s
from tests.files import ROOT
from tests.servers.handler import HANDLER, POCKET
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

BACKLOG, TAIL = TITLES = (
    "Seconds lost a job under a backlog",
    "From the last decoded picture to the posted result, without the uploads",
)


#: The largest difference between the variants' pictures in fp32, in grey levels.
ROUNDING = 1

#: Seconds that the pipeline should take for a job. Each ends in another part of the SDK's second.
LENGTHS = (0.8, 1.3, 1.9, 2.6, 3.4)
HEADERS = ("s a job, pipeline", "variant", "s a job", "s lost a job", "control", "device in use")

#: The fewest and the most steps that a job may have. `TINY_STEPS` are those of `--tiny`.
STEPS = (10, 50)
TINY_STEPS = (10, 12)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--jobs", type=int, help="in a backlog")
    parser.add_argument("--rounds", type=int, help="each is two backlogs of each variant")
    parser.add_argument("--side", type=int, default=384, help="of the pictures, in pixels")
    parser.add_argument("--lengths", type=_seconds, help="of the jobs: 0.8,1.3,... seconds, about")
    parser.add_argument("--upload-ms", type=float, default=80, help="time of an upload")
    options = parser.parse_args(argv)
    jobs, rounds, lengths = (5, 1, LENGTHS[:3]) if options.quick else (12, 3, LENGTHS)
    side = options.side
    limits = STEPS
    if options.tiny:
        jobs, rounds, lengths, side, limits = 2, 1, (0.0, 60.0), 64, TINY_STEPS
    lengths, upload_s = options.lengths or lengths, options.upload_ms / 1000
    with OverheadBenchmark(side, lengths, upload_s, limits) as benchmark:
        found = benchmark.run(options.jobs or jobs, options.rounds or rounds)
    report.finish("overhead", tables(benchmark, found), options.json)


def _seconds(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@dataclass(frozen=True, slots=True)
class Length:
    """Jobs of one length: their denoising steps, and the first of their seeds, used only here."""

    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """One variant's run: seconds a job, the share of time in which the device was in use, and the
    seconds of each job after its last decoded picture (`WorkerJob.tail_s`).
    """

    seconds: float
    in_use: float
    tails: tuple[float, ...] = ()


#: Each variant's runs with jobs of one length.
Backlogs = dict[str, list[Backlog]]
Variant = Callable[[Length, int], Backlog]


class OverheadBenchmark:
    """Both handlers and the servers that they use, as a context manager."""

    def __init__(
        self, side: int, lengths: Sequence[float], upload_s: float, limits: tuple[int, int]
    ) -> None:
        self.side, self.upload_s = side, upload_s
        self.pipe = load_baseline_pipeline()
        self.lengths = [
            Length(steps, 1 + 1000 * index)
            for index, steps in enumerate(self._steps(lengths, limits))
        ]
        self._num_jobs = 0

    def __enter__(self) -> OverheadBenchmark:
        with ExitStack() as stack:
            self.platform = stack.enter_context(Platform())
            self.store = stack.enter_context(SlowStorage(self.upload_s))
            self.receiver = stack.enter_context(CallbackReceiver())
            stack.enter_context(self._process("worker", str(HANDLER), env=self._worker_env()))
            baseline = ("-m", "benchmarks.baseline_handler")
            stack.enter_context(self._process("baseline", *baseline, env=self._baseline_env()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def run(self, jobs: int, rounds: int) -> list[Backlogs]:
        """Backlogs of `jobs` jobs for each length, by variant. A round runs a, b, c, c, b, a."""
        variants: dict[str, Variant] = {
            "pipeline": self.pipeline,
            "worker": self.worker,
            "baseline handler": self.baseline_handler,
        }
        for variant in variants.values():
            variant(self.lengths[0], 2)  # warms up
        found: list[Backlogs] = []
        for length in self.lengths:
            runs: Backlogs = {name: [] for name in variants}
            for name in rounds * (*variants, *reversed(variants)):
                run = variants[name](length, jobs)
                runs[name].append(run)
                print(f"{name:18}{length.steps} steps {run.seconds:8.3f} s a job", flush=True)
            self.check_pictures(length)
            found.append(runs)
        return found

    def pipeline(self, length: Length, jobs: int) -> Backlog:
        def generate() -> None:
            for number in range(jobs):
                baseline_picture(self.pipe, **self._picture(length, number))

        return Backlog(timed(generate) / jobs, 1.0)

    def baseline_handler(self, length: Length, jobs: int) -> Backlog:
        inputs = [self._picture(length, number) for number in range(jobs)]
        ids = [self.platform.submit(each, endpoint="baseline") for each in inputs]
        outputs = [self.platform.result(id, 600)["output"] for id in ids]
        ends = sorted(self._posted(id) for id in ids)
        generating_s = [output["generate"] for output in outputs]
        return Backlog(mean_interval(ends), sum(generating_s[1:]) / (ends[-1] - ends[0]))

    def worker(self, length: Length, jobs: int) -> Backlog:
        payloads = [self._payload(length, number) for number in range(jobs)]
        ids = [self.platform.submit(payload, endpoint="worker") for payload in payloads]
        documents = [self.platform.result(id, 600)["output"] for id in ids]
        ends = [self._posted(id) for id in ids]
        ended = [WorkerJob.of(*each, self.store) for each in zip(documents, ends, strict=True)]
        ended.sort(key=lambda job: job.device_released)
        generating_s = sum(job.generating_s for job in ended[1:])
        return Backlog(
            mean_interval([job.posted for job in ended]),
            generating_s / (ended[-1].device_released - ended[0].device_released),
            tuple(job.tail_s for job in ended),
        )

    def _posted(self, id: str) -> float:
        return next(update.at for update in self.platform.updates(id) if update.terminal)

    def check_pictures(self, length: Length) -> None:
        """Raise AssertionError if the variants' pictures differ, in fp32."""
        if self.pipe.dtype != torch.float32:
            return
        expected = np.asarray(baseline_picture(self.pipe, **self._picture(length, 0)), int)
        objects = self.store.objects.items()
        stored = [data for (_, key), (data, _) in objects if is_of_seed(key, length.seed)]
        assert len(stored) > 1
        for data in stored:
            with Image.open(io.BytesIO(data)) as picture:
                assert np.abs(np.asarray(picture) - expected).max() <= ROUNDING

    def _picture(self, length: Length, number: int) -> dict[str, Any]:
        return {"side": self.side, "steps": length.steps, "seed": length.seed + number}

    def _payload(self, length: Length, number: int) -> dict[str, Any]:
        self._num_jobs += 1
        seed = length.seed + number
        return {
            "id": f"job-{self._num_jobs}-seed-{seed}",
            "type": "sdxl_image_fast",
            "user_id": "user-1",
            "prompt": PROMPT,
            "config": {
                "resolution": f"{self.side}x{self.side}",
                "num_inference_steps": length.steps,
                "guidance_scale": 6.0,
                "seed": seed,
            },
        }

    def _steps(self, lengths: Sequence[float], limits: tuple[int, int]) -> list[int]:
        """The numbers of steps, without repeats and within the limits, for jobs of about these
        lengths in seconds.
        """
        options = {"side": self.side, "seed": 0}
        baseline_picture(self.pipe, **options, steps=1)  # warms up
        short, long = (
            min(timed(partial(baseline_picture, self.pipe, **options, steps=n)) for _ in range(2))
            for n in (2, 12)
        )
        step_s = max((long - short) / 10, 1e-6)
        wanted = [round((seconds - short) / step_s) + 2 for seconds in lengths]
        fewest, most = limits
        return sorted({min(max(fewest, steps), most) for steps in wanted})

    def _worker_env(self) -> dict[str, str]:
        return {
            "FAMILIES": "sdxl",
            "STORAGE_URL": f"supabase://{BUCKET}",
            "SUPABASE_URL": self.store.url,
            "SUPABASE_SERVICE_KEY": self.store.service_key,
            "CALLBACK_URL": self.receiver.callback_url,
            "JOB_CALLBACK_SECRET": self.receiver.secret,
        }

    def _baseline_env(self) -> dict[str, str]:
        return {"STORE_URL": self.store.objects_url, "STORE_KEY": self.store.service_key}

    def _process(self, name: str, script: str, *args: str, env: dict[str, str]) -> WorkerProcess:
        return WorkerProcess(
            self.platform,
            script,
            args=args,
            env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **POCKET, **env},
            cwd=ROOT,
            worker_id=name,
            endpoint=name,
            ready_timeout=300,
        )


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """One job of the worker. Points in time are of the one clock that all servers here share.

    `generating_s` is for how long it used the device, `uploading_s` for how long at least one of
    its uploads was running.
    """

    generating_s: float
    device_released: float
    uploading_s: float
    posted: float

    @classmethod
    def of(cls, document: dict[str, Any], posted: float, store: SlowStorage) -> WorkerJob:
        timings = document["metadata"]["timings"]
        uploads = store.uploads_of(document["job_id"])
        stored = max(upload.answered for upload in uploads)
        return cls(timings["generate"], stored - timings["deliver"], union_s(uploads), posted)

    @property
    def tail_s(self) -> float:
        """Seconds from the last decoded picture, when the worker releases the device, to the posted
        result, without the time of the uploads."""
        return self.posted - self.device_released - self.uploading_s


def is_of_seed(key: str, seed: int) -> bool:
    """Whether a stored file is a picture of this seed."""
    return key.endswith((f"-seed-{seed}/0.png", f"-seed-{seed}.png"))


def mean_interval(ends: Sequence[float]) -> float:
    """The mean of the seconds from one end to the next."""
    return mean(later - sooner for sooner, later in pairwise(ends))


def tables(benchmark: OverheadBenchmark, found: Sequence[Backlogs]) -> list[report.Table]:
    rows = [row for backlogs in found for row in rows_of(backlogs)]
    tails = sorted(tail for backlogs in found for run in backlogs["worker"] for tail in run.tails)
    steps = ", ".join(str(length.steps) for length in benchmark.lengths)
    return [
        report.table(
            BACKLOG,
            HEADERS,
            rows,
            f"{benchmark.side}x{benchmark.side}, {steps} steps, "
            f"{1000 * benchmark.upload_s:.0f} ms an upload. "
            "The control is each variant's first half against its second.",
        ),
        report.table(
            TAIL,
            ["jobs", "median ms", "worst ms"],
            [[len(tails), 1000 * median(tails), 1000 * tails[-1]]],
        ),
    ]


def rows_of(backlogs: Backlogs) -> list[list[object]]:
    """The variants' rows for jobs of one length.

    What a variant loses is given only if its control and the pipeline's are near 1.
    """
    seconds = {name: [run.seconds for run in runs] for name, runs in backlogs.items()}
    controls = {name: control_ratio(each) for name, each in seconds.items()}
    floor = median(seconds["pipeline"])
    rows: list[list[object]] = [[floor, "pipeline", floor, None, controls["pipeline"], None]]
    for name, runs in backlogs.items():
        if name != "pipeline":
            took = median(seconds[name])
            lost = report.trusted(took - floor, controls[name], controls["pipeline"])
            in_use = f"{100 * median(run.in_use for run in runs):.1f} %"
            rows.append([floor, name, took, lost, controls[name], in_use])
    return rows


if __name__ == "__main__":
    main()
