"""RunPod's side of the job API, for the real SDK loop in a subprocess to talk to.

    with Platform() as platform, WorkerProcess(platform, "handler.py"):
        job = platform.submit({"prompt": "a red square"})
        assert platform.result(job)["output"] == ...
        assert platform.status(job)["status"] == "COMPLETED"

A caller with an HTTP client of its own finds RunPod's operations under `caller_url`, with
`caller_key` for a bearer: run, runsync, status, stream, cancel and health of each endpoint.

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

from tests.support.patience import PATIENCE_S
from tests.support.web import Answer, LocalServer, Request, json_answer

RUN_LIMIT = 10 * 1000 * 1000
RUNSYNC_LIMIT = 20 * 1000 * 1000

# A stop signal that comes before the SDK has made the job's task, up to 0.1 s after the take, is
# lost in the SDK. A person who cancels is slower than that.
SOONEST_STOP = 0.5

#: How long `/runsync` waits where the caller does not say, in milliseconds.
RUNSYNC_WAIT_MS = 90_000

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
    endpoint: str
    status: Status = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str = ""
    taken_at: float = 0.0
    updates: list[Update] = field(default_factory=list)
    stream: list[Any] = field(default_factory=list)
    num_streamed: int = 0

    @property
    def ended(self) -> bool:
        return self.status not in ("IN_QUEUE", "IN_PROGRESS")

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
    """RunPod endpoints, each with a queue, for use in a `with` statement.

    `script([...])` (see `LocalServer`) applies to the requests whose path holds `script_path`: the
    posts of results and progress, unless a test says otherwise.
    """

    script_path = "/job-done/"

    def __init__(self, hold: float = 1.0, api_key: str = "rp-local-key") -> None:
        super().__init__()
        self.hold = hold
        self.api_key = api_key
        self.caller_url = f"{self.url}/v2"
        self.caller_key = "rpa-caller-key"
        self.polls: Counter[str] = Counter()
        self.pings: list[Ping] = []
        self._home = tempfile.TemporaryDirectory(prefix="runpod-home-")
        self._queues: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._jobs: dict[str, _Job] = {}
        self._stops: defaultdict[str, list[str]] = defaultdict(list)

    def env(self, worker_id: str = "worker-1", endpoint: str = "local") -> dict[str, str]:
        """The environment that makes the SDK in a subprocess a worker of an endpoint."""
        api = f"{self.url}/v2/{endpoint}"
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

    def submit(
        self,
        input: Any,
        id: str | None = None,
        sync: bool = False,
        endpoint: str = "local",
        **top: Any,
    ) -> str:
        """Queue a job and return its id. The same id again is a second delivery of that job.

        `sync` is `/runsync` with its larger limit; `top` stands beside `input`, as `s3Config` does.
        """
        id = id or str(uuid.uuid4())
        with self.changed:
            limit = RUNSYNC_LIMIT if sync else RUN_LIMIT
            job = self._jobs.setdefault(id, _Job(limit, endpoint))
            if job.status != "IN_PROGRESS":
                job.status = "IN_QUEUE"
            self._queues[endpoint].append({"id": id, "input": input, **top})
            self.changed.notify_all()
        return id

    def result(self, id: str, timeout: float = PATIENCE_S, nth: int = 1) -> dict[str, Any]:
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

    def wait_for_status(
        self, id: str, status: Status, timeout: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Wait until the caller would see this status; return what `status` returns."""
        what = f"{id} to be {status}"
        self.wait_until(lambda: self._jobs[id].status == status, timeout, what)
        return self.status(id)

    def wait_for_updates(
        self, id: str, count: int = 1, timeout: float = PATIENCE_S
    ) -> list[Update]:
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

    def endpoint_of(self, id: str) -> str:
        """The endpoint that a job was submitted to."""
        return self._jobs[id].endpoint

    def queued(self, endpoint: str = "local") -> list[dict[str, Any]]:
        """The jobs that wait for a worker of an endpoint, as a worker would get them."""
        with self.changed:
            return list(self._queues[endpoint])

    def cancel(self, id: str) -> None:
        """Take a queued job back, or have its worker told to stop a running one.

        Each call sends one stop signal, so a second call is a second signal.
        """
        time.sleep(max(0.0, self._jobs[id].taken_at + SOONEST_STOP - time.monotonic()))
        with self.changed:
            job = self._jobs[id]
            if job.worker and job.status in ("IN_PROGRESS", "CANCELLED"):
                self._stops[job.worker].append(id)
            queue = self._queues[job.endpoint]
            self._queues[job.endpoint] = deque(each for each in queue if each["id"] != id)
            if job.status not in ("COMPLETED", "FAILED"):
                job.status, job.output = "CANCELLED", None
            self.changed.notify_all()

    def stop(self) -> None:
        super().stop()
        self._home.cleanup()

    def scripted(self, request: Request) -> bool:
        return self.script_path in request.path

    def answer(self, request: Request) -> Answer:
        key, (endpoint, *operation) = (
            request.headers.get("Authorization"),
            request.path.split("/")[2:],
        )
        if key == f"Bearer {self.caller_key}":
            return self._answer_caller(request, endpoint, operation)
        return (
            self._answer_worker(request, endpoint, operation)
            if key == self.api_key
            else Answer(401)
        )

    def _answer_caller(self, request: Request, endpoint: str, operation: list[str]) -> Answer:
        match [request.method, *operation]:
            case ["POST", "run"]:
                return self._run(request, endpoint)
            case ["POST", "runsync"]:
                return self._runsync(request, endpoint)
            case ["GET", "status", id] if id in self._jobs:
                return json_answer(self.status(id))
            case ["GET", "stream", id] if id in self._jobs:
                return self._stream_on(self._jobs[id])
            case ["POST", "cancel", id] if id in self._jobs:
                self.cancel(id)
                return json_answer({"id": id, "status": self.status(id)["status"]})
            case ["GET", "health"]:
                return json_answer(self.health(endpoint))
        return json_answer({"error": "not found"}, 404)

    def _answer_worker(self, request: Request, endpoint: str, operation: list[str]) -> Answer:
        match operation:
            case ["job-take", worker]:
                jobs = self._take(request, endpoint, worker, 1)
                return json_answer(jobs[0]) if jobs else NOTHING
            case ["job-take-batch", worker]:
                jobs = self._take(request, endpoint, worker, int(request.query["batch_size"]))
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

    def health(self, endpoint: str = "local") -> dict[str, dict[str, int]]:
        """What `GET /health` shows: an endpoint's jobs and workers by their state."""
        with self.changed:
            jobs = [job for job in self._jobs.values() if job.endpoint == endpoint]
            states = Counter(job.status for job in jobs)
            busy = {job.worker for job in jobs if job.status == "IN_PROGRESS"}
            idle = len(self._workers[endpoint] - busy)
        return {
            "jobs": {
                "completed": states["COMPLETED"],
                "failed": states["FAILED"],
                "inProgress": states["IN_PROGRESS"],
                "inQueue": states["IN_QUEUE"],
                "retried": 0,
            },
            "workers": {
                "idle": idle,
                "initializing": 0,
                "ready": idle,
                "running": len(busy),
                "throttled": 0,
                "unhealthy": 0,
            },
        }

    def _run(self, request: Request, endpoint: str) -> Answer:
        body = json.loads(request.body)
        if "input" not in body:
            return json_answer({"error": "input is missing"}, 400)
        return json_answer({"id": self.submit(endpoint=endpoint, **body), "status": "IN_QUEUE"})

    def _runsync(self, request: Request, endpoint: str) -> Answer:
        id = self.submit(endpoint=endpoint, sync=True, **json.loads(request.body))
        seconds = int(request.query.get("wait", RUNSYNC_WAIT_MS)) / 1000
        with self.changed:
            self.changed.wait_for(lambda: self._jobs[id].ended or self.closing.is_set(), seconds)
        return json_answer(self.status(id))

    def _stream_on(self, job: _Job) -> Answer:
        """What the job has streamed since it was last asked; held while there is nothing."""
        with self.changed:
            self.changed.wait_for(
                lambda: len(job.stream) > job.num_streamed or job.ended, self.hold
            )
            news, job.num_streamed = job.stream[job.num_streamed :], len(job.stream)
            return json_answer(
                {"status": job.status, "stream": [{"output": item} for item in news]}
            )

    def _take(
        self, request: Request, endpoint: str, worker: str, count: int
    ) -> list[dict[str, Any]]:
        with self.changed:
            self.polls[worker] += 1
            self._workers[endpoint].add(worker)
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: self._queues[endpoint] or self.closing.is_set(), self.hold
            )
            if self.closing.is_set() or request.hung_up():
                return []
            queue = self._queues[endpoint]
            jobs = [queue.popleft() for _ in range(min(count, len(queue)))]
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
