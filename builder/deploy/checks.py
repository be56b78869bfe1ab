"""What is checked before anything is sent to be made: the environment as a worker checks it, and
the pools, GPUs and volumes by RunPod's catalog.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from builder.deploy.api import Api, DeployError
from builder.deploy.plan import Tree
from builder.deploy.secrets import REFERENCE
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings, read_for_worker

#: Variables that others read: RunPod, the libraries, Python. Their values are not checked.
OTHERS = (
    *("RUNPOD_", "HF_", "OTEL_", "CUDA_", "NVIDIA_", "PYTORCH_", "TORCH_", "NCCL_", "OMP_"),
    *("PYTHON", "TZ", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_"),
)

#: What stands for one of RunPod's secrets while settings are checked; the first that fits.
STAND_INS = ("secret", "https://secret.invalid", "1", "1/minute")


def check_names(names: Iterable[str]) -> None:
    """Raise DeployError for a variable that nothing reads, one line for each."""
    known = [name.upper() for name in Settings.model_fields]
    lines = []
    for name in names:
        if name in known or name.startswith(OTHERS):
            continue
        near = difflib.get_close_matches(name.upper(), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ", see docs/settings.md"
        lines.append(f"--env {name}: no setting has this name{hint}")
    if lines:
        raise DeployError("\n".join(lines))


def check_env(env: Mapping[str, str]) -> None:
    """Raise DeployError if a worker on RunPod would not start with this environment.

    The checks are the very ones that would end the start of that worker. One of RunPod's secrets
    counts as set.
    """
    given = {name: _plain(name, value) for name, value in env.items()}
    with _environment({**given, "RUNPOD_ENDPOINT_ID": "checked"}):
        try:
            read_for_worker()
        except ModelLoadError as exc:
            lines = [f"--env {line}" for line in exc.message.split("; ")]
            raise DeployError("\n".join(lines)) from None


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """This process with another environment, which is all that settings are read from."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _plain(name: str, value: str) -> str:
    if not REFERENCE.search(value):
        return value
    return next((REFERENCE.sub(each, value) for each in STAND_INS if _fits(name, each)), "")


def _fits(name: str, value: str) -> bool:
    try:
        Settings.model_validate({name.lower(): value})
    except ValueError:
        return False
    return True


def check_gpus(gpu: Tree, catalog: list[Tree]) -> None:
    """Raise DeployError for a pool or a GPU that is not in RunPod's catalog."""
    pools = pools_of(catalog)
    for pool in gpu["pools"]:
        if pool not in pools:
            raise DeployError(_no_pool(pool, pools, catalog))
    types = [each["id"] for pool in gpu["pools"] for each in pools[pool]]
    for excluded in gpu.get("excludedTypes", []):
        if excluded not in types:
            raise DeployError(
                f"--exclude-gpu: {excluded} is not in these pools: {', '.join(types)}"
            )
    if types and not set(types) - set(gpu.get("excludedTypes", [])):
        raise DeployError("--exclude-gpu: no GPU is left")


def pools_of(catalog: list[Tree]) -> dict[str, list[Tree]]:
    """The GPU types of each serverless pool."""
    pools: dict[str, list[Tree]] = {}
    for gpu in catalog:
        if gpu.get("pool"):
            pools.setdefault(gpu["pool"], []).append(gpu)
    return pools


def _no_pool(name: str, pools: Mapping[str, list[Tree]], catalog: list[Tree]) -> str:
    wanted = name.casefold()
    holder = next(
        (
            gpu["pool"]
            for gpu in catalog
            if gpu.get("pool") and wanted in f"{gpu['id']} {gpu.get('name', '')}".casefold()
        ),
        None,
    )
    if holder:
        return f"--gpu: {name} is a GPU; its pool is {holder}"
    return f"--gpu: there is no pool {name}. Pools are {', '.join(sorted(pools))}"


def check_volumes(endpoint: Tree, api: Api) -> None:
    """Raise DeployError for a network volume that is not there, or not in a named data center."""
    centers = endpoint.get("dataCenterIds", [])
    for id in endpoint.get("networkVolumes", []):
        volume = api.network_volume(id)
        if volume is None:
            raise DeployError(f"--network-volume: there is no volume {id}")
        if centers and volume.get("dataCenter") not in centers:
            raise DeployError(
                f"--data-center: volume {id} is in {volume.get('dataCenter')}, "
                f"and workers run where their volume is"
            )


def prices(endpoint: Tree, catalog: list[Tree]) -> Iterator[str]:
    """What the workers cost, by RunPod's list prices, one line for each pool with a price."""
    pools, gpu, workers = pools_of(catalog), endpoint["gpu"], endpoint["workers"]
    for pool in gpu["pools"]:
        listed = [price for each in pools.get(pool, []) if (price := _price(each)) is not None]
        if not listed:
            continue
        hour = max(listed) * gpu.get("count", 1)
        always = f", {hour * workers['min']:.2f} of them always" if workers["min"] else ""
        yield (
            f"  {pool}: ${hour:.2f} an hour, ${hour / 3600:.6f} a second of a worker; "
            f"at most ${hour * workers['max']:.2f} an hour{always}"
        )


def _price(gpu: Tree) -> Any:
    return (gpu.get("price") or {}).get("serverless")


def small_pools(gpu: Tree, catalog: list[Tree], needed_gb: float) -> list[str]:
    """The pools with less memory than the weights take."""
    pools, count = pools_of(catalog), gpu.get("count", 1)
    return [
        pool
        for pool in gpu["pools"]
        if min(each["memory"] for each in pools[pool]) * count < needed_gb
    ]
