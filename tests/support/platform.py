"""RunPod's side of the job API, for the real SDK loop in a subprocess to talk to.

    with Platform() as platform, WorkerProcess(platform, "handler.py"):
        job = platform.submit({"prompt": "a red square"})
        assert platform.result(job)["output"] == ...
        assert platform.status(job)["status"] == "COMPLETED"

It is true to what was seen of the real one: polls are held, the last post for a job decides what
the caller sees, and a result that is too large or is no JSON is refused and gone.
"""

import json
import tempfile
import time
import uuid
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.web import Answer, LocalServer, Request, json_answer

RUN_LIMIT = 10 * 1000 * 1000
RUNSYNC_LIMIT = 20 * 1000 * 1000

# A stop signal that comes before the SDK has made the job's task, up to 0.1 s after the take, is
# lost in the SDK. A person who cancels is slower than that.
SOONEST_STOP = 0.5

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]
NOTHING = Answer(204)


class ResultDropped(Exception):
    """The worker posted a result and the platform refused it: the caller will never see it."""


@dataclass(frozen=True)
class Update:
    """One post for a job: progress, or the job-done document. `refused` says why it was dropped."""

    at: float
    document: dict[str, Any]
    size: int
    is_stream: bool = False
    refused: str | None = None

    @property
    def terminal(self) -> bool:
        return self.document.get("status") != "IN_PROGRESS"


@dataclass(frozen=True)
class Ping:
    at: float
    worker: str
    jobs: list[str]
    params: dict[str, str]


@dataclass
class _Job:
    limit: int
    status: Status = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str = ""
    taken_at: float = 0.0
    updates: list[Update] = field(default_factory=list)
    stream: list[Any] = field(default_factory=list)

    def apply(self, document: dict[str, Any]) -> None:
        if self.status == "CANCELLED":
            return
        self.output, self.error = document.get("output"), None
        error = document.get("error")
        if document.get("status") == "IN_PROGRESS":
            # Also after the result, which is how a late progress post hangs a finished job.
            self.status = "IN_PROGRESS"
        elif error and isinstance(error, str):
            self.status, self.error = "FAILED", error
        elif error:
            self.status, self.output = "COMPLETED", None
        else:
            self.status = "COMPLETED"


class Platform(LocalServer):
    """A RunPod endpoint with a queue, for use in a `with` statement.

    `script([...])` (see `LocalServer`) applies to the posts of results and progress only.
    """

    def __init__(self, hold: float = 1.0, api_key: str = "rp-local-key") -> None:
        super().__init__()
        self.hold = hold
        self.api_key = api_key
        self.polls: Counter[str] = Counter()
        self.pings: list[Ping] = []
        self._home = tempfile.TemporaryDirectory(prefix="runpod-home-")
        self._queue: deque[dict[str, Any]] = deque()
        self._jobs: dict[str, _Job] = {}
        self._stops: defaultdict[str, list[str]] = defaultdict(list)

    def env(self, worker_id: str = "worker-1") -> dict[str, str]:
        """The environment that makes the SDK in a subprocess a worker of this platform."""
        api = f"{self.url}/v2/local"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{api}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{api}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{api}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{api}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_AI_API_KEY": self.api_key,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_LOG_LEVEL": "INFO",
            # The SDK prefers a key in ~/.runpod to the one in the environment.
            "HOME": self._home.name,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def submit(self, input: Any, id: str | None = None, sync: bool = False, **top: Any) -> str:
        """Queue a job and return its id. The same id again is a second delivery of that job.

        `sync` is `/runsync` with its larger limit; `top` stands beside `input`, as `s3Config` does.
        """
        id = id or str(uuid.uuid4())
        with self.changed:
            job = self._jobs.setdefault(id, _Job(RUNSYNC_LIMIT if sync else RUN_LIMIT))
            if job.status != "IN_PROGRESS":
                job.status = "IN_QUEUE"
            self._queue.append({"id": id, "input": input, **top})
            self.changed.notify_all()
        return id

    def result(self, id: str, timeout: float = 30, nth: int = 1) -> dict[str, Any]:
        """Wait for a job's terminal document, the nth one where it was delivered several times."""

        def results() -> list[Update]:
            return [update for update in self._jobs[id].updates if update.terminal]

        try:
            self.wait_until(lambda: len(results()) >= nth, timeout)
        except TimeoutError:
            seen = f"{self.status(id)}, updates: {self.updates(id)}"
            raise TimeoutError(f"no result of {id} within {timeout} s; {seen}"[:2000]) from None
        update = results()[nth - 1]
        if update.refused:
            raise ResultDropped(update.refused)
        return update.document

    def wait_for_status(self, id: str, status: Status, timeout: float = 30) -> dict[str, Any]:
        """Wait until the caller would see this status; return what `status` returns."""
        what = f"{id} to be {status}"
        self.wait_until(lambda: self._jobs[id].status == status, timeout, what)
        return self.status(id)

    def wait_for_updates(self, id: str, count: int = 1, timeout: float = 30) -> list[Update]:
        """Wait for that many posts for a job, progress included, and return all that came."""
        what = f"{count} updates of {id}"
        self.wait_until(lambda: len(self._jobs[id].updates) >= count, timeout, what)
        return self.updates(id)

    def updates(self, id: str) -> list[Update]:
        """All posts for a job in the order of arrival, the refused ones included."""
        with self.changed:
            return list(self._jobs[id].updates)

    def stream(self, id: str) -> list[Any]:
        """What a generator handler has yielded so far."""
        with self.changed:
            return list(self._jobs[id].stream)

    def status(self, id: str) -> dict[str, Any]:
        """What `GET /status/{id}` shows to the caller."""
        with self.changed:
            job = self._jobs[id]
            shown = {"id": id, "status": job.status, "output": job.output, "error": job.error}
        return {name: value for name, value in shown.items() if value is not None}

    def cancel(self, id: str) -> None:
        """Take a queued job back, or have its worker told to stop a running one.

        Each call sends one stop signal, so a second call is a second signal.
        """
        time.sleep(max(0.0, self._jobs[id].taken_at + SOONEST_STOP - time.monotonic()))
        with self.changed:
            job = self._jobs[id]
            if job.worker and job.status in ("IN_PROGRESS", "CANCELLED"):
                self._stops[job.worker].append(id)
            self._queue = deque(queued for queued in self._queue if queued["id"] != id)
            if job.status not in ("COMPLETED", "FAILED"):
                job.status, job.output = "CANCELLED", None
            self.changed.notify_all()

    def stop(self) -> None:
        super().stop()
        self._home.cleanup()

    def scripted(self, request: Request) -> bool:
        return "/job-done/" in request.path

    def answer(self, request: Request) -> Answer:
        if request.headers.get("Authorization") != self.api_key:
            return Answer(401)
        match request.path.split("/")[3:]:
            case ["job-take", worker]:
                jobs = self._take(request, worker, 1)
                return json_answer(jobs[0]) if jobs else NOTHING
            case ["job-take-batch", worker]:
                jobs = self._take(request, worker, int(request.query["batch_size"]))
                return json_answer(jobs) if jobs else NOTHING
            case ["job-stop", worker]:
                stops = self._stop_signals(worker)
                return json_answer({"jobsToStop": stops}) if stops else NOTHING
            case ["job-done", _, id] if id in self._jobs:
                return self._done(self._jobs[id], request)
            case ["job-stream", _, id] if id in self._jobs:
                return self._streamed(self._jobs[id], request)
            case ["ping", worker]:
                return self._ping(worker, request)
        return Answer(404)

    def _take(self, request: Request, worker: str, count: int) -> list[dict[str, Any]]:
        with self.changed:
            self.polls[worker] += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._queue or self.closing.is_set(), self.hold)
            if self.closing.is_set() or request.hung_up():
                return []
            jobs = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
            for job in jobs:
                record = self._jobs[job["id"]]
                record.status, record.worker = "IN_PROGRESS", worker
                record.taken_at = time.monotonic()
            self.changed.notify_all()
        return jobs

    def _stop_signals(self, worker: str) -> list[str]:
        with self.changed:
            self.changed.wait_for(lambda: self._stops[worker] or self.closing.is_set(), self.hold)
            return self._stops.pop(worker, [])

    def _done(self, job: _Job, request: Request) -> Answer:
        document, refused = _read(request.body, job.limit)
        is_stream = request.query.get("isStream") == "true"
        update = Update(request.at, document, len(request.body), is_stream, refused)
        with self.changed:
            job.updates.append(update)
            if not refused:
                job.apply(document)
            self.changed.notify_all()
        return json_answer({"message": refused}, 400) if refused else json_answer({})

    def _streamed(self, job: _Job, request: Request) -> Answer:
        document, refused = _read(request.body, job.limit)
        if refused:
            return json_answer({"message": refused}, 400)
        with self.changed:
            job.stream.append(document.get("output"))
            self.changed.notify_all()
        return json_answer({})

    def _ping(self, worker: str, request: Request) -> Answer:
        jobs = request.query.get("job_id", "").split(",")
        with self.changed:
            self.pings.append(Ping(request.at, worker, [*filter(None, jobs)], request.query))
            self.changed.notify_all()
        return json_answer({})


def _read(body: bytes, limit: int) -> tuple[dict[str, Any], str | None]:
    """A posted document and why it is refused, if it is."""
    try:
        document = json.loads(body, parse_constant=_no_json)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    if len(body) > limit:
        return document, f"{len(body)} bytes are more than {limit}"
    return document, None


def _no_json(constant: str) -> None:
    # Python's own encoder writes NaN and Infinity, and no other parser reads them.
    raise ValueError(f"{constant} is not JSON")
