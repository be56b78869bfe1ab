"""The engine behind a worker's chat: its own, or a server that speaks OpenAI's protocol.

Both are a `TextModel`. What only one of them needs is imported when it is chosen: beside a server
this worker needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import Settings

if TYPE_CHECKING:
    from ourvidz_serverless.models.chat.model import Chat
    from ourvidz_serverless.models.chat.server.model import ServerChat


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError if the device does not support what the settings ask of chat."""
    if settings.chat_engine == "builtin":
        from ourvidz_serverless.models.chat import loader

        loader.check(settings, ledger)


def load(settings: Settings, ledger: Ledger) -> Chat | ServerChat:
    """The chat models that the settings ask for; raises ModelLoadError with one line."""
    if settings.chat_engine == "openai":
        from ourvidz_serverless.models.chat.server import loader as server_loader

        return server_loader.load(settings)
    from ourvidz_serverless.models.chat import loader

    return loader.load(settings, ledger)
