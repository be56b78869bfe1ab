"""What a person at a terminal sees of a job: its progress, and at its end where its files are.

stdout gets the result alone: the answer of a chat, or one line for each file. Everything else goes
to stderr. With `VERBOSE=1` stdout gets the whole document, and stderr the log too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Asset, Document, Failure
from ourvidz_serverless.settings import Settings

#: The option that makes the SDK serve its own API, for many jobs.
SERVE_API = "--rp_serve_api"

#: The variable with which the SDK serves its API at this port.
REALTIME_PORT = "RUNPOD_REALTIME_PORT"


def is_on_platform() -> bool:
    """Whether RunPod runs this process, not a person at a terminal."""
    return "RUNPOD_WEBHOOK_POST_OUTPUT" in os.environ


def is_verbose() -> bool:
    """Whether the environment asks for whole documents: `VERBOSE` is neither empty nor 0."""
    return os.environ.get("VERBOSE", "") not in ("", "0")


def runs_one_job(argv: Sequence[str]) -> bool:
    """Whether the SDK runs one job and ends: neither on RunPod nor as an API of its own."""
    is_api = SERVE_API in argv or REALTIME_PORT in os.environ
    return not is_on_platform() and not is_api


def is_for_a_person(argv: Sequence[str]) -> bool:
    """Whether this process runs one job for a person who has not asked for more."""
    return runs_one_job(argv) and not is_verbose()


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send what the SDK prints to stderr; a `TerminalReporter` made within prints to stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class TerminalReporter:
    """A progress bar on stderr, and the result on stdout."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bar: tqdm[Any] | None = None
        self._has_written = False

    def report(self, progress: Mapping[str, Any]) -> None:
        """Move the bar. It appears at the first step."""
        if self._bar is None:
            self._bar = tqdm(total=progress["steps"], unit="step", desc=progress["stage"])
        self._bar.update(progress["step"] - self._bar.n)

    def write(self, delta: Mapping[str, Any]) -> None:
        """Print a part of a streamed reply at once."""
        if not is_verbose():
            self._has_written = True
            _print(delta["delta"], end="")

    def show(self, document: Document) -> None:
        """Print the result, or with `VERBOSE` the document as the caller gets it."""
        self._close_bar()
        if is_verbose():
            _print(json.dumps(document.result(), indent=2, ensure_ascii=False))
        elif document.failure:
            print(_why(document.failure), file=sys.stderr, flush=True)
        elif self._has_written:
            _print("")
        else:
            _print("\n".join(lines_of(document, self._settings)))

    async def close(self) -> None:
        """End the bar where it is."""
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()


def lines_of(document: Document, settings: Settings) -> list[str]:
    """What a person wants of a document.

    It is the reply of a chat, the result of an administrator's job, or one line for each file,
    with its place.
    """
    for name in ("response", "enhanced_prompt"):
        if document.reply.get(name):
            return [str(document.reply[name])]
    if "result" in document.reply:
        return [json.dumps(document.reply["result"], indent=2, ensure_ascii=False)]
    seconds = document.metadata.get("processing_time", 0.0)
    return [
        f"{_place(each, settings)}: {_facts(each)}, {seconds:.1f} s" for each in document.assets
    ]


def _why(failure: Failure) -> str:
    return f"failed: {failure.code}: {failure.message}"


def _place(asset: Asset, settings: Settings) -> str:
    """The path of an asset's file from here, if it is on this machine; else its URL.

    Of a `data:` URI only what it holds.
    """
    if asset.url.startswith("data:"):
        return f"{asset.metadata['format']} in the document, which VERBOSE=1 prints"
    scheme, _, root = settings.storage_url.partition(":")
    if scheme != "file" or settings.asset_url_style != "path":
        return asset.url
    found = DirectoryStorage(Path(root.removeprefix("//"))).find(asset.url)
    if found is None:
        return asset.url
    here = Path.cwd()
    return str(found.relative_to(here) if found.is_relative_to(here) else found)


def _facts(asset: Asset) -> str:
    facts = asset.metadata
    frames = f"{facts['frame_num']} frames of " if facts.get("frame_num") else ""
    return f"{frames}{facts.get('width')}x{facts.get('height')}, seed {facts.get('seed')}"


def _print(text: str, end: str = "\n") -> None:
    # Not `sys.stdout`, which `only_results_on_stdout` replaces.
    print(text, end=end, file=sys.__stdout__, flush=True)
