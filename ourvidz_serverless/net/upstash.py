"""Upstash: Redis by HTTP (https://upstash.com/docs/redis/features/restapi)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ourvidz_serverless.net.transport import MAX_BYTES, Transport


class Upstash:
    """A client of one Upstash database."""

    def __init__(self, url: str, token: str) -> None:
        self._url = f"{url.rstrip('/')}/pipeline"
        self._transport = Transport({"Authorization": f"Bearer {token}"})

    def pipeline(
        self, *commands: Sequence[str | int], within_s: float, max_bytes: int = MAX_BYTES
    ) -> Any:
        """The database's answer to commands that are sent in one request, as parsed JSON.

        That is a list with `{"result": reply}` or `{"error": text}` for each command. Raises
        Fault.
        """
        answer = self._transport.send(
            "POST",
            self._url,
            data=json.dumps(commands).encode(),
            headers={"Content-Type": "application/json"},
            within_s=within_s,
            max_bytes=max_bytes,
        )
        return answer.json()
