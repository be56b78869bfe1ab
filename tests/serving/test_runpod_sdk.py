"""The import of RunPod's SDK, in a process of its own."""

import subprocess
import sys

import pytest

from ourvidz_serverless.serving import runpod_sdk

pytestmark = pytest.mark.skipif(
    runpod_sdk.processor() is None, reason="the kernel has no name for the processor"
)

SCRIPT = """
import sys
started = []

def hook(event, about):
    if event == "subprocess.Popen" and "cpuinfo" in str(about[1]):
        started.append(about)

sys.addaudithook(hook)
from ourvidz_serverless.serving import runpod_sdk
runpod_sdk.load()
import cpuinfo
from runpod.serverless.utils import rp_debugger
print(len(started), cpuinfo.get_cpu_info.__module__, rp_debugger.PROCESSOR, sep="|")
"""


def loaded() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    return done.stdout.strip().split("|")


def test_importing_the_sdk_starts_no_other_python() -> None:
    started, *_ = loaded()

    assert started == "0"


def test_the_sdk_gets_the_processors_name() -> None:
    *_, name = loaded()

    assert name == runpod_sdk.processor()


def test_py_cpuinfo_is_restored_after_the_import() -> None:
    _, module, _ = loaded()

    assert module == "cpuinfo.cpuinfo"


def test_the_processors_name_equals_py_cpuinfos() -> None:
    import cpuinfo

    assert runpod_sdk.processor() == cpuinfo.get_cpu_info().get("brand_raw")
