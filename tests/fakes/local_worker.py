"""A worker in this process, with a `FakeSdxl` for a model and a folder for a bucket."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ourvidz_serverless.context import Stop
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.content_credentials import Credentials
from ourvidz_serverless.delivery.storage.base import Storage
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.guard.admission import Admission
from ourvidz_serverless.guard.poison_jobs import PoisonJobs
from ourvidz_serverless.guard.rate_limits import RateLimits
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.safety import PictureClassifier
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.net.retries import Retry
from ourvidz_serverless.references.policy import ReferencePolicy
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Parts, Worker
from ourvidz_serverless.worker.job_files import JobFiles
from tests.fakes.fake_sdxl import FakeSdxl

QUICK = Retry(base_s=0.01)


def sdxl_payload(**changes: Any) -> dict[str, Any]:
    """A small valid payload; `config` and `metadata` among the changes are merged in."""
    payload: dict[str, Any] = {
        "id": "job-1",
        "type": "sdxl_image_fast",
        "user_id": "user-1",
        "prompt": "a red sun",
        "config": {"resolution": "64x64", "num_inference_steps": 10, "seed": 7},
        "metadata": {},
    }
    for part in ("config", "metadata"):
        payload[part] = {**payload[part], **changes.pop(part, {})}
    return {**payload, **changes}


def chat_payload(**changes: Any) -> dict[str, Any]:
    """A short valid conversation."""
    payload = {
        "id": "job-1",
        "type": "chat_conversation",
        "user_id": "user-1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is rain?"},
        ],
        "max_tokens": 16,
    }
    return {**payload, **changes}


def wan_payload(**changes: Any) -> dict[str, Any]:
    """A video of a few small frames; `config` and `metadata` among the changes are merged in."""
    payload: dict[str, Any] = {
        "id": "job-1",
        "type": "video_fast",
        "user_id": "user-1",
        "prompt": "a red circle moving right",
        "config": {
            "width": 64,
            "height": 64,
            "frames": 9,
            "fps": 8,
            "num_inference_steps": 3,
            "seed": 7,
        },
        "metadata": {},
    }
    for part in ("config", "metadata"):
        payload[part] = {**payload[part], **changes.pop(part, {})}
    return {**payload, **changes}


@dataclass
class LocalWorker:
    """A worker with a FakeSdxl for SDXL, and everything that leaves it."""

    root: Path
    settings: Settings = field(default_factory=Settings)
    fake_sdxl: FakeSdxl = field(default_factory=FakeSdxl)
    callback: Callback = field(default_factory=lambda: Callback(None))
    storage: Storage | None = None
    stop: Stop = field(default_factory=Stop)
    progress: list[Any] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    streamed: list[Any] = field(default_factory=list)
    limits: RateLimits | None = None
    policy: ReferencePolicy | None = None
    upload_policy: Policy | None = None
    credentials: Credentials | None = None
    classifiers: tuple[PictureClassifier, ...] = ()
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.storage = self.storage or DirectoryStorage(self.root)
        self.files = JobFiles(
            self.settings, self.storage, self.credentials, self.policy, self.upload_policy
        )
        parts = Parts(
            self.files,
            self.callback,
            Admission(self.settings, self.limits or RateLimits.of(self.settings)),
            PoisonJobs(self.settings.poison_dir),
            self.classifiers,
        )
        models = self.models or {"sdxl": self.fake_sdxl}
        self.worker = Worker(self.settings, models, parts, "worker-1", self.ledger, self.clock)

    def run(self, payload: Any = None, stop: Stop | None = None, **top: Any) -> Document:
        """Run a payload, `sdxl_payload()` if none is given, as the platform's job `rp-1`."""
        event = {"id": "rp-1", "input": sdxl_payload() if payload is None else payload, **top}
        return self.worker.run(
            Envelope.of(event, self.settings.families),
            stop or self.stop,
            self.progress.append,
            self.streamed.append,
        )

    def stored(self) -> list[str]:
        """The keys of all that lies in the folder."""
        return sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*") if p.is_file())
