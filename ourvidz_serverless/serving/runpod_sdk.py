"""RunPod's SDK, imported without the second that its import waits for.

The SDK (1.12) asks py-cpuinfo for the processor's name, which nobody but its debugger shows. That
starts another Python, which takes 1.1 of the import's 1.5 seconds while everything else waits, at
every cold start. Linux tells the name in a file.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def load() -> None:
    """Import `runpod`; the processor's name is the kernel's, where it tells one."""
    name = processor()
    import cpuinfo

    asked = cpuinfo.get_cpu_info
    if name:
        cpuinfo.get_cpu_info = lambda: {"brand_raw": name}
    try:
        import runpod  # noqa: F401
    finally:
        cpuinfo.get_cpu_info = asked


def processor() -> str | None:
    """The processor's name, as py-cpuinfo has it too; None where the kernel does not tell it."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+?)\s*$", CPUINFO.read_text(), re.MULTILINE)
        return found and found[1]
    return None
