"""Signatures in URLs: two signed URLs of one file differ only in their signatures.

This module imports nothing of the package: the build of an image uses it alone.
"""

from __future__ import annotations

from urllib.parse import parse_qsl

#: The parameter that marks a query as signed, and the other parameters of that signature: S3,
#: Google, CloudFront, Azure, Supabase and Civitai. A name that ends with `-` is a prefix.
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
    """A query's parameters without those of a known signature, and whether it has a signature."""
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
