"""Signatures in URLs: what of a query stays the same from one signed URL of a file to the next.

Nothing else is imported here: the build of an image uses this module without the package.
"""

from __future__ import annotations

from urllib.parse import parse_qsl

#: What makes a query signed, and which other parameters belong to that signature: S3, Google,
#: CloudFront, Azure, Supabase and Civitai. A name that ends with `-` stands for all that begin so.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "x-amz-signature": ("x-amz-",),
    "x-goog-signature": ("x-goog-",),
    "signature": ("awsaccesskeyid", "googleaccessid", "expires", "policy", "key-pair-id"),
    "sig": (
        *("se", "si", "sip", "ske", "skoid", "sks", "skt", "sktid", "skv"),
        *("sp", "spr", "sr", "st", "sv"),
    ),
    "token": (),
}


def unsigned(query: str) -> tuple[list[tuple[str, str]], bool]:
    """A query's parameters without those of a known signature, and whether there was one."""
    given = parse_qsl(query, keep_blank_values=True)
    names = {name.lower() for name, _ in given}
    signed = {each for marker in SIGNATURES.keys() & names for each in _parameters(marker)}
    prefixes = tuple(each for each in signed if each.endswith("-"))
    kept = [
        (name, value)
        for name, value in given
        if name.lower() not in signed and not name.lower().startswith(prefixes)
    ]
    return kept, bool(signed)


def _parameters(marker: str) -> tuple[str, ...]:
    return (marker, *SIGNATURES[marker])
