"""Without a collector nothing of OpenTelemetry runs, and no library sends anything of its own."""

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fakes.local_worker import LocalWorker
from tests.files import ROOT
from tests.patience import PATIENCE_S, start
from tests.servers import warm_python

TELEMETRY = str(ROOT / "ourvidz_serverless/telemetry")


def run_script(folder: Path, script: str) -> Any:
    """The JSON that a script prints, in a process of its own."""
    file = folder / "script.py"
    file.write_text(script)
    env = {**os.environ, **warm_python.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = warm_python.run([str(file)], env=env, cwd=folder, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_worker_without_a_collector_imports_nothing_of_opentelemetry(tmp_path: Path) -> None:
    script = """
import json, pathlib, sys
from tests.fakes.local_worker import LocalWorker
document = LocalWorker(pathlib.Path("assets")).run()
loaded = [name for name in sys.modules if name.startswith("opentelemetry")]
print(json.dumps([document.status, loaded]))
"""
    assert run_script(tmp_path, script) == ["completed", []]


def threads() -> int:
    """How many threads send telemetry."""
    return sum(thread.name == "telemetry" for thread in threading.enumerate())


def test_a_job_without_a_collector_makes_two_calls_of_telemetry_and_no_thread(
    local: Callable[..., LocalWorker],
) -> None:
    before = threads()
    at, calls = local(), Counter[str]()

    def count(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(TELEMETRY):
            calls[frame.f_code.co_name] += 1

    def run() -> None:
        sys.setprofile(count)
        try:
            at.run()
        finally:
            sys.setprofile(None)

    start(run).result(PATIENCE_S)

    assert calls == {"begin": 1, "end": 1}
    assert threads() - before <= 0


def test_fastapi_adds_no_spans_of_its_own(tmp_path: Path) -> None:
    # They would hold the query of a request, if any library set a global provider.
    script = """
import json, pathlib
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
from tests.fakes.local_worker import LocalWorker
from tests.servers.http_service import ServedHttp
at = LocalWorker(pathlib.Path("assets"))
with ServedHttp(at.settings, at.worker) as http:
    status = http.get("/health?zebra=1").status_code
print(json.dumps([status, [span.name for span in exporter.get_finished_spans()]]))
"""
    assert run_script(tmp_path, script) == [200, []]
