"""Random interleavings of jobs with stops, deadlines, shutdown, second deliveries and faults.

Hypothesis draws which events happen at which stage of which job. Each event happens exactly there,
because the fake or server that the stage uses triggers it. Whatever is drawn, every job has one
callback, and its deliveries return the same document.
"""

import itertools
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from ourvidz_serverless.context import Stop
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.settings import Settings
from tests.examples import examples
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S, start
from tests.servers.local_server import Answer, Request
from tests.servers.supabase import CallbackReceiver

STAGES = ("fetch", "generate", "deliver", "post")
EVENTS = ("nothing", "stop", "deadline", "shutdown", "deliver again", "another job", "fault")
FAST_RETRY = Retry(base_s=0.001)

Plan = dict[tuple[str, str], list[str]]
plans = st.dictionaries(
    st.tuples(st.sampled_from(["job-0", "job-1"]), st.sampled_from(STAGES)),
    st.lists(st.sampled_from(EVENTS), min_size=1, max_size=3),
    max_size=5,
)


class ObservedStop(Stop):
    """A stop that records when the worker first reads it: its delivery has then started."""

    def __init__(self) -> None:
        super().__init__()
        self.was_read = threading.Event()

    @property
    def error(self) -> Any:
        self.was_read.set()
        return super().error


class ReportingStorage(DirectoryStorage):
    """A folder that reports each use, and refuses every reference."""

    def __init__(self, root: Path, at: Callable[[str, str], None]) -> None:
        super().__init__(root, FAST_RETRY)
        self._at, self.put_at = at, dict[str, float]()

    def put(self, key: str, data: bytes, mime: str) -> None:
        if "callback." not in key:
            self._at(key.split("/")[1], "deliver")
        super().put(key, data, mime)
        self.put_at[key] = time.time()

    def get(self, key: str, bucket: str | None = None) -> bytes:
        self._at(Path(key).stem, "fetch")
        raise Fault(404)


class ReportingSdxl(FakeSdxl):
    """A FakeSdxl that reports each generation. The seed of a request is the number of its job."""

    def __init__(self, at: Callable[[str, str], None]) -> None:
        super().__init__()
        self._at = at

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        self._at(f"job-{request.seeds[0]}", "generate")
        yield from super().generate(request, progress)


@dataclass
class Interleaving:
    """One run of a plan."""

    plan: Plan
    receiver: CallbackReceiver
    root: Path
    deliveries: list[tuple[str, Future[Document]]] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.receiver.at = self.at  # type: ignore[attr-defined]
        self.stops: dict[str, list[ObservedStop]] = {"job-0": [], "job-1": []}
        self.clock_ahead_s = {"job-0": 0.0, "job-1": 0.0}
        self.thread = threading.local()
        self.store = ReportingStorage(self.root, self.at)
        self.lock = threading.Lock()
        self.local = LocalWorker(
            self.root,
            settings=Settings(job_timeout_s=1),
            fake_sdxl=ReportingSdxl(self.at),
            callback=Callback(self.receiver.callback_url, self.receiver.secret, policy=FAST_RETRY),
            storage=self.store,
            clock=self.clock,
        )

    def clock(self) -> float:
        """The time of the job whose thread asks. A passed deadline concerns that job only."""
        return self.clock_ahead_s.get(getattr(self.thread, "job", ""), 0.0)

    def run_job(self, job: str, stop: Stop) -> Document:
        self.thread.job = job
        return self.local.run(payload(job), stop)

    def deliver(self, job: str) -> ObservedStop:
        stop = ObservedStop()
        with self.lock:
            self.stops[job].append(stop)
            self.deliveries.append((job, start(self.run_job, job, stop)))
        return stop

    def at(self, job: str, stage: str) -> None:
        """Trigger the events that are planned for this stage of this job, once."""
        with self.lock:
            events = self.plan.pop((job, stage), [])
        for event in events:
            self.trigger(event, job, stage)

    def trigger(self, event: str, job: str, stage: str) -> None:
        match event:
            case "stop":
                self.stops[job][-1].set()
            case "deadline":
                # Longer than a job may take. Even three of these leave the post its `LAST_WORD_S`.
                self.clock_ahead_s[job] += 2
            case "shutdown":
                self.closed = True
                self.local.worker.close(grace_s=0)
            case "deliver again":
                assert self.deliver(job).was_read.wait(PATIENCE_S)
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
        """The documents of all deliveries, by job."""
        self.deliver("job-0")
        documents: dict[str, list[Document]] = {}
        for i in itertools.count():
            with self.lock:
                if i == len(self.deliveries):
                    break
                job, future = self.deliveries[i]
            documents.setdefault(job, []).append(future.result(PATIENCE_S))
        return documents


def payload(job: str) -> dict[str, Any]:
    reference = {"reference_image_url": f"user-1/{job}.png"}
    return sdxl_payload(id=job, config={"seed": int(job[-1])}, metadata=reference)


class ReportingReceiver(CallbackReceiver):
    """The receiver of callbacks, which reports each callback and refuses those with a fault."""

    at: Callable[[str, str], None] = staticmethod(lambda job, stage: None)

    def answer(self, request: Request) -> Answer:
        try:
            self.at(json.loads(request.body)["job_id"], "post")
        except Fault as fault:
            return Answer(fault.status or 500)
        return super().answer(request)


@pytest.fixture(scope="module")
def receiver() -> Iterator[ReportingReceiver]:
    with ReportingReceiver() as server:
        yield server


@examples(80, suppress_health_check=list(HealthCheck))
@given(plans)
def test_every_job_has_one_callback_whatever_happens_at_its_stages(
    receiver: ReportingReceiver, plan: Plan
) -> None:
    receiver.received.clear()
    receiver.jobs.clear()
    with tempfile.TemporaryDirectory() as root:
        run = Interleaving(dict(plan), receiver, Path(root))

        results = run.run()

        callbacks = Counter(each.document["job_id"] for each in receiver.received)
        assert callbacks == Counter(results.keys()), "one terminal callback a job"
        for job, documents in results.items():
            assert len({json.dumps(each.result()) for each in documents}) == 1
            assert_consistent(run, receiver, job, documents[0])
        if not run.closed:
            assert run.local.run(sdxl_payload(id="next")).status == "completed"


def assert_consistent(
    run: Interleaving, receiver: ReportingReceiver, job: str, document: Document
) -> None:
    """The callback, the returned document and the stored files agree."""
    (callback,) = [each for each in receiver.received if each.document["job_id"] == job]
    returned = document.callback()
    undelivered = returned["metadata"].pop("callback", None)
    assert callback.document == returned
    assert (callback.status == 200) == (undelivered is None)
    if undelivered:
        kept = json.loads((run.root / undelivered["kept"]).read_text())
        assert kept == callback.document
    stored = {key for key in run.local.stored() if "callback." not in key}
    late = [key for key in stored if f"/{job}/" in key and run.store.put_at[key] > callback.at]
    assert not late, "nothing is stored after the callback"
    for asset in document.assets:
        assert {asset.url, asset.thumbnail_url} <= stored
    if document.status == "completed":
        assert len(document.assets) == 1
