"""The worker whose metrics are sent, as far as they are read from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ourvidz_serverless.models.memory.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Observed:
    """A worker's id, and what its metrics read of it at each export."""

    worker_id: str
    num_running: Callable[[], int]
    ledger: Ledger | None
