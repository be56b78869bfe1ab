"""Check a built image: its content, one job, and that SIGTERM ends it.

    python -m tests.prove_image --image ourvidz:sdxl --family sdxl --engine docker
    python -m tests.prove_image --image localhost/ourvidz:chat --family chat --engine podman \\
        --volume $PWD/.cache/pocket_chat:/worker/.cache/pocket_chat:ro

It prints what it finds, and exits with an error at the first check that fails. The containers run
as they may in production: not as root, with a read-only root file system.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builder.lock import OLDER_TORCH, OVERRIDES
from tests.servers.handler import POCKET
from tests.servers.runpod import Platform

#: Jobs that take some seconds on the pocket models, so that SIGTERM comes while they run.
LONG_JOBS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "type": "sdxl_image_high",
        "prompt": "green hills under a blue sky, a yellow sun on the right",
        "config": {"num_inference_steps": 50, "num_images": 3, "resolution": "256x256"},
    },
    "chat": {
        "type": "chat_conversation",
        "messages": [{"role": "user", "content": "Tell me a very long story about the sea."}],
        "max_tokens": 1000,
        "temperature": 0,
        "stream": True,
    },
    "wan": {
        "type": "video_fast",
        "prompt": "a red circle moves over a blue background",
        "config": {"width": 128, "height": 128, "frames": 17, "num_inference_steps": 50},
    },
}

#: Run by the Python in the image: prints what it finds there as JSON.
INSPECTION = """
import collections, importlib.metadata, importlib.util, json, os, pathlib, re, shutil, sys
from packaging.requirements import Requirement
def plain(name):
    return re.sub("[-_.]+", "-", name).lower()
names = collections.Counter(
    plain(each.metadata["Name"]) for each in importlib.metadata.distributions()
)
def unmet(each):
    for required in map(Requirement, each.requires or ()):
        if not required.marker or required.marker.evaluate({"extra": ""}):
            if plain(required.name) not in names:
                yield str(required)
            elif not required.specifier.contains(importlib.metadata.version(required.name), True):
                yield str(required)
site = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]
sources = [*site.rglob("*.py"), *pathlib.Path("ourvidz_serverless").rglob("*.py")]
def is_compiled(path):
    cached = pathlib.Path(importlib.util.cache_from_source(str(path)))
    return cached.exists() and cached.read_bytes()[4:8] == b"\\x01\\0\\0\\0"
print(json.dumps({
    "python": sys.version.split()[0],
    "uid": os.getuid(),
    "versions": {name: importlib.metadata.version(name) for name in
                 ("torch", "diffusers", "transformers", "runpod")},
    "unmet": [text for each in importlib.metadata.distributions() for text in unmet(each)],
    "twice": [name for name, count in names.items() if count > 1],
    "tools": [tool for tool in ("gcc", "cc", "make", "git") if shutil.which(tool)],
    "pip": "pip" in names,
    "not compiled": [str(path) for path in sources if not is_compiled(path)],
    "sources": len(sources),
    "worker": sorted(os.listdir(".")),
    "env": {name: os.environ.get(name) for name in
            ("FAMILIES", "HF_HUB_OFFLINE", "RUNPOD_LOG_LEVEL")},
}))
"""

BILL = "sbom.cdx.json"

#: The files and folders in /worker, besides `test_input*` and the mount `.cache`.
WORKER = {
    "__pycache__",
    "LICENSE",
    "NOTICE",
    "handler.py",
    "models",
    "ourvidz_serverless",
    "outputs",
    "pocket",
    BILL,
}

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"

#: Packages that others require and that the lock files leave out on purpose.
LEFT_OUT = {each.split(" ;")[0] for each in OVERRIDES if "never" in each}

#: Seconds; more than any of these jobs takes.
GRACE_S = 300


class Image:
    """An image, and the containers that run it."""

    def __init__(self, args: argparse.Namespace, outputs: Path) -> None:
        self.name, self.family, self._engine = args.image, args.family, args.engine
        self._options = [
            *args.option,
            "--network=host",
            "--read-only",
            "--tmpfs=/tmp",
            f"--volume={outputs}:/worker/outputs",
            *(f"--volume={volume}" for volume in args.volume),
            "--env=OMP_NUM_THREADS=1",
        ]

    def command(self, *options: str) -> list[str]:
        return [self._engine, "run", "--rm", *self._options, *options, self.name]

    def run(self, *args: str, options: Sequence[str] = ()) -> str:
        """The standard output of a container. The container must exit with 0."""
        run = subprocess.run(
            [*self.command(*options), *args], stdout=subprocess.PIPE, text=True, timeout=600
        )
        check(
            run.returncode == 0, f"the container ends with {run.returncode}: {run.stdout[-2000:]}"
        )
        return run.stdout

    @contextmanager
    def running(self, name: str, **env: str) -> Iterator[subprocess.Popen[str]]:
        options = [f"--name={name}", *(f"--env={key}={value}" for key, value in env.items())]
        process = subprocess.Popen(
            self.command(*options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process
        finally:
            subprocess.run([self._engine, "kill", name], capture_output=True)
            process.wait()

    def terminate(self, name: str) -> None:
        """Send SIGTERM to PID 1, as the platform does."""
        subprocess.run(
            [self._engine, "kill", "--signal=TERM", name], check=True, capture_output=True
        )


def check(is_true: Any, what: str) -> None:
    """Exit with an error that says what was expected, unless it is true."""
    if not is_true:
        sys.exit(f"check failed: {what}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", required=True)
    parser.add_argument("--family", required=True, choices=LONG_JOBS)
    parser.add_argument("--engine", default="docker")
    parser.add_argument("--option", action="append", default=[], help="another option of `run`")
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--keep", type=Path, help="a folder that keeps the job's assets")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = (args.keep or Path(scratch)).resolve()
        outputs.mkdir(parents=True, exist_ok=True)
        # The worker in the container has another user id.
        outputs.chmod(0o777)
        image = Image(args, outputs)
        show_layers(image.name, args.engine)
        prove_content(image)
        prove_bill(image, outputs)
        prove_job(image, outputs)
        prove_sigterm_while_loading(image)
        prove_sigterm(image, grace_s=0, status="failed")
        prove_sigterm(image, grace_s=GRACE_S, status="completed")
    print(f"{image.name}: every check passed")


def show_layers(name: str, engine: str) -> None:
    """Print the image's layers that have a size, the newest first."""
    history = [engine, "history", "--format", "{{.Size}}\t{{.CreatedBy}}", name]
    layers = subprocess.run(history, capture_output=True, text=True, check=True).stdout
    for line in layers.splitlines():
        size, _, made_by = line.partition("\t")
        if not size.startswith("0"):
            print(f"  {size:>10}  {' '.join(made_by.split())[:80]}")


def prove_content(image: Image) -> None:
    """Code, packages and byte code are there once; build tools and other files are not."""
    found = json.loads(image.run("-c", INSPECTION, options=["--entrypoint=/opt/venv/bin/python"]))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"  Python {found['python']}, uid {found['uid']}, {versions}")
    check(found["uid"] == 10001, "the worker is not root")
    check(not found["twice"], f"every package is installed once, not: {found['twice']}")
    unmet = [each for each in found["unmet"] if re.split(r"[^\w-]", each)[0] not in LEFT_OUT]
    check(not unmet, f"every package has what it requires; missing: {unmet}")
    check(not found["tools"] and not found["pip"], f"no build tools and no pip: {found['tools']}")
    stale = found["not compiled"]
    check(len(stale) < 5, f"modules have byte code that is never stale, not: {stale[:9]}")
    others = {name for name in found["worker"] if name not in WORKER and name != ".cache"}
    check(all(name.startswith("test_input") for name in others), f"no other files: {others}")
    expected = {"FAMILIES": image.family, "HF_HUB_OFFLINE": "1", "RUNPOD_LOG_LEVEL": "INFO"}
    check(found["env"] == expected, f"the environment is {expected}, not {found['env']}")
    print(f"  {found['sources']} modules, not compiled: {stale or 'none'}")


def prove_bill(image: Image, outputs: Path) -> None:
    """The bill of materials lists all requirements. A copy is written beside the job's assets."""
    text = image.run(
        "-c", f"print(open('{BILL}').read())", options=["--entrypoint=/opt/venv/bin/python"]
    )
    (outputs / BILL).write_text(text)
    components = json.loads(text)["components"]
    # The version of another build of torch has a suffix after a plus.
    listed = {
        each["name"]: each["version"].partition("+")[0] for each in components if "version" in each
    }
    for name, version in re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE):
        is_older_torch = f"{name}=={listed.get(name)}" == OLDER_TORCH
        check(
            listed.get(name.lower()) == version or is_older_torch, f"{BILL} lists {name} {version}"
        )
    kinds = Counter(each.get("purl", each["type"]).partition("/")[0] for each in components)
    check(kinds.keys() == {"pkg:pypi", "pkg:deb", "machine-learning-model"}, f"{BILL}: {kinds}")
    print(f"  {BILL}: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}")


def prove_job(image: Image, outputs: Path) -> None:
    """`docker run IMAGE` completes the family's test input, as any user."""
    started = time.monotonic()
    output = image.run(options=["--env=VERBOSE=1", "--user=4242"])
    took = time.monotonic() - started
    document = json.loads(output[output.index("{\n") : output.rindex("\n}") + 2])
    check(document["status"] == "completed", f"the job completes, not: {document}")
    # A chat reply is an asset too, whose URL contains the text.
    assets = [asset["url"] for asset in document["assets"] if "data:" not in asset["url"]]
    for asset in assets:
        check((outputs / asset).stat().st_size, f"{asset} is stored")
    seconds = document["metadata"]["processing_time"]
    print(f"  {document['job_id']}: {assets or 'a reply'}, {seconds} s of {took:.1f} s")


def prove_sigterm_while_loading(image: Image) -> None:
    """SIGTERM stops a container at once while it loads, before the engine would kill it."""
    name = f"prove-{image.family}-loading"
    with Platform() as platform, image.running(name, **worker_env(platform)) as process:
        assert process.stdout
        # The libraries print the first line while they load.
        process.stdout.readline()
        image.terminate(name)
        log, _ = process.communicate(timeout=60)
        check(process.returncode == 0, f"exit 0 after SIGTERM while loading: {log[-2000:]}")
    print("  SIGTERM while loading: exit 0")


def prove_sigterm(image: Image, *, grace_s: float, status: str) -> None:
    """After SIGTERM the running job ends with `status`, by the grace that it has.

    Its document is posted, and the container exits with 0.
    """
    name = f"prove-{image.family}-{status}"
    with Platform() as platform:
        job = platform.submit({"id": "long", "user_id": "user-1", **LONG_JOBS[image.family]})
        env = worker_env(platform) | {"SHUTDOWN_GRACE_S": str(grace_s)}
        with image.running(name, **env) as process:
            platform.wait_until(
                lambda: platform.updates(job) or platform.stream(job), 180, "the job's progress"
            )
            image.terminate(name)
            platform.result(job, timeout=GRACE_S)
            log, _ = process.communicate(timeout=120)
            check(process.returncode == 0, f"exit 0 after SIGTERM: {log[-2000:]}")
        ended = platform.status(job)
    result = ended["error"] if status == "failed" else ended["output"]
    check(ended["status"] == status.upper(), f"the job has {status}, not: {ended}")
    check(status == "completed" or "WORKER_UNAVAILABLE" in result, f"the error, not: {result}")
    print(f"  SIGTERM during a job, grace {grace_s} s: job {ended['status']}, exit 0")


def worker_env(platform: Platform) -> dict[str, str]:
    # A home without files: the SDK prefers a key in the home folder to the one in the environment.
    return {**platform.env(), **POCKET, "HOME": "/tmp"}


if __name__ == "__main__":
    main()
