"""`python -m builder.deploy`: make or update an endpoint on RunPod, after showing the changes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from builder.deploy import checks, plan, secrets
from builder.deploy.api import KEYS_PAGE, Api, DeployError
from builder.deploy.differences import Difference
from builder.deploy.options import Options, parse
from builder.deploy.plan import Change, Tree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, or 1 with the reasons on stderr if it cannot be done.

    Nothing is changed before all checks have passed and somebody has agreed.
    """
    options = parse(argv)
    try:
        with Api(_key(), options.base_url) as api:
            return _deploy(options, api)
    except DeployError as exc:
        print(exc, file=sys.stderr)
        return 1


def _key() -> str:
    key = os.environ.get("RUNPOD_API_KEY", "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise DeployError(f"RUNPOD_API_KEY: set it to a key of your account, from {KEYS_PAGE}")
    return key


def _deploy(options: Options, api: Api) -> int:
    checks.check_names(options.env)
    there = plan.find(api.endpoints(), options.name, "endpoint")
    endpoint = plan.endpoint_change(options, there)
    env = endpoint.will_be["env"]
    api.secrets += [env[name] for name in secrets.literal_secrets(env)]
    checks.check_env(env)
    catalog = api.gpus()
    if endpoint.was is None or "gpu" in options.fields:
        checks.check_gpus(endpoint.will_be["gpu"], catalog)
    checks.check_volumes(endpoint.will_be, api)
    known = plan.find(api.templates(), options.name, "template")
    template = plan.template_change(options.name, endpoint.will_be, known)
    _show("endpoint", endpoint, endpoint.differences)
    shown = endpoint.differences
    _show("template", template, [each for each in template.differences if each not in shown])
    _show_notes(options, endpoint, catalog)
    if not (template.differences or endpoint.differences):
        return 0
    if options.is_dry_run or not _agreed(options):
        print("Nothing was changed.")
        return 0
    return _apply(api, template, endpoint)


def _show(what: str, change: Change, differences: Sequence[Difference]) -> None:
    """One line for the record, and one for each difference that has not been shown yet."""
    fate = "will be made" if change.id is None else "will change"
    same = (
        " with the endpoint's image, disk and variables"
        if len(differences) < len(change.differences)
        else ""
    )
    id = f" ({change.id})" if change.id else ""
    print(f"{what} {change.name}{id}: {fate + same if change.differences else 'no change'}")
    width = max((len(each.field) for each in differences), default=0)
    for each in differences:
        print(f"  {each.sign} {each.field:{width}}  {each.values}")


def _show_notes(options: Options, endpoint: Change, catalog: list[Tree]) -> None:
    """Prices, and what the deployer should know of secrets and of memory."""
    costs = list(checks.prices(endpoint.will_be, catalog))
    if costs:
        print("list prices:", *costs, sep="\n")
    for name in secrets.literal_secrets(options.env):
        print(
            f"note: {name} is stored in the template and the endpoint as it is. A secret of "
            f"RunPod's keeps it out of both: --env '{name}={{{{ RUNPOD_SECRET_name }}}}'"
        )
    if endpoint.was is None:
        gpu, needed = endpoint.will_be["gpu"], options.preset.gpu_gb
        for pool in checks.small_pools(gpu, catalog, needed):
            print(f"note: {pool} has less memory than the {needed} GB of weights of this preset")


def _agreed(options: Options) -> bool:
    if options.is_agreed:
        return True
    if not sys.stdin or not sys.stdin.isatty():
        raise DeployError("--yes: needed to change this, since nobody can be asked here")
    try:
        return input("Change this at RunPod? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _apply(api: Api, template: Change, endpoint: Change) -> int:
    """The template first: if the endpoint is then refused, another run continues from there."""
    template_id = template.id
    if template.differences:
        template_id = plan.apply_template(api, template)["id"]
        print(f"template {template_id}: {'changed' if template.id else 'made'}")
    if endpoint.differences:
        made = plan.apply_endpoint(api, endpoint, str(template_id))
        print(f"endpoint {made['id']}: {'changed' if endpoint.id else 'made'}")
        urls = made.get("requestUrls") or {}
        print(f"send jobs to {urls.get('runSync') or urls.get('base') or 'it'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
