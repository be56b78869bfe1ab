"""Loads chat models, of any architecture that the engine computes as transformers does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ourvidz_serverless.models.chat import architecture, quantization
from ourvidz_serverless.models.chat.cache_budget import CacheBudget
from ourvidz_serverless.models.chat.cuda_graphs import choose_capture
from ourvidz_serverless.models.chat.engine import EngineLimits
from ourvidz_serverless.models.chat.model import Chat, ChatModel
from ourvidz_serverless.models.chat.places import POCKET as POCKET
from ourvidz_serverless.models.chat.places import pocket
from ourvidz_serverless.models.chat.request import ModelName
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer
from ourvidz_serverless.models.loading import checkpoints, weight_files
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import Settings

#: The shortest context of WAN's enhancer, in tokens: a system prompt, a prompt, an enhanced prompt.
ENHANCER_CONTEXT = 1024


def load(settings: Settings, ledger: Ledger | None = None) -> Chat:
    """The models of `CHAT_INSTRUCT_MODEL` and, if it is set, `CHAT_BASE_MODEL`.

    Raises ModelLoadError with one line if weights are missing, corrupt or of another kind.
    """
    ledger = ledger or open_ledger(settings)
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    named: dict[ModelName, tuple[str, str | None]] = {
        "qwen_instruct": ("CHAT_INSTRUCT_MODEL", settings.chat_instruct_model),
        "qwen_base": ("CHAT_BASE_MODEL", settings.chat_base_model),
    }
    sources = {
        name: Checkpoint(variable, place, settings, device, is_plain=name == "qwen_base")
        for name, (variable, place) in named.items()
        if place
    }
    # By place: weights that serve under both names are loaded once, as the instruct model.
    names = {source.place: name for name, source in reversed(sources.items())}
    loaded = {name: sources[name].read() for name in names.values()}
    networks = {sources[name].variable: network for name, (network, _) in loaded.items()}
    limits = CacheBudget(ledger, device, settings, networks).limits()
    models = {}
    for name, (network, tokenizer) in loaded.items():
        models[name] = sources[name].model(network, tokenizer, limits)
        sources[name].register(models[name], ledger, name, "chat")
    served = {name: models[names[source.place]] for name, source in sources.items()}
    ledger.preload(*served.values())
    return Chat(served, device, settings.chat_context, ledger, settings.chat_cache_salt)


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError if the device does not support what the settings ask of chat."""
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    quantization.check(settings.chat_quantization, device)


def load_enhancer(place: str, settings: Settings, device: Device, ledger: Ledger) -> Chat:
    """WAN's own chat model, as `qwen_instruct`; it answers one conversation at a time.

    Raises ModelLoadError as `load`.
    """
    source = Checkpoint("WAN_ENHANCER_MODEL", place, settings, device)
    network, tokenizer = source.read()
    networks = {source.variable: network}
    budget = CacheBudget(ledger, device, settings, networks, ENHANCER_CONTEXT)
    limits = budget.limits_for(budget.context, max_batch=1)
    model = source.model(network, tokenizer, limits)
    source.register(model, ledger, "wan_enhancer", "wan")
    context = min(settings.chat_context, budget.context)
    return Chat({"qwen_instruct": model}, device, context, ledger)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights at the place that a setting names: a path, a repository, or `pocket`."""

    variable: str
    place: str
    settings: Settings
    device: Device
    #: Whether the model only continues texts, and needs no chat format.
    is_plain: bool = False

    def read(self) -> tuple[Any, ChatTokenizer]:
        """The network, as transformers loads it, and its tokenizer."""
        quantization.check(self.settings.chat_quantization, self.device)
        path = self._find()
        with checkpoints.loading(self.variable, path, "chat"):
            is_mapped = checkpoints.is_mapped(path, self.settings.mmap_weights)
            quantized = self.settings.chat_quantization
            options = ReadOptions(
                self.device, is_mapped, quantized, self.settings.chat_context, self.is_plain
            )
            return read_folder(path, options)

    def model(self, network: Any, tokenizer: ChatTokenizer, limits: EngineLimits) -> ChatModel:
        """A model that answers requests, and that can be read again after it was dropped."""
        capture = choose_capture(self.settings.chat_graphs, self.device, network.config)
        read = self._read_network
        return ChatModel(network, tokenizer, self.device, limits, read, capture)

    def register(self, model: ChatModel, ledger: Ledger, name: str, family: str) -> None:
        """Enter a model in the ledger, with the bytes that its caches may take."""
        cache_bytes = model.engine.cache_bytes
        source = Path(self.place).name
        ledger.register(model, name, family, source=source, reserved_bytes=cache_bytes)

    def _read_network(self) -> list[Any]:
        return [self.read()[0]]

    def _find(self) -> Path:
        if self.place != "pocket":
            return checkpoints.find(self.variable, self.place, self.settings.model_dirs)
        return pocket(self.variable)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a folder is read: `context` is the most tokens of a conversation."""

    device: Device
    is_mapped: bool = True
    quantized: str = "none"
    context: int = 8192
    is_plain: bool = False


def read_folder(path: Path, options: ReadOptions) -> tuple[Any, ChatTokenizer]:
    """The network and the tokenizer of a folder. Raises ValueError for one that is not served."""
    weight_files.check_configs(path, ["."])
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    architecture.check(config, options.context)
    checkpoints.check(path)
    pretrained = AutoTokenizer.from_pretrained(path, local_files_only=True)
    tokenizer = ChatTokenizer(pretrained, options.is_plain)
    device, quantized = options.device, options.quantized
    network, loading_info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=device.dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        disable_mmap=not options.is_mapped,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **quantization.options(quantized, device),
    )
    weight_files.check_loading_info(loading_info, len(network.state_dict()))
    if quantized == "int4":
        # int4 is packed on the device. From now on the ledger decides where the weights are.
        network = network.to("cpu")
    return network.eval(), tokenizer
