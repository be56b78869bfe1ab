"""Whether the engine computes an architecture as transformers does, seen from what it does.

The network is built once more without weights (on torch's meta device), and reads a few tokens. Its
attention notes how it is called. The engine needs

- one call of transformers' attention interface in each layer, with the engine's own mask;
- keys and values of the same shape in all layers;
- no attention but the usual one over all earlier tokens: no sinks, no capped scores, and no window
  that is smaller than the context;
- logits that are the output of the last layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM

NAME = "ourvidz_noted"

#: What the engine reads from a configuration.
NEEDED = (
    *("max_position_embeddings", "hidden_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
)

#: Tokens that the network without weights reads.
LENGTH = 4

#: Position embeddings whose factors depend on the longest text in the batch.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

#: What an attention may be told that makes it another one.
CHANGES = {"softcap": "caps its scores", "s_aux": "has sinks"}

#: Operations that move numbers and change none, and products, which a last layer is.
HARMLESS = {
    *("slice", "select", "t", "transpose", "permute", "view", "_unsafe_view", "reshape"),
    *("unsqueeze", "squeeze", "expand", "alias", "detach", "clone", "mm", "addmm", "bmm", "linear"),
    *("index", "_to_copy", "_reshape_alias", "matmul"),
}


class _Call(NamedTuple):
    """One call of the attention interface."""

    layer: int | None
    shapes: tuple[torch.Size, torch.Size]
    mask: torch.Tensor | None
    options: Mapping[str, Any]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    noted: list[_Call],
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention that notes how it is called. Its output only has the right shape."""
    layer = getattr(module, "layer_idx", None)
    noted.append(_Call(layer, (key.shape, value.shape), attention_mask, options))
    rows, _, tokens, _ = query.shape
    return query.new_empty(rows, tokens, query.shape[1], value.shape[-1]), None


AttentionInterface.register(NAME, _attention)


class _Operations(TorchDispatchMode):
    """The names of torch's operations since `names` was cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def check(config: Any, context: int) -> None:
    """Raise ValueError, with the reason, for a network that the engine does not compute.

    `context` is the most tokens of a conversation.
    """
    if config.get_text_config() is not config:
        raise ValueError(f"{config.model_type} reads more than text")
    if missing := [name for name in NEEDED if not hasattr(config, name)]:
        raise ValueError(f"its configuration has no {missing[0]}")
    context = min(context, config.max_position_embeddings)
    _check_positions(config, context)
    mask = torch.zeros(1, 1, LENGTH, LENGTH, device="meta", dtype=torch.bfloat16)
    try:
        calls, after_last_layer = _run(config, mask)
    except Exception as exc:
        # Any error of any architecture's own code: the engine would meet it too.
        why = type(exc).__name__
        raise ValueError(f"the engine cannot run {config.model_type} ({why})") from exc
    _check_layers(config, calls)
    for call in calls:
        _check_attention(call, mask, context)
    if changes := [name for name in after_last_layer if name not in HARMLESS]:
        raise ValueError(f"it changes its logits after the last layer ({changes[0]})")


def _run(config: Any, mask: torch.Tensor) -> tuple[list[_Call], list[str]]:
    """Run the network without weights.

    Returns the calls of its attention, and the operations after those of its decoder.
    """
    calls: list[_Call] = []
    with torch.device("meta"), torch.no_grad(), _Operations() as operations:
        copied = copy.deepcopy(config)
        network = AutoModelForCausalLM.from_config(
            copied, attn_implementation=NAME, dtype=torch.bfloat16
        ).eval()
        network.base_model.register_forward_hook(lambda *_: operations.names.clear())
        network(
            input_ids=torch.zeros(1, LENGTH, dtype=torch.long),
            position_ids=torch.arange(LENGTH)[None],
            attention_mask=mask,
            use_cache=False,
            noted=calls,
        )
    return calls, operations.names


def _check_positions(config: Any, context: int) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(part for part in rope.values() if isinstance(part, Mapping))]:
        limit = each.get("original_max_position_embeddings") or config.max_position_embeddings
        if each.get("rope_type") in LENGTH_DEPENDENT_ROPE and context > limit:
            raise ValueError(
                f"its positions depend on the longest text in the batch; CHAT_CONTEXT={limit}, "
                "or less, serves it"
            )


def _check_layers(config: Any, calls: Sequence[_Call]) -> None:
    if [call.layer for call in calls] != list(range(config.num_hidden_layers)):
        raise ValueError("not all of its layers have the usual attention")
    if len({call.shapes for call in calls}) > 1:
        raise ValueError("its layers have keys and values of different shapes")
    keys, values = calls[0].shapes
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not keys == values == (1, config.num_key_value_heads, LENGTH, dim):
        raise ValueError("its keys and values have another shape than its configuration says")


def _check_attention(call: _Call, mask: torch.Tensor, context: int) -> None:
    for name, change in CHANGES.items():
        if call.options.get(name) is not None:
            raise ValueError(f"its attention {change}")
    if call.mask is not mask:
        raise ValueError("its attention has a mask of its own")
    window = call.options.get("sliding_window")
    if window is not None and window < context:
        raise ValueError(
            f"its attention has a window of {window} tokens; CHAT_CONTEXT={window}, or less, "
            "serves it"
        )
