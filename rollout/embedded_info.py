"""What the embedded engine says about itself: SGLang's model_info, server_info, models and loads."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pacenote.rollout.embedded_config import EngineConfig
from pacenote.rollout.embedded_engine import Engine
from pacenote.rollout.embedded_model import Runner
from pacenote.rollout.embedded_protocol import model_card

VERSION = "0.5.23"  # the SGLang whose protocol this is


class Reports:
    """Handlers.

    Args:
        config: the process's options.
        runner: the model.
        engine: its scheduler.
        name: the served model's.
    """

    def __init__(self, config: EngineConfig, runner: Runner, engine: Engine, name: str) -> None:
        self._config, self._runner, self._engine, self._name = config, runner, engine, name
        self._instance = uuid.uuid4().hex

    async def model_info(self, http: HttpRequest) -> Response:
        """GET /model_info."""
        fields, config = self._runner.fields, self._config
        return _json(
            {
                "model_path": str(self._runner.path),
                "tokenizer_path": str(self._config.model_path),
                "served_model_name": self._name,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self._engine.weight_version,
                "tool_call_parser": self._config.tool_call_parser,
                "reasoning_parser": self._config.reasoning_parser,
                "disaggregation_mode": config.disaggregation_mode,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": fields.get("model_type"),
                "architectures": fields.get("architectures"),
            }
        )

    async def server_info(self, http: HttpRequest) -> Response:
        """GET /server_info."""
        config, load = self._config, self._engine.load()
        return _json(
            {
                "model_path": str(self._runner.path),
                "tokenizer_path": str(config.model_path),
                "served_model_name": self._name,
                "host": config.host,
                "port": config.port,
                "dtype": config.dtype,
                "device": config.device,
                "random_seed": config.random_seed,
                "context_length": self._runner.context_length,
                "max_running_requests": config.max_running_requests,
                "max_prefill_tokens": config.max_prefill_tokens,
                "max_total_num_tokens": config.max_running_requests * self._runner.context_length,
                "tool_call_parser": config.tool_call_parser,
                "reasoning_parser": config.reasoning_parser,
                "weight_version": self._engine.weight_version,
                "enable_return_routed_experts": True,
                "disaggregation_mode": config.disaggregation_mode,
                "disaggregation_bootstrap_port": config.disaggregation_bootstrap_port,
                "tp_size": 1,
                "dp_size": 1,
                "pp_size": 1,
                "version": VERSION,
                "status": "ready",
                "instance_id": self._instance,  # not SGLang's: tells this start from the next on the same port
                "internal_states": [{"weight_version": self._engine.weight_version, "num_running": load.running}],
            }
        )

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models."""
        return _json(model_card(self._name, self._runner.context_length))

    async def loads(self, http: HttpRequest) -> Response:
        """GET /v1/loads."""
        load = self._engine.load()
        total = self._config.max_running_requests * self._runner.context_length
        entry = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": load.running,
            "num_waiting_reqs": load.waiting,
            "num_used_tokens": load.used_tokens,
            "max_total_num_tokens": total,
            "token_usage": load.used_tokens / total,
        }
        when = datetime.now(UTC).isoformat()
        return _json({"timestamp": when, "version": VERSION, "num_accelerators": 1, "loads": [entry]})


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
