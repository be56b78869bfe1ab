"""RunPod's API, emulated for the real SDK loop in a subprocess and for clients.

    with Platform() as platform, WorkerProcess(platform, "handler.py"):
        job = platform.submit({"prompt": "a green tree"})
        assert platform.result(job)["output"] == ...
        assert platform.status(job)["status"] == "COMPLETED"

Callers find RunPod's operations at `caller_url`, with `caller_key` as the bearer: run, runsync,
status, stream, cancel, health and `openai/v1/...` of each endpoint.

It follows RunPod's documentation, and the observed behaviour of the real API:

- `/run` accepts 10 MB and `/runsync` 20 MB, and a result may be as large. A result that is too
large
  or no JSON is refused and lost.
- A job ends as TIMED_OUT after its `policy.executionTimeout`, and its worker gets a stop signal. So
  does a job that no worker takes within its `policy.ttl`.
- A result is deleted 30 minutes after its job's end, the result of `/runsync` after one minute.
- The jobs of a worker that sends no heartbeat any more are given to another worker.
- Polls are held, and a job is handed out even if the worker has disconnected. A cancel becomes a
  stop signal at once. The last post for a job decides what the caller sees.

`skip` lets time pass in a test.
"""

import json
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, LocalServer, Request, json_answer

RUN_LIMIT = 10 * 1000 * 1000
RUNSYNC_LIMIT = 20 * 1000 * 1000

#: The policy of a job without one, in milliseconds.
EXECUTION_TIMEOUT_MS, TTL_MS = 600_000, 86_400_000

#: How long a result is kept after its job's end, in seconds: of `/run`, and of `/runsync`.
RUN_RETENTION_S, RUNSYNC_RETENTION_S = 30 * 60, 60

#: The other fields of a request besides `input`.
TOP = ("webhook", "policy", "s3Config")

#: How often the time limits are checked, in seconds.
TICK_S = 0.1

#: How long `/runsync` waits by default, in milliseconds.
RUNSYNC_WAIT_MS = 90_000

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
NOTHING = Answer(204)


class ResultDropped(Exception):
    """The worker posted a result and the platform refused it: the caller will never see it."""


class TooLarge(Exception):
    """A request is larger than its operation takes."""


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
class PlatformJob:
    given: dict[str, Any]
    endpoint: str
    is_sync: bool
    submitted_at: float
    status: Status = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str = ""
    taken_at: float = 0.0
    ended_at: float | None = None
    num_retries: int = 0
    updates: list[Update] = field(default_factory=list)
    stream: list[Any] = field(default_factory=list)
    num_streamed: int = 0

    @property
    def ended(self) -> bool:
        return self.status not in ("IN_QUEUE", "IN_PROGRESS")

    @property
    def limit(self) -> int:
        return RUNSYNC_LIMIT if self.is_sync else RUN_LIMIT

    def is_overdue(self, now: float) -> bool:
        policy = self.given.get("policy") or {}
        if self.status == "IN_QUEUE":
            return now - self.submitted_at > policy.get("ttl", TTL_MS) / 1000
        timeout_ms = policy.get("executionTimeout", EXECUTION_TIMEOUT_MS)
        return self.status == "IN_PROGRESS" and now - self.taken_at > timeout_ms / 1000

    def is_forgotten(self, now: float) -> bool:
        retention_s = RUNSYNC_RETENTION_S if self.is_sync else RUN_RETENTION_S
        return self.ended_at is not None and now - self.ended_at > retention_s

    def apply(self, document: dict[str, Any]) -> None:
        if self.status in ("CANCELLED", "TIMED_OUT"):
            return
        self.output, self.error = document.get("output"), None
        error = document.get("error")
        if document.get("status") == "IN_PROGRESS":
            # Also after the result: late progress puts a finished job back in progress for ever.
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
    posts of results, unless a test says otherwise. A worker is dead, and its jobs are given to
    another, once it has sent no heartbeat for `dead_after` seconds.
    """

    script_path = "/job-done/"

    def __init__(
        self,
        hold: float = 1.0,
        api_key: str = "rp-local-key",
        dead_after: float = 30.0,
        port: int = 0,
    ) -> None:
        super().__init__(port)
        self.hold = hold
        self.api_key = api_key
        self.dead_after = dead_after
        self.caller_url = f"{self.url}/v2"
        self.caller_key = "rpa-caller-key"
        self.polls: Counter[str] = Counter()
        self.pings: list[Ping] = []
        self._home = tempfile.TemporaryDirectory(prefix="runpod-home-")
        self._queues: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._jobs: dict[str, PlatformJob] = {}
        self._stops: defaultdict[str, list[str]] = defaultdict(list)
        self._removals: Counter[str] = Counter()
        self._seen: dict[str, float] = {}
        self._skipped = 0.0

    def __enter__(self) -> Self:
        threading.Thread(target=self._let_time_pass, daemon=True).start()
        return super().__enter__()

    def skip(self, seconds: float) -> None:
        """Let time pass for jobs and results, but not for heartbeats."""
        with self.changed:
            self._skipped += seconds
            self._pass_time()

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
        limit, size = RUNSYNC_LIMIT if sync else RUN_LIMIT, len(json.dumps({"input": input, **top}))
        if size > limit:
            raise TooLarge(f"{size} bytes are more than {limit}")
        id = id or str(uuid.uuid4())
        with self.changed:
            given = {"id": id, "input": input, **top}
            job = self._jobs.setdefault(id, PlatformJob(given, endpoint, sync, self._now()))
            job.given = given
            if job.status != "IN_PROGRESS":
                job.status, job.submitted_at, job.ended_at = "IN_QUEUE", self._now(), None
            self._queues[endpoint].append(given)
            self.changed.notify_all()
        return id

    def result(self, id: str, timeout: float = PATIENCE_S, nth: int = 1) -> dict[str, Any]:
        """Wait for a job's terminal document, or for the nth if the job was delivered n times."""

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
        """The items that a generator handler has yielded so far."""
        with self.changed:
            return list(self._jobs[id].stream)

    def status(self, id: str) -> dict[str, Any]:
        """The body of `GET /status/{id}`; raises LookupError for a job that was deleted."""
        with self.changed:
            if not self._has(id):
                raise LookupError(f"there is no job {id}")
            job = self._jobs[id]
            shown = {"id": id, "status": job.status, "output": job.output, "error": job.error}
        return {name: value for name, value in shown.items() if value is not None}

    def end(self, id: str, items: list[Any]) -> None:
        """End a queued job without a worker, with these items as its stream and its output."""
        with self.changed:
            job = self._jobs[id]
            self._unqueue(id, job)
            job.stream = list(items)
            job.apply({"output": list(items)})

    def endpoint_of(self, id: str) -> str:
        """The endpoint that a job was submitted to."""
        return self._jobs[id].endpoint

    def queued(self, endpoint: str = "local") -> list[dict[str, Any]]:
        """The jobs that wait for a worker of an endpoint, as a worker would get them."""
        with self.changed:
            return list(self._queues[endpoint])

    def cancel(self, id: str) -> None:
        """Remove a queued job, or send a stop signal for a running one.

        Each call sends one stop signal, so a second call is a second signal.
        """
        with self.changed:
            job = self._jobs[id]
            if job.worker and job.status in ("IN_PROGRESS", "CANCELLED"):
                self._stops[job.worker].append(id)
            self._unqueue(id, job)
            if job.status not in ("COMPLETED", "FAILED", "TIMED_OUT"):
                job.status, job.output = "CANCELLED", None
                job.ended_at = job.ended_at or self._now()
            self.changed.notify_all()

    def remove(self, worker: str) -> None:
        """End the held polls of a worker that is gone. A new one may have its id."""
        with self.changed:
            self._removals[worker] += 1
            self.changed.notify_all()

    def stop(self) -> None:
        super().stop()
        self._home.cleanup()

    def scripted(self, request: Request) -> bool:
        is_progress = self.script_path == "/job-done/" and b'"IN_PROGRESS"' in request.body[:40]
        return self.script_path in request.path and not is_progress

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
            case ["POST", "run" | "runsync" as way]:
                return self._submitted(request, endpoint, is_sync=way == "runsync")
            case ["GET", "status", id] if self._has(id):
                return json_answer(self.status(id))
            case ["GET", "stream", id] if self._has(id):
                return self.next_items(self._jobs[id])
            case ["POST", "cancel", id] if self._has(id):
                self.cancel(id)
                return json_answer({"id": id, "status": self.status(id)["status"]})
            case ["GET", "health"]:
                return json_answer(self.health(endpoint))
            case ["GET" | "POST", "openai", *path]:
                return self._openai(request, endpoint, "/" + "/".join(path))
        return json_answer({"error": "not found"}, 404)

    def _answer_worker(self, request: Request, endpoint: str, operation: list[str]) -> Answer:
        match operation:
            case ["job-take", worker]:
                jobs = self._take(endpoint, worker, 1)
                return json_answer(jobs[0]) if jobs else NOTHING
            case ["job-take-batch", worker]:
                jobs = self._take(endpoint, worker, int(request.query["batch_size"]))
                return json_answer(jobs) if jobs else NOTHING
            case ["job-stop", worker]:
                stops = self._stop_signals(worker)
                return json_answer({"jobsToStop": stops}) if stops else NOTHING
            case ["job-done", _, id] if id in self._jobs:
                return self._done(self._jobs[id], request)
            case ["job-stream", _, id] if id in self._jobs:
                return self._take_item(self._jobs[id], request)
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
                "retried": sum(job.num_retries for job in jobs),
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

    def _submitted(self, request: Request, endpoint: str, is_sync: bool) -> Answer:
        try:
            body = json.loads(request.body)
            top = {name: body[name] for name in TOP if name in body}
            id = self.submit(body["input"], sync=is_sync, endpoint=endpoint, **top)
        except TooLarge as exc:
            return json_answer({"error": str(exc)}, 400)
        except (ValueError, KeyError, TypeError):
            return json_answer({"error": "input is missing"}, 400)
        # Also if a worker has taken the job by now.
        return (
            self._runsync(request, id) if is_sync else json_answer({"id": id, "status": "IN_QUEUE"})
        )

    def _openai(self, request: Request, endpoint: str, route: str) -> Answer:
        """A call of OpenAI's protocol as a job.

        RunPod documents the route for its own worker for vLLM alone. From that worker's source:
        the job's input is `openai_route` and `openai_input`; its one item is the answer's body, or
        its items are texts, and together the events of a stream. How RunPod answers for a job that
        failed is documented nowhere: here it is 500 with the job's error.
        """
        body = json.loads(request.body) if request.body else {}
        call = {"openai_route": route, "openai_input": body}
        id = self.submit(call, sync=True, endpoint=endpoint)
        if body.get("stream") is True:
            pieces = self._events(self._jobs[id])
            return Answer(200, headers={"Content-Type": "text/event-stream"}, pieces=pieces)
        with self.changed:
            self.changed.wait_for(lambda: self._jobs[id].ended or self.closing.is_set())
        job = self._jobs[id]
        if job.status != "COMPLETED":
            return json_answer({"error": job.error or job.status}, 500)
        return json_answer(job.output[0] if isinstance(job.output, list) else job.output)

    def _events(self, job: PlatformJob) -> Iterator[bytes]:
        """The items of a job that are texts, each as soon as it is there."""
        while (news := self._next_of(job)) is not None:
            yield from (item.encode() for item in news if isinstance(item, str))

    def _next_of(self, job: PlatformJob) -> list[Any] | None:
        """The items since the last call; None at the job's end."""
        with self.changed:
            self.changed.wait_for(
                lambda: len(job.stream) > job.num_streamed or job.ended or self.closing.is_set()
            )
            news, job.num_streamed = job.stream[job.num_streamed :], len(job.stream)
        return news or None

    def _runsync(self, request: Request, id: str) -> Answer:
        seconds = int(request.query.get("wait", RUNSYNC_WAIT_MS)) / 1000
        with self.changed:
            self.changed.wait_for(lambda: self._jobs[id].ended or self.closing.is_set(), seconds)
        return json_answer(self.status(id))

    def next_items(self, job: PlatformJob) -> Answer:
        """The items since the last call; waits while there are none."""
        with self.changed:
            self.changed.wait_for(
                lambda: len(job.stream) > job.num_streamed or job.ended, self.hold
            )
            news, job.num_streamed = job.stream[job.num_streamed :], len(job.stream)
            return json_answer(
                {"status": job.status, "stream": [{"output": item} for item in news]}
            )

    def _take(self, endpoint: str, worker: str, count: int) -> list[dict[str, Any]]:
        with self.changed:
            self.polls[worker] += 1
            self._workers[endpoint].add(worker)
            self.changed.notify_all()
            removals = self._removals[worker]

            def is_over() -> bool:
                return self.closing.is_set() or self._removals[worker] > removals

            self.changed.wait_for(lambda: self._queues[endpoint] or is_over(), self.hold)
            if is_over():
                return []
            queue = self._queues[endpoint]
            given = [queue.popleft() for _ in range(min(count, len(queue)))]
            for job in (self._jobs[each["id"]] for each in given):
                job.status, job.worker, job.taken_at = "IN_PROGRESS", worker, self._now()
            self._seen[worker] = time.monotonic()
            self.changed.notify_all()
        return given

    def _stop_signals(self, worker: str) -> list[str]:
        with self.changed:
            self.changed.wait_for(lambda: self._stops[worker] or self.closing.is_set(), self.hold)
            return self._stops.pop(worker, [])

    def _done(self, job: PlatformJob, request: Request) -> Answer:
        document, refused = _read(request.body, job.limit)
        is_stream = request.query.get("isStream") == "true"
        update = Update(request.at, document, len(request.body), is_stream, refused)
        with self.changed:
            job.updates.append(update)
            if not refused:
                job.apply(document)
                if job.ended:
                    job.ended_at = job.ended_at or self._now()
            self.changed.notify_all()
        return json_answer({"message": refused}, 400) if refused else json_answer({})

    def _take_item(self, job: PlatformJob, request: Request) -> Answer:
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
            self._seen[worker] = time.monotonic()
            self.pings.append(Ping(request.at, worker, [*filter(None, jobs)], request.query))
            self.changed.notify_all()
        return json_answer({})

    def _now(self) -> float:
        return time.monotonic() + self._skipped

    def _has(self, id: str) -> bool:
        return id in self._jobs and not self._jobs[id].is_forgotten(self._now())

    def _unqueue(self, id: str, job: PlatformJob) -> None:
        self._queues[job.endpoint] = deque(
            each for each in self._queues[job.endpoint] if each["id"] != id
        )

    def _let_time_pass(self) -> None:
        while not self.closing.wait(TICK_S):
            with self.changed:
                self._pass_time()

    def _pass_time(self) -> None:
        """End the jobs whose time is over, and queue the jobs of dead workers again."""
        for id, job in self._jobs.items():
            if job.is_overdue(self._now()):
                if job.worker:
                    self._stops[job.worker].append(id)
                self._unqueue(id, job)
                job.status, job.output, job.ended_at = "TIMED_OUT", None, self._now()
                self.changed.notify_all()
            elif job.status == "IN_PROGRESS" and self._is_dead(job.worker):
                job.status, job.worker = "IN_QUEUE", ""
                job.num_retries += 1
                self._queues[job.endpoint].appendleft(job.given)
                self.changed.notify_all()

    def _is_dead(self, worker: str) -> bool:
        return time.monotonic() - self._seen[worker] > self.dead_after


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
    # Python's encoder writes NaN and Infinity, which are not JSON.
    raise ValueError(f"{constant} is not JSON")
