"""Posting again the documents that could not be delivered: they lie in storage, beside the assets.

    python -m ourvidz_serverless.callback replay outputs
    python -m ourvidz_serverless.callback replay s3://workspace-temp/assets

It reads the same environment as a worker, posts one document at a time under the `webhook-id` it
had, and removes what was taken. It exits with 1 while any is left.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass

from ourvidz_serverless import settings
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage import Storage, open_storage
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.retries import Fault

KEPT = re.compile(r"(?:.*/)?callback\.(?:completed|failed)\.json")


@dataclass(frozen=True, slots=True)
class Kept:
    """One undelivered document: the bytes to post, and what names them."""

    body: bytes
    job_id: str
    status: str
    callback_url: str | None


def replay(storage: Storage, callback: Callback) -> tuple[int, int]:
    """Post all that is kept in a storage; how many were delivered, and how many are left."""
    delivered = left = 0
    # A job may have failed and been completed later: its completion is its last word.
    for key in sorted(filter(KEPT.fullmatch, storage.keys()), reverse=True):
        try:
            kept = read(storage.get(key))
            callback.deliver(kept.body, kept.job_id, kept.status, kept.callback_url)
            storage.delete(key)
        except (Fault, ValueError) as exc:
            print(f"{key}: left, {exc}")
            left += 1
        else:
            print(f"{key}: delivered")
            delivered += 1
    return delivered, left


def read(data: bytes) -> Kept:
    """A kept document; raises ValueError for what is none."""
    try:
        document = json.loads(data)
        url = document.pop("callback_url", None)
        body = json.dumps(document).encode()
        return Kept(
            body,
            str(document["job_id"]),
            str(document["status"]),
            url if isinstance(url, str) else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ValueError("it is no document") from exc


def main() -> None:
    """The command line."""
    if len(sys.argv) != 3 or sys.argv[1] != "replay":
        sys.exit("usage: python -m ourvidz_serverless.callback replay FOLDER_OR_BUCKET_URL")
    place = sys.argv[2]
    try:
        config = settings.read().model_copy(
            update={"storage_url": place if ":" in place else f"file:{place}"}
        )
        if not config.resolved_callback_url:
            raise ModelLoadError("CALLBACK_URL: Field required")
        delivered, left = replay(open_storage(config), Callback.of(config))
    except (ModelLoadError, Fault) as exc:
        sys.exit(f"cannot replay: {exc}")
    print(f"{delivered} delivered, {left} left")
    sys.exit(1 if left else 0)
