"""What each fault of each dependency does to a job: `python -m tests.faults`.

Prints the table of docs/reliability.md. Between the worker and a real other side stands a proxy
that misbehaves in one way, for ever or once.
"""

import io
import json
import logging
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.s3 import S3Storage
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.guard.rate_limits import RateLimits, RedisCounter
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

#: What a try may take: as good as for ever where an answer comes, and soon over where none does.
PATIENCE_S = {"timeout": 0.3, "drip": 0.3}

RATE = Rate(100, 3600, "100/hour")


@dataclass(frozen=True)
class Outcome:
    """How a job ended, after how many tries, and what the other side saw of it."""

    document: Document
    tries: int
    audit: Mapping[str, Any]
    kept: list[str]
    seen: Any


def policy(fault: Fault, patience_s: float | None = None) -> Retry:
    return Retry(base_s=0.01, try_s=patience_s or PATIENCE_S.get(fault, 30.0))


class Pictures(LocalServer):
    """A host of reference pictures, all the same."""

    def __init__(self, picture: bytes) -> None:
        super().__init__()
        self.picture, self.asked = picture, 0

    def answer(self, request: Request) -> Answer:
        with self.changed:
            self.asked += 1
        return Answer(200, self.picture, {"Content-Type": "image/png"})


class World:
    """The real other sides, up for as long as the tests run."""

    def __init__(self, folder: Path, redis: RedisServer, s3: SeaweedServer, picture: bytes) -> None:
        self.folder, self.redis, self.s3, self.picture = folder, redis, s3, picture
        authority = write_authority(folder)
        self.server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.server_tls.load_cert_chain(authority / "host.pem")
        self.client_tls = ssl.create_default_context(cafile=authority / "ca.pem")

    def reference(self, script: list[Fault], patience: Retry, *, required: bool = False) -> Outcome:
        with (
            Pictures(self.picture) as host,
            BrokenProxy(host.url, script, self.server_tls) as proxy,
        ):
            reach = ReferencePolicy(
                deadline_s=patience.try_s,
                retry=patience,
                resolve=lambda name: ["127.0.0.1"],
                is_public=lambda address: True,
                port=proxy.port,
                tls=self.client_tls,
            )
            payload = sdxl_payload(
                config={"reference_required": required},
                metadata={"reference_image_url": "https://images.example/a.png"},
            )
            return self._run(proxy, payload, lambda: host.asked, policy=reach)

    def supabase(self, script: list[Fault], patience: Retry) -> Outcome:
        with SupabaseServer() as server, BrokenProxy(server.url, script) as proxy:
            store = SupabaseStorage(
                proxy.url, server.service_key, "workspace-temp", policy=patience
            )
            return self._run(
                proxy, sdxl_payload(), lambda: [key for _, key in server.objects], storage=store
            )

    def bucket(self, script: list[Fault], patience: Retry) -> Outcome:
        def store_at(endpoint: str) -> S3Storage:
            return S3Storage(
                bucket=self.s3.bucket,
                endpoint=endpoint,
                key_id=self.s3.access_key,
                secret=self.s3.secret_key,
                region="us-east-1",
                policy=patience,
            )

        direct = store_at(self.s3.endpoint)
        for key in sorted(direct.keys()):
            direct.delete(key)
        with BrokenProxy(self.s3.endpoint, script) as proxy:
            return self._run(
                proxy, sdxl_payload(), lambda: sorted(direct.keys()), storage=store_at(proxy.url)
            )

    def receiver(self, script: list[Fault], patience: Retry) -> Outcome:
        with CallbackReceiver() as server, BrokenProxy(server.url, script) as proxy:
            callback = Callback(proxy.url, server.secret, policy=patience)
            return self._run(proxy, sdxl_payload(), lambda: server.received, callback=callback)

    def limits(self, script: list[Fault], patience: Retry, *, fail_open: bool = True) -> Outcome:
        self.redis.call("FLUSHALL")
        with (
            RedisRestServer(self.redis) as rest_server,
            BrokenProxy(rest_server.url, script) as proxy,
        ):
            settings = Settings(rate_limit_user=str(RATE), rate_limit_fail_open=fail_open)
            redis = Upstash(proxy.url, rest_server.token)
            limits = RateLimits({"user": RATE}, RedisCounter(redis, "e", patience))
            return self._run(
                proxy,
                sdxl_payload(),
                lambda: len(rest_server.pipelines),
                settings=settings,
                limits=limits,
            )

    def _run(self, proxy: BrokenProxy, payload: Any, seen: Any, **parts: Any) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self.folder) as root, audited() as lines:
            local = LocalWorker(Path(root), **parts)
            document = local.run(payload)
            kept = [key for key in local.stored() if "callback." in key]
        return Outcome(document, proxy.tries, json.loads(lines[-1].getMessage()), kept, seen())


@contextmanager
def audited() -> Iterator[list[logging.LogRecord]]:
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


DEPENDENCIES = {
    "reference host": World.reference,
    "storage (Supabase)": World.supabase,
    "storage (S3)": World.bucket,
    "callback receiver": World.receiver,
    "Redis": World.limits,
}


@contextmanager
def world(folder: Path, s3: SeaweedServer) -> Iterator[World]:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(picture, "PNG")
    with RedisServer() as redis:
        yield World(folder, redis, s3, picture.getvalue())


def table() -> str:
    """The tries that each dependency gets under each fault, as the document shows them."""
    rows = [f"| tries | {' | '.join(FAULTS)} |", "|---" * (1 + len(FAULTS)) + "|"]
    with (
        tempfile.TemporaryDirectory() as folder,
        SeaweedServer() as s3,
        world(Path(folder), s3) as these,
    ):
        for name, run in DEPENDENCIES.items():
            tries = [str(run(these, [fault], policy(fault)).tries) for fault in FAULTS]
            rows.append(f"| {name} | {' | '.join(tries)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
