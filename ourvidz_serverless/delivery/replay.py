"""Post again the documents that could not be delivered. They lie in storage, beside the assets.

    python -m ourvidz_serverless replay outputs
    python -m ourvidz_serverless replay s3://workspace-temp/assets

The command reads the same environment as a worker. It posts one document at a time, under the
`webhook-id` of its first tries, and removes each document that the application takes. It exits
with 1 if any document is left.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ourvidz_serverless import settings
from ourvidz_serverless.delivery.callback import Callback, Message
from ourvidz_serverless.delivery.storage.base import Storage
from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.retries import Fault

#: The keys of stored documents.
STORED = re.compile(r"(?:.*/)?callback\.(?:completed|failed)\.json")


@dataclass(frozen=True, slots=True)
class Undelivered:
    """One undelivered document, and the payload's own URL for it."""

    message: Message
    callback_url: str | None


def replay(storage: Storage, callback: Callback) -> tuple[int, int]:
    """Post every kept document of a storage; how many were delivered, and how many are left."""
    delivered = left = 0
    # A job may have failed first and completed later. Its completion is posted last.
    for key in sorted(filter(STORED.fullmatch, storage.keys()), reverse=True):
        try:
            document = read(storage.get(key))
            callback.deliver(document.message, document.callback_url)
            storage.delete(key)
        except (Fault, ValueError) as exc:
            print(f"{key}: left, {exc}")
            left += 1
        else:
            print(f"{key}: delivered")
            delivered += 1
    return delivered, left


def read(data: bytes) -> Undelivered:
    """A kept document; raises ValueError if the file holds no document."""
    try:
        document = json.loads(data)
        url = document.pop("callback_url", None)
        body = json.dumps(document).encode()
        message = Message(body, str(document["job_id"]), str(document["status"]))
        return Undelivered(message, url if isinstance(url, str) else None)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ValueError("it is no document") from exc


def main(argv: Sequence[str]) -> int:
    """The command `replay`; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ourvidz_serverless replay",
        description="Post again the documents that could not be delivered.",
        epilog="It reads the environment of a worker. It exits with 1 if any document is left.",
    )
    parser.add_argument("place", help="a folder, s3://BUCKET[/PREFIX] or supabase://BUCKET")
    place = parser.parse_args(argv).place
    try:
        config = settings.read().model_copy(
            update={"storage_url": place if ":" in place else f"file:{place}"}
        )
        if not config.resolved_callback_url:
            raise ModelLoadError("CALLBACK_URL: Field required")
        delivered, left = replay(open_storage(config), Callback.of(config))
    except (ModelLoadError, Fault) as exc:
        print(f"cannot replay: {exc}", file=sys.stderr)
        return 1
    print(f"{delivered} delivered, {left} left")
    return 1 if left else 0
