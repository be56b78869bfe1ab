"""Mixed jobs on a device that is too small for all models: does anything leak?

    python -m benchmarks.mixed --jobs 2000

RunPod's real loop, in another process, serves SDXL, chat and WAN with pocket models and a memory
budget that does not hold them all. Every job must complete. One table has the process's memory,
open files, threads and temporary files after each twentieth of the jobs. The other one has the
moves of each model by the ledger: onto the device and off it, to the host's memory, dropped, and
read again from the disk.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from tests.fakes.local_worker import chat_payload, sdxl_payload, wan_payload
from tests.fakes.tiny_chat import tiny_folder
from tests.servers.handler import start
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

#: Of forty jobs. A picture takes about a hundred times as long as a reply of the tiny chat model.
SHARES = {"sdxl": 2, "wan": 1, "chat": 25, "admin": 12}

#: GiB. The pocket SDXL takes 10.6 MiB, the pocket WAN about as much, and their jobs need memory
#: too: each evicts the other.
BUDGET = 0.022

AT_ONCE = 8

#: The columns of the ledger's table: keys of a model in `memory_report`.
FACTS = (
    "name",
    "memory",
    "state",
    "loads",
    "evictions",
    "moved_to_host",
    "dropped",
    "read_again",
)
OPERATIONS = ("health", "memory_report", "status", "pressure_check", "job_status", "memory_status")


GROWTH, LEDGER = TITLES = ("A worker's process over mixed jobs", "The ledger after them")


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--jobs", type=int, help="200, or 2000 where it is not quick")
    parser.add_argument("--budget", type=float, default=BUDGET, help="VRAM_BUDGET_GB")
    options = parser.parse_args(argv)
    jobs = options.jobs or (len(SHARES) if options.tiny else 200 if options.quick else 2000)
    sizes: list[list[object]] = []
    with MixedJobs(options.budget) as mixed:
        step = max(jobs // 20, 1)
        for done in mixed.run(jobs):
            if done % step == 0 or done == jobs:
                sizes.append([done, *mixed.size().values()])
                print(*sizes[-1], flush=True)
        models = [[model[key] for key in FACTS] for model in mixed.report()["models"]]
    headers = ["jobs", "memory MiB", "open files", "threads", "temporary files"]
    tables = [report.table(GROWTH, headers, sizes), report.table(LEDGER, FACTS, models)]
    report.finish("mixed", tables, options.json)


class MixedJobs:
    """A worker for all families behind RunPod's loop, and random jobs for it: a context manager."""

    def __init__(self, budget: float, seed: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mixed-")
        self.root, self._rng = Path(self._folder.name), random.Random(seed)
        (self.root / "tmp").mkdir()
        self._env = {
            "FAMILIES": "sdxl,chat,wan",
            "CHAT_INSTRUCT_MODEL": tiny_folder(self.root / "chat", context=512),
            "CHAT_KV_TOKENS": "4096",
            "CHAT_PREFIX_TOKENS": "1024",
            "CONCURRENCY": str(AT_ONCE),
            "VRAM_BUDGET_GB": str(budget),
            "STORAGE_URL": f"file:{self.root / 'assets'}",
            "TMPDIR": str(self.root / "tmp"),
            "LOG_LEVEL": "WARNING",
        }
        self._count = 0

    def __enter__(self) -> MixedJobs:
        self.platform = Platform()
        self.platform.__enter__()
        self.worker: WorkerProcess = start(self.platform, **self._env)
        self.worker.ready_timeout = 300
        self.worker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.worker.__exit__(*error)
        self.platform.__exit__(*error)
        self._folder.cleanup()

    def run(self, count: int, timeout: float = 600) -> Iterator[int]:
        """Run `count` random jobs, some at once, and yield after each how many are done.

        Raises AssertionError for a job that does not complete.
        """
        families = self._rng.choices(list(SHARES), weights=list(SHARES.values()), k=count)
        yield from self._run(families, timeout)

    def each_kind(self, timeout: float = 300) -> Iterator[int]:
        """The same for a few jobs of every family, alternately."""
        yield from self._run([*SHARES, *SHARES, "sdxl"], timeout)

    def _run(self, families: list[str], timeout: float) -> Iterator[int]:
        left = deque(families)
        waiting: deque[tuple[str, str]] = deque()
        for done in range(1, len(families) + 1):
            while left and len(waiting) < AT_ONCE:
                family = left.popleft()
                waiting.append((family, self._submit(family)))
            family, job = waiting.popleft()
            ended = self.platform.result(job, timeout)
            assert "output" in ended, f"{family}: {ended.get('error')}"
            assert ended["output"][-1]["status"] == "completed"
            yield done

    def report(self) -> dict[str, Any]:
        """The worker's `memory_report`."""
        question = {"type": "admin_utilities", "config": {"operation": "memory_report"}}
        job = self.platform.submit({"id": f"report-{time.time_ns()}", **question})
        document: dict[str, Any] = self.platform.result(job, 120)["output"][-1]
        return dict(document["result"])

    def size(self) -> dict[str, int]:
        """The worker process's memory in MiB, open files, threads and temporary files, now."""
        process = Path(f"/proc/{self.worker.pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return {
            "memory": int(status["VmRSS"].split()[0]) >> 10,
            "files": len(list((process / "fd").iterdir())),
            "threads": int(status["Threads"]),
            "temporary": sum(1 for _ in (self.root / "tmp").rglob("*")),
        }

    def _submit(self, family: str) -> str:
        self._count += 1
        return self.platform.submit(self._payload(family, f"{family}-{self._count}"))

    def _payload(self, family: str, name: str) -> dict[str, Any]:
        seed = self._rng.randrange(1, 1000)
        if family == "sdxl":
            return sdxl_payload(id=name, config={"seed": seed})
        if family == "wan":
            return wan_payload(id=name, config={"seed": seed})
        if family == "chat":
            return chat_payload(id=name, seed=seed, max_tokens=12)
        operation = self._rng.choice(OPERATIONS)
        config = {"operation": operation, "job_id": f"sdxl-{seed}", "user_id": "user-1"}
        return {"id": name, "type": "admin_utilities", "config": config}


if __name__ == "__main__":
    main()
