"""The memory of a worker that loads no model: a server computes for it."""

from __future__ import annotations


class NoMemory:
    """A device of one byte, which is free: so that its pressure is low."""

    name = "chat server"
    is_host = True
    total_bytes = 1

    def free_bytes(self) -> int:
        return 1

    def host_free_bytes(self) -> int:
        return 0
