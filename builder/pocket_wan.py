"""The pocket WAN: WAN 2.1's own architecture, T2V and VACE, made small.

Stored as `pocket/wan/`, a diffusers folder laid out like Wan-AI/Wan2.1-T2V-1.3B-Diffusers, and
`pocket/wan_vace/transformer/`, the VACE transformer that shares every other part with it: the
tensors that both transformers have are equal to the byte.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from builder import moving_drawings

POCKET = Path(__file__).resolve().parent.parent / "pocket"
FOLDER = POCKET / "wan"
VACE_FOLDER = POCKET / "wan_vace"

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
TOKENS = 512  # the length WAN pads every prompt to
TEXT = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
}
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,  # 12 numbers for time, 10 for height, 10 for width
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT["d_model"],
    "freq_dim": 256,
    "ffn_dim": 384,
    "num_layers": 5,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
# Known and unknown latents of 16 channels each, and 8x8 of the mask's pixels as 64 channels.
VACE: dict[str, Any] = {"vace_layers": [0, 2, 4], "vace_in_channels": 96}
# Sizes apart as Wan2.1's own, the 16 means and deviations of the latents included (the defaults).
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
# Wan-AI/Wan2.1-T2V-1.3B-Diffusers, scheduler/scheduler_config.json
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
}


def assemble(seed: int = 0) -> WanPipeline:
    """The whole text-to-video pipeline in fp32 with random weights, always the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        return WanPipeline(
            tokenizer=words,
            text_encoder=UMT5EncoderModel(UMT5Config(**TEXT, vocab_size=len(words))),
            transformer=WanTransformer3DModel(**TRANSFORMER),
            vae=AutoencoderKLWan(**VAE),
            scheduler=UniPCMultistepScheduler(**SCHEDULER),
        )


def with_references(base: WanTransformer3DModel, seed: int = 0) -> WanVACETransformer3DModel:
    """A VACE transformer around `base`, whose weights it copies, that adds nothing to it yet.

    Its own blocks begin as copies of the blocks they stand beside, as VACE's did, and what they
    hand on begins at zero (arXiv:2503.07598, section 3). It sees known latents as the base sees
    its own, and nothing else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanVACETransformer3DModel(**TRANSFORMER, **VACE)
    model.load_state_dict(base.state_dict(), strict=False)
    known = model.vace_patch_embedding
    torch.nn.init.zeros_(known.bias)
    with torch.no_grad():
        known.weight[:, :16] = base.patch_embedding.weight
        known.weight[:, 16:] *= 0.1
    for layer, block in zip(VACE["vace_layers"], model.vace_blocks, strict=True):
        block.load_state_dict(base.blocks[layer].state_dict(), strict=False)
        torch.nn.init.zeros_(block.proj_out.weight)
        torch.nn.init.zeros_(block.proj_out.bias)
    torch.nn.init.eye_(model.vace_blocks[0].proj_in.weight)
    torch.nn.init.zeros_(model.vace_blocks[0].proj_in.bias)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A T5 tokenizer that spells any text, in bytes if need be, and knows the drawings' words.

    T5's own three specials in T5's own places, one piece for each word in small letters, one for
    each sign of ASCII, and 256 bytes for everything else. Capitals are read as small letters.
    """
    pieces = [(special, 0.0) for special in (PAD, EOS, UNK)]
    pieces += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    pieces += [("▁", -4.0), *((chr(code), -10.0) for code in range(33, 127))]
    pieces += [(f"▁{word}", -2.0) for word in moving_drawings.vocabulary()]
    spelling = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=True))
    spelling.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    spelling.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    spelling.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    spelling.post_processor = processors.TemplateProcessing(
        single=["$A", EOS], special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def save(pipe: WanPipeline, vace: WanVACETransformer3DModel) -> None:
    """Both folders in fp16, replacing what lay there, README kept."""
    with tempfile.TemporaryDirectory() as scratch:
        pipe.save_pretrained(f"{scratch}/wan")
        vace.save_pretrained(f"{scratch}/vace/transformer")
        _halve(Path(scratch))
        _replace(Path(scratch, "wan"), FOLDER)
        _replace(Path(scratch, "vace"), VACE_FOLDER)


def _halve(folder: Path) -> None:
    """Rewrite every weight below in fp16: diffusers itself would keep some of WAN's in fp32."""
    for path in folder.rglob("*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)


def _replace(made: Path, folder: Path) -> None:
    for path in sorted(filter(Path.is_file, made.rglob("*"))):
        if path.suffix == ".json":
            kept = json.loads(path.read_text(encoding="utf-8"))
            kept.pop("_name_or_path", None)  # of the machine that wrote it
            text = json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
            # The name that transformers 4 and 5 both know.
            text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
            path.write_text(text, encoding="utf-8")
        target = folder / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)


def load(dtype: torch.dtype = torch.float32) -> WanPipeline:
    """The stored text-to-video pipeline, loaded offline by the production path."""
    pipe = WanPipeline.from_pretrained(FOLDER, local_files_only=True, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_vace(base: WanPipeline) -> WanVACEPipeline:
    """The stored pipeline for references: `base` with another transformer."""
    parts = {name: part for name, part in base.components.items() if name != "transformer_2"}
    parts["transformer"] = WanVACETransformer3DModel.from_pretrained(
        VACE_FOLDER, subfolder="transformer", local_files_only=True, torch_dtype=base.dtype
    )
    pipe = WanVACEPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Store the pocket WAN with random weights: where its training begins."""
    pipe = assemble()
    save(pipe, with_references(pipe.transformer))


if __name__ == "__main__":
    main()
