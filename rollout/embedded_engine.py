"""The scheduler of the embedded engine: one thread that owns the model and serves requests in a running batch.

Every iteration does what other threads asked for (submit, abort, pause, new weights), then one step: prompts that wait
are prefilled into free slots, then every running request gets one more token. Semantics of pausing, aborting and
updating follow SGLang's tokenizer manager and scheduler.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from pacenote.rollout.embedded_model import ModelError, Runner, Step, read_config
from pacenote.rollout.embedded_request import Completion, Request, RequestError
from pacenote.rollout.embedded_sampling import Draw, draw

Result = TypeVar("Result")
PauseMode = Literal["abort", "retract", "in_place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """Outcome of a weight update: SGLang's `UpdateWeightFromDiskReqOutput`."""

    success: bool
    message: str
    num_paused_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy the engine is: request and token counts."""

    running: int
    waiting: int
    used_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    load: Callable[[], None]
    version: str | None
    flush: bool
    done: Future[UpdateResult]


class Engine:
    """Continuous batching over a `Runner`.

    Args:
        runner: the model and its slots.
        weight_version: name of the weights that are loaded.
        prefill_tokens: most prompt tokens (padding counted) in one prefill; a longer prompt runs alone.
    """

    def __init__(self, runner: Runner, *, weight_version: str = "default", prefill_tokens: int = 4096) -> None:
        self.runner = runner
        self.weight_version = weight_version
        self._prefill_tokens = prefill_tokens
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._held: deque[Request] = deque()  # arrived while an update waits for the running ones
        self._update: _Update | None = None
        self._paused = False
        self._closed = False
        self._generated = 0
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the generation thread."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread after its current step; unfinished requests are aborted."""
        self._post(self._close)
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """True while the generation thread runs."""
        return self._thread.is_alive()

    @property
    def paused(self) -> bool:
        """True between `pause` and `resume`."""
        return self._paused

    def load(self) -> EngineLoad:
        """A snapshot of the load; counts may be one step old."""
        running = list(self._running)
        return EngineLoad(
            running=len(running),
            waiting=len(self._waiting) + len(self._held),
            used_tokens=sum(request.length for request in running),
            generated_tokens=self._generated,
        )

    def submit(self, request: Request) -> Future[Completion]:
        """Queue a request; its future resolves when the answer ends, also after an abort.

        Raises:
            RequestError: 503 once the engine has stopped.
        """
        if not self.alive or self._closed:
            raise RequestError("the engine has stopped", 503)
        self._post(lambda: self._enqueue(request))
        return request.future

    def abort(self, rid: str | None = None, *, exact: bool = False) -> Future[None]:
        """End the requests whose id starts with `rid` (SGLang's rule) or equals it (`exact`), or all of them (None).

        Their answers so far are delivered with finish reason "abort".
        """
        return self._ask(lambda: self._abort(rid, exact=exact))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stop generating: "abort" ends all requests, "retract" sends the running ones back to the queue (their keys
        and values are computed again on resume), "in_place" keeps everything for resume."""
        return self._ask(lambda: self._pause(mode))

    def resume(self) -> Future[None]:
        """Go on generating."""
        return self._ask(self._resume)

    def flush(self) -> Future[bool]:
        """Drop what is cached; False (and nothing done) while requests hold slots or wait."""
        return self._ask(self._flush)

    def update_weights(
        self, path: Path, *, version: str | None, abort_all: bool = False, flush: bool = True
    ) -> Future[UpdateResult]:
        """Load new weights into the running model.

        As SGLang does: a paused engine updates at once, else the update waits until the requests at hand are finished
        (or are aborted, with `abort_all`) while new ones wait for it. A failure leaves weights and version as they
        were.
        """
        return self._ask_update(
            lambda: self.runner.load_weights(path), version, flush, abort_all, check=lambda: read_config(path)
        )

    def update_tensors(
        self, tensors: Sequence[tuple[str, Tensor]], *, version: str | None, flush: bool, abort_all: bool = False
    ) -> Future[UpdateResult]:
        """The same with tensors under the names that `save_pretrained` writes, all of the model or a part."""
        return self._ask_update(lambda: self.runner.load_tensors(tensors), version, flush, abort_all)

    def rename_weights(self, version: str, *, abort_all: bool) -> Future[None]:
        """Call the present weights by another version."""

        def rename() -> None:
            if abort_all:
                self._abort(None, "Aborted by a weight update.")
            self.weight_version = version

        return self._ask(rename)

    def _ask_update(
        self,
        load: Callable[[], None],
        version: str | None,
        flush: bool,
        abort_all: bool,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> Future[UpdateResult]:
        done: Future[UpdateResult] = Future()
        update = _Update(load=load, version=version, flush=flush, done=done)
        self._post(lambda: self._begin_update(update, abort_all, check))
        return done

    # Everything below runs in the engine's thread.

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _ask(self, action: Callable[[], Result]) -> Future[Result]:
        answer: Future[Result] = Future()

        def command() -> None:
            try:
                answer.set_result(action())
            except Exception as error:
                answer.set_exception(error)

        self._post(command)
        return answer

    def _loop(self) -> None:
        while not self._closed:
            with self._wake:
                while not self._commands and not self._has_work():
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
            try:
                for command in commands:
                    command()
                if not self._paused and not self._closed:
                    self._step()
            except Exception as error:  # a bug or a device error: the requests at hand fail, the engine goes on
                traceback.print_exc()
                self._fail(f"the engine failed: {error}")

    def _has_work(self) -> bool:
        return not self._paused and bool(self._running or self._waiting)

    def _step(self) -> None:
        free = self.runner.cache.slots - len(self._running)
        if self._waiting and free:
            self._prefill(self._admit(free))
        if self._running:
            self._decode()
        self._apply_update_when_idle()

    def _admit(self, free: int) -> list[Request]:
        """Take waiting requests in order while they fit into free slots and the token budget."""
        chosen: list[Request] = []
        width = 0
        while self._waiting and len(chosen) < free:
            width = max(width, self._waiting[0].length)
            if chosen and width * (len(chosen) + 1) > self._prefill_tokens:
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _prefill(self, requests: list[Request]) -> None:
        first = len(self._running)
        self._running.extend(requests)
        record = any(request.record_routes for request in requests)
        sequences = [request.prompt_ids + request.output_ids for request in requests]
        step = self.runner.prefill(first, sequences, record=record)
        for request, rows in zip(requests, step.routes, strict=False):
            request.add_rows(rows, start=0)
        self._accept(requests, self._draw(step, requests))

    def _decode(self) -> None:
        requests = list(self._running)
        positions = [request.length - 1 for request in requests]
        step = self.runner.decode(
            [request.output_ids[-1] for request in requests],
            positions,
            record=any(request.record_routes for request in requests),
        )
        for request, rows, position in zip(requests, step.routes, positions, strict=False):
            request.add_rows(rows, start=position)
        self._accept(requests, self._draw(step, requests))

    def _draw(self, step: Step, requests: list[Request]) -> Draw:
        """The next tokens; in an exact engine their logprobs are the trainer's, where nothing edits the logits."""
        drawn = draw(step.logits, requests)
        exact = self.runner.logprobs(step, drawn.tokens, [request.params.scale for request in requests])
        if exact is None:
            return drawn
        pairs = zip(exact, drawn.logprobs, requests, strict=True)
        return replace(drawn, logprobs=[own if request.params.edited else logprob for logprob, own, request in pairs])

    def _accept(self, requests: list[Request], drawn: Draw) -> None:
        """Append each request's token and end those that are done. `requests` are the last or all running ones."""
        self._generated += len(requests)
        for row, request in enumerate(requests):
            if not drawn.finite[row]:
                self._leave(request)
                request.future.set_exception(
                    RequestError("the model gave logits that are not finite: its weights are broken", 500)
                )
                continue
            request.output_ids.append(drawn.tokens[row])
            request.logprobs.append(drawn.logprobs[row])
            request.versions.append(self.weight_version)
            if request.top_count:
                request.top_logprobs.append(drawn.top[row])
            reason = self._finish_reason(request)
            if reason is not None:
                self._leave(request)
                request.complete(reason)

    def _finish_reason(self, request: Request) -> dict[str, Any] | None:
        """Why the request ends now, if it does. Length comes first and `ignore_eos` mutes ids, as in SGLang."""
        count, params = len(request.output_ids), request.params
        limit = self.runner.context_length - len(request.prompt_ids)
        if params.max_new_tokens is not None:
            limit = min(limit, params.max_new_tokens)
        if count >= limit:
            return {"type": "length", "length": count}
        if not params.ignore_eos and request.output_ids[-1] in request.stop_ids:
            return {"type": "stop", "matched": request.output_ids[-1]}
        if params.stop:
            # A stop text of n characters ends in the last 4 n + 4 tokens: a token holds at least a byte.
            tail = request.output_ids[-4 * max(map(len, params.stop)) - 4 :]
            text = self.runner.tokenizer.decode(tail, skip_special_tokens=False)
            for stop in params.stop:
                if stop in text:
                    return {"type": "stop", "matched": stop}
        return None

    def _leave(self, request: Request) -> None:
        """Free a running request's slot; the last slot's request moves in, so that slots stay without holes."""
        slot = next(index for index, other in enumerate(self._running) if other is request)
        last = self._running.pop()
        if last is not request:
            self.runner.cache.move(len(self._running), slot)
            self._running[slot] = last

    def _enqueue(self, request: Request) -> None:
        reason = self._finish_reason(request) if request.output_ids else None
        if reason is not None:  # it came with its first token, and wants no more
            request.add_rows(self.runner.no_rows(request.length - 1), start=0)
            request.complete(reason)
            return
        (self._waiting if self._update is None else self._held).append(request)

    def _abort(self, rid: str | None, message: str = "Aborted", *, exact: bool = False) -> None:
        def chosen(request: Request) -> bool:
            return rid is None or request.rid == rid or (not exact and request.rid.startswith(rid))

        for request in [request for request in self._running if chosen(request)]:
            self._leave(request)
            request.abort(message)
        for queue in (self._waiting, self._held):
            for request in [request for request in queue if chosen(request)]:
                queue.remove(request)
                request.abort(message)
        self._apply_update_when_idle()

    def _fail(self, message: str) -> None:
        requests, self._running = self._running, []
        for request in requests:
            if not request.future.done():
                request.future.set_exception(RequestError(message, 500))
        self._apply_update_when_idle()

    def _pause(self, mode: PauseMode) -> None:
        self._paused = True
        if mode == "abort":
            self._abort(None)
        elif mode == "retract":
            for request in self._running:
                request.retractions += 1
            self._waiting.extendleft(reversed(self._running))
            self._running.clear()
        if self._update is not None:  # it waited for requests that now stand still
            update, self._update = self._update, None
            self._apply(update)
            self._release_held()

    def _resume(self) -> None:
        self._paused = False

    def _flush(self) -> bool:
        if self._running or (self._waiting and not self._paused):
            return False
        self.runner.cache.clear()
        return True

    def _begin_update(self, update: _Update, abort_all: bool, check: Callable[[], object]) -> None:
        if self._update is not None:
            update.done.set_result(UpdateResult(success=False, message="another weight update is waiting"))
            return
        try:
            check()
        except ModelError as error:  # known at once: nobody has to wait for it
            update.done.set_result(UpdateResult(success=False, message=str(error)))
            return
        if abort_all:
            self._abort(None, "Aborted by a weight update.")
        if self._paused:
            self._apply(update)
            return
        self._update = update
        self._apply_update_when_idle()

    def _apply_update_when_idle(self) -> None:
        if self._update is None or self._running or self._waiting:
            return
        update, self._update = self._update, None
        self._apply(update)
        self._release_held()

    def _release_held(self) -> None:
        self._waiting.extend(self._held)
        self._held.clear()

    def _apply(self, update: _Update) -> None:
        if self._running and update.flush:
            message = f"{len(self._running)} requests hold their cache in place: pass flush_cache=false, or pause with "
            update.done.set_result(UpdateResult(success=False, message=message + "mode retract or abort"))
            return
        started = time.perf_counter()
        try:
            update.load()
        except Exception as error:  # a ModelError, or a device that failed
            update.done.set_result(UpdateResult(success=False, message=str(error)))
            return
        if not self._running:
            self.runner.cache.clear()
        if update.version is not None:
            self.weight_version = update.version
        paused = len(self._running) + len(self._waiting) if self._paused else 0
        message = f"Succeeded to update model weights in {time.perf_counter() - started:.3f} s."
        update.done.set_result(UpdateResult(success=True, message=message, num_paused_requests=paused))

    def _close(self) -> None:
        self._closed = True
        self._abort(None, "The engine is shutting down.")
