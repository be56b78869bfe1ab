"""The contract's files, generated from the code that parses payloads and writes documents.

    python -m builder.contract            write contract/ and clients/typescript/types.ts
    python -m builder.contract --check    fail if a file differs from what would be written
    python -m builder.contract --keep NAME FILE...
                                          keep payloads and their present meaning for ever

The tests parse the payloads under contract/kept/ again. A change that refuses one of them, or gives
it another meaning, fails there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder import typescript
from ourvidz_serverless import job_types, jobs
from ourvidz_serverless.document import Asset, Document, Failure
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving import schema as contract
from ourvidz_serverless.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "contract"
TYPES = ROOT / "clients/typescript/types.ts"

VERSIONS = {"worker": "0.1.0", "diffusers": "0.42.1"}
PICTURE = {
    "width": 1024,
    "height": 576,
    "format": "png",
    "batch_size": 1,
    "asset_index": 0,
    "seed": 7,
    "steps": 15,
    "num_inference_steps": 15,
    "guidance_scale": 6.0,
    "file_size_bytes": 123456,
}
VIDEO = {
    **PICTURE,
    "width": 480,
    "height": 832,
    "format": "mp4",
    "steps": 25,
    "num_inference_steps": 25,
    "frame_num": 81,
    "fps": 16,
    "duration_seconds": 5.063,
}
FACTS = {
    "processing_time": 3.2,
    "timings": {"generate": 3.0, "deliver": 0.1},
    "versions": VERSIONS,
    "reference_mode": "none",
    "batch_size": 1,
}
REPLY = {
    "response": "Rain is water that falls.",
    "finish_reason": "stop",
    "usage": {
        "prompt_tokens": 21,
        "completion_tokens": 7,
        "total_tokens": 28,
        "prompt_tokens_reused": 0,
    },
}
REPLY_ASSET = Asset(
    "text",
    "data:text/plain;charset=utf-8,Rain%20is%20water%20that%20falls.",
    None,
    {"batch_size": 1, "asset_index": 0, "format": "txt", "file_size_bytes": 25},
)

#: One document of each kind, as the worker writes it.
DOCUMENTS = {
    "completed": Document(
        "job-1",
        "worker-1",
        "completed",
        (Asset("image", "user-1/job-1/0.png", "user-1/job-1/0.thumb.webp", PICTURE),),
        FACTS,
    ),
    "video": Document(
        "job-5",
        "worker-1",
        "completed",
        (Asset("video", "user-1/job-5/0.mp4", "user-1/job-5/0.thumb.webp", VIDEO),),
        {**FACTS, "frame_num": VIDEO["frame_num"], "fps": VIDEO["fps"]},
    ),
    "chat": Document("job-2", "worker-1", "completed", (REPLY_ASSET,), FACTS, reply=REPLY),
    "failed": Document(
        "job-3",
        "worker-1",
        "failed",
        (),
        {"processing_time": 0.1, "versions": VERSIONS},
        Failure("OOM_ERROR", "not even one picture fits the device", True),
    ),
    "processing": Document("job-4", "worker-1", "processing"),
}


def main() -> None:
    """Write, check or keep, by the options of the command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true")
    arguments.add_argument("--keep", metavar="NAME")
    arguments.add_argument("files", nargs="*", type=Path)
    asked = arguments.parse_args()
    if asked.keep:
        keep(asked.keep, asked.files)
    elif asked.check:
        if stale := check():
            sys.exit("stale: " + ", ".join(stale) + "; run python -m builder.contract")
    else:
        for path, text in artefacts().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def check() -> list[str]:
    """The files that are missing, outdated or superfluous."""
    wanted = artefacts()
    present = {*FOLDER.glob("*.json"), *FOLDER.glob("jobs/*"), *FOLDER.glob("examples/*.json")}
    stale = {path for path, text in wanted.items() if not path.exists() or path.read_text() != text}
    return sorted(str(path.relative_to(ROOT)) for path in stale | (present - wanted.keys()))


def artefacts() -> dict[Path, str]:
    """The text of every generated file, by its path."""
    files = {FOLDER / "VERSION": f"{contract.VERSION}\n", TYPES: types()}
    for name, schema in contract.job_schemas().items():
        files[FOLDER / f"jobs/{name}.schema.json"] = _json(schema)
    for name, schema in {**contract.document_schemas(), "event": contract.event_schema()}.items():
        files[FOLDER / f"{name}.schema.json"] = _json(schema)
    for name, document in DOCUMENTS.items():
        files[FOLDER / f"examples/callback.{name}.json"] = _json(document.callback())
        if name != "processing":
            # The SDK moves `error` from the returned document to a place beside the output.
            shown = {key: value for key, value in document.result().items() if key != "error"}
            files[FOLDER / f"examples/result.{name}.json"] = _json(shown)
    files[FOLDER / "examples/delta.json"] = _json({"delta": "Rain is"})
    return files


def types() -> str:
    """The contract as TypeScript."""
    families = dict.fromkeys(jobs.FAMILY_OF.values())
    payloads = [contract.family_schema(family) for family in families]
    declared: dict[str, str] = {}
    for schema in [*payloads, contract.event_schema(), *contract.document_schemas().values()]:
        declared |= typescript.interfaces(schema)
    names = ", ".join(json.dumps(name) for name in families)
    return (
        "\n\n".join(
            [
                "// Written by `python -m builder.contract` from the worker's models. Do not edit.",
                f"export const CONTRACT_VERSION = {json.dumps(contract.VERSION)};",
                f"/** Which family serves which job type. */\nexport const FAMILY_OF = "
                f"{json.dumps(jobs.FAMILY_OF, indent=2)} as const;",
                "/** Other names of two of them, which the application's payloads use. */\n"
                f"export const SYNONYMS = {json.dumps(job_types.SYNONYMS, indent=2)} as const;",
                f"export const FAMILIES = [{names}] as const;",
                "export type JobType = keyof typeof FAMILY_OF;",
                "export type Family = (typeof FAMILIES)[number];",
                *declared.values(),
                f"export type Job = {typescript.union(schema['title'] for schema in payloads)};",
            ]
        )
        + "\n"
    )


def keep(name: str, files: list[Path]) -> None:
    """Keep payloads under a name: `input` is the payload, `means` its meaning."""
    for file in files:
        kept = FOLDER / "kept" / name / file.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        payload = json.loads(file.read_text())
        kept.write_text(_json({"input": payload, "means": meaning(payload)}))


def meaning(payload: Mapping[str, Any]) -> Any:
    """The meaning of a payload: the fields of the parsed job, under their present names."""
    settings = Settings()
    job = Envelope.of({"id": "rp-1", "input": payload}, settings.families).job(settings)
    return json.loads(job.model_dump_json(exclude={"s3_config"}, fallback=str))


def kept() -> Iterator[tuple[str, Any]]:
    """Every kept payload with its meaning, by name."""
    for file in sorted(FOLDER.glob("kept/*/*.json")):
        yield f"{file.parent.name}/{file.stem}", json.loads(file.read_text())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
