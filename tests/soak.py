"""Thousands of small jobs with random faults: `python -m tests.soak 10000`.

It prints the table of docs/reliability.md. The storage, the callback receiver, the model and the
caller each fail now and then. Afterwards no job may be lost or called back twice, and the process
must be as small as before: otherwise the command prints what is wrong, and fails.
"""

import gc
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ourvidz_serverless.context import Stop
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import DeadlinePassed, OutOfMemory
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.servers.local_server import Answer, Request
from tests.servers.supabase import CallbackReceiver

FAST_RETRIES = Retry(base_s=0.001)
THREADS = 4

#: The faults of a job, and the share of jobs that have each.
ODDS = {
    "an invalid payload": 0.05,
    "a text that the floor refuses": 0.03,
    "a missing reference": 0.05,
    "a bug in the model": 0.04,
    "out of memory": 0.04,
    "a stop": 0.05,
    "a deadline": 0.03,
    "a second delivery": 0.05,
}
STORAGE_FAILS, STORAGE_REFUSES = 0.08, 0.01
RECEIVER_FAILS, RECEIVER_REFUSES = 0.08, 0.01


class FailingStorage(DirectoryStorage):
    """A folder that fails now and then, but not for a document whose callback failed."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        super().__init__(root, FAST_RETRIES)
        self._rng = rng

    def put(self, key: str, data: bytes, mime: str) -> None:
        drawn = self._rng.random()
        if "callback." not in key and drawn < STORAGE_FAILS + STORAGE_REFUSES:
            raise Fault(503 if drawn < STORAGE_FAILS else 403)
        super().put(key, data, mime)


class FailingReceiver(CallbackReceiver):
    """A callback receiver that fails now and then. It only counts the callbacks of each job."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.accepted: Counter[str] = Counter()

    def answer(self, request: Request) -> Answer:
        drawn = self._rng.random()
        if drawn < RECEIVER_FAILS + RECEIVER_REFUSES:
            return Answer(503 if drawn < RECEIVER_FAILS else 400)
        job = json.loads(request.body)["job_id"]
        with self.changed:
            self.accepted[job] += 1
        return Answer(200)

    def note(self, request: Request, answer: Answer | None) -> None: ...


class FailingSdxl(FakeSdxl):
    """A fake SDXL that fails if its prompt is the name of a fault."""

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        self.requests.clear()
        text = request.prompt[0].text
        if text == "a bug in the model":
            raise RuntimeError(text)
        if text == "out of memory":
            raise OutOfMemory("does not fit")
        yield from super().generate(request, progress)


@dataclass(frozen=True)
class Size:
    """The size of this process in everything that may leak."""

    threads: int
    files: int
    objects: int
    megabytes: float
    temporary: int

    @classmethod
    def now(cls) -> "Size":
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),
            len(gc.get_objects()),
            pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            len(os.listdir(tempfile.gettempdir())),
        )


@dataclass
class Soak:
    """Runs jobs with random faults, and has the results.

    `faults` counts the jobs with each fault, `endings` those with each error code. `sizes` has the
    process after each round.
    """

    root: Path
    seed: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    called_back_twice: list[str] = field(default_factory=list)
    kept: int = 0
    sizes: list[Size] = field(default_factory=list)

    def run(self, count: int, rounds: int = 4) -> None:
        """Run `count` jobs in some rounds, and measure after each. The first one warms up."""
        rng = random.Random(self.seed)
        with FailingReceiver(random.Random(self.seed + 1)) as self.receiver:
            self.local = LocalWorker(
                self.root,
                settings=Settings(poison_dir=self.root / "poison"),
                fake_sdxl=FailingSdxl(),
                callback=Callback(self.receiver.callback_url, "secret", policy=FAST_RETRIES),
                storage=FailingStorage(self.root / "assets", random.Random(self.seed + 2)),
            )
            shares = [*ODDS.values(), 1 - sum(ODDS.values())]
            with ThreadPoolExecutor(THREADS) as threads, ThreadPoolExecutor(THREADS) as repeats:
                self._repeats = repeats
                for start in range(0, count, -(-count // rounds)):
                    jobs = range(start, min(count, start + -(-count // rounds)))
                    faults = rng.choices([*ODDS, "nothing"], shares, k=len(jobs))
                    list(threads.map(self._run_job, jobs, faults))
                    self.local.progress.clear()
                    self.sizes.append(Size.now())

    def defects(self) -> list[str]:
        """What must not be after a soak: jobs without an end, and anything that grew."""
        first, last = self.sizes[0], self.sizes[-1]
        limits = {
            "threads": first.threads + 8,  # The pool of delivery threads grows on demand.
            "files": first.files + 4,
            "temporary": first.temporary,
            "objects": first.objects + 3000,
            "megabytes": first.megabytes + 40,
        }
        return [
            *(f"{job} is lost" for job in self.lost),
            *(f"{job} was called back twice" for job in self.called_back_twice),
            *(
                f"{name}: {getattr(last, name)}, more than {most}"
                for name, most in limits.items()
                if getattr(last, name) > most
            ),
        ]

    def _run_job(self, number: int, fault: str) -> None:
        job, stop = f"job-{number}", Stop()
        payload = sdxl_payload(id=job, prompt=fault)
        match fault:
            case "an invalid payload":
                payload["config"] = {"num_images": 7}
            case "a text that the floor refuses":
                payload["prompt"] = "nude child"
            case "a missing reference":
                payload["metadata"] = {"reference_image_url": "user-1/none/0.png"}
            case "a stop":
                threading.Timer(0.003, stop.set).start()
            case "a deadline":
                threading.Timer(0.003, stop.set, (DeadlinePassed("the time is over"),)).start()
        is_repeated = fault == "a second delivery"
        second = self._repeats.submit(self.local.run, payload, Stop()) if is_repeated else None
        document = self.local.run(payload, stop)
        if second:
            second.result()
        self._count(job, fault, document)

    def _count(self, job: str, fault: str, document: Document) -> None:
        code = document.failure.code if document.failure else "completed"
        self.faults[fault] += 1
        self.endings[code] += 1
        callbacks = self.receiver.accepted.pop(job, 0)
        undelivered = document.metadata.get("callback") or {}
        is_kept = bool(undelivered) and (self.root / "assets" / undelivered["kept"]).exists()
        self.kept += is_kept
        if not callbacks and not is_kept:
            self.lost.append(job)
        if callbacks > 1 and fault != "a second delivery":
            self.called_back_twice.append(job)
        for folder in ("user-1", "undelivered"):
            shutil.rmtree(self.root / "assets" / folder / job, ignore_errors=True)


def report(soak: Soak, count: int) -> str:
    first, last = soak.sizes[0], soak.sizes[-1]
    rows = [
        ("jobs", count),
        ("lost", len(soak.lost)),
        ("called back twice", len(soak.called_back_twice)),
        ("undelivered, kept", soak.kept),
        *((f"ended as `{code}`", n) for code, n in soak.endings.most_common()),
        ("threads", f"{first.threads} → {last.threads}"),
        ("open files", f"{first.files} → {last.files}"),
        ("temporary files", f"{first.temporary} → {last.temporary}"),
        ("Python objects", f"{first.objects} → {last.objects}"),
        ("resident memory, MB", f"{first.megabytes:.0f} → {last.megabytes:.0f}"),
    ]
    return "\n".join(
        ["| soak | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    number = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        (Path(folder) / "soak").mkdir()
        run = Soak(Path(folder) / "soak")
        run.run(number)
        print(report(run, number))
        sys.exit("\n".join(run.defects()) or None)
