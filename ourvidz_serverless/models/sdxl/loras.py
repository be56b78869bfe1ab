"""LoRAs (arXiv:2106.09685): small weights that a checkpoint has for the time of one job.

Only safetensors are read: by name from one folder, or by URL from allowed hosts. Downloads are
stored in the folder's `downloads/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.models.memory.device import is_lost, is_out_of_memory
from ourvidz_serverless.models.sdxl import lora_header
from ourvidz_serverless.models.sdxl.lora_downloads import Downloads
from ourvidz_serverless.net.download import download
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.settings import Settings

#: The largest SDXL LoRAs have about this many bytes.
MAX_BYTES = 2_000_000_000
DOWNLOAD_S = 300.0


@dataclass(frozen=True, slots=True)
class LoraStore:
    """The folder with LoRAs. Without a folder there are none; without hosts, no downloads."""

    folder: Path | None
    policy: Policy | None = None
    max_cached_bytes: int = 10 << 30

    @classmethod
    def of(cls, settings: Settings) -> LoraStore:
        hosts = frozenset(settings.lora_hosts)
        tokens = {each.host: each.token.get_secret_value() for each in settings.lora_host_tokens}
        policy = Policy(hosts, max_bytes=MAX_BYTES, deadline_s=DOWNLOAD_S, tokens=tokens)
        max_cached_bytes = int(settings.lora_cache_gb * (1 << 30))
        return cls(settings.sdxl_lora_dir, policy if hosts else None, max_cached_bytes)

    def path(self, source: str, user_id: str) -> Path:
        """The file of a name, or of a URL that the user's job has fetched.

        Raises InvalidPrompt for a name without a file, or an invalid URL.
        """
        folder = self._existing_folder()
        if ":" in source:
            try:
                return self._downloads().path(source, user_id)
            except ValueError as exc:
                raise InvalidPrompt("config.loras: Input should be an https URL") from exc
        path = folder / f"{source.removesuffix('.safetensors')}.safetensors"
        if not path.is_file():
            raise InvalidPrompt(f"config.loras: there is no {source}")
        return path

    def fetch(self, source: str, user_id: str, deadline: Deadline) -> Path:
        """The file of a name or a URL, downloaded if necessary.

        Raises InvalidPrompt if URLs are not allowed, ModelLoadError if the download fails.
        """
        path, downloads = self.path(source, user_id), self._downloads()
        if ":" not in source or downloads.use(path):
            return path
        if self.policy is None:
            raise InvalidPrompt("config.loras: URLs are not allowed here, see LORA_HOSTS")
        try:
            data = download(source, self.policy, deadline)
        except Fault as exc:
            raise ModelLoadError(f"config.loras: {exc}") from exc
        downloads.keep(path, data)
        return path

    def _existing_folder(self) -> Path:
        if self.folder is None:
            raise InvalidPrompt("config.loras: this endpoint has none, see SDXL_LORA_DIR")
        return self.folder

    def _downloads(self) -> Downloads:
        return Downloads(self._existing_folder() / "downloads", self.max_cached_bytes)


@contextmanager
def applied(pipe: Any, loras: Sequence[tuple[Path, float]]) -> Iterator[None]:
    """Apply LoRAs to a pipeline, each at its scale, as long as the context lasts.

    Raises ModelLoadError for a file that is not a LoRA for this model.
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
            # PEFT's new layers are in training mode, in which dropout is active.
            network.eval()
        yield
    finally:
        pipe.unload_lora_weights()


def _load(pipe: Any, name: str, path: Path) -> None:
    """Add a file's LoRA, with the strength in the file's header, as diffusers does."""
    try:
        lora_header.check(path)
    except (SafetensorError, OSError) as exc:
        raise ModelLoadError(f"config.loras: {path.stem[:12]} is no LoRA of this model") from exc
    except ValueError as exc:
        why = "has a broken header" if isinstance(exc, json.JSONDecodeError) else exc
        raise ModelLoadError(f"config.loras: {path.stem[:12]} {why}") from exc
    try:
        pipe.load_lora_weights(
            str(path), adapter_name=name, use_safetensors=True, local_files_only=True
        )
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as exc:
        if is_lost(exc) or is_out_of_memory(exc):
            raise
        raise ModelLoadError(f"config.loras: {path.stem[:12]} is no LoRA of this model") from exc
    if name not in {each for every in pipe.get_list_adapters().values() for each in every}:
        raise ModelLoadError(f"config.loras: {path.stem[:12]} is no LoRA of this model")
