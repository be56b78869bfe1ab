"""The contract as JSON Schema: every job's payload, and every document that comes back.

A payload's schema is generated from the model that parses it, and shows every other name that a
field has. The schema of what comes back is generated from `Document`. Tests validate real payloads
and documents against both.

`VERSION` counts changes that a caller can see: the second number counts additions, the first number
changes that break an older caller.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import AliasChoices, AliasPath, BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from ourvidz_serverless import families, jobs
from ourvidz_serverless.document import ContractModel, Document
from ourvidz_serverless.job import KEY_PATTERN, Job, S3Config

VERSION = "1.0"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

#: The parts of a payload in which null means absent for every field.
NULLABLE = ("config", "metadata")

#: The fields of every payload besides its model's: a key, and older names of fields.
COMMON_FIELDS: dict[str, JsonSchemaValue] = {
    "api_key": {"type": "string", "description": "needed where the worker has WORKER_API_KEY"},
    "job_id": {"type": "string", "pattern": KEY_PATTERN, "description": "the same as id"},
    "job_type": {"type": "string", "description": "the same as type, which wins"},
}


class Delta(ContractModel):
    """One item of a streamed reply; the last item of a stream is a Result."""

    delta: str


class _Schema(GenerateJsonSchema):
    """pydantic's schema without titles of fields and without empty defaults."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        default = made.get("default")
        # The default of a value that is parsed from text is not a value that a caller can send.
        is_parsed = made.get("type") == "string" and not isinstance(default, str)
        if default is None or default == [] or is_parsed or isinstance(default, dict):
            made.pop("default", None)
        return made


class _Written(_Schema):
    """The schema of what the worker writes: each field is there, unless it may be null."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        schema = field["schema"]
        value = schema["schema"] if schema["type"] == "default" else schema
        return bool(value["type"] != "nullable")


def job_schemas() -> dict[str, JsonSchemaValue]:
    """The payload's schema by job type."""
    return {name: _of_type(family_schema(family), name) for name, family in jobs.FAMILY_OF.items()}


def document_schemas() -> dict[str, JsonSchemaValue]:
    """The schemas of documents: the callback, the returned result, a stream's item."""
    schemas = {
        "callback": _document_schema(
            "Callback", "The body that is posted, signed, to the application.", "error"
        ),
        "result": _document_schema(
            "Result",
            "What RunPod shows as `output`; a failed job's `error` is this `failure` as JSON text.",
            "failure",
        ),
        "delta": Delta.model_json_schema(schema_generator=_Schema),
    }
    return {name: _with_header(name, schema) for name, schema in schemas.items()}


def _document_schema(title: str, about: str, failure: str) -> JsonSchemaValue:
    """The schema of a document as it is written, with its failure under this name."""
    schema = TypeAdapter(Document).json_schema(schema_generator=_Written)
    fields = schema["properties"]
    del fields["reply"]
    reply = schema["$defs"].pop("Reply")["properties"]
    # `Document.callback` puts the failure's message and the reply's fields on the first level.
    written = {"error_message": {"anyOf": [{"type": "string"}, {"type": "null"}]}, **reply}
    fields |= written | {failure: fields.pop("failure")}
    schema["required"].remove("reply")
    return schema | {"title": title, "description": about}


def event_schema() -> JsonSchemaValue:
    """The body of RunPod's `/run`, and of this worker's `/jobs`."""
    return _with_header(
        "event",
        {
            "title": "RunRequest",
            "type": "object",
            "properties": {
                "input": {"type": "object", "description": "a payload: the schemas in jobs/"},
                "s3Config": S3Config.model_json_schema(schema_generator=_Schema),
            },
            "required": ["input"],
        },
    )


def family_schema(family: str) -> JsonSchemaValue:
    """The payload's schema of a family's jobs."""
    model = _model(family)
    schema = model.model_json_schema(schema_generator=_Schema, mode="validation")
    for part, nested in _parts(model):
        for name, info in nested.model_fields.items():
            _put_everywhere(schema, part, name, info.validation_alias)
    types = [name for name, owner in jobs.FAMILY_OF.items() if owner == family]
    properties = schema["properties"]
    del properties["s3Config"]
    properties |= COMMON_FIELDS | {"type": {"type": "string", "enum": types}}
    properties["id"]["description"] = "RunPod's own id serves where it is missing"
    parts = [_resolved(schema, properties[name]) for name in NULLABLE if name in properties]
    for holder in (schema, *parts):
        _allow_null(holder)
    schema["title"] = f"{family.title()}Job"
    schema["required"] = sorted({*schema.get("required", ()), "type"} - {"id"})
    schema.pop("description", None)
    _drop_unused(schema)
    return schema


def _model(family: str) -> type[Job]:
    """The model that a family's `parse` returns."""
    model: type[Job] = typing.get_type_hints(jobs.module(family).parse)["return"]
    return model


def _put_everywhere(
    schema: JsonSchemaValue,
    part: list[str],
    name: str,
    alias: str | AliasPath | AliasChoices | None,
) -> None:
    """Put a field at every place that it may have. pydantic puts it at one."""
    if alias is None or isinstance(alias, str):
        return
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    paths = [_path(choice) for choice in choices]
    chosen = next((path[0] for path in paths if len(path) == 1), name)
    home = _object(schema, part)
    field = home["properties"].pop(chosen)
    if chosen in home.get("required", ()):
        home["required"].remove(chosen)
    first = ".".join([*part, *paths[0]])
    for *where, last in paths:
        about = {} if [*where, last] == paths[0] else {"description": f"the same as {first}"}
        _object(schema, [*part, *where])["properties"].setdefault(last, {**field, **about})


def _parts(model: type[BaseModel]) -> Iterator[tuple[list[str], type[BaseModel]]]:
    yield [], model
    for name in NULLABLE:
        if name in model.model_fields:
            part = model.model_fields[name].annotation
            assert isinstance(part, type) and issubclass(part, BaseModel)
            yield [name], part


def _path(choice: str | AliasPath) -> list[str]:
    return [choice] if isinstance(choice, str) else [str(step) for step in choice.path]


def _object(schema: JsonSchemaValue, path: list[str]) -> JsonSchemaValue:
    """The object at a path. It is created if it has no field of its own."""
    here = schema
    for name in path:
        title = f"{schema['title'].removesuffix('Job')}{name.title()}"
        if name not in here["properties"]:
            here["properties"][name] = {"$ref": f"#/$defs/{title}"}
            schema["$defs"][title] = {"title": title, "type": "object", "properties": {}}
        here = _resolved(schema, here["properties"][name])
    return here


def _resolved(schema: JsonSchemaValue, part: JsonSchemaValue) -> JsonSchemaValue:
    reference = part.get("$ref")
    resolved: JsonSchemaValue = schema["$defs"][reference.rsplit("/")[-1]] if reference else part
    return resolved


def _allow_null(part: JsonSchemaValue) -> None:
    required = part.get("required", ())
    for name, value in part.get("properties", {}).items():
        options = value.get("anyOf", ())
        if name not in required and {"type": "null"} not in options:
            about = {key: value.pop(key) for key in ("default", "description") if key in value}
            inner = options or [dict(value)]
            value.clear()
            value |= {"anyOf": [*inner, {"type": "null"}], **about}


def _drop_unused(schema: JsonSchemaValue) -> None:
    definitions = schema.pop("$defs", {})
    text = str(schema) + str(definitions)
    used = {name: part for name, part in definitions.items() if f"#/$defs/{name}'" in text}
    if used:
        schema["$defs"] = used


def _of_type(schema: JsonSchemaValue, name: str) -> JsonSchemaValue:
    schema["properties"]["type"] = {"const": name, "type": "string"}
    family = families.FAMILIES.get(jobs.FAMILY_OF[name])
    if family and name == family.type_of_unnamed:
        schema["properties"]["type"]["description"] = f"may be missing if FAMILIES={family.name}"
        schema["required"].remove("type")
    return _with_header(f"jobs:{name}", schema)


def _with_header(name: str, schema: JsonSchemaValue) -> JsonSchemaValue:
    return {"$schema": DIALECT, "$id": f"urn:ourvidz:{VERSION}:{name}", **schema}
