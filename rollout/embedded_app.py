"""The embedded engine's HTTP application: SGLang's routes over an `Engine`.

Handlers parse a body, ask the engine's thread and build the answer; nothing here computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from pacenote.rollout.embedded_answer import Answers, Asked
from pacenote.rollout.embedded_config import EngineConfig
from pacenote.rollout.embedded_engine import Engine, UpdateResult
from pacenote.rollout.embedded_info import Reports
from pacenote.rollout.embedded_model import Runner
from pacenote.rollout.embedded_pair import Room, Side
from pacenote.rollout.embedded_prompt import Prompts
from pacenote.rollout.embedded_protocol import (
    AbortBody,
    BodyError,
    ChatBody,
    DistributedBody,
    GenerateBody,
    GroupBody,
    LeaveBody,
    ParameterError,
    PauseBody,
    SessionBody,
    TensorBody,
    UpdateBody,
    VersionBody,
    describe,
    generate_error,
    openai_error,
)
from pacenote.rollout.embedded_request import Completion, Request, RequestError, SamplingParams
from pacenote.rollout.embedded_sampling import generator
from pacenote.rollout.embedded_weights import WeightUpdates

Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[[HttpRequest], Awaitable[Response]]


class ClientGoneError(Exception):
    """The client closed its connection before the answer was ready."""


class Frontend:
    """The HTTP handlers: parse, ask the engine, answer.

    Args:
        config: the process's options.
        runner: the model.
        engine: its scheduler, not started yet.
    """

    def __init__(self, config: EngineConfig, runner: Runner, engine: Engine) -> None:
        self._config = config
        self._runner = runner
        self._engine = engine
        self._name = config.served_model_name or str(config.model_path)
        self._answers = Answers(
            runner.tokenizer,
            runner.geometry,
            model=self._name,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        )
        self._prompts = Prompts(runner.tokenizer)
        self._updates = WeightUpdates(engine)
        self._side = Side(config.disaggregation_mode, config.disaggregation_bootstrap_port)
        self._live: set[str] = set()
        self._number = 0
        self.reports = Reports(config, runner, engine, self._name)

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]:
        """What is open while the application runs."""
        return self._side.lifespan(self._config.host)

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        body = await _read(http, ChatBody)
        if body.stream:
            raise RequestError("stream=true is not supported by the embedded engine: ask without it.")
        ids = body.input_ids if body.input_ids is not None else await self._prompts.render(body)
        top = (body.top_logprobs or 0) if body.logprobs else 0
        asked, done = await self._run(
            http,
            rid=body.rid,
            ids=ids,
            params=body.params(),
            routes_from=body.routed_experts_start_len,
            record=body.return_routed_experts,
            top=top,
            room=body.room,
        )
        return _json(self._answers.chat(body, asked, done, self._engine.weight_version))

    async def generate(self, http: HttpRequest) -> Response:
        """POST /generate."""
        body = await _read(http, GenerateBody)
        if body.stream:
            raise RequestError("stream=true is not supported by the embedded engine: ask without it.")
        if body.text is None and body.input_ids is None:
            raise RequestError("Either text, input_ids or input_embeds should be provided.")
        if body.logprob_start_len != -1:
            raise RequestError("logprob_start_len is not supported by the embedded engine: leave it out.")
        ids = (
            body.input_ids if body.input_ids is not None else await self._prompts.encode(body.text or "", special=True)
        )
        asked, done = await self._run(
            http,
            rid=body.rid,
            ids=ids,
            params=body.params(),
            routes_from=body.routed_experts_start_len,
            record=body.return_routed_experts,
            top=body.top_logprobs_num if body.return_logprob else 0,
            room=body.room,
        )
        return _json(self._answers.generate(body, asked, done, self._engine.weight_version))

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: 200 while the generation thread lives."""
        return Response(status_code=200 if self._engine.alive else 503)

    async def health_generate(self, http: HttpRequest) -> Response:
        """GET /health_generate: 200 if one token could be generated; 503 after 20 s, or while paused."""
        if not self._engine.alive or self._engine.paused:
            return Response(status_code=503)
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        request = self._request(f"HEALTH_CHECK_{uuid.uuid4().hex}", [0], params)
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._engine.submit(request)), 20.0)
        except (TimeoutError, RequestError):
            return Response(status_code=503)
        return Response(status_code=200)

    async def update_weights(self, http: HttpRequest) -> Response:
        """POST /update_weights_from_disk: 200 if the weights serve now, else 400; the body says so."""
        body = await _read(http, UpdateBody)
        result = await asyncio.wrap_future(
            self._engine.update_weights(
                Path(body.model_path),
                version=body.weight_version,
                abort_all=body.abort_all_requests,
                flush=body.flush_cache,
            )
        )
        return _json(asdict(result), 200 if result.success else 400)

    async def begin_update(self, http: HttpRequest) -> Response:
        """POST /begin_weight_update."""
        await _read(http, SessionBody)
        return _outcome(self._updates.begin())

    async def end_update(self, http: HttpRequest) -> Response:
        """POST /end_weight_update."""
        await _read(http, SessionBody)
        return _outcome(await self._updates.end())

    async def update_tensors(self, http: HttpRequest) -> Response:
        """POST /update_weights_from_tensor."""
        return _outcome(await self._updates.tensors(await _read(http, TensorBody)))

    async def update_distributed(self, http: HttpRequest) -> Response:
        """POST /update_weights_from_distributed."""
        return _outcome(await self._updates.distributed(await _read(http, DistributedBody)))

    async def join_group(self, http: HttpRequest) -> Response:
        """POST /init_weights_update_group."""
        return _outcome(await self._updates.join(await _read(http, GroupBody)))

    async def leave_group(self, http: HttpRequest) -> Response:
        """POST /destroy_weights_update_group."""
        return _outcome(await self._updates.leave((await _read(http, LeaveBody)).group_name))

    async def rename_weights(self, http: HttpRequest) -> Response:
        """POST /update_weight_version."""
        body = await _read(http, VersionBody)
        await asyncio.wrap_future(self._engine.rename_weights(body.new_version, abort_all=body.abort_all_requests))
        message = f"Weight version updated to {body.new_version}"
        return _json({"success": True, "message": message, "new_version": body.new_version})

    async def flush_cache(self, http: HttpRequest) -> Response:
        """GET | POST /flush_cache: 400 while requests run."""
        flushed = await asyncio.wrap_future(self._engine.flush())
        text = (
            "Cache flushed.\nPlease check backend logs for more details. (When there are running or waiting requests, "
            "the operation will not be performed.)\n"
        )
        return Response(text if flushed else "Flush cache failed.\n", 200 if flushed else 400)

    async def pause(self, http: HttpRequest) -> Response:
        """POST /pause_generation."""
        body = await _read(http, PauseBody)
        await asyncio.wrap_future(self._engine.pause(body.mode))
        return _json({"status": "ok", "message": "Generation paused successfully."})

    async def resume(self, http: HttpRequest) -> Response:
        """POST /continue_generation."""
        await asyncio.wrap_future(self._engine.resume())
        return _json({"status": "ok", "message": "Generation continued successfully."})

    async def abort(self, http: HttpRequest) -> Response:
        """POST /abort_request."""
        body = await _read(http, AbortBody)
        if not body.abort_all and not body.rid:
            raise RequestError("give rid, or abort_all=true")
        await asyncio.wrap_future(self._engine.abort(None if body.abort_all else body.rid))
        return Response(status_code=200)

    async def _run(
        self,
        http: HttpRequest,
        *,
        rid: str | None,
        ids: list[int],
        params: SamplingParams,
        routes_from: int,
        record: bool,
        top: int,
        room: Room,
    ) -> tuple[Asked, Completion]:
        """Check a request against the model, generate, and abort if the client leaves."""
        started = time.perf_counter()
        self._check(ids, params)
        if not 0 <= routes_from <= len(ids):
            raise RequestError(f"routed_experts_start_len must be in [0, {len(ids)}], got {routes_from}.")
        if not 0 <= top <= 100:
            raise RequestError(f"top_logprobs must be in [0, 100], got {top}.")
        rid = rid or uuid.uuid4().hex
        if rid in self._live:
            raise RequestError(f"Duplicate request ID detected: {rid}")
        self._side.check(room)
        params = self._side.params(params)
        request = self._request(rid, ids, params, record=record, top=top)

        async def ask() -> Completion:
            return await asyncio.wrap_future(self._engine.submit(request))

        self._live.add(rid)
        try:
            done = await self._answer_or_abort(http, rid, self._side.run(request, room, ask))
        finally:
            self._live.discard(rid)
        return Asked(rid=rid, prompt_ids=ids, params=params, routes_from=routes_from, started=started), done

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        limit, vocab = self._runner.context_length, self._runner.vocab_size
        if not ids:
            raise RequestError("The input is empty: expected at least one token.")
        if min(ids) < 0 or max(ids) >= vocab:
            raise RequestError(f"The input_ids contain values outside of the vocabulary [0, {vocab}).")
        if any(not 0 <= token < vocab for token in params.logit_bias):
            raise RequestError(f"logit_bias must have keys in [0, {vocab}).")
        if len(ids) >= limit:
            raise RequestError(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({limit} tokens)."
            )
        if params.max_new_tokens is not None and len(ids) + params.max_new_tokens > limit:
            raise RequestError(
                f"Requested token count exceeds the model's maximum context length of {limit} tokens. You requested a "
                f"total of {len(ids) + params.max_new_tokens} tokens: {len(ids)} tokens from the input messages and "
                f"{params.max_new_tokens} tokens for the completion. Please reduce the number of tokens in the input "
                "messages or the completion to fit within the limit."
            )

    def _request(
        self, rid: str, ids: list[int], params: SamplingParams, *, record: bool = False, top: int = 0
    ) -> Request:
        self._number += 1
        stops = self._runner.stop_ids | params.stop_token_ids
        return Request(
            rid=rid,
            prompt_ids=ids,
            params=params,
            stop_ids=frozenset(token for token in stops if 0 <= token < self._runner.vocab_size),
            generator=generator(params.seed, engine_seed=self._config.random_seed, number=self._number),
            record_routes=record,
            top_logprobs=top,
        )

    async def _answer_or_abort(self, http: HttpRequest, rid: str, work: Awaitable[Completion]) -> Completion:
        answer = asyncio.ensure_future(work)
        gone = asyncio.create_task(_disconnected(http))
        either: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
                self._engine.abort(rid, exact=True)
        if not answer.done():
            raise ClientGoneError
        return answer.result()


def create_engine_app(config: EngineConfig, runner: Runner, engine: Engine) -> Starlette:
    """The application; its lifespan starts and stops the engine's thread."""
    front = Frontend(config, runner, engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        async with front.lifespan():
            yield
        await asyncio.to_thread(engine.stop)

    get, post = ["GET"], ["POST"]
    table: list[tuple[str, Handler, list[str]]] = [
        ("/v1/chat/completions", front.chat, post),
        ("/generate", front.generate, [*post, "PUT"]),
        ("/health", front.health, get),
        ("/health_generate", front.health_generate, get),
        ("/model_info", front.reports.model_info, get),
        ("/get_model_info", front.reports.model_info, get),
        ("/server_info", front.reports.server_info, get),
        ("/get_server_info", front.reports.server_info, get),
        ("/v1/models", front.reports.models, get),
        ("/v1/loads", front.reports.loads, get),
        ("/update_weights_from_disk", front.update_weights, post),
        ("/begin_weight_update", front.begin_update, post),
        ("/end_weight_update", front.end_update, post),
        ("/update_weights_from_tensor", front.update_tensors, post),
        ("/update_weights_from_distributed", front.update_distributed, post),
        ("/init_weights_update_group", front.join_group, post),
        ("/destroy_weights_update_group", front.leave_group, post),
        ("/update_weight_version", front.rename_weights, post),
        ("/flush_cache", front.flush_cache, get + post),
        ("/pause_generation", front.pause, post),
        ("/continue_generation", front.resume, post),
        ("/abort_request", front.abort, post),
    ]
    routes = [Route(path, _guarded(handler, path), methods=methods) for path, handler, methods in table]
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _not_found, Exception: _unexpected}
    )


async def _not_found(http: HttpRequest, error: Exception) -> Response:
    """404 and 405 as FastAPI, and so SGLang, words them."""
    assert isinstance(error, HTTPException)
    return _json({"detail": error.detail}, error.status_code)


async def _unexpected(http: HttpRequest, error: Exception) -> Response:
    return _json(openai_error(f"internal error: {error}", 500), 500)


def _guarded(handler: Handler, path: str) -> Handler:
    """The handler with errors turned into SGLang's bodies."""

    async def answer(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except ParameterError as error:
            return _json({"error": str(error)}, error.status)
        except BodyError as error:
            return _json(openai_error(str(error), error.status, "Bad Request"), error.status)
        except RequestError as error:
            body = generate_error(str(error)) if path == "/generate" else openai_error(str(error), error.status)
            return _json(body, error.status)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it; the access log does

    return answer


async def _read(http: HttpRequest, kind: type[Body]) -> Body:
    """The request's JSON body.

    Raises:
        RequestError: not JSON, or fields of a wrong type.
    """
    raw = await http.body()
    try:
        return kind.model_validate(orjson.loads(raw) if raw else {})
    except orjson.JSONDecodeError as error:
        raise BodyError(f"The body is not valid JSON: {error}") from error
    except ValidationError as error:
        raise BodyError(describe(error)) from error


async def _disconnected(http: HttpRequest) -> None:
    """Returns once the client has closed the connection (the body has been read before)."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _outcome(result: UpdateResult) -> Response:
    return _json({"success": result.success, "message": result.message}, 200 if result.success else 400)


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
