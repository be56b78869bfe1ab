"""RunPod's batch jobs, emulated: `Platform` with the operations below `/batch`.

It follows https://docs.runpod.io/serverless/batch-jobs. The requests of a batch are queued when the
batch is finalized. A real batch runs on workers of its own; here the endpoint's workers take it.
"""

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from tests.servers.local_server import Answer, Request, json_answer
from tests.servers.runpod import Platform

#: The most bytes of a call that adds requests.
CALL_LIMIT = 10 * 1024 * 1024

#: The requests on a page of results.
PAGE = 50


@dataclass
class Batch:
    requests: list[Any] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    status: str = "DRAFT"


class BatchPlatform(Platform):
    """RunPod with batches, for use in a `with` statement."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: dict[str, Batch] = {}

    def _answer_caller(self, request: Request, endpoint: str, operation: list[str]) -> Answer:
        match [request.method, *operation]:
            case ["POST", "batch"]:
                return self._create(request)
            case ["POST", "batch", id, "requests"]:
                return self._add(self._batches[id], json.loads(request.body)["requests"])
            case ["POST", "batch", id, "finalize"]:
                return self._finalize(id, endpoint)
            case ["GET", "batch", id]:
                return self._summary(id, endpoint)
            case ["GET", "batch", id, "requests"]:
                return self._page(self._batches[id], request.query)
        return super()._answer_caller(request, endpoint, operation)

    def _create(self, request: Request) -> Answer:
        if len(request.body) > CALL_LIMIT:
            return json_answer({"error": "the body is too large"}, 413)
        id = f"batch_{uuid.uuid4().hex}"
        self._batches[id] = Batch(json.loads(request.body))
        return json_answer({"id": id, "status": "DRAFT"})

    def _add(self, batch: Batch, requests: list[Any]) -> Answer:
        if batch.status != "DRAFT":
            return json_answer({"error": "the batch is finalized"}, 409)
        batch.requests += requests
        return json_answer({"status": batch.status})

    def _finalize(self, id: str, endpoint: str) -> Answer:
        batch = self._batches[id]
        batch.status = "FINALIZED"
        batch.jobs = [self.submit(each["input"], endpoint=endpoint) for each in batch.requests]
        return json_answer({"id": id, "status": batch.status})

    def _summary(self, id: str, endpoint: str) -> Answer:
        batch = self._batches[id]
        states = [self.status(job)["status"] for job in batch.jobs]
        return json_answer(
            {
                "id": id,
                "endpointId": endpoint,
                "status": batch.status,
                "requestTotal": len(batch.requests),
                "requestInProgress": states.count("IN_PROGRESS"),
                "requestCompleted": states.count("COMPLETED"),
                "requestFailed": states.count("FAILED"),
            }
        )

    def _page(self, batch: Batch, query: dict[str, str]) -> Answer:
        offset, limit = int(query.get("offset", 0)), int(query.get("limit", PAGE))
        shown = [self.status(job) for job in batch.jobs[offset : offset + limit]]
        total = len(batch.jobs)
        page = {"total": total, "offset": offset, "limit": limit}
        return json_answer({"requests": shown, **page, "hasMore": offset + limit < total})
