"""A platform that has a streamed reply and returns one piece of it to each request."""

import json
from typing import Any

from builder.contract import FOLDER
from tests.servers.local_server import Answer, json_answer
from tests.servers.runpod import Platform, PlatformJob

#: The job's document, and the pieces of its streamed reply.
DOCUMENT: dict[str, Any] = json.loads((FOLDER / "examples/result.chat.json").read_text())
PIECES = ["Rain ", "is water ", "that falls."]


class StreamingPlatform(Platform):
    """A platform that returns one item of a stream to each request."""

    def completed_job(self) -> str:
        """The id of a job at the endpoint `local` that has streamed `PIECES` and `DOCUMENT`."""
        id = self.submit({})
        deltas = [{"delta": piece} for piece in PIECES]
        self.end(id, [*deltas, DOCUMENT])
        return id

    def next_items(self, job: PlatformJob) -> Answer:
        with self.changed:
            items = job.stream[job.num_streamed : job.num_streamed + 1]
            job.num_streamed += len(items)
        return json_answer({"status": job.status, "stream": [{"output": item} for item in items]})
