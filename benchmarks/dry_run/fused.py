"""What `COMPILE=regional` would save: the repeated blocks of networks, fused by torch's compiler.

A block is traced on a fake device, and Inductor plans and fuses its kernels as for an H200. It
writes the kernels' Triton code too; nothing compiles that code. The counts are Inductor's own: each
fused kernel reads its inputs once and writes its outputs once.

Inductor asks the device for its properties and for Triton, which is not there. So `_on_h200`
replaces what it asks. These parts of torch 2.13 are not public: another version may need other
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks import architectures, report
from benchmarks.dry_run import attention
from benchmarks.dry_run.fake_cuda import FakeCuda
from benchmarks.dry_run.installed import installed
from benchmarks.dry_run.tables import FUSED
from ourvidz_serverless.models.wan.blocks import move_fewer_bytes

CUDA = torch.device("cuda", 0)

#: What Inductor asks of a device: an H200, by the CUDA C++ Programming Guide's table of compute
#: capability 9.0.
H200 = SimpleNamespace(
    name="H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)

#: Steps of the scheduler that are no kernels.
WITHOUT_KERNEL = ("NopKernelSchedulerNode", "MultiOutput")

Made = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Block:
    """A kind of repeated block: `make` returns one on the device, with its inputs.

    A step calls it so many `times`.
    """

    name: str
    times: int
    make: Callable[[], Made]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Fused:
    """The kernels of a block after fusion, how many of them are Triton's, and their bytes."""

    kernels: int
    triton: int
    num_bytes: int


def wan_block(config: dict[str, Any], frames: int = 81) -> Made:
    """A block of a WAN network for a video of 832x480."""
    heads = config["num_attention_heads"]
    width, tokens = heads * config["attention_head_dim"], ((frames - 1) // 4 + 1) * 30 * 52
    block = WanTransformerBlock(
        width,
        config["ffn_dim"],
        heads,
        config["qk_norm"],
        config["cross_attn_norm"],
        added_kv_proj_dim=config.get("added_kv_proj_dim"),
    )
    wide = {"dtype": torch.float32}
    for module, name in (
        (block.norm2, "weight"),
        (block.norm2, "bias"),
        (block, "scale_shift_table"),
    ):
        shape = getattr(module, name).shape
        setattr(module, name, torch.nn.Parameter(torch.empty(shape, **wide), requires_grad=False))
    prompt = 512 + (257 if "added_kv_proj_dim" in config else 0)
    angles = torch.empty(1, tokens, 1, config["attention_head_dim"], **wide)
    inputs = (torch.empty(1, tokens, width), torch.empty(1, prompt, width))
    return block, (*inputs, torch.empty(1, 6, width), (angles, angles.clone()))


def sdxl_block(width: int, tokens: int) -> Made:
    """A block of SDXL's UNet for a guided picture of 1024x1024, in the stage of that width."""
    heads, text = width // 64, architectures.SDXL_UNET["cross_attention_dim"]
    block = BasicTransformerBlock(width, heads, 64, cross_attention_dim=text)
    return block, (torch.empty(2, tokens, width), None, torch.empty(2, 77, text))


BLOCKS = (
    Block("SDXL, 1280 wide", 60, lambda: sdxl_block(1280, 32 * 32)),
    Block("SDXL, 640 wide", 10, lambda: sdxl_block(640, 64 * 64)),
    Block("WAN T2V 1.3B, 81 frames", 60, lambda: wan_block(architectures.WAN_TRANSFORMER)),
    Block("WAN I2V 14B, 81 frames", 80, lambda: wan_block(architectures.WAN_I2V_14B)),
)


def table(blocks: Sequence[Block] = BLOCKS) -> report.Table:
    headers = [
        "block",
        "in a step",
        "operations, eager",
        "GB",
        "kernels, fused",
        "Triton's",
        "GB, fused",
        "GB less in a step",
    ]
    note = (
        "Eager: as the worker computes it. Fused: by Inductor for an H200, and by its own count. "
        "Products and attention are the libraries' kernels in both."
    )
    return report.table(FUSED, headers, [row(each) for each in blocks], note)


def row(block: Block) -> list[object]:
    kernels, num_bytes = eager(block.make)
    found = fused(block.make)
    saved = block.times * (num_bytes - found.num_bytes)
    gigabytes = [round(each / 1e9, 2) for each in (num_bytes, found.num_bytes, saved)]
    facts = [block.name, block.times, kernels, gigabytes[0], found.kernels, found.triton]
    return [*facts, *gigabytes[1:]]


def eager(make: Callable[[], Made]) -> tuple[int, int]:
    """The operations and bytes of a block as the worker computes it."""
    fake = FakeCuda()
    with installed(fake):
        block, inputs = _on_device(fake, make)
        move_fewer_bytes(torch.nn.ModuleList([block]))
        with fake.on(), torch.inference_mode():
            fake.take()
            block(*inputs)
            found = fake.take()
    return found.kernels, found.num_bytes


def fused(make: Callable[[], Made]) -> Fused:
    """A block's kernels after fusion."""
    fake = FakeCuda()
    with installed(fake), _on_h200(), torch.no_grad():
        block, inputs = _on_device(fake, make)
        graph, flat = _traced(fake, block, inputs)
        with V.set_fake_mode(fake.fake), V.set_debug_handler(DebugContext()):
            view_to_reshape(graph)
            post_grad_passes(graph, is_inference=True)
            lowered = GraphLowering(graph, example_inputs=flat, is_inference=True)
            with V.set_graph_handler(lowered):
                lowered.run(*flat)
                code = lowered.codegen()[0].value
                return _counted(lowered.scheduler.nodes, code)


def _on_device(fake: FakeCuda, make: Callable[[], Made]) -> Made:
    with fake.fake, architectures.made_on("cuda:0", torch.bfloat16):
        block, inputs = make()
    return block.requires_grad_(False).eval(), inputs


def _traced(fake: FakeCuda, block: Any, inputs: Any) -> tuple[Any, list[torch.Tensor]]:
    """The graph of a block, and the tensors that it takes."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    flat, spec = tree_flatten((tensors, inputs))
    numbers = [each for each in flat if isinstance(each, torch.Tensor)]

    def compute(*given: torch.Tensor) -> Any:
        left = iter(given)
        filled = [next(left) if isinstance(each, torch.Tensor) else each for each in flat]
        return torch.func.functional_call(block, *tree_unflatten(filled, spec))

    with fake.fake:
        return make_fx(compute, select_decomp_table(), "real")(*numbers), numbers


def _counted(nodes: Sequence[Any], code: str) -> Fused:
    kernels = num_bytes = 0
    for node in nodes:
        kinds = {type(node).__name__, *(type(each.node).__name__ for each in node.get_nodes())}
        if "MultiOutput" in kinds:
            # What attention writes: Inductor counts what it reads.
            layout = node.node.get_layout()
            num_bytes += int(layout.storage_size()) * layout.dtype.itemsize
        if kinds.isdisjoint(WITHOUT_KERNEL):
            kernels += 1
            num_bytes += int(node.get_read_write_buffers_sizes())
    return Fused(kernels, code.count("async_compile.triton("), num_bytes)


@contextmanager
def _on_h200() -> Iterator[None]:
    """Within this context Inductor finds an H200 and Triton."""
    answers: dict[str, Any] = {
        "get_device_properties": H200,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "synchronize": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
                if hasattr(owner, name):
                    replaced: Any = _returning(answer)
                    replaced = replaced if owner is torch.cuda else staticmethod(replaced)
                    stack.enter_context(patch.object(owner, name, replaced))
        stack.enter_context(patch.object(scheduler, "has_triton", _returning(True)))
        stack.enter_context(patch("torch.utils._triton.has_triton", _returning(True)))
        stack.enter_context(patch("torch.utils._triton.triton_hash_with_backend", _returning("")))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention.attend))
        yield


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
