"""Content Credentials (C2PA, https://c2pa.org): a signed statement that a model made a file.

They are optional, beside the XMP mark that every file bears. They need the package `c2pa-python`, a
certificate chain and its key. The manifest names the generator and the type of the source. It holds
no prompt, no user and no thumbnail, and no request goes to a timestamp authority.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ourvidz_serverless import __version__
from ourvidz_serverless.delivery.provenance import source_type
from ourvidz_serverless.errors import InternalError, ModelLoadError
from ourvidz_serverless.settings import Settings

#: Algorithm by the name of the key's curve, or by the kind of the key.
ALGORITHMS = {
    "secp256r1": "es256",
    "secp384r1": "es384",
    "secp521r1": "es512",
    "RSA": "ps256",
    "Ed25519": "ed25519",
}


#: The warning for a file that could not be signed, and the error if it must be.
UNSIGNED = "content credentials: an asset could not be signed"


class Credentials:
    """Signs files with one key. If signatures are `required`, no unsigned file is delivered."""

    def __init__(self, chain: str, key: str, required: bool = False) -> None:
        """`chain` and `key` are PEM, the signer's own certificate first.

        Raises ModelLoadError if they are not valid, or if the package is missing.
        """
        try:
            import c2pa
        except ImportError as exc:
            raise ModelLoadError(
                "C2PA_CERT: needs requirements-c2pa.txt installed, or an image built with C2PA=1"
            ) from exc
        self._c2pa: Any = c2pa
        self._required = required
        self._chain, self._key, self._algorithm = chain, key, _algorithm(key)
        settings = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        try:
            self._context: Any = c2pa.Context(settings, self._signer())
        except Exception as exc:  # the native library has no exception classes for this
            raise ModelLoadError("C2PA_CERT: no chain that C2PA can sign with") from exc

    @classmethod
    def of(cls, settings: Settings) -> Credentials | None:
        """The credentials of the settings, if any. Raises ModelLoadError if one is missing."""
        chain, key = settings.c2pa_cert, settings.c2pa_key
        if chain and key:
            pems = _pem("C2PA_CERT", chain), _pem("C2PA_KEY", key.get_secret_value())
            return cls(*pems, required=settings.require_c2pa)
        if chain or key or settings.require_c2pa:
            raise ModelLoadError("C2PA_CERT: needs both C2PA_CERT and C2PA_KEY")
        return None

    def sign(self, data: bytes, mime: str, composite: bool, warnings: list[str]) -> bytes:
        """The file with its manifest.

        If that fails, the file as it is, with an entry in `warnings`; or InternalError, if
        signatures are required.
        """
        signed = io.BytesIO()
        try:
            with self._c2pa.Builder(_manifest(composite), context=self._context) as builder:
                builder.sign(mime, io.BytesIO(data), signed)
        except Exception as exc:  # as above
            if self._required:
                raise InternalError(UNSIGNED) from exc
            if UNSIGNED not in warnings:
                warnings.append(UNSIGNED)
            return data
        return signed.getvalue()

    def _signer(self) -> Any:
        info = self._c2pa.C2paSignerInfo(
            self._algorithm.encode(), self._chain.encode(), self._key.encode(), None
        )
        return self._c2pa.Signer.from_info(info)


def _manifest(composite: bool) -> str:
    created = {
        "action": "c2pa.created",
        "digitalSourceType": source_type(composite),
    }
    return json.dumps(
        {
            "claim_generator_info": [{"name": "ourvidz-serverless", "version": __version__}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
    )


def _pem(name: str, value: str) -> str:
    """The text of a PEM. The setting holds the text, or the path of its file."""
    if "-----BEGIN" in value:
        return value.replace("\\n", "\n")
    try:
        return Path(value).read_text()
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{name}: neither PEM nor a file that can be read") from exc


def _algorithm(key: str) -> str:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private: Any = load_pem_private_key(key.encode(), None)
    except (ValueError, TypeError) as exc:
        raise ModelLoadError("C2PA_KEY: Input should be a private key in PEM") from exc
    curve = getattr(private, "curve", None)
    kind = curve.name if curve else type(private).__name__.removesuffix("PrivateKey").lstrip("_")
    if kind not in ALGORITHMS:
        raise ModelLoadError(f"C2PA_KEY: Input should be one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[kind]
