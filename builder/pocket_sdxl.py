"""The pocket SDXL: Stable Diffusion XL's own architecture at a thousandth of its size.

Stored as `pocket/sdxl.safetensors`, one checkpoint in the layout SDXL was published in, and
`pocket/sdxl/`, the configuration that goes with it, so that it is deployed like the real one:
`StableDiffusionXLPipeline.from_single_file(CHECKPOINT, config=CONFIG, local_files_only=True)`.
`python -m builder.pocket_sdxl --folder DEST` writes the same model as a diffusers folder.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from builder import landscape_captions

POCKET = Path(__file__).resolve().parent.parent / "pocket"
CHECKPOINT = POCKET / "sdxl.safetensors"
CONFIG = POCKET / "sdxl"

TOKENS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Two widths that differ: the loader of single files tells the two text encoders apart by width.
TEXT_1 = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3}
TEXT_2 = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
TEXT_LAYERS = 2
SIZE_EMBEDDING = 32
UNET = {
    "sample_size": 64,
    "block_out_channels": (32, 48, 80, 96),
    "down_block_types": ("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 3, 5, 6),  # the number of heads, as in SDXL's own configuration
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "cross_attention_dim": TEXT_1["hidden_size"] + TEXT_2["hidden_size"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_EMBEDDING,
    "projection_class_embeddings_input_dim": TEXT_2["hidden_size"] + 6 * SIZE_EMBEDDING,
}
# One group for every normalisation and no attention in the middle: then a flat colour decodes
# almost independently of the rest of the picture, and independently of its size.
VAE = {
    "sample_size": 512,
    "block_out_channels": (16, 24, 40, 48),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}
# stabilityai/stable-diffusion-xl-base-1.0, scheduler/scheduler_config.json, except the
# prediction: the velocity, as in SDXL's v-prediction checkpoints. A small network learns it faster.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


def assemble(seed: int = 0) -> StableDiffusionXLPipeline:
    """The whole pipeline in fp32 with random weights, always the same for one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tokenizer(pad) for pad in (EOS, "!")]
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(_text_config(TEXT_1, tokenizers[0])),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(TEXT_2, tokenizers[1])),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=UNet2DConditionModel(**UNET),
            scheduler=EulerDiscreteScheduler(**SCHEDULER),
            add_watermarker=False,
        )


def _text_config(width: dict[str, int], tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        **width,
        vocab_size=len(tokenizer),
        num_hidden_layers=TEXT_LAYERS,
        max_position_embeddings=TOKENS,
        projection_dim=width["hidden_size"],
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenizer(pad: str) -> CLIPTokenizer:
    """A CLIP tokenizer that spells any text and knows the captions' words as single tokens."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), pad)
        return CLIPTokenizer.from_pretrained(folder)


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's four tokenizer files: 256 bytes, the same ending a word, merges, two specials."""
    pieces = _byte_letters()
    merges = learn_merges(landscape_captions.vocabulary())
    entries = [*pieces, *(piece + "</w>" for piece in pieces), *map("".join, merges), BOS, EOS]
    specials = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **specials}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {entry: index for index, entry in enumerate(entries)})
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", specials)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each of the 256 bytes, in CLIP's order: "!" comes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each of the words is one token."""
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelt for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merged(word, best) for word in spelt]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def save_config(pipe: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the diffusers folder without weights. It replaces the old one but keeps the README."""
    with tempfile.TemporaryDirectory() as scratch:
        pipe.save_pretrained(scratch)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.rmtree(Path(scratch, name))
            write_tokenizer(Path(scratch, name), getattr(pipe, name).pad_token)
        for path in sorted(Path(scratch).rglob("*")):
            if path.suffix in (".json", ".txt"):
                target = folder / path.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())


def save_single_file(pipe: StableDiffusionXLPipeline, path: Path) -> None:
    """The pipeline's weights in fp16 as one checkpoint in SDXL's original layout, atomically."""
    tensors = {key: value.half().contiguous() for key, value in original_layout(pipe).items()}
    scratch = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, scratch, metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    scratch.chmod(0o644)
    os.replace(scratch, path)


def original_layout(pipe: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """The weights of an SDXL of any size under the names of the original checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    depth = pipe.unet.config.layers_per_block + 1
    for key, value in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_key(key, depth)] = value
    for key, value in pipe.vae.state_dict().items():
        # The original attention has 1x1 convolutions.
        is_conv = re.search(r"attentions.*(to_\w+)\.(0\.)?weight", key)
        tensors["first_stage_model." + vae_key(key)] = value[..., None, None] if is_conv else value
    for key, value in pipe.text_encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        tensors["conditioner.embedders.0.transformer.text_model." + name] = value
    for key, value in _open_clip(pipe.text_encoder_2.state_dict()).items():
        tensors["conditioner.embedders.1.model." + key] = value
    return tensors


UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION_NAMES = {
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _unet_key(key: str, depth: int) -> str:
    """One UNet key in the original numbering, in which every layer is a block."""
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", key):
        level, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * depth}.0.op.{rest.removeprefix('conv.')}"
        key = f"input_blocks.{1 + level * depth + layer}.{int(kind == 'attentions')}.{rest}"
    elif match := re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", key):
        level, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "upsamplers":
            return f"output_blocks.{(level + 1) * depth - 1}.2.{rest}"
        key = f"output_blocks.{level * depth + layer}.{int(kind == 'attentions')}.{rest}"
    for ours, theirs in UNET_NAMES.items():
        if key.startswith(ours + "."):
            key = theirs + key.removeprefix(ours)
    if "transformer_blocks" not in key:
        for ours, theirs in RESNET_NAMES.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def vae_key(key: str) -> str:
    """One VAE key in the original naming, which numbers the decoder's levels in reverse."""
    top = len(VAE["block_out_channels"]) - 1  # type: ignore[arg-type]
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{top - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions" in key:
        for ours, theirs in VAE_ATTENTION_NAMES.items():
            key = key.replace(ours, theirs)
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


OPEN_CLIP_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.": "attn.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder in open_clip's layout: q, k and v joined, projection transposed."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        for ours, theirs in OPEN_CLIP_NAMES.items():
            key = key.replace(ours, theirs)
        if match := re.match(r"(.*\.attn\.)q_proj\.(weight|bias)", key):
            parts = [state[_sibling(key, state, letter)] for letter in "qkv"]
            tensors[f"{match[1]}in_proj_{match[2]}"] = torch.cat(parts)
        elif key == "text_projection.weight":
            tensors["text_projection"] = value.T
        elif not re.search(r"\.attn\.[kv]_proj\.", key):
            tensors[key] = value
    return tensors


def _sibling(key: str, state: dict[str, torch.Tensor], letter: str) -> str:
    """The key in `state` of the q, k or v projection of the same layer as this q projection."""
    layer, kind = re.findall(r"resblocks\.(\d+)\..*\.(weight|bias)", key)[0]
    found = f"text_model.encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"
    assert found in state
    return found


def load(dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    """The stored pocket SDXL, loaded offline by the production path."""
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(CHECKPOINT),
        config=str(CONFIG),
        local_files_only=True,
        torch_dtype=dtype,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pocket SDXL as a diffusers folder.")
    parser.add_argument("--folder", type=Path, required=True)
    load(torch.float16).save_pretrained(parser.parse_args().folder)


if __name__ == "__main__":
    main()
