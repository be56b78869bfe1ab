"""RunPod's load balancer, emulated: requests to several HTTP workers behind one URL.

It follows https://docs.runpod.io/serverless/load-balancing/worker-affinity. Each response names
its worker in `X-Runpod-Worker-Id`. A request with that header goes to the worker that it names, and
with `strict` before the name to no other. Requests without it go to each worker in turn. An answer
is passed on as a whole, so a stream arrives at its end.
"""

import itertools
import threading
from collections.abc import Mapping

import requests

from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, LocalServer, Request

HEADER = "X-Runpod-Worker-Id"
PASSED_ON = ("Authorization", "X-API-Key", "Content-Type", "Accept")
PASSED_BACK = ("Content-Type", "Retry-After")


class LoadBalancer(LocalServer):
    """Two or more workers by their ids, each with its URL, for use in a `with` statement."""

    def __init__(self, workers: Mapping[str, str]) -> None:
        super().__init__()
        self.workers = dict(workers)
        self.served: list[tuple[str, str]] = []
        """Each request, as its path and the worker that served it."""
        self._turns = itertools.cycle(sorted(workers))
        self._choosing = threading.Lock()

    def answer(self, request: Request) -> Answer:
        mode, worker = self._asked(request)
        if worker not in self.workers:
            if mode == "strict":
                return Answer(404, b"affinity_worker_gone")
            with self._choosing:
                worker = next(self._turns)
        with self.changed:
            self.served.append((request.path, worker))
        found = requests.request(
            request.method,
            self.workers[worker] + request.path,
            params=request.query,
            data=request.body,
            headers={name: request.headers[name] for name in PASSED_ON if name in request.headers},
            timeout=PATIENCE_S,
        )
        back = {name: found.headers[name] for name in PASSED_BACK if name in found.headers}
        return Answer(found.status_code, found.content, {**back, HEADER: worker})

    @staticmethod
    def _asked(request: Request) -> tuple[str, str]:
        """The mode and the worker that a request asks for."""
        *mode, worker = request.headers.get(HEADER, "").rsplit(" ", 1)
        return "".join(mode) or "soft", worker
