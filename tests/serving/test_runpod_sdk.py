import subprocess
import sys

import pytest

from ourvidz_serverless.serving import runpod_sdk

pytestmark = pytest.mark.skipif(
    runpod_sdk.processor() is None, reason="a kernel that tells no name"
)

TOLD = """
import sys
started = []

def hear(event, about):
    if event == "subprocess.Popen" and "cpuinfo" in str(about[1]):
        started.append(about)

sys.addaudithook(hear)
from ourvidz_serverless import sdk
sdk.load()
import cpuinfo
from runpod.serverless.utils import rp_debugger
print(len(started), cpuinfo.get_cpu_info.__module__, rp_debugger.PROCESSOR, sep="|")
"""


def told() -> list[str]:
    done = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


def test_the_sdk_is_imported_without_starting_another_python() -> None:
    started, *_ = told()

    assert started == "0"


def test_the_sdk_still_knows_the_processors_name() -> None:
    *_, name = told()

    assert name == runpod_sdk.processor()


def test_whoever_asks_for_the_processor_later_gets_the_librarys_own_answer() -> None:
    _, asked, _ = told()

    assert asked == "cpuinfo.cpuinfo"


def test_the_name_is_the_one_that_the_library_finds() -> None:
    import cpuinfo

    assert runpod_sdk.processor() == cpuinfo.get_cpu_info().get("brand_raw")
