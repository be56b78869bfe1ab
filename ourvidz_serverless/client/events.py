"""Server-sent events, as the HTTP service writes them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Event(NamedTuple):
    name: str
    data: dict[str, Any]


class EventReader:
    """Reads events from the bytes of a response.

    Lines end at a line feed alone: the JSON of an event may hold other separators, such as U+2028.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._name = "message"

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are complete with this chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := self._read(line.decode()))]

    def _read(self, line: str) -> Event | None:
        field, _, value = line.partition(": ")
        if field == "data":
            return Event(self._name, json.loads(value))
        if field == "event":
            self._name = value
        elif not line:
            self._name = "message"
        return None
