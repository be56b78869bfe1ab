"""The names of models: what a worker lists, and which model a call means."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ourvidz_serverless.serving.openai import failures
from ourvidz_serverless.serving.openai.failures import ApiError
from ourvidz_serverless.settings import Settings

#: The model behind each route.
MODEL_OF = {
    "/v1/chat/completions": "qwen_instruct",
    "/v1/completions": "qwen_base",
    "/v1/images/generations": "sdxl",
}
ROUTE_OF = {model: route for route, model in MODEL_OF.items()}

OWNER = "ourvidz_serverless"

#: The most characters of an unknown name that an error repeats.
MAX_NAME = 100


@dataclass(frozen=True)
class Served:
    """The models of one worker by name, `OPENAI_MODEL_NAMES` included."""

    models: Mapping[str, str]
    #: Whether the `url` of an asset is a URL, and not a path in a bucket.
    has_urls: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, settings: Settings) -> Served:
        """What a worker with these settings serves."""
        own = [name for name, is_served in _models(settings).items() if is_served]
        models = {name: name for name in own}
        models |= {each.name: each.model for each in settings.openai_model_names}
        has_urls = settings.storage_url == "inline:" or settings.asset_url_style != "path"
        return cls({name: model for name, model in models.items() if model in own}, has_urls)

    def listing(self) -> dict[str, Any]:
        """The answer to `GET /v1/models`."""
        return {"object": "list", "data": [self._model(name) for name in self.models]}

    def model(self, name: str) -> dict[str, Any]:
        """The answer to `GET /v1/models/{name}`; raises ApiError (404) for an unknown name."""
        if name not in self.models:
            raise self._unknown(name)
        return self._model(name)

    def model_for(self, route: str, name: object) -> str:
        """The model of a call to a route that names this model, or none.

        Raises ApiError (404) if the worker does not have it, or not behind this route.
        """
        own = MODEL_OF[route]
        named = own if name is None else name
        model = self.models.get(named) if isinstance(named, str) else None
        if model is None:
            raise self._unknown(named)
        if model != own:
            message = f"model: {model} is served at {ROUTE_OF[model]}, not at {route}"
            raise ApiError(failures.MODEL_NOT_FOUND, message, "model")
        return model

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": OWNER,
            "root": self.models[name],
        }

    def _unknown(self, name: object) -> ApiError:
        served = ", ".join(self.models) or "none"
        message = f"The model `{str(name)[:MAX_NAME]}` does not exist. This worker has: {served}"
        return ApiError(failures.MODEL_NOT_FOUND, message, "model")


def _models(settings: Settings) -> dict[str, bool]:
    """Each model that the protocol knows, and whether the worker has it."""
    has_chat = "chat" in settings.families
    return {
        "qwen_instruct": has_chat,
        "qwen_base": has_chat and settings.chat_models["qwen_base"] is not None,
        "sdxl": "sdxl" in settings.families,
    }
