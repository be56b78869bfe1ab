"""JSON Schema to TypeScript, for the subset that the contract uses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

Schema = Mapping[str, Any]

PRIMITIVES = {
    "string": "string",
    "integer": "number",
    "number": "number",
    "boolean": "boolean",
    "null": "null",
}


def interfaces(schema: Schema) -> dict[str, str]:
    """The declaration of a schema, and of each of its definitions, by name."""
    parts = {**schema.get("$defs", {}), schema["title"]: schema}
    return {name: interface(name, part) for name, part in parts.items()}


def interface(name: str, schema: Schema) -> str:
    """One object as an exported interface.

    The worker ignores unknown keys. In the types most of them would be typing errors, so only
    documents and metadata, which belongs to the application, accept further keys.
    """
    lines = [f"export interface {name} {{"]
    required = schema.get("required", ())
    for field, part in schema.get("properties", {}).items():
        lines += _comment(part.get("description"), "  ")
        mark = "" if field in required else "?"
        lines.append(f"  {_key(field)}{mark}: {type_of(part)};")
    if schema.get("additionalProperties") or name.endswith("Metadata"):
        lines.append("  [key: string]: unknown;")
    return "\n".join([*_comment(schema.get("description"), ""), *lines, "}"])


def type_of(schema: Schema) -> str:
    """The type of a value."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return union(json.dumps(value) for value in schema["enum"])
    if "anyOf" in schema:
        return union(type_of(option) for option in schema["anyOf"])
    kind = schema.get("type")
    if kind == "array":
        inner = type_of(schema.get("items", {}))
        return f"({inner})[]" if "|" in inner else f"{inner}[]"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"Record<string, {type_of(values) if isinstance(values, dict) else 'unknown'}>"
    return PRIMITIVES[kind] if kind else "unknown"


def union(types: Iterable[str]) -> str:
    """The union of the types, each of them once, in order."""
    return " | ".join(dict.fromkeys(types))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else json.dumps(name)


def _comment(text: str | None, indent: str) -> list[str]:
    return [f"{indent}/** {' '.join(text.split())} */"] if text else []
