"""Which variables hold secrets, and what of a value may be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ourvidz_serverless.settings import Settings

#: The settings, each with whether it is a secret.
SETTINGS = {
    name.upper(): bool(re.search("SecretStr|HostToken", str(field.annotation)))
    for name, field in Settings.model_fields.items()
}

#: Names of secrets among the variables that others read.
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")

#: A secret of RunPod's that a value names. The value itself tells nothing.
REFERENCE = re.compile(r"\{\{\s*RUNPOD_SECRET_\w+\s*\}\}")


def masked(name: str, value: Any) -> str:
    """A value as it may be shown. Of a secret only a reference to one of RunPod's is shown."""
    text = str(value)
    if is_secret(name) and text and not REFERENCE.fullmatch(text):
        return "***"
    # A password, or what comes after a question mark.
    return re.sub(r"(?<=://)[^/@]*(?=@)|(?<=\?).+", "***", text.replace("\n", " "))


def literal_secrets(env: Mapping[str, str]) -> list[str]:
    """The variables that hold a secret itself, and not the name of one of RunPod's secrets."""
    return [
        name
        for name, value in env.items()
        if is_secret(name) and value and not REFERENCE.fullmatch(value)
    ]


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return SETTINGS.get(name, bool(SECRET.search(name)))
