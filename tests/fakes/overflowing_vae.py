"""The pocket SDXL with a VAE that is marked as overflowing in fp16, as SDXL's own is."""

import json
import shutil
from pathlib import Path

from ourvidz_serverless.settings import Settings
from tests.files import ROOT


def overflowing_vae_settings(folder: Path, device: str = "auto") -> Settings:
    """Settings of a model in fp16 whose VAE is kept in fp32."""
    config = folder / "sdxl"
    shutil.copytree(ROOT / "pocket/sdxl", config)
    vae = config / "vae/config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"force_upcast": True}))
    return Settings(
        sdxl_model=str(ROOT / "pocket/sdxl.safetensors"),
        sdxl_config=config,
        sdxl_tiny_vae="pocket",
        device=device,
        dtype="float16",
    )
