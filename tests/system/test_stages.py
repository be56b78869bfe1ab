"""Stop, deadline, SIGTERM and a second delivery at every stage of a job, through the real loop.

A job is held at a stage by the other side: the store that gives its reference, the job before it,
its own steps, the pixels that its encoder waits for, the store that takes its picture, the receiver
of its callback.
"""

import io
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.fakes.local_worker import sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
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


#: From the first stage to the last, and whether the job can still be stopped there: at once, as
#: soon as its picture is encoded, which nothing interrupts, or not any more.
STAGES = {
    "fetch": "at once",
    "wait": "at once",
    "generate": "at once",
    "encode": "then",
    "deliver": "at once",
    "post": "no",
}


class Gate:
    """Holds the requests that it is shut for."""

    def __init__(self) -> None:
        self.shut, self.held = threading.Event(), threading.Event()
        self._open = threading.Event()

    def close(self) -> None:
        self._open.clear()
        self.held.clear()
        self.shut.set()

    def open(self) -> None:
        self.shut.clear()
        self._open.set()

    def passed(self) -> None:
        if self.shut.is_set():
            self.held.set()
            self._open.wait(PATIENCE_S)


class Store(SupabaseServer):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.writes = Gate(), Gate()

    def answer(self, request: Request) -> Answer:
        (self.reads if request.method == "GET" else self.writes).passed()
        return super().answer(request)


class Receiver(CallbackReceiver):
    def __init__(self) -> None:
        super().__init__()
        self.posts = Gate()

    def answer(self, request: Request) -> Answer:
        self.posts.passed()
        return super().answer(request)

    def terminal(self, job: str) -> list[str]:
        """The statuses that were told of a job, but for the tries of one and the same message."""
        told = [each for each in self.received if each.document["job_id"] == job]
        return list({each.headers["webhook-id"]: each.document["status"] for each in told}.values())


@dataclass
class Stage:
    """A worker process, and everything around it that can be held."""

    platform: Platform
    store: Store
    receiver: Receiver
    process: WorkerProcess
    blocking_sdxl: Path
    count: int = 0
    busy: list[str] = field(default_factory=list)
    gates: dict[str, Gate] = field(init=False)

    def __post_init__(self) -> None:
        store = self.store
        store.objects["workspace-temp", "user-1/face.png"] = (png(), "image/png")
        self.gates = {"fetch": store.reads, "deliver": store.writes, "post": self.receiver.posts}

    def hold(self, stage: str) -> str:
        """The id of a new job that is held at a stage."""
        self.count += 1
        job = f"{stage}-{self.count}"
        if stage == "wait":
            self.busy.append(self.hold("generate"))
            # A job whose reference is fetched has been let in; all that it can do next is wait.
            self.hold_at("fetch", job)
            self.gates["fetch"].open()
        elif stage == "encode":
            # An encoder that was let go in its last look may have said it once more.
            self.encoder_waits.unlink(missing_ok=True)
            self.pixels.touch()
            self.submit(job)
            while not self.encoder_waits.exists():
                time.sleep(0.02)
        elif stage == "generate":
            self.blocking_sdxl.touch()
            self.submit(job)
            self.platform.wait_for_updates(job, 1, PATIENCE_S)
        else:
            self.hold_at(stage, job)
        return job

    def hold_at(self, gate: str, job: str) -> None:
        """Submit a job that is held by what it asks for, or tells, at a stage."""
        self.gates[gate].close()
        reference = {"reference_image_url": "user-1/face.png"} if gate == "fetch" else {}
        self.submit(job, metadata=reference)
        assert self.gates[gate].held.wait(PATIENCE_S)

    def submit(self, job: str, **more: Any) -> None:
        self.platform.submit(sdxl_payload(id=job, **more), id=job)

    @property
    def pixels(self) -> Path:
        return self.blocking_sdxl.with_suffix(".pixels")

    @property
    def encoder_waits(self) -> Path:
        return self.blocking_sdxl.with_suffix(".waits")

    @property
    def later(self) -> Path:
        """While it exists, every job's deadline has passed."""
        return self.blocking_sdxl.with_suffix(".later")

    def release(self) -> None:
        for file in (self.blocking_sdxl, self.pixels, self.encoder_waits):
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
def stage_of(**env: str) -> Iterator[Stage]:
    with (
        Platform() as platform,
        Store() as store,
        Receiver() as receiver,
        tempfile.TemporaryDirectory() as folder,
    ):
        blocking_sdxl = Path(folder) / "hold"
        told = {
            "STORAGE_URL": "supabase://workspace-temp",
            "SUPABASE_URL": store.url,
            "SUPABASE_SERVICE_KEY": store.service_key,
            "CALLBACK_URL": receiver.callback_url,
            "JOB_CALLBACK_SECRET": receiver.secret,
            "HOLD": str(blocking_sdxl),
            "CONCURRENCY": "4",
            **env,
        }
        fake_handler = ["tests.fakes.fake_handler"]
        with WorkerProcess(platform, "-m", args=fake_handler, env=told, cwd=ROOT) as process:
            stage = Stage(platform, store, receiver, process, blocking_sdxl)
            try:
                yield stage
            finally:
                stage.release()


@pytest.fixture(scope="module")
def patient() -> Iterator[Stage]:
    with stage_of() as stage:
        yield stage


@pytest.fixture
def late(patient: Stage) -> Iterator[Stage]:
    """The same, whose deadlines a test lets pass."""
    yield patient
    patient.release()
    patient.later.unlink(missing_ok=True)


pytestmark = pytest.mark.slow  # a worker process or two, and ten more for SIGTERM


# --- stop ---


@pytest.mark.parametrize("at", [at for at, stops in STAGES.items() if stops == "at once"])
def test_a_stopped_job_ends_though_the_other_side_does_not(patient: Stage, at: str) -> None:
    job = patient.hold(at)

    patient.platform.cancel(job)

    patient.receiver.wait_until(lambda: patient.receiver.terminal(job), PATIENCE_S)
    patient.release()
    assert patient.receiver.terminal(job) == ["failed"]
    last = next(each for each in patient.receiver.received if each.document["job_id"] == job)
    assert last.document["error"]["code"] == "CANCELLED"
    assert patient.platform.status(job)["status"] == "CANCELLED"


def test_a_stop_while_the_callback_is_out_comes_too_late(patient: Stage) -> None:
    job = patient.hold("post")

    patient.platform.cancel(job)
    patient.release()

    patient.receiver.wait_until(lambda: patient.receiver.terminal(job), PATIENCE_S)
    assert patient.receiver.terminal(job) == ["completed"]


@pytest.mark.parametrize("at", STAGES)
def test_a_stopped_job_leaves_its_slot_to_the_next(patient: Stage, at: str) -> None:
    job = patient.hold(at)
    patient.platform.cancel(job)
    patient.release()

    patient.submit(f"after-{job}")

    assert patient.code(f"after-{job}") is None


def test_a_job_that_is_stopped_while_its_picture_is_encoded_stores_none(patient: Stage) -> None:
    job, witness = patient.hold("encode"), patient.hold("generate")

    # Whoever is stopped after it and has ended has seen that it was.
    patient.platform.cancel(job)
    patient.platform.cancel(witness)
    patient.receiver.wait_until(lambda: patient.receiver.terminal(witness), PATIENCE_S)
    patient.release()

    patient.receiver.wait_until(lambda: patient.receiver.terminal(job), PATIENCE_S)
    assert patient.receiver.terminal(job) == ["failed"]
    assert not [key for _, key in patient.store.objects if f"/{job}/0.png" in key]


# --- deadline ---


@pytest.mark.parametrize("at", [at for at, stops in STAGES.items() if stops == "at once"])
def test_a_job_ends_at_its_deadline_though_the_other_side_does_not(late: Stage, at: str) -> None:
    job = late.hold(at)

    late.later.touch()

    assert late.code(job) == "TIMEOUT_ERROR"
    late.release()
    assert late.receiver.terminal(job) == ["failed"]


def test_a_deadline_that_passes_while_a_picture_is_encoded_ends_the_job_after_it(
    late: Stage,
) -> None:
    job, witness = late.hold("encode"), late.hold("generate")

    late.later.touch()
    assert late.code(witness) == "TIMEOUT_ERROR"
    late.release()

    assert late.code(job) == "TIMEOUT_ERROR"
    assert late.receiver.terminal(job) == ["failed"]
    assert not [key for _, key in late.store.objects if f"/{job}/0.png" in key]


def test_a_job_that_was_done_in_time_is_done_however_long_its_callback_takes(late: Stage) -> None:
    job = late.hold("post")

    late.later.touch()
    late.release()

    assert late.code(job) is None
    assert late.receiver.terminal(job) == ["completed"]


# --- a second delivery ---


@pytest.mark.parametrize("at", STAGES)
def test_a_second_delivery_hears_the_end_of_the_first(patient: Stage, at: str) -> None:
    job = patient.hold(at)

    patient.submit(job)
    patient.process.wait_for_log(f"{job} arrived again", PATIENCE_S)
    patient.release()

    first = patient.platform.result(job, PATIENCE_S)
    second = patient.platform.result(job, PATIENCE_S, nth=2)
    assert first == second
    assert patient.receiver.terminal(job) == ["completed"]


# --- SIGTERM ---


@pytest.mark.parametrize("at", STAGES)
@pytest.mark.parametrize("grace", ["0", "600"])
def test_a_job_is_told_of_once_when_its_worker_is_shut_down(at: str, grace: str) -> None:
    with stage_of(SHUTDOWN_GRACE_S=grace) as stage:
        job = stage.hold(at)
        witness = stage.hold("generate") if STAGES[at] == "then" else None

        stage.process.terminate()
        stage.process.wait_for_log("shutting down", PATIENCE_S)
        if witness and grace == "0":
            # Its stop comes after the other's.
            stage.receiver.wait_until(lambda: stage.receiver.terminal(witness), PATIENCE_S)
        if grace != "0" or STAGES[at] != "at once":
            stage.release()

        is_done = grace != "0" or STAGES[at] == "no"
        assert stage.code(job) == (None if is_done else "WORKER_UNAVAILABLE")
        assert stage.process.wait(PATIENCE_S) == 0
        assert stage.receiver.terminal(job) == ["completed" if is_done else "failed"]
