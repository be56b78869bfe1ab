"""LoRAs (arXiv:2106.09685): small weights that one job adds to a checkpoint, and leaves behind.

Only safetensors are read, from one folder by name, or from allowed hosts by URL; a URL is
downloaded once and kept in that folder's `downloads/`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import SafetensorError

from ourvidz_serverless import checkpoints, references
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError, ReferenceFrameError
from ourvidz_serverless.models import lora_header
from ourvidz_serverless.settings import Settings

#: The largest SDXL LoRAs have about as many bytes.
MAX_BYTES = 2_000_000_000
DOWNLOAD_S = 300.0


@dataclass(frozen=True, slots=True)
class LoraShelf:
    """Where LoRAs lie. Without a folder it is empty, and without hosts nothing is downloaded."""

    folder: Path | None
    policy: references.Policy | None = None

    @classmethod
    def of(cls, settings: Settings) -> LoraShelf:
        hosts = frozenset(settings.lora_hosts)
        policy = references.Policy(hosts, max_bytes=MAX_BYTES, deadline_s=DOWNLOAD_S)
        return cls(settings.sdxl_lora_dir, policy if hosts else None)

    def path(self, source: str) -> Path:
        """The file of a name or a URL; a URL must have been fetched.

        Raises InvalidPrompt for a name that nothing lies under, or a URL that is none.
        """
        if self.folder is None:
            raise InvalidPrompt("config.loras: this endpoint has none, see SDXL_LORA_DIR")
        if ":" in source:
            try:
                return self.folder / "downloads" / f"{_digest(source)}.safetensors"
            except ValueError as exc:
                raise InvalidPrompt("config.loras: Input should be an https URL") from exc
        path = self.folder / f"{source.removesuffix('.safetensors')}.safetensors"
        if not path.is_file():
            raise InvalidPrompt(f"config.loras: there is no {source}")
        return path

    def fetch(self, source: str, remaining_s: Callable[[], float]) -> Path:
        """The file of a name or a URL, downloaded where it must be.

        Raises InvalidPrompt when URLs are not allowed, ModelLoadError when one gives nothing.
        """
        path = self.path(source)
        if path.exists():
            return path
        if self.policy is None:
            raise InvalidPrompt("config.loras: URLs are not allowed here, see LORA_HOSTS")
        try:
            data = references.download(source, policy=self.policy, remaining_s=remaining_s)
        except ReferenceFrameError as exc:
            why = exc.message.removeprefix("reference: ")
            raise ModelLoadError(f"config.loras: {why}") from exc
        _write(path, data)
        return path


def _digest(url: str) -> str:
    """What a URL is kept under. Its query is left out: a signature is new each time."""
    parts = urlsplit(url)
    return hashlib.sha256(f"{parts.hostname}{parts.path}".encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Keep a download. Raises ModelLoadError, and keeps nothing, where it is none of weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        fresh = Path(file.name)
    try:
        fresh.write_bytes(data)
        checkpoints.header(fresh)
        fresh.replace(path)
    except ValueError as exc:
        raise ModelLoadError("config.loras: the URL gives no safetensors file") from exc
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def applied(pipe: Any, loras: Sequence[tuple[Path, float]]) -> Iterator[None]:
    """The pipeline with LoRAs, each at its scale, for as long as the context lasts.

    Raises ModelLoadError for a file that is no LoRA of this model.
    """
    if not loras:
        yield
        return
    names = [f"lora_{index}" for index in range(len(loras))]
    try:
        for name, (path, _) in zip(names, loras, strict=True):
            _load(pipe, name, path)
        pipe.set_adapters(names, [scale for _, scale in loras])
        for network in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
            # PEFT's own layers begin in training, in which they drop values out.
            network.eval()
        yield
    finally:
        pipe.unload_lora_weights()


def _load(pipe: Any, name: str, path: Path) -> None:
    """Add a LoRA of a file, at the strength that the file tells, as diffusers does."""
    try:
        lora_header.check(path)
    except (SafetensorError, OSError) as exc:
        raise ModelLoadError(f"config.loras: {path.stem[:12]} is no LoRA of this model") from exc
    except ValueError as exc:
        why = "has a header that is broken" if isinstance(exc, json.JSONDecodeError) else exc
        raise ModelLoadError(f"config.loras: {path.stem[:12]} {why}") from exc
    try:
        pipe.load_lora_weights(
            str(path), adapter_name=name, use_safetensors=True, local_files_only=True
        )
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as exc:
        raise ModelLoadError(f"config.loras: {path.stem[:12]} is no LoRA of this model") from exc
    if name not in {each for every in pipe.get_list_adapters().values() for each in every}:
        raise ModelLoadError(f"config.loras: {path.stem[:12]} is no LoRA of this model")
