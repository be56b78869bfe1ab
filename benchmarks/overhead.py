"""What the worker adds to its model: the whole of it under a backlog, against two others.

    python -m benchmarks.overhead

Three arms take turns, each with the pocket SDXL, the same prompt, seeds, size and steps:

    pipeline    diffusers' pipeline called in a loop, nothing delivered: the floor
    worker      handler.py behind RunPod's real loop: storage, thumbnails, signed callbacks
    straight    a handler as RunPod's public workers write it (`benchmarks/straight.py`)

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
from benchmarks.turns import timed
from tests.support.handler import HANDLER, POCKET, ROOT
from tests.support.platform import Platform
from tests.support.receivers import CallbackReceiver
from tests.support.worker import WorkerProcess

BACKLOG, TAIL = TITLES = (
    "The worker under a backlog",
    "From the last decoded picture to the posted result, without the uploads",
)


#: Grey levels: what the arms' pictures may differ by in fp32.
ROUNDING = 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--jobs", type=int, help="in a backlog")
    parser.add_argument("--rounds", type=int, help="each is two backlogs of each arm")
    parser.add_argument("--side", type=int, default=384, help="of the pictures, in pixels")
    parser.add_argument("--seconds", type=float, default=1.2, help="a job should take at least")
    parser.add_argument("--upload-ms", type=float, default=80, help="what the store takes a file")
    options = parser.parse_args(argv)
    jobs, rounds = (6, 1) if options.quick else (12, 3)
    side, seconds = options.side, options.seconds
    if options.tiny:
        (jobs, rounds), side, seconds = (2, 1), 64, 0.0
    with Site(side, seconds, options.upload_ms / 1000) as site:
        backlogs = site.run(options.jobs or jobs, options.rounds or rounds)
    report.finish("overhead", tables(site, backlogs), options.json)


@dataclass(frozen=True, slots=True)
class Backlog:
    """One arm's run: seconds a job from end to end, shares of a busy lane, tails in seconds."""

    seconds: float
    busy: float
    tails: tuple[float, ...] = ()


class Site:
    """Both workers and all that they talk to, for use in a `with` statement."""

    def __init__(self, side: int, seconds: float, upload_s: float) -> None:
        self.side, self.upload_s = side, upload_s
        self.pipe = plain_pipeline()
        self.steps = self._steps(seconds)
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

    def run(self, jobs: int, rounds: int) -> dict[str, list[Backlog]]:
        """Backlogs of so many jobs by arm, the arms in turns: a, b, c, c, b, a."""
        arms: dict[str, Callable[[int], Backlog]] = {
            "pipeline": self.pipeline,
            "worker": self.worker,
            "straight": self.straight,
        }
        found: dict[str, list[Backlog]] = {name: [] for name in arms}
        for arm in arms.values():
            arm(2)  # warms up
        for _ in range(rounds):
            for name in (*arms, *reversed(arms)):
                found[name].append(arms[name](jobs))
                print(f"{name:10}{found[name][-1].seconds:8.3f} s a job", flush=True)
        self.check_pictures()
        return found

    def pipeline(self, jobs: int) -> Backlog:

        def generate() -> None:
            for seed in range(jobs):
                plain_picture(self.pipe, **self._wish(seed))

        return Backlog(timed(generate) / jobs, 1.0)

    def straight(self, jobs: int) -> Backlog:
        ids = [self.platform.submit(self._wish(n), endpoint="straight") for n in range(jobs)]
        outputs = [self.platform.result(id, 600)["output"] for id in ids]
        ends = sorted(self._posted(id) for id in ids)
        held = [output["generate"] for output in outputs]
        return Backlog(pace(ends), sum(held[1:]) / (ends[-1] - ends[0]))

    def worker(self, jobs: int) -> Backlog:
        ids = [self.platform.submit(self._payload(n), endpoint="worker") for n in range(jobs)]
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

    def check_pictures(self) -> None:
        """Raise AssertionError if the arms have not painted the same, in fp32."""
        if self.pipe.dtype != torch.float32:
            return
        expected = np.asarray(plain_picture(self.pipe, **self._wish(0)), int)
        stored = [data for (_, key), (data, _) in self.store.objects.items() if is_first(key)]
        assert len(stored) > 1
        for data in stored:
            with Image.open(io.BytesIO(data)) as picture:
                assert np.abs(np.asarray(picture) - expected).max() <= ROUNDING

    def _wish(self, seed: int) -> dict[str, Any]:
        return {"side": self.side, "steps": self.steps, "seed": seed + 1}

    def _payload(self, seed: int) -> dict[str, Any]:
        self._num_jobs += 1
        return {
            "id": f"job-{self._num_jobs}-seed-{seed + 1}",
            "type": "sdxl_image_fast",
            "user_id": "user-1",
            "prompt": PROMPT,
            "config": {
                "resolution": f"{self.side}x{self.side}",
                "num_inference_steps": self.steps,
                "guidance_scale": 6.0,
                "seed": seed + 1,
            },
        }

    def _steps(self, seconds: float) -> int:
        """As many steps, from the fewest that a job may have, as make a job last long enough."""
        few = {"side": self.side, "seed": 0}
        plain_picture(self.pipe, **few, steps=1)  # warms up
        spent = timed(lambda: plain_picture(self.pipe, **few, steps=10))
        return min(max(10, round(10 * seconds / spent)), 50)

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


def is_first(key: str) -> bool:
    """Whether a stored file is a picture of the first seed."""
    return key.endswith(("-seed-1/0.png", "-seed-1.png"))


def pace(ends: Sequence[float]) -> float:
    """Seconds from one end to the next, on average."""
    return mean(later - sooner for sooner, later in pairwise(ends))


def tables(site: Site, backlogs: dict[str, list[Backlog]]) -> list[report.Table]:
    floor = median(each.seconds for each in backlogs["pipeline"])
    rows = []
    for name, runs in backlogs.items():
        seconds = [run.seconds for run in runs]
        half = len(runs) // 2
        control = median(seconds[:half]) / median(seconds[half:])
        busy = f"{100 * median(run.busy for run in runs):.1f} %" if name != "pipeline" else ""
        rows.append([name, median(seconds), median(seconds) / floor, control, busy])
    tails = sorted(tail for run in backlogs["worker"] for tail in run.tails)
    return [
        report.table(
            BACKLOG,
            ["arm", "seconds a job", "against the pipeline", "control", "the lane is busy"],
            rows,
            f"{site.side}x{site.side}, {site.steps} steps, {1000 * site.upload_s:.0f} ms an upload."
            " The control is each arm's first half against its second.",
        ),
        report.table(
            TAIL,
            ["jobs", "median ms", "worst ms"],
            [[len(tails), 1000 * median(tails), 1000 * tails[-1]]],
        ),
    ]


if __name__ == "__main__":
    main()
