"""The tables of fields in docs/calling.md, chat.md, wan.md and admin.md equal the contract.

A row of a table begins with one or more names. The first column's title says where the fields are:
`field` is the top level of a payload, otherwise `config` or `metadata`. A name with a dot says it
itself.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.jobs import FAMILY_OF
from ourvidz_serverless.jobs.admin import OPERATIONS
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving import schema
from ourvidz_serverless.settings import Settings
from tests.files import ROOT

SHARED = "calling.md"
PAGES = {"sdxl": "calling.md", "chat": "chat.md", "wan": "wan.md", "admin": "admin.md"}

#: The heading under which calling.md has the fields of every type.
SHARED_HEADING = "The payload"

#: A payload of each family with the required fields and nothing else.
SMALLEST: dict[str, dict[str, Any]] = {
    "sdxl": {"type": "sdxl_image_fast", "prompt": "a red sun"},
    "wan": {"type": "video_fast", "prompt": "a red circle moves right"},
    "chat": {"type": "chat_conversation", "messages": [{"role": "user", "content": "Hello"}]},
    "admin": {"type": "admin_utilities", "operation": "health"},
}


#: Fields whose choices have tables of their own.
SKIPPED = ("type", "operation")

#: A request is refused by RunPod before a reference in it reaches this limit.
MAX_REFERENCE = 30_000_000


@dataclass(frozen=True)
class Row:
    """The fields that one row describes, each with its place, and the row's text."""

    fields: list[tuple[str, ...]]
    text: str

    @property
    def is_required(self) -> bool:
        return "**required**" in self.text


def rows(text: str) -> Iterator[Row]:
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        title, _, *lines = table.strip().splitlines()
        part = title.split("|")[1].strip().strip("`")
        if part in ("field", "config", "metadata"):
            for line in lines:
                yield Row(list(places(line.split("|")[1], part)), line)


def places(cell: str, part: str) -> Iterator[tuple[str, ...]]:
    for name in re.findall(r"`([\w.]+)[^`]*`", cell):
        is_whole = part == "field" or name.startswith(("config.", "metadata."))
        yield tuple(name.split(".")) if is_whole else (part, name)


def described(family: str) -> list[Row]:
    """The rows for a family: those of every type, and those of its own page."""
    sections = (ROOT / "docs" / SHARED).read_text().split("\n## ")
    (shared,) = (each for each in sections if each.startswith(f"{SHARED_HEADING}\n"))
    if PAGES[family] == SHARED:
        own = "".join(each for each in sections if each.startswith("SDXL"))
    else:
        own = (ROOT / "docs" / PAGES[family]).read_text()
    return [*rows(shared), *rows(own)]


def properties(family: str) -> dict[tuple[str, ...], Any]:
    """The fields of a family's payloads by their places, with their schemas."""
    name = "admin_utilities" if family == "admin" else None
    found = schema.job_schemas()[name] if name else schema.family_schema(family)
    top = found["properties"]
    parts = {(part, key): each for part in schema.NULLABLE for key, each in inner(found, part)}
    return {(key,): each for key, each in top.items() if key not in schema.NULLABLE} | parts


def inner(found: Any, part: str) -> Iterator[tuple[str, Any]]:
    if part in found["properties"]:
        options = found["properties"][part]["anyOf"]
        (name,) = (each["$ref"].rsplit("/")[-1] for each in options if "$ref" in each)
        yield from found["$defs"][name]["properties"].items()


def is_copy(field: tuple[str, ...], about: Any) -> bool:
    """Whether a field is another place of a field with the same name."""
    original = about.get("description", "").partition("the same as ")[2].split(",")[0]
    return original.split(".")[-1] == field[-1]


@pytest.mark.parametrize("family", PAGES)
def test_the_page_of_a_family_describes_each_of_its_fields(family: str) -> None:
    on_page = {field for row in described(family) for field in row.fields}

    there = properties(family)
    missing = {f for f, about in there.items() if f not in on_page and not is_copy(f, about)}
    assert missing == set()
    assert on_page - there.keys() == set()


@pytest.mark.parametrize("family", PAGES)
def test_a_row_names_the_choices_and_the_limits_of_its_fields(family: str) -> None:
    there = properties(family)
    wrong = [
        (".".join(field), fact)
        for row in described(family)
        for field in row.fields
        if field[-1] not in SKIPPED
        for fact in map(written, facts(there[field]))
        if not re.search(rf"(?<![\w.]){re.escape(fact)}(?!\w|\.\d)", row.text.replace(",", ""))
    ]

    assert wrong == []


def written(fact: Any) -> str:
    return f"{fact:g}" if isinstance(fact, float) else str(fact)


def facts(about: Any) -> Iterator[Any]:
    """What a row has to say of a field: its choices, its limits and its default."""
    default = about.get("default")
    for option in about.get("anyOf", [about]):
        limits = [option.get(name) for name in ("minimum", "maximum", "maxItems", "maxLength")]
        limits += [option["exclusiveMaximum"] - 1] if "exclusiveMaximum" in option else []
        yield from option.get("enum", ())
        yield from (limit for limit in limits if limit and limit != MAX_REFERENCE)
    if default is not None and default is not False:
        yield default


@pytest.mark.parametrize("family", PAGES)
def test_the_fields_that_a_page_marks_as_required_are_enough_and_needed(family: str) -> None:
    payload = SMALLEST[family]
    marked = {
        field[-1]
        for row in described(family)
        if row.is_required and (family in ("sdxl", "wan") or "for pictures" not in row.text)
        for field in row.fields[:1]
    }

    assert marked == payload.keys()
    assert parse(payload)
    for name in payload:
        with pytest.raises(InvalidPrompt):
            parse({key: value for key, value in payload.items() if key != name})


def parse(payload: dict[str, Any]) -> Any:
    return Envelope.of({"id": "rp-1", "input": payload}).job(Settings())


def test_the_page_of_administration_describes_each_operation() -> None:
    page = (ROOT / "docs" / PAGES["admin"]).read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page.split("## Questions")[1], re.MULTILINE)

    assert sorted(listed) == sorted(OPERATIONS)


def test_every_job_type_is_on_the_page_of_its_family() -> None:
    wrong = [
        name
        for name, owner in FAMILY_OF.items()
        if f"`{name}`" not in (ROOT / "docs" / PAGES[owner]).read_text()
    ]

    assert wrong == []
