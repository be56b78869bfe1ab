"""The effect of each fault of each dependency on a job: `python -m tests.faults`.

It prints the table of docs/reliability.md. A proxy between the worker and a real server causes one
fault, always or once.
"""

import io
import json
import logging
import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.guard.rate_limits import FallbackCounter, RateLimits, UpstashCounter
from ourvidz_serverless.net.retries import Retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.references.policy import ReferencePolicy
from ourvidz_serverless.settings import Rate, Settings
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.servers.broken_proxy import FAULTS, BrokenProxy, Fault
from tests.servers.certificates import write_authority
from tests.servers.local_server import Answer, LocalServer, Request
from tests.servers.redis import RedisRestServer, RedisServer
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import CallbackReceiver
from tests.servers.supabase import SupabaseStorage as SupabaseServer

#: Seconds of a try for the faults that end only with its time limit.
TRY_S = {"timeout": 0.3, "drip": 0.3}

RATE = Rate(100, 3600, "100/hour")


@dataclass(frozen=True)
class Outcome:
    """How a job ended, how many connections were tried, and what the server recorded of it.

    `kept` has the keys of documents that were stored because their callback failed.
    """

    document: Document
    tries: int
    audit: Mapping[str, Any]
    kept: list[str]
    seen: Any


def policy(fault: Fault, try_s: float | None = None) -> Retry:
    return Retry(base_s=0.01, try_s=try_s or TRY_S.get(fault, 30.0))


class PictureHost(LocalServer):
    """A host that answers every request with the same picture."""

    def __init__(self, picture: bytes) -> None:
        super().__init__()
        self.picture, self.num_requests = picture, 0

    def answer(self, request: Request) -> Answer:
        with self.changed:
            self.num_requests += 1
        return Answer(200, self.picture, {"Content-Type": "image/png"})


class Dependencies:
    """The real servers that a worker talks to. A method runs one job with one of them failing.

    `script` has the proxy's faults, connection by connection.
    """

    def __init__(self, folder: Path, redis: RedisServer, s3: SeaweedServer, picture: bytes) -> None:
        self.folder, self.redis, self.s3, self.picture = folder, redis, s3, picture
        authority = write_authority(folder)
        self.server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.server_tls.load_cert_chain(authority / "host.pem")
        self.client_tls = ssl.create_default_context(cafile=authority / "ca.pem")

    def reference(self, script: list[Fault], retry: Retry, *, required: bool = False) -> Outcome:
        with (
            PictureHost(self.picture) as host,
            BrokenProxy(host.url, script, self.server_tls) as proxy,
        ):
            references = ReferencePolicy(
                deadline_s=retry.try_s,
                retry=retry,
                resolve=lambda name: ["127.0.0.1"],
                is_public=lambda address: True,
                port=proxy.port,
                tls=self.client_tls,
            )
            payload = sdxl_payload(
                config={"reference_required": required},
                metadata={"reference_image_url": "https://images.example/a.png"},
            )
            return self._run(proxy, payload, lambda: host.num_requests, policy=references)

    def supabase(self, script: list[Fault], retry: Retry) -> Outcome:
        with SupabaseServer() as server, BrokenProxy(server.url, script) as proxy:
            store = SupabaseStorage(proxy.url, server.service_key, "workspace-temp", policy=retry)
            return self._run(
                proxy, sdxl_payload(), lambda: [key for _, key in server.objects], storage=store
            )

    def bucket(self, script: list[Fault], retry: Retry) -> Outcome:
        direct = self.s3.storage()
        for key in sorted(direct.keys()):
            direct.delete(key)
        with BrokenProxy(self.s3.endpoint, script) as proxy:
            store = self.s3.storage(endpoint=proxy.url, policy=retry)
            return self._run(proxy, sdxl_payload(), lambda: sorted(direct.keys()), storage=store)

    def receiver(self, script: list[Fault], retry: Retry) -> Outcome:
        with CallbackReceiver() as server, BrokenProxy(server.url, script) as proxy:
            callback = Callback(proxy.url, server.secret, policy=retry)
            return self._run(proxy, sdxl_payload(), lambda: server.received, callback=callback)

    def limits(self, script: list[Fault], retry: Retry, *, fail_open: bool = True) -> Outcome:
        self.redis.call("FLUSHALL")
        with (
            RedisRestServer(self.redis) as rest_server,
            BrokenProxy(rest_server.url, script) as proxy,
        ):
            settings = Settings(rate_limit_user=str(RATE), rate_limit_fail_open=fail_open)
            redis = Upstash(proxy.url, rest_server.token)
            shared = UpstashCounter(redis, "e", retry)
            limits = RateLimits({"user": RATE}, FallbackCounter(shared) if fail_open else shared)
            return self._run(
                proxy,
                sdxl_payload(),
                lambda: len(rest_server.pipelines),
                settings=settings,
                limits=limits,
            )

    def _run(
        self, proxy: BrokenProxy, payload: Any, seen: Callable[[], Any], **parts: Any
    ) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self.folder) as root, audited() as lines:
            local = LocalWorker(Path(root), **parts)
            document = local.run(payload)
            kept = [key for key in local.stored() if "callback." in key]
        return Outcome(document, proxy.tries, json.loads(lines[-1].getMessage()), kept, seen())


@contextmanager
def audited() -> Iterator[list[logging.LogRecord]]:
    """The records of the audit log within this context."""
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append
    trail = logging.getLogger("ourvidz.audit")
    trail.setLevel(logging.INFO)
    trail.addHandler(handler)
    try:
        yield lines
    finally:
        trail.removeHandler(handler)


RUNS = {
    "reference host": Dependencies.reference,
    "storage (Supabase)": Dependencies.supabase,
    "storage (S3)": Dependencies.bucket,
    "callback receiver": Dependencies.receiver,
    "Redis": Dependencies.limits,
}


@contextmanager
def running_dependencies(folder: Path, s3: SeaweedServer) -> Iterator[Dependencies]:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(picture, "PNG")
    with RedisServer() as redis:
        yield Dependencies(folder, redis, s3, picture.getvalue())


def table() -> str:
    """The tries of each dependency under each fault, as the document has them."""
    rows = [f"| tries | {' | '.join(FAULTS)} |", "|---" * (1 + len(FAULTS)) + "|"]
    with (
        tempfile.TemporaryDirectory() as folder,
        SeaweedServer() as s3,
        running_dependencies(Path(folder), s3) as servers,
    ):
        for name, run in RUNS.items():
            tries = [str(run(servers, [fault], policy(fault)).tries) for fault in FAULTS]
            rows.append(f"| {name} | {' | '.join(tries)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
