"""Tokens a CPU-second of four chat engines: the worker's, transformers' two, and vLLM on a CPU.

    python -m benchmarks.chat_peers --venv FOLDER             vLLM is in an environment of its own
    python -m benchmarks.chat_peers --only mixed,shared

`python -m tests.prove_vllm --venv FOLDER` makes that environment. Without it vLLM is left out, with
a sentence.

All engines answer the same requests, greedily, with the same random weights in float32: Qwen2 with
8 layers of 512 and the full vocabulary of 151,936. Each engine is a process with one thread. Its
CPU time is that of all of its processes, so that it does not matter how an engine divides its work,
nor what else the machine does. The engines take turns (a b c d, d c b a) with new requests in each
turn, and a figure is the tokens of all replies by the CPU-seconds of all turns. The control is the
worker's first turn against its last one. `generate` answers only the first requests of each turn,
one after another; `replies equal` counts those of each turn that the worker answered alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from benchmarks import report
from ourvidz_serverless.models.chat.engine import Engine, EngineLimits
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import Device

TITLE = "Chat's engine beside others, tokens a CPU-second"
HEADERS = (
    "requests",
    "the worker's engine",
    "transformers, batched",
    "transformers, `generate`",
    "vLLM",
    "times batched",
    "times `generate`",
    "times vLLM",
    "control",
    "replies equal",
)

VLLM_ARM = Path(__file__).with_name("vllm_arm.py")

#: A small Qwen2 with the whole vocabulary. Its last layer is the embeddings, as in Qwen's own small
#: models.
MODEL: Mapping[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

#: The same for a test, in which nobody measures.
TINY = {**MODEL, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}

#: How many requests of a turn `generate` answers.
NUM_ONE_BY_ONE = 4

#: What all engines compute of prompts in one step, and keep of them, in tokens.
PREFILL_TOKENS, CACHE_TOKENS, PAGE_TOKENS = 512, 32768, 32

#: How long an engine may take to end, in seconds.
END_S = 30.0

#: A request: the tokens of its prompt, and the number of tokens of its reply.
Request = tuple[list[int], int]
Replies = list[list[int]]
Answer = Callable[[Sequence[Request]], Replies]
Command = Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that come at once: how many, how long, and how many tokens all begin with."""

    title: str
    count: int
    prompt: tuple[int, int]
    reply: tuple[int, int] = (12, 64)
    shared: int = 0

    def requests(self, turn: int, vocabulary: int) -> list[Request]:
        """The requests of one turn: of the same lengths each time, and of other tokens."""
        lengths, tokens = random.Random(self.title), random.Random(f"{self.title} {turn}")

        def text(length: int) -> list[int]:
            return [tokens.randrange(100, vocabulary) for _ in range(length)]

        beginning = text(self.shared)
        return [
            (beginning + text(lengths.randint(*self.prompt)), lengths.randint(*self.reply))
            for _ in range(self.count)
        ]


WORKLOADS: Mapping[str, Workload] = {
    "mixed": Workload("16 of 16 to 700 tokens", 16, (16, 700)),
    "shared": Workload("16 that share 800 tokens", 16, (16, 64), shared=800),
    "many": Workload("64 of 16 to 300 tokens", 64, (16, 300)),
}
#: What each engine answers before it is measured.
WARM_UP = Workload("6 of 16 to 300 tokens", 6, (16, 300), (4, 12))
SMALLEST = {"tiny": Workload("3 of 4 to 40 tokens", 3, (4, 40), (2, 4), shared=20)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--venv", type=Path, help="an environment with vLLM")
    parser.add_argument("--only", help="workloads, separated by commas")
    # For the processes that this module starts.
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.arm:
        be_arm(ARMS[options.arm], options.folder)
    workloads = SMALLEST if options.tiny else WORKLOADS
    chosen = options.only.split(",") if options.only else list(workloads)
    num_turns = 1 if options.quick or options.tiny else 2
    with tempfile.TemporaryDirectory() as place:
        sizes = TINY if options.tiny else MODEL
        make_model(Path(place), sizes)
        with started_arms(Path(place), options.venv) as arms:
            rows = [
                Comparison(workloads[name], sizes["vocab_size"]).row(arms, num_turns)
                for name in chosen
            ]
    note = f"float32, greedy, replies of 12 to 64 tokens, turns of each engine: {num_turns}"
    found = report.table(TITLE, HEADERS, rows, f"{note}; one thread in each.")
    report.finish("chat_peers", [found], options.json)


def make_model(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Random weights, as transformers stores them."""
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(Qwen2Config(**sizes))
    network.generation_config = GenerationConfig(do_sample=False)
    network.save_pretrained(folder)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- the comparison ---


@dataclass
class Comparison:
    """The engines on one workload: what each has answered, and the CPU-seconds that it took."""

    workload: Workload
    vocabulary: int
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_equal: int = 0
    num_compared: int = 0

    def row(self, arms: Mapping[str, Arm], num_turns: int) -> list[object]:
        """The table's row. An engine that is not there has an empty cell."""
        for turn in range(num_turns):
            self._take_turn(arms, turn)
        pace = {name: self.tokens[name] / sum(self.seconds[name]) for name in self.tokens}
        own = pace["builtin"]
        control = self.seconds["builtin"][0] / self.seconds["builtin"][-1]
        others = [pace.get(name) for name in ("batched", "generate", "vllm")]
        is_known = num_turns > 1
        ratios = [
            each and (report.trusted_ratio(own / each, control) if is_known else own / each)
            for each in others
        ]
        equal = f"{self.num_equal} of {self.num_compared}"
        return [self.workload.title, own, *others, *ratios, control if is_known else None, equal]

    def _take_turn(self, arms: Mapping[str, Arm], turn: int) -> None:
        """Let each engine answer the same requests, in every second turn in the other order."""
        requests = self.workload.requests(turn, self.vocabulary)
        replies = {}
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            asked = requests[:NUM_ONE_BY_ONE] if name == "generate" else requests
            replies[name], seconds = arms[name].measure(asked)
            num_tokens = sum(map(len, replies[name]))
            assert num_tokens == sum(count for _, count in asked), f"{name} left tokens out"
            self.tokens[name] = self.tokens.get(name, 0) + num_tokens
            self.seconds.setdefault(name, []).append(seconds)
            print(f"{self.workload.title}: {name} {num_tokens / seconds:.1f}", flush=True)
        one_by_one = replies["generate"]
        self.num_equal += sum(map(list.__eq__, replies["builtin"], one_by_one))
        self.num_compared += len(one_by_one)


# --- engines in processes ---


class Arm:
    """An engine in a process of its own, which may have processes below it.

    It reads the requests of a turn as one line of JSON, and writes the replies as another.
    """

    def __init__(self, command: Command, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            list(map(str, command)),
            env={**env, **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Its session has all processes that it starts.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        # Whatever is left of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def measure(self, requests: Sequence[Request]) -> tuple[Replies, float]:
        """The replies, and the CPU-seconds that they took."""
        before = cpu_seconds(self._process.pid)
        replies = self.ask(requests)
        return replies, cpu_seconds(self._process.pid) - before

    def ask(self, requests: Sequence[Request]) -> Replies:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine has ended: {self._process.args!r}")
        replies: Replies = json.loads(line)
        return replies


@contextlib.contextmanager
def started_arms(folder: Path, venv: Path | None) -> Iterator[dict[str, Arm]]:
    """The engines, each of which has answered once."""
    warm_up = WARM_UP.requests(0, TINY["vocab_size"])
    with contextlib.ExitStack() as stack:
        arms = {
            name: stack.enter_context(Arm(*each)) for name, each in commands(folder, venv).items()
        }
        for arm in arms.values():
            arm.ask(warm_up)
        yield arms


def commands(folder: Path, venv: Path | None) -> dict[str, tuple[Command, Mapping[str, str]]]:
    """What starts each engine, and its environment; vLLM only if there is one that has it."""
    module = (sys.executable, "-m", "benchmarks.chat_peers", "--folder", folder, "--arm")
    found: dict[str, tuple[Command, Mapping[str, str]]] = {
        name: ([*module, name], {}) for name in ARMS
    }
    python = venv and venv / "bin/python"
    if python and python.exists():
        # -P: its own folder has modules whose names are those of others.
        found["vllm"] = ([python, "-P", VLLM_ARM, folder], VLLM_ENV)
    else:
        print("vLLM is left out: --venv names no environment that has it", flush=True)
    return found


#: One thread, which may run on any core, a gigabyte for keys and values, and one process: of the
#: three that it has by default some wait in a loop, which takes CPU time (`SpinCondition`,
#: vllm/distributed/device_communicators/shm_broadcast.py, 0.32). What the environment says counts.
VLLM_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def cpu_seconds(session: int) -> float:
    """The CPU time of a session's processes, and of those that ended below them, in seconds."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything (proc(5)): state, parent, group, session.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def be_arm(make: Callable[[Any], Answer], folder: Path) -> NoReturn:
    """Answer lines of requests to the end of stdin, and end this process."""
    # What libraries print goes to stderr from now on.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        answer = make(load(folder))
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=out, flush=True)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    # transformers' batching has a thread without an end.
    os._exit(0)


# --- the engines ---


def builtin(network: Any) -> Answer:
    """The worker's own engine."""
    limits = EngineLimits(
        kv_tokens=CACHE_TOKENS, prefill_tokens=PREFILL_TOKENS, prefix_tokens=CACHE_TOKENS // 2
    )
    engine = Engine(network, Device(torch.device("cpu"), torch.float32), eos_ids=[], limits=limits)

    def answer(requests: Sequence[Request]) -> Replies:
        asked = [
            Generation(ids, SamplingParams(max_tokens=count, temperature=0), _no_text)
            for ids, count in requests
        ]
        for each in asked:
            engine.submit(each)
        for each in asked:
            list(each)
        return [each.ids[each.num_prompt :] for each in asked]

    return answer


def _no_text(ids: Sequence[int]) -> str:
    return "x" * len(ids)


def batched(network: Any) -> Answer:
    """transformers' continuous batching."""
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=CACHE_TOKENS // PAGE_TOKENS,
        max_batch_tokens=PREFILL_TOKENS,
    )
    manager = network.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=64),
        continuous_batching_config=config,
    )
    manager.start()

    def answer(requests: Sequence[Request]) -> Replies:
        names = [
            manager.add_request(ids, max_new_tokens=count, eos_token_id=-1)
            for ids, count in requests
        ]
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is None:
                continue
            if result.error:
                raise RuntimeError(result.error)
            if result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        return [found[name] for name in names]

    return answer


def one_by_one(network: Any) -> Answer:
    """transformers' `generate`, one request after another."""

    def answer(requests: Sequence[Request]) -> Replies:
        replies = []
        for prompt, count in requests:
            ids = torch.tensor([prompt])
            made = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
            replies.append(made[0, len(prompt) :].tolist())
        return replies

    return answer


ARMS = {"builtin": builtin, "batched": batched, "generate": one_by_one}


if __name__ == "__main__":
    main()
