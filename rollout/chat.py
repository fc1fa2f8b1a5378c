"""The way of one chat: parse, match, render, then the engine, then commit. Nothing changes before the commit.

The event loop only waits: messages are parsed, rendered and tokenised in a thread, and so are large answers. No lock is
held while the engine generates.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson

from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout import linear, tracing
from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import BadRequest, RollbackFailed
from pacenote.rollout.matching import STRICT, Match
from pacenote.rollout.messages import Message, chain, parse_messages
from pacenote.rollout.observed import Observed, Observer, unobserved
from pacenote.rollout.request_limits import USUAL, RequestLimits
from pacenote.rollout.session import Session
from pacenote.rollout.sglang import Reply, chat_body, read_reply
from pacenote.rollout.store import SessionStore
from pacenote.rollout.template import Arguments, Template, Tools
from pacenote.rollout.tito import check_roles, extend
from pacenote.rollout.turn import Answer, Prompt, Turn
from pacenote.rollout.upstream_probe import Chatting

AT_ONCE = 16  # chats that are worked on
LARGE = 1 << 16  # bytes of an answer that is worth a thread
MOST_CHOICES = 128
_ROLLED_BACK = "the engine lost its prefix (rollback failed) and was asked once more, for all rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A request, ready for the engine.

    Attributes:
        session: the session's id.
        prompt: as rendered.
        request: the client's.
        bodies: the engine's, one a choice.
        replaces: answers that the request takes back.
    """

    session: str
    prompt: Prompt
    request: Mapping[str, Any]
    bodies: list[bytes]
    replaces: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chats:
    """Answers chats.

    Attributes:
        template: the model's.
        geometry: the model's routing, or None to keep no routes.
        append_roles: roles that may follow a generated answer.
        model: name of the served model.
        store: the sessions.
        engine: what generates.
        threads: where rendering runs.
        policy: "tree" or "linear".
        match: when two messages are the same.
        observe: called with what there is to say about each answered chat.
        limits: of one request.
        turn: so many chats are worked on at once; those whose engine generates do not count. More would not be faster,
            and everybody else on the loop, /health first, would wait for all of them.
    """

    template: Template
    geometry: RoutingGeometry | None
    append_roles: frozenset[str]
    model: str
    store: SessionStore
    engine: Chatting
    threads: ThreadPoolExecutor
    policy: str = "tree"
    match: Match = STRICT
    observe: Observer = unobserved
    limits: RequestLimits = USUAL
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def complete(self, session_id: str, request: Mapping[str, Any]) -> Completion:
        """Answer one chat and record it. Cancelling this before it returns leaves no trace.

        Args:
            session_id: a session that is not known is started once there is an answer.
            request: OpenAI's chat body, parsed.

        Raises:
            SessionError: see `rollout.errors`.
        """
        began = time.perf_counter()
        session = self.store.open(session_id)
        with tracing.span("render"):
            async with self.turn:
                plan = await self._off_loop(self._plan, session, request)
        self.limits.check_prompt(plan.prompt.length)
        pending = session.begin(plan.prompt, replaces=plan.replaces)
        asked = time.perf_counter()
        with tracing.span("engine"):
            replies = await self._sample(plan)
        engine_seconds = time.perf_counter() - asked
        created, id = time.time(), f"chatcmpl-{uuid.uuid4().hex}"
        with tracing.span("commit"):
            completion, answers = await self._written(plan, replies, id, created)
            try:
                turns = await self.store.commit(session, pending, *answers, id=id, created=created)
            except asyncio.CancelledError:
                self.store.abandon(session, id)  # it may have been too late to stop it
                raise
        own_seconds = time.perf_counter() - began - engine_seconds
        self.observe(
            Observed(session_id=session_id, turns=turns, engine_seconds=engine_seconds, own_seconds=own_seconds)
        )
        return replace(completion, abandon=partial(self.store.abandon, session, id))

    async def count(self, session_id: str, request: Mapping[str, Any]) -> int:
        """Tokens of the prompt that `complete` would send now. Starts no session.

        Raises:
            SessionError: as `complete`, as far as no engine is asked.
        """
        known = self.store.find(session_id) or Session(session_id)
        plan: _Plan = await self._off_loop(self._plan, known, request)
        return plan.prompt.length

    def _plan(self, session: Session, request: Mapping[str, Any]) -> _Plan:
        """Parse, match, render. Reads the session, changes nothing."""
        messages = self.match.keyed(parse_messages(request.get("messages")))
        count = _count(request.get("n"))
        tools = _tools(request.get("tools"))
        arguments: Arguments = self.template.arguments(
            request.get("chat_template_kwargs"), request.get("reasoning_effort")
        )
        parent = self._parent(session, messages)
        if parent is not None:
            check_roles(messages, len(parent.history()), self.append_roles)
            tools, arguments = _shared(parent, tools, arguments)
        path = chain([message.key for message in messages])[-1]
        prompt = extend(self.template, messages, parent=parent, path=path, tools=tools, arguments=arguments)
        replaces: tuple[Turn, ...] = ()
        if self.policy == "linear":
            linear.check_append_only(prompt)
            replaces = linear.taken_back(session, prompt)
        if session.recovered and not session.turns:
            note = "recovered: the session was not known here; what was generated in it starts at"
            prompt = replace(prompt, note=f"{note} messages[{len(messages)}]")
        bodies = [self._body(prompt, request, choice) for choice in range(count if "seed" in request else 1)]
        return _Plan(
            session=session.id,
            prompt=prompt,
            request=request,
            bodies=bodies * (count // len(bodies)),
            replaces=replaces,
        )

    def _parent(self, session: Session, messages: tuple[Message, ...]) -> Turn | None:
        """The answer that the request goes on from."""
        if self.policy == "linear":
            return linear.checkpoint(session, messages, reasoning=self.match.reasoning)
        return session.find(messages, reasoning=self.match.reasoning)

    def _body(self, prompt: Prompt, request: Mapping[str, Any], choice: int, start: int | None = None) -> bytes:
        """The engine's body for one choice, with a seed of its own: equal seeds would sample equal answers."""
        body = chat_body(prompt, request, model=self.model, routing=self.geometry is not None, start=start)
        if choice and type(body.get("seed")) is int:
            body["seed"] = (body["seed"] + choice) % 2**63
        try:
            return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        except orjson.JSONEncodeError as error:  # JSON that can be read, but is nested too deeply to be written
            raise BadRequest(f"the request cannot be passed on to the engine: {error}") from error

    async def _sample(self, plan: _Plan) -> list[Reply]:
        """The engine's answers, one a choice. If one fails the others are aborted, and the first failure is raised."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._choice(plan, choice)) for choice in range(len(plan.bodies))]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures.exceptions[0].__cause__
        return [task.result() for task in tasks]

    async def _choice(self, plan: _Plan, choice: int) -> Reply:
        try:
            return await self._ask(plan, plan.bodies[choice])
        except RollbackFailed:
            body = await self._off_loop(self._body, plan.prompt, plan.request, choice, 0)
            return await self._ask(plan, body, start=0, note=_ROLLED_BACK)

    async def _ask(self, plan: _Plan, body: bytes, *, start: int | None = None, note: str | None = None) -> Reply:
        raw = await self.engine.chat(body, session=plan.session)
        read = partial(read_reply, raw, plan.prompt, self.geometry, start=start, note=note)
        async with self.turn:
            return await self._off_loop(read) if len(raw) > LARGE else read()

    async def _written(
        self, plan: _Plan, replies: list[Reply], id: str, created: float
    ) -> tuple[Completion, list[Answer]]:
        """What the client gets, and the answers as they are found later."""
        name = plan.request.get("model")
        model = name if isinstance(name, str) else self.model

        def write() -> tuple[Completion, list[Answer]]:
            messages = self.match.keyed([reply.answer.message for reply in replies])
            answers = [
                replace(reply.answer, message=message, choice=choice)
                for choice, (reply, message) in enumerate(zip(replies, messages, strict=True))
            ]
            prompt_ids = plan.prompt.token_ids()
            return Completion.of(replies, id=id, created=created, model=model, prompt_ids=prompt_ids), answers

        small = plan.prompt.length * len(replies) * 8 < LARGE and self.match.function is None
        return write() if small else await self._off_loop(write)

    async def _off_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run it in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, partial(function, *arguments))


def _count(value: object) -> int:
    """OpenAI's `n`.

    Raises:
        BadRequest: not a number of choices.
    """
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= MOST_CHOICES:
        raise BadRequest(f"n must be a number of choices in 1..{MOST_CHOICES}, got {value!r}", param="n")
    return value


def _shared(parent: Turn, tools: Tools, arguments: Arguments) -> tuple[Tools, Arguments]:
    """The parent's own objects where they are equal, so that a turn does not keep another copy of all tools."""
    render = parent.prompt.render
    return (
        render.tools if tools == render.tools else tools,
        render.arguments if arguments == render.arguments else arguments,
    )


def _tools(value: object) -> Tools:
    """OpenAI's `tools`; None for none.

    Raises:
        BadRequest: not a list of functions with names.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRequest(f"tools must be a list, got {type(value).__name__}", param="tools")
    for place, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{place}] must be an object with a function that has a name", param="tools")
    return value
