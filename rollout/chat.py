"""The way of one chat: parse, match, render, then the engine, then commit. Nothing changes before the commit.

The event loop only waits: messages are parsed, rendered and tokenised in a thread, and so are large answers. No lock is
held while the engine generates.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import orjson

from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import BadRequest
from pacenote.rollout.messages import chain, parse_messages
from pacenote.rollout.session import Session
from pacenote.rollout.sglang import Engine, chat_body, read_reply
from pacenote.rollout.store import SessionStore
from pacenote.rollout.template import Template, Tools
from pacenote.rollout.tito import check_roles, extend
from pacenote.rollout.turn import Prompt

LARGE = 1 << 16  # bytes of an answer that is worth a thread


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
    """

    template: Template
    geometry: RoutingGeometry | None
    append_roles: frozenset[str]
    model: str
    store: SessionStore
    engine: Engine
    threads: ThreadPoolExecutor

    async def complete(self, session_id: str, request: Mapping[str, Any]) -> Completion:
        """Answer one chat and record it. Cancelling this before it returns leaves no trace.

        Args:
            session_id: a session that is not known is started.
            request: OpenAI's chat body, parsed.

        Raises:
            SessionError: see `rollout.errors`.
        """
        loop = asyncio.get_running_loop()
        known = self.store.find(session_id) or Session(session_id)
        prompt, body = await loop.run_in_executor(self.threads, self._plan, known, request)
        session = self.store.open(session_id)
        pending = session.begin(prompt)
        raw = await self.engine.chat(body)
        if len(raw) > LARGE:
            reply = await loop.run_in_executor(self.threads, read_reply, raw, prompt, self.geometry)
        else:
            reply = read_reply(raw, prompt, self.geometry)
        turn = await self.store.commit(session, pending, reply.answer, id=f"chatcmpl-{uuid.uuid4().hex}")
        name = request.get("model")
        return Completion(
            turn=turn,
            reply=reply,
            prompt_ids=prompt.token_ids(),
            model=name if isinstance(name, str) else self.model,
        )

    def _plan(self, session: Session, request: Mapping[str, Any]) -> tuple[Prompt, bytes]:
        """The prompt and the engine's body. Reads the session, changes nothing."""
        messages = parse_messages(request.get("messages"))
        if request.get("n") not in (None, 1):
            raise BadRequest(f"n must be 1, got {request['n']!r}: send the request again for another answer", param="n")
        tools = _tools(request.get("tools"))
        arguments = self.template.arguments(request.get("chat_template_kwargs"), request.get("reasoning_effort"))
        links = chain([message.key for message in messages])
        parent = session.find(messages, links)
        if parent is not None:
            check_roles(messages, len(parent.history()), self.append_roles)
        prompt = extend(self.template, messages, parent=parent, path=links[-1], tools=tools, arguments=arguments)
        body = chat_body(prompt, request, model=self.model, routing=self.geometry is not None)
        try:
            return prompt, orjson.dumps(body)
        except orjson.JSONEncodeError as error:  # JSON that can be read, but is nested too deeply to be written
            raise BadRequest(f"the request cannot be passed on to the engine: {error}") from error


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
