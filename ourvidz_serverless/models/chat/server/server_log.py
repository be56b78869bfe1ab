"""Which lines of a chat server's output are logged: never one that may hold a prompt.

Before the server answers, nobody has sent it a prompt, so all of its lines are logged. From then on
a line is logged only as far as no caller can have written it: the level and the place of a log line
in vLLM's form, a frame of a traceback, and the class of an error without its words.
"""

from __future__ import annotations

import re

#: The most characters of a line that is logged.
MAX_CHARS = 500

#: Colours, and what else a terminal takes for a command.
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

#: What vLLM writes before each line: the name and the pid of the process.
_PROCESS = re.compile(r"^\([\w .:=-]{1,80}\)\s*")

#: `ERROR 11-30 17:00:00 [async_llm.py:123]`; `WARNING:  uvicorn's lines`. Below WARNING there is a
#: line for each request.
_RECORD = re.compile(r"^(WARNING|ERROR|CRITICAL)\b(?:[ \d:.,-]*(\[[\w./]{1,100}:\d+\]))?")

_FRAME = re.compile(r'^\s*File "[^"]{1,300}", line \d+, in [\w<>.]{1,100}$')
_ERROR = re.compile(r"^([A-Za-z_][\w.]{0,100}(?:Error|Exception|Exit|Interrupt))(?=:|$)")


def before_prompts(line: str, secret: str | None) -> str:
    """A line from before the server answers, without the key."""
    line = _CONTROL.sub("", line).rstrip()
    return (line.replace(secret, "***") if secret else line)[:MAX_CHARS]


class AfterPrompts:
    """What is logged of the lines from the time when the server answers."""

    def __init__(self) -> None:
        self._last_record = ""

    def shown(self, line: str) -> str | None:
        """What is logged of the next line; None for nothing."""
        line = _PROCESS.sub("", _CONTROL.sub("", line).rstrip())
        record = _RECORD.match(line)
        if record is None:
            return _place(line)
        level, place = record.groups()
        if place and (found := _place(line[record.end() :].removeprefix(" "))):
            return found
        # vLLM writes each line of a traceback as a record, at the same second and place.
        is_again, self._last_record = place and record[0] == self._last_record, record[0]
        return None if is_again else " ".join(filter(None, (level, place)))


def _place(line: str) -> str | None:
    """A frame of a traceback, or the class of an error; None for another line."""
    if _FRAME.match(line):
        return line.strip()
    error = _ERROR.match(line)
    return error[1] if error else None
