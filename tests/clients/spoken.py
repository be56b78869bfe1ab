"""A platform that has a streamed reply, and sends one piece of it for each request."""

import json
from typing import Any

from builder.contract import FOLDER
from tests.servers.local_server import Answer, json_answer
from tests.servers.runpod import Platform, PlatformJob

#: The job's document, and the pieces of its streamed reply.
DOCUMENT: dict[str, Any] = json.loads((FOLDER / "examples/result.chat.json").read_text())
PIECES = ["Rain ", "is water ", "that falls."]


class Spoken(Platform):
    """`done()` is the id of a job at `local` that has ended with `DOCUMENT`."""

    def done(self) -> str:
        id = self.submit({})
        deltas = [{"delta": piece} for piece in PIECES]
        self.end(id, [*deltas, DOCUMENT])
        return id

    def next_items(self, job: PlatformJob) -> Answer:
        with self.changed:
            news = job.stream[job.num_streamed : job.num_streamed + 1]
            job.num_streamed += len(news)
        return json_answer({"status": job.status, "stream": [{"output": item} for item in news]})
