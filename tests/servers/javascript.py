"""The TypeScript client in real Deno and Node, and edge functions in Deno."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.worker_process import WorkerProcess

DENO = Path(sys.executable).parent / "deno"
CALLER = ROOT / "tests/clients/caller.js"
CLIENT = ROOT / "clients/typescript"
EXAMPLES = CLIENT / "examples"
RUNTIMES = ("deno", "node")

#: The tools of `tests/clients/npm/`, which `make test` installs.
NPM = ROOT / ".cache/npm/node_modules"

#: What npm makes in the client's folder.
OUTPUTS = ("dist", "node_modules")

#: The secret with which the worker signs callbacks and the edge function verifies them.
SECRET = "whsec_YSBzZWNyZXQgb2Ygb3VyIG93bg=="

#: Nothing is fetched from anywhere: the client has no dependencies.
DENO_ENV = {"DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}


def call(runtime: str, action: str, **given: Any) -> dict[str, Any]:
    """The result of an action of `caller.js`: `{"value": ...}` or `{"error": ...}`."""
    done = subprocess.run(
        [*_command(runtime), str(CALLER), action, json.dumps(given)],
        capture_output=True,
        text=True,
        env=deno_environment(**({} if runtime == "deno" else {"CLIENT": str(built() / "mod.js")})),
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def deno_environment(**env: str) -> dict[str, str]:
    return {**os.environ, **DENO_ENV, **env}


def _command(runtime: str) -> list[str]:
    if runtime == "deno":
        return [str(DENO), "run", "--no-prompt", "--allow-net=127.0.0.1", f"--allow-read={ROOT}"]
    needed(shutil.which("node") is not None, "node is not on this machine")
    return ["node"]


def needed(is_there: bool, reason: str) -> None:
    """Skip the test on a machine that lacks something; CI must have it."""
    if not is_there and "CI" not in os.environ:
        pytest.skip(reason)
    assert is_there, reason


def built() -> Path:
    """The client's `dist/`, as `npm pack` builds it."""
    return packed().parent / "dist"


def packed() -> Path:
    """The file that `npm publish` would send. It is built once for these sources."""
    (file,) = _pack().glob("*.tgz")
    return file


@functools.cache
def _pack() -> Path:
    """A copy of the client's folder in which `npm pack` has run."""
    needed(shutil.which("npm") is not None, "npm is not on this machine")
    needed((NPM / ".bin/tsc").exists(), "tsc is not in .cache/npm; `make test` installs it")
    home = ROOT / ".cache/client" / _digest()
    home.parent.mkdir(parents=True, exist_ok=True)
    # Other processes of the tests need it at the same time.
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=home.parent) as folder:
                _npm_pack(Path(folder) / "client")
                (Path(folder) / "client").rename(home)
    return home


def _digest() -> str:
    """A name for the sources of the client and the versions of its tools."""
    found = hashlib.sha256((NPM / ".package-lock.json").read_bytes())
    for file in sorted(path for path in _sources() if path.is_file()):
        found.update(f"{file.relative_to(CLIENT)}:".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    for path in CLIENT.rglob("*"):
        if not {*OUTPUTS} & {*path.relative_to(CLIENT).parts}:
            yield path


def _npm_pack(folder: Path) -> None:
    shutil.copytree(CLIENT, folder, ignore=shutil.ignore_patterns(*OUTPUTS))
    done = subprocess.run(
        ["npm", "pack", "--no-update-notifier"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{NPM / '.bin'}:{os.environ['PATH']}"},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr


def edge_function(name: str, **env: str) -> WorkerProcess:
    """One of the client's examples, served by Deno; its log has `Listening on` and the URL."""
    args = ["--no-prompt", "--allow-net=127.0.0.1", "--allow-env", f"--allow-read={ROOT}"]
    script = [*args, str(EXAMPLES / f"{name}.ts")]
    env = {**DENO_ENV, "PORT": "0", **env}
    return WorkerProcess(None, "run", program=str(DENO), args=script, env=env)


def url_of(process: WorkerProcess) -> str:
    """The URL of an edge function, when it listens."""
    log = process.wait_for_log("Listening on")
    return log.split("Listening on ", 1)[1].split()[0].rstrip("/")
