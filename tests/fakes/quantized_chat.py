"""Loads quantised chat models, asks them something, and prints a report as JSON.

It runs as `python -m tests.fakes.quantized_chat pocket`, or with `tiny FOLDER` or `device FOLDER
DEVICE`, in a process that may import torchao: the tests' own may not. FOLDER is empty, for a
checkpoint.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig, Qwen3Config

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat import loader
from ourvidz_serverless.models.chat.model import Chat, ChatModel
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_cuda_graph import FakeCudaGraphs
from tests.fakes.tiny_chat import (
    CPU,
    ask,
    generate_text,
    tiny_decoder,
    tiny_folder,
    tiny_tokenizer,
)
from tests.patience import PATIENCE_S

QUESTION = ("user", "What is the capital of France?")


def load(quantization: str, **settings: Any) -> tuple[Chat, int]:
    """The chat models, and the measured bytes of the only one."""
    chat = loader.load(Settings(families=("chat",), chat_quantization=quantization, **settings))
    (row,) = chat.ledger.report()
    return chat, row.num_bytes


def reply(chat: Chat) -> str:
    return "".join(ask(chat, QUESTION, temperature=0, max_tokens=8))


def answers(quantization: str) -> dict[str, Any]:
    """What the pocket model replies, and its bytes."""
    chat, num_bytes = load(quantization)
    return {"reply": reply(chat), "bytes": num_bytes}


def drops(place: str) -> dict[str, Any]:
    """The replies of an int8 model before and after it was on the disk, and its bytes."""
    chat, num_bytes = load("int8", chat_instruct_model=place)
    before = reply(chat)
    move = chat.ledger.request_move("qwen_instruct", "disk", force=True)
    has_moved = move.is_done.wait(PATIENCE_S) and move.error is None
    return {"before": before, "has_moved": has_moved, "after": reply(chat), "bytes": num_bytes}


def replays(place: str) -> dict[str, Any]:
    """What an int8 model says without and with captured steps, and how many were replayed."""
    graphs = FakeCudaGraphs()

    def say_hello(**capture: Any) -> str:
        model = ChatModel(
            *loader.read_folder(Path(place), loader.ReadOptions(CPU, quantized="int8")),
            CPU,
            **capture,
        )
        return generate_text(model, "hello", max_tokens=40)

    return {
        "without": say_hello(),
        "with": say_hello(capture=graphs),
        "num_replayed": graphs.num_replayed,
    }


def others(folder: str) -> dict[str, Any]:
    """For other architectures in int8: what the engine says, and what transformers generates."""
    tokenizer, said = tiny_tokenizer(), {}
    for kind in (Qwen3Config, Gemma3TextConfig):
        place = Path(folder) / kind.__name__
        tiny_decoder(kind).save_pretrained(place)
        tokenizer.save_pretrained(place)
        read = loader.read_folder(place, loader.ReadOptions(CPU, quantized="int8", context=512))
        ids = torch.tensor([tokenizer.encode("hello")])
        made = read[0].generate(ids, max_new_tokens=20, do_sample=False)
        theirs = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        said[place.name] = [generate_text(ChatModel(*read, CPU), "hello", max_tokens=20), theirs]
    return said


def tiny(folder: str) -> dict[str, Any]:
    """A model of random weights: its bytes, and what it replies in the cases above."""
    place = tiny_folder(Path(folder))
    return {
        "full_bytes": load("none", chat_instruct_model=place)[1],
        "dropped": drops(place),
        "replayed": replays(place),
        "others": others(folder),
    }


def pocket() -> dict[str, Any]:
    """The pocket model by each quantisation, and its bytes without."""
    return {
        "full_bytes": load("none")[1],
        **{name: answers(name) for name in ("int8", "fp8")},
    }


def device(folder: str, name: str) -> dict[str, Any]:
    """What a model on a device replies by each quantisation: before and after it was on the host.

    It is so wide that its linear layers outweigh its embeddings.
    """
    place = tiny_folder(Path(folder), layers=2, hidden=512)

    def replies(quantization: str) -> dict[str, Any]:
        try:
            chat, num_bytes = load(
                quantization, chat_instruct_model=place, device=name, dtype="bfloat16"
            )
        except ModelLoadError as exc:
            return {"error": exc.message}
        before = reply(chat)
        move = chat.ledger.request_move("qwen_instruct", "host", force=True)
        assert move.is_done.wait(PATIENCE_S)
        return {"before": before, "after": reply(chat), "bytes": num_bytes}

    return {each: replies(each) for each in ("none", "int8", "fp8", "int4")}


if __name__ == "__main__":
    print(
        json.dumps({"tiny": tiny, "pocket": pocket, "device": device}[sys.argv[1]](*sys.argv[2:]))
    )
