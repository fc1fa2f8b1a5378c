"""What clients ask about the model before they chat. Answered here: the engine's own answers name paths and hosts."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pacenote.rollout.store import SessionStore


class Info:
    """Handlers under `/sessions/{id}`. None starts a session; a deleted id is refused.

    Args:
        model: name of the served model.
        store: the sessions.
    """

    def __init__(self, model: str, store: SessionStore) -> None:
        self._model = model
        self._store = store

    def routes(self) -> list[Route]:
        """OpenAI's listing, SGLang's model_info and server_info, LiteLLM's model/info."""
        paths = {
            "v1/models": self.models,
            "v1/models/{model:path}": self.card,
            "model_info": self.model_info,
            "get_model_info": self.model_info,
            "server_info": self.model_info,
            "get_server_info": self.model_info,
            "v1/model/info": self.lite,
            "v1/v1/model/info": self.lite,  # clients whose base URL ends in /v1 ask here
            "model/info": self.lite,
        }
        return [Route(f"/sessions/{{session_id}}/{path}", handler, methods=["GET"]) for path, handler in paths.items()]

    async def models(self, request: Request) -> Response:
        """OpenAI's list of the one served model."""
        self._find(request)
        return JSONResponse({"object": "list", "data": [_card(self._model)]})

    async def card(self, request: Request) -> Response:
        """OpenAI's card. Any name is good, as in a chat."""
        self._find(request)
        return JSONResponse(_card(request.path_params["model"]))

    async def model_info(self, request: Request) -> Response:
        """SGLang's model_info, the fields that are the same for every engine; the newest turn's weight version."""
        session = self._find(request)
        turns = () if session is None else session.turns
        return JSONResponse(
            {
                "model_path": self._model,
                "served_model_name": self._model,
                "tokenizer_path": self._model,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": turns[-1].answer.version_name if turns else None,
            }
        )

    async def lite(self, request: Request) -> Response:
        """LiteLLM's model/info."""
        self._find(request)
        entry = {
            "model_name": self._model,
            "litellm_params": {"model": f"openai/{self._model}"},
            "model_info": {"id": self._model, "mode": "chat", "supports_function_calling": True},
        }
        return JSONResponse({"data": [entry]})

    def _find(self, request: Request) -> Any:
        return self._store.find(request.path_params["session_id"])


def _card(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "pacenote"}
