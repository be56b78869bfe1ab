"""Jobs under everything at once: stops, deadlines, shutdown, second deliveries and faults.

Hypothesis draws what happens at which stage of which job; each thing happens exactly there, since
the other side of the stage does it. Whatever was drawn, nothing is lost and nothing is doubled.
"""

import itertools
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ourvidz_serverless.context import Stop
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, Request
from tests.servers.supabase import CallbackReceiver

STAGES = ("fetch", "generate", "deliver", "post")
DEEDS = ("nothing", "stop", "deadline", "shutdown", "deliver again", "another job", "fault")
HASTE = Retry(base_s=0.001)

Plan = dict[tuple[str, str], list[str]]
plans = st.dictionaries(
    st.tuples(st.sampled_from(["job-0", "job-1"]), st.sampled_from(STAGES)),
    st.lists(st.sampled_from(DEEDS), min_size=1, max_size=3),
    max_size=5,
)


class Heard(Stop):
    """A stop that knows when the worker first looked at it: its delivery is under way then."""

    def __init__(self) -> None:
        super().__init__()
        self.is_looked_at = threading.Event()

    @property
    def error(self) -> Any:
        self.is_looked_at.set()
        return super().error


class Store(DirectoryStorage):
    """A folder that says when it is used."""

    def __init__(self, root: Path, at: Callable[[str, str], None]) -> None:
        super().__init__(root, HASTE)
        self._at, self.put_at = at, dict[str, float]()

    def put(self, key: str, data: bytes, mime: str) -> None:
        if "callback." not in key:
            self._at(key.split("/")[1], "deliver")
        super().put(key, data, mime)
        self.put_at[key] = time.time()

    def get(self, key: str, bucket: str | None = None) -> bytes:
        self._at(Path(key).stem, "fetch")
        raise Fault(404)


class Brush(FakeSdxl):
    """Its seed tells which job it paints for."""

    def __init__(self, at: Callable[[str, str], None]) -> None:
        super().__init__()
        self._at = at

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        self._at(f"job-{request.seeds[0]}", "generate")
        yield from super().generate(request, progress)


@dataclass
class Play:
    """One run of a plan."""

    plan: Plan
    receiver: CallbackReceiver
    root: Path
    deliveries: list[tuple[str, Future[Document]]] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.receiver.at = self.at  # type: ignore[attr-defined]
        self.stops: dict[str, list[Heard]] = {"job-0": [], "job-1": []}
        self.late_s = {"job-0": 0.0, "job-1": 0.0}
        self.thread = threading.local()
        self.store = Store(self.root, self.at)
        self.threads = ThreadPoolExecutor(16)
        self.lock = threading.Lock()
        self.local = LocalWorker(
            self.root,
            settings=Settings(job_timeout_s=1),
            fake_sdxl=Brush(self.at),
            callback=Callback(self.receiver.callback_url, self.receiver.secret, policy=HASTE),
            storage=self.store,
            clock=self.clock,
        )

    def clock(self) -> float:
        """Seconds of the job whose thread asks: a deadline is one job's, and delays no other."""
        return self.late_s.get(getattr(self.thread, "job", ""), 0.0)

    def run_job(self, job: str, stop: Stop) -> Document:
        self.thread.job = job
        return self.local.run(payload(job), stop)

    def deliver(self, job: str) -> Heard:
        stop = Heard()
        with self.lock:
            self.stops[job].append(stop)
            future = self.threads.submit(self.run_job, job, stop)
            self.deliveries.append((job, future))
        return stop

    def at(self, job: str, stage: str) -> None:
        """Do what is planned for this moment, once."""
        with self.lock:
            deeds = self.plan.pop((job, stage), [])
        for deed in deeds:
            self.do(deed, job, stage)

    def do(self, deed: str, job: str, stage: str) -> None:
        match deed:
            case "stop":
                self.stops[job][-1].set()
            case "deadline":
                # Longer than a job may take. Even three of them leave the post its `LAST_WORD_S`.
                self.late_s[job] += 2
            case "shutdown":
                self.closed = True
                self.local.worker.close(grace_s=0)
            case "deliver again":
                assert self.deliver(job).is_looked_at.wait(PATIENCE_S)
            case "another job":
                other = "job-1" if job == "job-0" else "job-0"
                if not self.stops[other]:
                    self.deliver(other)
            case "fault" if stage == "generate":
                raise RuntimeError("a bug")
            case "fault" if stage == "deliver":
                raise Fault(403)
            case "fault" if stage == "post":
                raise Fault(400)

    def run(self) -> dict[str, list[Document]]:
        """The documents of every delivery, by job."""
        self.deliver("job-0")
        ended: dict[str, list[Document]] = {}
        for i in itertools.count():
            with self.lock:
                if i == len(self.deliveries):
                    break
                job, future = self.deliveries[i]
            ended.setdefault(job, []).append(future.result(PATIENCE_S))
        self.threads.shutdown()
        return ended


def payload(job: str) -> dict[str, Any]:
    reference = {"reference_image_url": f"user-1/{job}.png"}
    return sdxl_payload(id=job, config={"seed": int(job[-1])}, metadata=reference)


class Receiver(CallbackReceiver):
    """The edge function, which says when it is told of a job, and may refuse."""

    at: Callable[[str, str], None] = staticmethod(lambda job, stage: None)

    def answer(self, request: Request) -> Answer:
        try:
            self.at(json.loads(request.body)["job_id"], "post")
        except Fault as fault:
            return Answer(fault.status or 500)
        return super().answer(request)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        yield server


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans)
def test_nothing_is_lost_and_nothing_is_doubled(receiver: Receiver, plan: Plan) -> None:
    receiver.received.clear()
    receiver.jobs.clear()
    with tempfile.TemporaryDirectory() as root:
        play = Play(dict(plan), receiver, Path(root))

        ended = play.run()

        told = Counter(each.document["job_id"] for each in receiver.received)
        assert told == Counter(ended.keys()), "one terminal callback a job"
        for job, documents in ended.items():
            assert len({json.dumps(each.result()) for each in documents}) == 1
            assert_whole(play, receiver, job, documents[0])
        if not play.closed:
            assert play.local.run(sdxl_payload(id="next")).status == "completed"


def assert_whole(play: Play, receiver: Receiver, job: str, document: Document) -> None:
    """What was told, what was returned and what is stored are one and the same."""
    (callback,) = [each for each in receiver.received if each.document["job_id"] == job]
    returned = document.callback()
    undelivered = returned["metadata"].pop("callback", None)
    assert callback.document == returned
    assert (callback.status == 200) == (undelivered is None)
    if undelivered:
        kept = json.loads((play.root / undelivered["kept"]).read_text())
        assert kept == callback.document
    stored = {key for key in play.local.stored() if "callback." not in key}
    late = [key for key in stored if f"/{job}/" in key and play.store.put_at[key] > callback.at]
    assert not late, "nothing is stored after the last word"
    for asset in document.assets:
        assert {asset.url, asset.thumbnail_url} <= stored
    if document.status == "completed":
        assert len(document.assets) == 1
