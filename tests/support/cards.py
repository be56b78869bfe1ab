"""Devices of a size, and models that only know where they are."""

from __future__ import annotations

import threading

from ourvidz_serverless.models.residency import Ledger


class Card:
    """The memory of a device with room for so many bytes, and a host with room for so many."""

    name = "card"
    is_host = False

    def __init__(self, total_bytes: int, host_bytes: int = 1 << 40) -> None:
        self.total_bytes, self.host_bytes = total_bytes, host_bytes
        self.held = self.held_by_others = 0

    def free_bytes(self) -> int:
        return max(self.total_bytes - self.held - self.held_by_others, 0)

    def host_free_bytes(self) -> int:
        return self.host_bytes


class Parcel:
    """A model that is nothing but a size and a place."""

    is_on_disk = True

    def __init__(self, num_bytes: int, card: Card | None = None) -> None:
        self.num_bytes, self.place = num_bytes, "host"
        self.card = card or Card(0)
        self.left = threading.Event()

    def load(self) -> None:
        self.place = "host"

    def arrive(self) -> None:
        self.place = "device"
        self.card.held += self.num_bytes

    def leave(self) -> None:
        self._go("host")

    def drop(self) -> None:
        self._go("disk")

    def _go(self, place: str) -> None:
        self.card.held -= self.num_bytes if self.place == "device" else 0
        self.place = place
        self.left.set()


class NoHome:
    """Stands where a model's home stands, for a model that is always there."""

    def expect(self) -> None: ...


def card(total_bytes: int) -> Ledger:
    return Ledger(Card(total_bytes))
