"""A platform at which a reply was streamed already, and is told one piece for each question."""

import json
from typing import Any

from builder.contract import FOLDER
from tests.servers.local_server import Answer, json_answer
from tests.servers.runpod import Platform, _Job

#: What the job comes to, and the pieces that its reply was streamed in.
DOCUMENT: dict[str, Any] = json.loads((FOLDER / "examples/result.chat.json").read_text())
PIECES = ["Rain ", "is water ", "that falls."]


class Spoken(Platform):
    """`done()` is the id of a job at `local` that has ended with `DOCUMENT`."""

    def done(self) -> str:
        id = self.submit({})
        deltas = [{"delta": piece} for piece in PIECES]
        with self.changed:
            self._queues["local"].clear()
            self._jobs[id].stream = [*deltas, DOCUMENT]
            self._jobs[id].apply({"output": [*deltas, DOCUMENT]})
        return id

    def _stream_on(self, job: _Job) -> Answer:
        with self.changed:
            news = job.stream[job.num_streamed : job.num_streamed + 1]
            job.num_streamed += len(news)
        return json_answer({"status": job.status, "stream": [{"output": item} for item in news]})
