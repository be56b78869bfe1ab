"""Thousands of small jobs with faults at random: `python -m tests.soak 10000`.

Prints the table of docs/reliability.md. The store, the receiver, the model and the caller each
fail now and then. Afterwards no job may be lost or called back twice, and the process must be as
small as it was.
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
import time
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
from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, Request
from tests.servers.supabase import CallbackReceiver

HASTE = Retry(base_s=0.001)
THREADS = 4

#: What goes wrong, and how often.
ODDS = {
    "a payload that does not hold": 0.05,
    "a text that the floor refuses": 0.03,
    "a reference that cannot be had": 0.05,
    "a bug in the model": 0.04,
    "out of memory": 0.04,
    "a stop": 0.05,
    "a deadline": 0.03,
    "a second delivery": 0.05,
}
STORE_FAILS, STORE_REFUSES = 0.08, 0.01
RECEIVER_FAILS, RECEIVER_REFUSES = 0.08, 0.01


class Store(DirectoryStorage):
    """A folder that fails now and then; what is kept of a document it takes."""

    def __init__(self, root: Path, dice: random.Random) -> None:
        super().__init__(root, HASTE)
        self._dice = dice

    def put(self, key: str, data: bytes, mime: str) -> None:
        drawn = self._dice.random()
        if "callback." not in key and drawn < STORE_FAILS + STORE_REFUSES:
            raise Fault(503 if drawn < STORE_FAILS else 403)
        super().put(key, data, mime)


class Receiver(CallbackReceiver):
    """The edge function, which fails now and then, and only counts what it took."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._dice = dice
        self.taken: Counter[str] = Counter()

    def answer(self, request: Request) -> Answer:
        drawn = self._dice.random()
        if drawn < RECEIVER_FAILS + RECEIVER_REFUSES:
            return Answer(503 if drawn < RECEIVER_FAILS else 400)
        job = json.loads(request.body)["job_id"]
        with self.changed:
            self.taken[job] += 1
        return Answer(200)

    def note(self, request: Request, answer: Answer | None) -> None: ...


class Brush(FakeSdxl):
    """Fails as its prompt says."""

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
    """What a process has of what may leak."""

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
    """What happened to a number of jobs."""

    root: Path
    seed: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    wishes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    kept: int = 0
    sizes: list[Size] = field(default_factory=list)

    def run(self, count: int, rounds: int = 4) -> None:
        """Run `count` jobs, and measure after each of some rounds; the first one warms up."""
        dice = random.Random(self.seed)
        with Receiver(random.Random(self.seed + 1)) as self.receiver:
            self.local = LocalWorker(
                self.root,
                settings=Settings(poison_dir=self.root / "pills"),
                fake_sdxl=Brush(),
                callback=Callback(self.receiver.callback_url, "secret", policy=HASTE),
                storage=Store(self.root / "assets", random.Random(self.seed + 2)),
            )
            with ThreadPoolExecutor(THREADS) as threads, ThreadPoolExecutor(THREADS) as twice:
                self._twice = twice
                for start in range(0, count, -(-count // rounds)):
                    jobs = range(start, min(count, start + -(-count // rounds)))
                    wishes = [self._draw(dice) for _ in jobs]
                    list(threads.map(self._one, jobs, wishes))
                    self.local.progress.clear()
                    self.sizes.append(self._settled())

    def _settled(self) -> Size:
        """The size once the watches of the last requests have seen that they are over."""
        end = time.monotonic() + PATIENCE_S
        while any("cut_when" in each.name for each in threading.enumerate()):
            assert time.monotonic() < end
            time.sleep(0.05)
        return Size.now()

    @staticmethod
    def _draw(dice: random.Random) -> str:
        (wish,) = dice.choices([*ODDS, "nothing"], [*ODDS.values(), 1 - sum(ODDS.values())])
        return wish

    def _one(self, number: int, wish: str) -> None:
        job, stop = f"job-{number}", Stop()
        payload = sdxl_payload(id=job, prompt=wish)
        match wish:
            case "a payload that does not hold":
                payload["config"] = {"num_images": 2}
            case "a text that the floor refuses":
                payload["prompt"] = "nude child"
            case "a reference that cannot be had":
                payload["metadata"] = {"reference_image_url": "user-1/none/0.png"}
            case "a stop":
                threading.Timer(0.003, stop.set).start()
            case "a deadline":
                threading.Timer(0.003, stop.set, (DeadlinePassed("the time is over"),)).start()
        second = self._twice.submit(self.local.run, payload, Stop()) if "second" in wish else None
        document = self.local.run(payload, stop)
        if second:
            second.result()
        self._judge(job, wish, document, was_repeated=second is not None)

    def _judge(self, job: str, wish: str, document: Document, was_repeated: bool) -> None:
        code = document.failure.code if document.failure else "completed"
        self.wishes[wish] += 1
        self.endings[code] += 1
        taken = self.receiver.taken.pop(job, 0)
        told = document.metadata.get("callback")
        kept = bool(told) and (self.root / "assets" / told["kept"]).exists()
        self.kept += kept
        if not taken and not kept:
            self.lost.append(job)
        if taken > 1 and not was_repeated:
            self.doubled.append(job)
        for home in ("user-1", "undelivered"):
            shutil.rmtree(self.root / "assets" / home / job, ignore_errors=True)


def report(soak: Soak, count: int) -> str:
    first, last = soak.sizes[0], soak.sizes[-1]
    rows = [
        ("jobs", count),
        ("lost", len(soak.lost)),
        ("called back twice", len(soak.doubled)),
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
