"""Stop, deadline, SIGTERM and a second delivery at every stage of a job, with the real loop.

Each stage is held by what the job waits for there: the store that has its reference, the job before
it, its own steps, the pixels that its encoder reads, the store that takes its picture, or the
receiver of its callback.
"""

import io
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.fakes.local_worker import sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S, wait_until
from tests.servers.handler import failure
from tests.servers.local_server import Answer, Request
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.supabase import SupabaseStorage as SupabaseServer
from tests.servers.worker_process import WorkerProcess


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(file, "PNG")
    return file.getvalue()


#: The stages in order, and when a job stops that is stopped there. Nothing interrupts an encoder.
STAGES = {
    "fetch": "at once",
    "wait": "at once",
    "generate": "at once",
    "encode": "after the stage",
    "deliver": "at once",
    "post": "never",
}


class Gate:
    """Holds requests while it is closed."""

    def __init__(self) -> None:
        self.closed, self.held = threading.Event(), threading.Event()
        self._open = threading.Event()

    def close(self) -> None:
        self._open.clear()
        self.held.clear()
        self.closed.set()

    def open(self) -> None:
        self.closed.clear()
        self._open.set()

    def wait(self) -> None:
        if self.closed.is_set():
            self.held.set()
            self._open.wait(PATIENCE_S)


class GatedStore(SupabaseServer):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.writes = Gate(), Gate()

    def answer(self, request: Request) -> Answer:
        (self.reads if request.method == "GET" else self.writes).wait()
        return super().answer(request)


class GatedReceiver(CallbackReceiver):
    def __init__(self) -> None:
        super().__init__()
        self.posts = Gate()

    def answer(self, request: Request) -> Answer:
        self.posts.wait()
        return super().answer(request)

    def terminal(self, job: str) -> list[str]:
        """The statuses of the callbacks of a job. Repeated tries of one callback count once."""
        tries = [each for each in self.received if each.document["job_id"] == job]
        return list(
            {each.headers["webhook-id"]: each.document["status"] for each in tries}.values()
        )


@dataclass
class HeldWorker:
    """A worker process whose jobs can be held at every stage."""

    platform: Platform
    store: GatedStore
    receiver: GatedReceiver
    process: WorkerProcess
    hold_file: Path
    count: int = 0
    busy: list[str] = field(default_factory=list)
    gates: dict[str, Gate] = field(init=False)

    def __post_init__(self) -> None:
        store = self.store
        store.objects["workspace-temp", "user-1/face.png"] = (png(), "image/png")
        self.gates = {"fetch": store.reads, "deliver": store.writes, "post": self.receiver.posts}

    def hold(self, stage: str) -> str:
        """Submit a job, and return its id once it is held at this stage."""
        self.count += 1
        job = f"{stage}-{self.count}"
        if stage == "wait":
            self.busy.append(self.hold("generate"))
            # A job that fetches its reference has its place. Its next stage is to wait.
            self.hold_at("fetch", job)
            self.gates["fetch"].open()
        elif stage == "encode":
            # An earlier encoder may have created the file again when it was released.
            self.encoder_waits.unlink(missing_ok=True)
            self.pixels.touch()
            self.submit(job)
            wait_until(self.encoder_waits.exists)
        elif stage == "generate":
            self.hold_file.touch()
            self.submit(job)
            self.platform.wait_for_updates(job, 1, PATIENCE_S)
        else:
            self.hold_at(stage, job)
        return job

    def hold_at(self, gate: str, job: str) -> None:
        """Submit a job that is held at this gate."""
        self.gates[gate].close()
        reference = {"reference_image_url": "user-1/face.png"} if gate == "fetch" else {}
        self.submit(job, metadata=reference)
        assert self.gates[gate].held.wait(PATIENCE_S)

    def submit(self, job: str, **more: Any) -> None:
        self.platform.submit(sdxl_payload(id=job, **more), id=job)

    @property
    def pixels(self) -> Path:
        return self.hold_file.with_suffix(".pixels")

    @property
    def encoder_waits(self) -> Path:
        return self.hold_file.with_suffix(".waits")

    @property
    def later(self) -> Path:
        """The path of a file. While it exists, every job's deadline has passed."""
        return self.hold_file.with_suffix(".later")

    def release(self) -> None:
        for file in (self.hold_file, self.pixels, self.encoder_waits):
            file.unlink(missing_ok=True)
        for gate in self.gates.values():
            gate.open()
        while self.busy:
            self.platform.result(self.busy.pop(), PATIENCE_S)

    def code(self, job: str) -> str | None:
        self.platform.result(job, PATIENCE_S)
        status = self.platform.status(job)
        return failure(status)["code"] if status["status"] == "FAILED" else None


@contextmanager
def held_worker(**env: str) -> Iterator[HeldWorker]:
    with (
        Platform() as platform,
        GatedStore() as store,
        GatedReceiver() as receiver,
        tempfile.TemporaryDirectory() as folder,
    ):
        hold_file = Path(folder) / "hold"
        settings = {
            "STORAGE_URL": "supabase://workspace-temp",
            "SUPABASE_URL": store.url,
            "SUPABASE_SERVICE_KEY": store.service_key,
            "CALLBACK_URL": receiver.callback_url,
            "JOB_CALLBACK_SECRET": receiver.secret,
            "HOLD": str(hold_file),
            "CONCURRENCY": "4",
            **env,
        }
        module = ["tests.fakes.fake_handler"]
        with WorkerProcess(platform, "-m", args=module, env=settings, cwd=ROOT) as process:
            worker = HeldWorker(platform, store, receiver, process, hold_file)
            try:
                yield worker
            finally:
                worker.release()


@pytest.fixture(scope="module")
def worker() -> Iterator[HeldWorker]:
    with held_worker() as worker:
        yield worker


@pytest.fixture
def late_worker(worker: HeldWorker) -> Iterator[HeldWorker]:
    """The same worker. A test makes its deadlines pass."""
    yield worker
    worker.release()
    worker.later.unlink(missing_ok=True)


pytestmark = pytest.mark.slow  # Two worker processes, and ten more for SIGTERM.


# --- stop ---


@pytest.mark.parametrize("at", [at for at, stops in STAGES.items() if stops == "at once"])
def test_a_stopped_job_ends_though_it_waits_for_a_held_stage(worker: HeldWorker, at: str) -> None:
    job = worker.hold(at)

    worker.platform.cancel(job)

    worker.receiver.wait_until(lambda: worker.receiver.terminal(job), PATIENCE_S)
    worker.release()
    assert worker.receiver.terminal(job) == ["failed"]
    last = next(each for each in worker.receiver.received if each.document["job_id"] == job)
    assert last.document["error"]["code"] == "CANCELLED"
    assert worker.platform.status(job)["status"] == "CANCELLED"


def test_a_stop_during_the_callback_comes_too_late(worker: HeldWorker) -> None:
    job = worker.hold("post")

    worker.platform.cancel(job)
    worker.release()

    worker.receiver.wait_until(lambda: worker.receiver.terminal(job), PATIENCE_S)
    assert worker.receiver.terminal(job) == ["completed"]


@pytest.mark.parametrize("at", STAGES)
def test_a_stopped_job_frees_its_slot(worker: HeldWorker, at: str) -> None:
    job = worker.hold(at)
    worker.platform.cancel(job)
    worker.release()

    worker.submit(f"after-{job}")

    assert worker.code(f"after-{job}") is None


def test_a_job_that_is_stopped_while_its_picture_is_encoded_stores_no_picture(
    worker: HeldWorker,
) -> None:
    job, witness = worker.hold("encode"), worker.hold("generate")

    # The worker handles stops in order: once the witness has ended, the job is stopped too.
    worker.platform.cancel(job)
    worker.platform.cancel(witness)
    worker.receiver.wait_until(lambda: worker.receiver.terminal(witness), PATIENCE_S)
    worker.release()

    worker.receiver.wait_until(lambda: worker.receiver.terminal(job), PATIENCE_S)
    assert worker.receiver.terminal(job) == ["failed"]
    assert not [key for _, key in worker.store.objects if f"/{job}/0.png" in key]


# --- deadline ---


@pytest.mark.parametrize("at", [at for at, stops in STAGES.items() if stops == "at once"])
def test_a_job_ends_at_its_deadline_though_it_waits_for_a_held_stage(
    late_worker: HeldWorker, at: str
) -> None:
    job = late_worker.hold(at)

    late_worker.later.touch()

    assert late_worker.code(job) == "TIMEOUT_ERROR"
    late_worker.release()
    assert late_worker.receiver.terminal(job) == ["failed"]


def test_a_deadline_that_passes_while_a_picture_is_encoded_ends_the_job_after_it(
    late_worker: HeldWorker,
) -> None:
    job, witness = late_worker.hold("encode"), late_worker.hold("generate")

    late_worker.later.touch()
    assert late_worker.code(witness) == "TIMEOUT_ERROR"
    late_worker.release()

    assert late_worker.code(job) == "TIMEOUT_ERROR"
    assert late_worker.receiver.terminal(job) == ["failed"]
    assert not [key for _, key in late_worker.store.objects if f"/{job}/0.png" in key]


def test_a_job_that_finished_in_time_completes_however_long_its_callback_takes(
    late_worker: HeldWorker,
) -> None:
    job = late_worker.hold("post")

    late_worker.later.touch()
    late_worker.release()

    assert late_worker.code(job) is None
    assert late_worker.receiver.terminal(job) == ["completed"]


# --- a second delivery ---


@pytest.mark.parametrize("at", STAGES)
def test_a_second_delivery_gets_the_document_of_the_first(worker: HeldWorker, at: str) -> None:
    job = worker.hold(at)

    worker.submit(job)
    worker.process.wait_for_log(f"{job} arrived again", PATIENCE_S)
    worker.release()

    first = worker.platform.result(job, PATIENCE_S)
    second = worker.platform.result(job, PATIENCE_S, nth=2)
    assert first == second
    assert worker.receiver.terminal(job) == ["completed"]


# --- SIGTERM ---


@pytest.mark.parametrize("at", STAGES)
@pytest.mark.parametrize("grace", ["0", "600"])
def test_a_job_has_one_callback_when_its_worker_is_shut_down(at: str, grace: str) -> None:
    with held_worker(SHUTDOWN_GRACE_S=grace) as worker:
        job = worker.hold(at)
        witness = worker.hold("generate") if STAGES[at] == "after the stage" else None

        worker.process.terminate()
        worker.process.wait_for_log("shutting down", PATIENCE_S)
        if witness and grace == "0":
            # The witness is stopped after the job.
            worker.receiver.wait_until(lambda: worker.receiver.terminal(witness), PATIENCE_S)
        if grace != "0" or STAGES[at] != "at once":
            worker.release()

        completes = grace != "0" or STAGES[at] == "never"
        assert worker.code(job) == (None if completes else "WORKER_UNAVAILABLE")
        assert worker.process.wait(PATIENCE_S) == 0
        assert worker.receiver.terminal(job) == ["completed" if completes else "failed"]
