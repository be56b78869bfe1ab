"""The state of the HTTP service: the worker, its jobs, and the threads for short calls."""

from __future__ import annotations

from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.serving.http.job_store import CallThreads, JobStore
from ourvidz_serverless.serving.http.request_checks import MAX_REQUESTS, MAX_REQUESTS_WITHOUT_KEY
from ourvidz_serverless.serving.registration import Registration
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker

#: Threads that read bodies and payloads.
READER_THREADS = 4

#: Threads for `admin_utilities`, and how many more of its calls may wait for one.
ADMIN_THREADS = 8

#: The `Retry-After`, in seconds, while the models are loading.
LOADING_RETRY_S = 5


class HttpService:
    """What the routes share. It exists before the worker: models load after the socket opens."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.job_store = JobStore(
            settings.exclusive_places, settings.shared_places, settings.http_backlog
        )
        # Two pools: bodies are still read while every thread for administrators is busy.
        self.readers = CallThreads("read", READER_THREADS, MAX_REQUESTS + MAX_REQUESTS_WITHOUT_KEY)
        self.administrators = CallThreads("administer", ADMIN_THREADS, ADMIN_THREADS)
        self.is_closing = False
        self._worker: Worker | None = None
        self._registration = Registration.of(settings)

    @property
    def own_hosts(self) -> frozenset[str]:
        """The host names, besides loopback names, under which callers reach the worker."""
        registered = self._registration.host if self._registration else None
        return frozenset([*self.settings.allowed_hosts, *([registered] if registered else [])])

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes jobs."""
        return self._worker is not None and not self.is_closing and not self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether the worker's device has failed. It can serve nothing any more."""
        return self._worker is not None and self._worker.is_lost

    @property
    def worker(self) -> Worker:
        """The worker; raises WorkerUnavailable while its models are loading."""
        if self._worker is None:
            raise WorkerUnavailable("the models are being loaded", retry_after=LOADING_RETRY_S)
        return self._worker

    def open(self, worker: Worker) -> None:
        """Serve with this worker from now on; register its address if `REGISTER_WORKER` is set."""
        self._worker = worker
        if self.is_closing:
            worker.close(0)
        elif self._registration:
            self._registration.announce()

    def close(self) -> None:
        """Take no more jobs. Running jobs have `SHUTDOWN_GRACE_S` to end."""
        self.is_closing = True
        if self._registration:
            self._registration.close()
        if self._worker:
            self._worker.close(self.settings.shutdown_grace_s)

    async def shutdown(self) -> None:
        """Wait until the last job has ended, then end the threads."""
        await self.job_store.close()
        self.readers.close()
        self.administrators.close()

    def flush(self) -> None:
        """Send the worker's telemetry that is left, within a few seconds."""
        if self._worker:
            self._worker.flush()
