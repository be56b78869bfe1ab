"""What a job costs beside its model: seconds lost under a backlog, for jobs of several lengths.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --lengths 1,8 --side 1024

Three arms take turns, each with the pocket SDXL, the same prompt, seeds, size and steps:

    pipeline    diffusers' pipeline called in a loop, nothing delivered: the floor
    worker      handler.py behind RunPod's real loop: storage, thumbnails, signed callbacks
    straight    a handler as RunPod's public workers write it (`benchmarks/straight.py`)

Lost is what an arm takes for a job over what the pipeline takes. It is no ratio on purpose: while
a job is running RunPod's SDK looks for the next one once a second, so what a handler with one job
at a time loses depends on where in that second its job ends, and not on how long it took.

The platform, the store (whose uploads take as long as `--upload-ms` says) and the callback's
receiver are HTTP servers in this process, which tells when each request came and was answered.
A job's lane is held for what its document calls `generate`; it was let go `deliver` seconds before
the store had taken the job's last file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import report
from benchmarks.arms import PROMPT, plain_picture, plain_pipeline
from benchmarks.store import BUCKET, Store, union_s
from benchmarks.turns import control_of, timed
from tests.files import ROOT
from tests.servers.handler import HANDLER, POCKET
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

BACKLOG, TAIL = TITLES = (
    "Seconds lost a job under a backlog",
    "From the last decoded picture to the posted result, without the uploads",
)


#: Grey levels: what the arms' pictures may differ by in fp32.
ROUNDING = 1

#: Seconds of the pipeline that the jobs are to take; none of them a whole number, and each ends
#: elsewhere in the SDK's second.
LENGTHS = (0.8, 1.3, 1.9, 2.6, 3.4)
HEADERS = ("s a job, pipeline", "arm", "s a job", "s lost a job", "control", "the lane is busy")

#: The steps that a job may have.
STEPS = (10, 50)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--jobs", type=int, help="in a backlog")
    parser.add_argument("--rounds", type=int, help="each is two backlogs of each arm")
    parser.add_argument("--side", type=int, default=384, help="of the pictures, in pixels")
    parser.add_argument("--lengths", type=_seconds, help="of the jobs: 0.8,1.3,... seconds, about")
    parser.add_argument("--upload-ms", type=float, default=80, help="what the store takes a file")
    options = parser.parse_args(argv)
    jobs, rounds, lengths = (5, 1, LENGTHS[:3]) if options.quick else (12, 3, LENGTHS)
    side = options.side
    if options.tiny:
        jobs, rounds, lengths, side = 2, 1, (0.0, 60.0), 64
    with Site(side, options.lengths or lengths, options.upload_ms / 1000) as site:
        found = site.run(options.jobs or jobs, options.rounds or rounds)
    report.finish("overhead", tables(site, found), options.json)


def _seconds(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@dataclass(frozen=True, slots=True)
class Length:
    """Jobs of one length: denoising steps, and the first of their seeds, which no others have."""

    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """One arm's run: seconds a job from end to end, shares of a busy lane, tails in seconds."""

    seconds: float
    busy: float
    tails: tuple[float, ...] = ()


#: Each arm's runs with jobs of one length.
Backlogs = dict[str, list[Backlog]]
Arm = Callable[[Length, int], Backlog]


class Site:
    """Both workers and all that they talk to, for use in a `with` statement."""

    def __init__(self, side: int, lengths: Sequence[float], upload_s: float) -> None:
        self.side, self.upload_s = side, upload_s
        self.pipe = plain_pipeline()
        self.lengths = [
            Length(steps, 1 + 1000 * index) for index, steps in enumerate(self._steps(lengths))
        ]
        self._num_jobs = 0

    def __enter__(self) -> Site:
        with ExitStack() as stack:
            self.platform = stack.enter_context(Platform())
            self.store = stack.enter_context(Store(self.upload_s))
            self.receiver = stack.enter_context(CallbackReceiver())
            stack.enter_context(self._process("worker", str(HANDLER), env=self._ours()))
            straight = ("-m", "benchmarks.straight")
            stack.enter_context(self._process("straight", *straight, env=self._theirs()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def run(self, jobs: int, rounds: int) -> list[Backlogs]:
        """For each length, backlogs of so many jobs by arm, the arms in turns: a, b, c, c, b, a."""
        arms: dict[str, Arm] = {
            "pipeline": self.pipeline,
            "worker": self.worker,
            "straight": self.straight,
        }
        for arm in arms.values():
            arm(self.lengths[0], 2)  # warms up
        found: list[Backlogs] = []
        for length in self.lengths:
            runs: Backlogs = {name: [] for name in arms}
            for name in rounds * (*arms, *reversed(arms)):
                runs[name].append(arms[name](length, jobs))
                told = f"{length.steps} steps {runs[name][-1].seconds:8.3f} s a job"
                print(f"{name:10}{told}", flush=True)
            self.check_pictures(length)
            found.append(runs)
        return found

    def pipeline(self, length: Length, jobs: int) -> Backlog:

        def generate() -> None:
            for number in range(jobs):
                plain_picture(self.pipe, **self._wish(length, number))

        return Backlog(timed(generate) / jobs, 1.0)

    def straight(self, length: Length, jobs: int) -> Backlog:
        wishes = [self._wish(length, number) for number in range(jobs)]
        ids = [self.platform.submit(wish, endpoint="straight") for wish in wishes]
        outputs = [self.platform.result(id, 600)["output"] for id in ids]
        ends = sorted(self._posted(id) for id in ids)
        held = [output["generate"] for output in outputs]
        return Backlog(pace(ends), sum(held[1:]) / (ends[-1] - ends[0]))

    def worker(self, length: Length, jobs: int) -> Backlog:
        payloads = [self._payload(length, number) for number in range(jobs)]
        ids = [self.platform.submit(payload, endpoint="worker") for payload in payloads]
        documents = [self.platform.result(id, 600)["output"] for id in ids]
        ends = [self._posted(id) for id in ids]
        runs = [Run.of(*each, self.store) for each in zip(documents, ends, strict=True)]
        runs.sort(key=lambda run: run.lane_left)
        lane = [run.lane_left for run in runs]
        held = sum(run.lane_held_s for run in runs[1:])
        return Backlog(
            pace([run.posted for run in runs]),
            held / (lane[-1] - lane[0]),
            tuple(run.tail_s for run in runs),
        )

    def _posted(self, id: str) -> float:
        return next(update.at for update in self.platform.updates(id) if update.terminal)

    def check_pictures(self, length: Length) -> None:
        """Raise AssertionError if the arms have not painted the same, in fp32."""
        if self.pipe.dtype != torch.float32:
            return
        expected = np.asarray(plain_picture(self.pipe, **self._wish(length, 0)), int)
        objects = self.store.objects.items()
        stored = [data for (_, key), (data, _) in objects if is_of_seed(key, length.seed)]
        assert len(stored) > 1
        for data in stored:
            with Image.open(io.BytesIO(data)) as picture:
                assert np.abs(np.asarray(picture) - expected).max() <= ROUNDING

    def _wish(self, length: Length, number: int) -> dict[str, Any]:
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

    def _steps(self, lengths: Sequence[float]) -> list[int]:
        """The numbers of steps that make jobs last about so many seconds, each once."""
        few = {"side": self.side, "seed": 0}
        plain_picture(self.pipe, **few, steps=1)  # warms up
        short, long = (
            min(timed(lambda n=n: plain_picture(self.pipe, **few, steps=n)) for _ in range(2))
            for n in (2, 12)
        )
        step_s = max((long - short) / 10, 1e-6)
        wanted = [round((seconds - short) / step_s) + 2 for seconds in lengths]
        return sorted({min(max(STEPS[0], steps), STEPS[1]) for steps in wanted})

    def _ours(self) -> dict[str, str]:
        return {
            "FAMILIES": "sdxl",
            "STORAGE_URL": f"supabase://{BUCKET}",
            "SUPABASE_URL": self.store.url,
            "SUPABASE_SERVICE_KEY": self.store.service_key,
            "CALLBACK_URL": self.receiver.callback_url,
            "JOB_CALLBACK_SECRET": self.receiver.secret,
        }

    def _theirs(self) -> dict[str, str]:
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
class Run:
    """One job of the worker's, in seconds of the one clock that all servers here share."""

    lane_held_s: float
    lane_left: float
    uploading_s: float
    posted: float

    @classmethod
    def of(cls, document: dict[str, Any], posted: float, store: Store) -> Run:
        timings = document["metadata"]["timings"]
        uploads = store.uploads_of(document["job_id"])
        stored = max(upload.answered for upload in uploads)
        return cls(timings["generate"], stored - timings["deliver"], union_s(uploads), posted)

    @property
    def tail_s(self) -> float:
        """From the lane, which is let go after the last decoded picture, to the posted result,
        without the time in which the store took a file."""
        return self.posted - self.lane_left - self.uploading_s


def is_of_seed(key: str, seed: int) -> bool:
    """Whether a stored file is a picture of this seed."""
    return key.endswith((f"-seed-{seed}/0.png", f"-seed-{seed}.png"))


def pace(ends: Sequence[float]) -> float:
    """Seconds from one end to the next, on average."""
    return mean(later - sooner for sooner, later in pairwise(ends))


def tables(site: Site, found: Sequence[Backlogs]) -> list[report.Table]:
    rows = [row for backlogs in found for row in rows_of(backlogs)]
    tails = sorted(tail for backlogs in found for run in backlogs["worker"] for tail in run.tails)
    steps = ", ".join(str(length.steps) for length in site.lengths)
    return [
        report.table(
            BACKLOG,
            HEADERS,
            rows,
            f"{site.side}x{site.side}, {steps} steps, {1000 * site.upload_s:.0f} ms an upload. "
            "The control is each arm's first half against its second.",
        ),
        report.table(
            TAIL,
            ["jobs", "median ms", "worst ms"],
            [[len(tails), 1000 * median(tails), 1000 * tails[-1]]],
        ),
    ]


def rows_of(backlogs: Backlogs) -> list[list[object]]:
    """The arms with jobs of one length. What is lost is told if both arms' controls are near 1."""
    seconds = {name: [run.seconds for run in runs] for name, runs in backlogs.items()}
    controls = {name: control_of(each) for name, each in seconds.items()}
    floor = median(seconds["pipeline"])
    rows: list[list[object]] = [[floor, "pipeline", floor, None, controls["pipeline"], None]]
    for name, runs in backlogs.items():
        if name != "pipeline":
            took = median(seconds[name])
            lost = report.trusted(took - floor, controls[name], controls["pipeline"])
            busy = f"{100 * median(run.busy for run in runs):.1f} %"
            rows.append([floor, name, took, lost, controls[name], busy])
    return rows


if __name__ == "__main__":
    main()
