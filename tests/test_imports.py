"""What a worker's process imports, and what it can do without.

One process answers both questions, since importing torch and transformers takes seconds.
"""

import json
import subprocess
import sys

import pytest

from ourvidz_serverless.families import FAMILIES
from tests.files import ROOT
from tests.patience import PATIENCE_S

#: Packages that a family's worker does not import at its start.
FOREIGN = {
    "sdxl": ("compel", "av", "c2pa", "fastapi", "uvicorn", "llguidance", "ftfy"),
    "chat": ("diffusers", "compel", "av", "c2pa", "fastapi", "uvicorn", "peft", "ftfy"),
    "wan": ("compel", "av", "c2pa", "fastapi", "uvicorn"),
}

#: The modules of the packages that the locks leave out (`UNUSED` in `builder.lock`).
LEFT_OUT = (
    *("InquirerPy", "prettytable", "watchdog", "typer", "fastapi_cli", "fastapi_cloud_cli"),
    *("sentry_sdk", "rignore", "email_validator", "multipart", "httpx", "itsdangerous"),
    *("websockets", "watchfiles", "httptools", "rich"),
)

#: Nothing of LEFT_OUT can be imported. A process for each family prints what it has of FOREIGN;
#: then every module of the package is imported. What two families import of diffusers, and chat
#: does not, is imported once for both.
CODE = """
import importlib, json, os, pkgutil, sys
left_out, families = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(["torchao", *left_out]))
import ourvidz_serverless.worker
import torch, transformers.generation
for family, module, packages in families:
    if family != "chat":
        import diffusers.loaders.lora_base
    if (child := os.fork()) == 0:
        importlib.import_module(module)
        found = [name for name in packages if name in sys.modules]
        print(json.dumps([family, found]), flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, family
for module in pkgutil.walk_packages(ourvidz_serverless.__path__, "ourvidz_serverless."):
    importlib.import_module(module.name)
import handler
from diffusers import StableDiffusionXLPipeline, WanPipeline, WanVACEPipeline
"""


@pytest.fixture(scope="module")
def imports() -> subprocess.CompletedProcess[str]:
    chat_first = sorted(FAMILIES, key=lambda name: name != "chat")
    families = [(name, FAMILIES[name].models_module, FOREIGN[name]) for name in chat_first]
    return subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([LEFT_OUT, families])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_imports_no_package_that_only_other_families_need(
    imports: subprocess.CompletedProcess[str], family: str
) -> None:
    found = dict(json.loads(line) for line in imports.stdout.splitlines())

    assert found[family] == []


def test_every_module_imports_without_the_packages_that_the_locks_leave_out(
    imports: subprocess.CompletedProcess[str],
) -> None:
    assert imports.returncode == 0, imports.stderr
