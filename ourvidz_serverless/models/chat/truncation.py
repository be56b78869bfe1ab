"""`truncate`: which of a conversation's messages go, so that the rest fits the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ourvidz_serverless.models.chat.request import Message


def droppable(messages: Sequence[Message]) -> list[list[int]]:
    """The places of the messages that may go, the oldest first, in groups that go together.

    System prompts and the last message stay. A reply goes with the message before it, since a
    conversation does not begin with a reply.
    """
    groups: list[list[int]] = []
    for index, (role, _) in enumerate(messages[:-1]):
        if role == "assistant" and groups:
            groups[-1].append(index)
        elif role != "system":
            groups.append([index])
    return groups


def kept(num_messages: int, groups: Sequence[Sequence[int]]) -> list[int]:
    """The places of the messages that stay without these groups."""
    gone = {index for group in groups for index in group}
    return [index for index in range(num_messages) if index not in gone]


def fewest(most: int, fits: Callable[[int], bool]) -> int | None:
    """The least number of groups without which the rest `fits`; None if nothing fits.

    It asks about none first, which is the usual case, and then halves what is left.
    """
    if fits(0):
        return 0
    if not most or not fits(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high
