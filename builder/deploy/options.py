"""The command's options: what a deployer names, and nothing else.

An option that is not given is None, or empty. Whatever is not named keeps its value at RunPod, or
gets its default when an endpoint is made.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.deploy.api import BASE_URL, DeployError
from builder.presets import PRESETS, Preset, of_families
from ourvidz_serverless.families import FAMILIES

DESCRIPTION = """Make or update an endpoint on RunPod, and the template that it is made of.

The command finds both by their name, shows what it will change, and asks before it does so. What
no option names stays as it is, so a second run changes nothing, and `--image` alone brings another
version. RUNPOD_API_KEY holds the key."""

EPILOG = """examples:
  python -m builder.deploy --family sdxl --image ghcr.io/OWNER/ourvidz-sdxl:v0.1.0
  python -m builder.deploy --family sdxl --max-workers 5
  python -m builder.deploy --family sdxl --env STORAGE_URL=s3://BUCKET \\
      --env BUCKET_ACCESS_KEY_ID=ID --env 'BUCKET_SECRET_ACCESS_KEY={{ RUNPOD_SECRET_bucket }}'
"""

FLASHBOOT = {"off": "OFF", "on": "FLASHBOOT", "priority": "PRIORITY_FLASHBOOT"}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. `fields` are the named fields of an endpoint, as the API nests
    them, without its environment.
    """

    name: str
    preset: Preset
    fields: dict[str, Any]
    env: dict[str, str]
    unset: tuple[str, ...]
    is_agreed: bool
    is_dry_run: bool
    base_url: str


def parse(argv: Sequence[str] | None, environ: Mapping[str, str] = os.environ) -> Options:
    """The options of a command line. A wrong one ends the process with code 2, as argparse does."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        preset = _preset(args)
        return Options(
            name=args.name or f"ourvidz-{preset.name}",
            preset=preset,
            fields=_fields(args),
            env=dict(_pair(each, environ) for each in args.env),
            unset=tuple(args.unset),
            is_agreed=args.yes,
            is_dry_run=args.dry_run,
            base_url=args.api_url,
        )
    except DeployError as exc:
        parser.error(str(exc))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m builder.deploy",
        usage="%(prog)s (--family FAMILIES | --preset NAME) [OPTIONS]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=96
        ),
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--family",
        metavar="FAMILIES",
        help="what the endpoint serves: sdxl, chat, wan, or sdxl,chat,wan",
    )
    what.add_argument("--preset", choices=PRESETS, help="the same, by a name")
    _add_endpoint(parser.add_argument_group("the endpoint"))
    _add_scaling(parser.add_argument_group("its workers"))
    _add_env(parser.add_argument_group("their environment"))
    how = parser.add_argument_group("how")
    how.add_argument("--yes", action="store_true", help="change it without a question")
    how.add_argument("--dry-run", action="store_true", help="show the changes, and make none")
    how.add_argument("--api-url", default=BASE_URL, type=_api_url, help=argparse.SUPPRESS)
    return parser


def _add_endpoint(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--name", type=_text, metavar="NAME", help="the name of both (ourvidz-FAMILY)")
    add("--image", type=_text, metavar="IMAGE", help="image and tag; a new endpoint needs it")
    add("--registry", type=_text, metavar="ID", help="credentials for a private image")
    add("--gpu", type=_words, metavar="POOLS", help="pools, the preferred one first (by preset)")
    add("--exclude-gpu", action="append", metavar="TYPE", help="a GPU of these pools to leave out")
    add("--gpu-count", type=_number(1, 8), metavar="N", help="GPUs of a worker (1)")
    add(
        "--cuda",
        type=_versions,
        metavar="VERSIONS",
        help="the only CUDA versions that hosts may have",
    )
    add(
        "--min-cuda",
        type=_version,
        metavar="VERSION",
        help="the lowest CUDA version of hosts (by image)",
    )
    add("--disk", type=_number(1, 4096), metavar="GB", help="container disk (by preset)")
    add("--network-volume", action="append", metavar="ID", help="a volume for /runpod-volume")
    add("--data-center", action="append", metavar="ID", help="the only data centers to use (any)")


def _add_scaling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--min-workers",
        type=_number(0, 1000),
        metavar="N",
        help="workers that always run, and are paid (0)",
    )
    add("--max-workers", type=_number(0, 1000), metavar="N", help="the most workers at once (3)")
    # The bounds of the API (`EndpointWorkers`).
    add(
        "--idle-timeout",
        type=_number(1, 3600),
        metavar="S",
        help="seconds after which an idle worker stops (10)",
    )
    by = group.add_mutually_exclusive_group()
    by.add_argument(
        "--queue-delay", type=_delay, metavar="S", help="add a worker after a wait of S seconds (4)"
    )
    by.add_argument(
        "--requests-per-worker",
        type=_number(1, 1000),
        metavar="N",
        help="or: add a worker for every N jobs",
    )
    # From five seconds to seven days ("Execution timeout" of docs.runpod.io).
    add(
        "--execution-timeout",
        type=_number(5, 604_800),
        metavar="S",
        help="seconds that a job may take (600)",
    )
    add("--flashboot", choices=FLASHBOOT, help="faster starts of stopped workers (on)")


def _add_env(group: argparse._ArgumentGroup) -> None:
    add, pair = group.add_argument, "KEY=VALUE"
    add(
        "--env",
        action="append",
        default=[],
        metavar=pair,
        help="a variable; KEY alone takes its value in this shell",
    )
    add("--unset", action="append", default=[], metavar="KEY", help="remove a variable")


def _preset(args: argparse.Namespace) -> Preset:
    if args.preset:
        return PRESETS[args.preset]
    families = _words(args.family)
    if strange := [name for name in families if name not in FAMILIES]:
        raise DeployError(f"--family: {strange[0]} is none of {', '.join(FAMILIES)}")
    found = of_families(families)
    if found is None:
        raise DeployError(
            f"--family: no preset serves {','.join(families)} alone. "
            f"Use --preset everything --env FAMILIES={','.join(families)}"
        )
    return found


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """The named fields of an endpoint, as `POST /v2/serverless` nests them."""
    if args.cuda and args.min_cuda:
        raise DeployError("--cuda: not together with --min-cuda")
    gpu = {"pools": args.gpu, "excludedTypes": args.exclude_gpu, "count": args.gpu_count}
    if args.cuda:
        # An empty text is the API's word for no lowest version.
        gpu |= {"allowedCudaVersions": args.cuda, "minCudaVersion": ""}
    if args.min_cuda:
        gpu |= {"allowedCudaVersions": [], "minCudaVersion": args.min_cuda}
    workers = {"min": args.min_workers, "max": args.max_workers, "idleTimeout": args.idle_timeout}
    fields = {
        "image": args.image,
        "disk": args.disk,
        "registry": args.registry,
        "gpu": _given(gpu),
        "workers": _given(workers),
        "scaling": _scaling(args),
        "timeout": args.execution_timeout and args.execution_timeout * 1000,
        "flashboot": FLASHBOOT.get(args.flashboot),
        "networkVolumes": args.network_volume,
        "dataCenterIds": args.data_center,
    }
    if args.exclude_gpu and not args.gpu:
        raise DeployError("--exclude-gpu: needs --gpu, since RunPod takes both together")
    return {name: value for name, value in _given(fields).items() if value != {}}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _scaling(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.queue_delay is not None:
        return {"type": "QUEUE_DELAY", "queueDelay": args.queue_delay}
    if args.requests_per_worker is not None:
        return {"type": "REQUEST_COUNT", "requestCount": args.requests_per_worker}
    return None


def _pair(text: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """A variable and its value: `KEY=VALUE`, or `KEY` for the value that this shell has."""
    key, equals, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        raise DeployError("--env: KEY=VALUE was expected, or KEY alone")
    if not equals and key not in environ:
        raise DeployError(f"--env {key}: this shell has no such variable")
    return key, value if equals else environ[key]


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a text was expected")
    return text.strip()


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("names were expected, comma-separated")
    return list(dict.fromkeys(words))


def _version(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError("a version such as 13.0 was expected")
    return text


def _versions(text: str) -> list[str]:
    return [_version(word) for word in _words(text)]


def _number(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers within bounds."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"a number from {least} to {most} was expected")
        return int(text)

    return parse


def _delay(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text) or float(text) < 0.5:
        raise argparse.ArgumentTypeError("seconds from 0.5 on were expected")
    return float(text)


def _api_url(text: str) -> str:
    """An address of the API, for rehearsals. The key is sent there, so it needs TLS or loopback."""
    if not re.match(r"https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/]", text):
        raise argparse.ArgumentTypeError("an address with https:// was expected")
    return text
