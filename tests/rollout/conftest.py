"""What the session side's tests share: SGLang's answers with token-identity routes, a scripted engine, servers.

Test modules import the types under TYPE_CHECKING only and get the objects as fixtures.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from transformers import AutoTokenizer

from pacenote.replay.record import DECODE, PREFILL, RECOMPUTED
from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout.chat import Chats
from pacenote.rollout.matching import Match
from pacenote.rollout.memory_store import MemoryStore
from pacenote.rollout.messages import ROLES
from pacenote.rollout.server import SessionConfig, create_app
from pacenote.rollout.session import Branch, Session
from pacenote.rollout.sglang import Engine
from pacenote.rollout.store import SessionStore
from pacenote.rollout.template import FAMILIES, Template
from pacenote.rollout.turn import Turn

GEOMETRY = RoutingGeometry(num_layers=6, layers=(1, 2, 3, 4, 5), num_experts=16, top_k=2)
STOPS = {"user": "<|user|>", "observation": "<|observation|>", "end": "<|endoftext|>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_numbers = itertools.count(1)


def identity_rows(tokens: Sequence[int], start: int = 0) -> NDArray[np.int32]:
    """[tokens, L, 2]: the token's hexadecimal digits in slot 0 and those of its place (from `start`, the first is 1, so
    that no row is all zeros) in slot 1."""
    places = np.arange(start + 1, start + len(tokens) + 1, dtype=np.int32)
    shifts = np.arange(len(GEOMETRY.layers), dtype=np.int32) * 4
    pair = np.stack([np.asarray(tokens, dtype=np.int32).reshape(-1), places], axis=1)
    return (pair[:, None, :] >> shifts[None, :, None]) & 15


def named_tokens(experts: NDArray[Any]) -> tuple[list[int], list[int]]:
    """(tokens, positions) that rows [R, L, 2] name."""
    digits = (experts.astype(np.int64) << (np.arange(len(GEOMETRY.layers)) * 4)[None, :, None]).sum(axis=1)
    return digits[:, 0].tolist(), (digits[:, 1] - 1).tolist()


def payload(tokens: Sequence[int], start: int = 0) -> str:
    """Rows of `tokens`, whose first stands at `start`, as SGLang sends them: all layers, the dense one zeros."""
    ids = np.zeros((len(tokens), GEOMETRY.num_layers, GEOMETRY.top_k), dtype="<i4")
    ids[:, list(GEOMETRY.layers)] = identity_rows(tokens, start)
    return base64.b64encode(ids.tobytes()).decode()


def sglang_answer(
    body: Mapping[str, Any],
    sampled: Sequence[int],
    *,
    text: str | None = "ok",
    matched: int | str | None = None,
    version: str = "0",
    message: Mapping[str, Any] | None = None,
    **meta: Any,
) -> dict[str, Any]:
    """An answer to a chat body with `input_ids`: every logprob differs from all others, rows name their tokens.

    Args:
        matched: the stop that was met; None ends by length.
        message: fields of the message besides the role; `text` alone if left out.
        meta: fields of `meta_info` to replace.
    """
    tokens = [*body["input_ids"], *sampled]
    finish = {"type": "length", "length": len(sampled)} if matched is None else {"type": "stop", "matched": matched}
    logprobs = [-next(_numbers) / 1024 for _ in sampled]
    info: dict[str, Any] = {
        "id": "1",
        "finish_reason": finish,
        "prompt_tokens": len(body["input_ids"]),
        "completion_tokens": len(sampled),
        "cached_tokens": 0,
        "weight_version": version,
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, sampled, strict=True)],
    }
    if body.get("return_routed_experts"):
        start = body["routed_experts_start_len"]
        info["routed_experts"] = payload(tokens[start:-1], start)
    choice = {
        "index": 0,
        "message": {"role": "assistant", **({"content": text} if message is None else message)},
        "logprobs": {"content": [{"token": "t", "logprob": logprob, "top_logprobs": []} for logprob in logprobs]},
        "finish_reason": finish["type"],
        "meta_info": info | meta,
    }
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@dataclass
class Sent:
    """What went over the wire for one turn, kept apart from the session's own books."""

    body: dict[str, Any]
    sampled: list[int]
    logprobs: list[float]
    version: int
    text: str


class _InProcess(Engine):
    """An engine whose answers are written by the test; no HTTP."""

    def __init__(self) -> None:
        self.write: Callable[[dict[str, Any]], dict[str, Any]]
        self.body: dict[str, Any] = {}

    async def chat(self, body: bytes, *, session: str = "") -> bytes:
        self.body = json.loads(body)
        return json.dumps(self.write(self.body)).encode()


class Player:
    """One session behind the server's own way of a chat (`Chats`), its engine in the test's hand.

    Attributes:
        sent: by number of the turn.
        turn: the newest.
    """

    def __init__(
        self,
        template: Template,
        *,
        geometry: RoutingGeometry | None = GEOMETRY,
        policy: str = "tree",
        match: str = "strict",
        store: SessionStore | None = None,
    ) -> None:
        self.template = template
        self.sent: dict[int, Sent] = {}
        self._engine = _InProcess()
        self._runner = asyncio.Runner()
        self._store = MemoryStore() if store is None else store
        self.session: Session = self._runner.run(self._store.create())
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._chats = Chats(
            template=template,
            geometry=geometry,
            append_roles=frozenset(ROLES),
            model="m",
            store=self._store,
            engine=self._engine,
            threads=self._threads,
            policy=policy,
            match=Match.load(match),
        )

    @property
    def turn(self) -> Turn:
        """The newest turn."""
        return self.session.turns[-1]

    def token(self, name: str) -> int:
        """Id of a token by its text."""
        [token] = self.template.encode(name)[0]
        return token

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampled: Sequence[int] = (40, 41),
        *,
        stop: str | None = None,
        text: str = "ok",
        message: Mapping[str, Any] | None = None,
        version: int = 0,
        request: Mapping[str, Any] | None = None,
        write: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **meta: Any,
    ) -> dict[str, Any]:
        """Ask, have the engine sample these ids, and return the message as the client gets it.

        Args:
            stop: a token's text or a name of STOPS: it is sampled too; or "text", a stop text; None ends by length.
            request: further fields of the request.
            write: makes the engine's answer from the body, instead of `sglang_answer` with the arguments given here.
            meta: as `sglang_answer`.
        """
        token = None if stop in (None, "text") else self.token(STOPS.get(stop, stop))
        ids = [*sampled] + ([] if token is None else [token])
        answers: list[dict[str, Any]] = []

        def plain(body: dict[str, Any]) -> dict[str, Any]:
            matched = "END" if stop == "text" else token
            return sglang_answer(body, ids, text=text, matched=matched, version=str(version), message=message, **meta)

        def kept(body: dict[str, Any]) -> dict[str, Any]:
            answers.append((write or plain)(body))
            return answers[-1]

        self._engine.write = kept
        fields = {"messages": [*messages], **(request or {})}
        completion = self._runner.run(self._chats.complete(self.session.id, json.loads(json.dumps(fields))))
        logprobs = [entry[0] for entry in answers[-1]["choices"][0]["meta_info"]["output_token_logprobs"]]
        self.sent[self.turn.number] = Sent(self._engine.body, ids, logprobs, version, text)
        reply: dict[str, Any] = completion.body()["choices"][0]["message"]
        return reply

    def check(self) -> None:
        """Hold the session's books against what went over the wire."""
        turns, children = self.session.turns, {turn.parent.number for turn in self.session.turns if turn.parent}
        for turn in turns:
            body = self.sent[turn.number].body
            assert body["input_ids"] == turn.prompt.token_ids().tolist()
            assert body["routed_experts_start_len"] == (len(self._full(turn.parent)) - 1 if turn.parent else 0)
            again = [
                other
                for other in turns[turn.number + 1 :]
                if other.parent is turn.parent and self.sent[other.number].body["input_ids"] == body["input_ids"]
            ]
            assert self.session.superseded(turn) == (bool(again) and turn.number not in children)
        for everything in (True, False):
            branches = self.session.branches(include_superseded=everything)
            trained = [number for branch in branches for number in branch.trained]
            assert sorted(trained) == [t.number for t in turns if everything or not self.session.superseded(t)]
            assert [b.leaf for b in branches] == [
                t for t in turns if t.number not in children and (everything or not self.session.superseded(t))
            ]
            for branch in branches:
                self._check_branch(branch)
            for turn in turns:
                whole = [turn in b.leaf.line() and self._kept(b.leaf.line(), turn) == 0 for b in branches]
                owner = next((place for place, b in enumerate(branches) if turn.number in b.trained), None)
                assert owner is None or whole[owner] or not any(whole)

    def _full(self, turn: Turn | None) -> list[int]:
        """All tokens up to and with the turn's answer, as they went over the wire."""
        if turn is None:
            return []
        sent = self.sent[turn.number]
        ids: list[int] = sent.body["input_ids"] + sent.sampled
        return ids

    def _kept(self, line: list[Turn], turn: Turn) -> int:
        """Tokens of the turn's answer that its successor in the line did without: none or the last."""
        place = line.index(turn)
        if place + 1 == len(line):
            return 0
        full, after = self._full(turn), self.sent[line[place + 1].number].body["input_ids"]
        if after[: len(full)] == full:
            return 0
        assert after[: len(full) - 1] == full[:-1]
        assert turn.answer.stopped
        return 1

    def _check_branch(self, branch: Branch) -> None:
        line, trajectory = branch.leaf.line(), branch.trajectory()
        tokens = self._full(branch.leaf)
        count = len(tokens)
        mask, logprobs, generated = [0] * count, [0.0] * count, [False] * count
        written, rewritten = [-1] * count, [-1] * count
        provenance = [PREFILL] * count
        for turn in line:
            sent = self.sent[turn.number]
            start, held = len(sent.body["input_ids"]), len(self._full(turn.parent)) - 1
            for place in range(max(held, 0), start + len(sent.sampled)):  # who computed the row, the last of the line
                rewritten[place] = sent.version
                provenance[place] = PREFILL if place < start else DECODE
            for place in range(max(held, 0), start):
                generated[place], logprobs[place], mask[place], written[place] = False, 0.0, 0, sent.version
            if turn.parent is not None and not self._kept(line, turn.parent):
                last = self.sent[turn.parent.number]
                generated[held], logprobs[held], written[held] = True, last.logprobs[-1], last.version
                mask[held] = int(turn.parent.number in branch.trained)
            for offset, logprob in enumerate(sent.logprobs):
                place = start + offset
                generated[place], logprobs[place], written[place] = True, logprob, sent.version
                mask[place] = int(turn.number in branch.trained)
        assert trajectory.tokens.tolist() == tokens
        assert trajectory.loss_mask.tolist() == mask
        assert trajectory.logprobs.tolist() == logprobs
        assert trajectory.version.tolist() == written
        assert trajectory.experts is not None
        assert len(trajectory.experts) == count - 1
        assert named_tokens(trajectory.experts) == (tokens[:-1], list(range(count - 1)))
        other = [generated[i] and written[i] != rewritten[i] for i in range(count - 1)]
        assert trajectory.provenance.tolist() == [RECOMPUTED if other[i] else provenance[i] for i in range(count - 1)]
        roles, starts, stops, flags = zip(*trajectory.spans, strict=True)
        assert [*roles] == [message.role for message in branch.leaf.history()]
        assert [0, *stops] == [*starts, count]
        assert [*flags] == branch.leaf.generated()
        for start, stop, flag in zip(starts, stops, flags, strict=True):
            assert flag or not any(generated[start:stop])
        assert trajectory.trained == sum(mask)
        if branch.superseded:
            assert trajectory.status == "superseded"
        else:
            assert trajectory.status == ("length" if branch.leaf.answer.finish == "length" else "completed")

    def close(self) -> None:
        """Stop its thread and loop."""
        self._threads.shutdown()
        self._runner.close()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class Served:
    """An ASGI app on a port of its own, in a thread.

    Attributes:
        url: base URL.
        statuses: of all answers so far.
    """

    def __init__(self, app: Starlette) -> None:
        self.statuses: list[int] = []
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._app = app
        config = uvicorn.Config(self, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
        self._server = _Uvicorn(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, its statuses noted."""

        async def note(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
            await send(message)

        await self._app(scope, receive, note)

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._server.ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()


Writer = Callable[[dict[str, Any]], Response | dict[str, Any]]


@dataclass
class ScriptedEngine:
    """An HTTP engine that answers what the test wrote.

    Attributes:
        write: makes the answer from the body; a default one if None.
        bodies, headers: of all requests that came.
        arrived: released once a request has come.
        aborted: released once a request that was held lost its client.
    """

    write: Writer | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    aborted: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    url: str = ""
    _gate: asyncio.Event = field(default_factory=asyncio.Event)
    _passes: int = 0
    _loop: asyncio.AbstractEventLoop | None = None

    def reset(self) -> None:
        """As new: nothing seen, nothing held, the default answer."""
        self.write, self.bodies, self.headers = None, [], []
        self.arrived, self.aborted = threading.Semaphore(0), threading.Semaphore(0)
        self._gate.set()

    def hold(self, *, passes: int = 0) -> None:
        """Answer nothing until `release`, but for the first `passes` requests. Call while none is on its way."""
        self._passes = passes
        self._gate.clear()

    def release(self) -> None:
        """Answer what is held, and what comes."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gate.set)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._loop = asyncio.get_running_loop()
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.arrived.release()
        self._passes, passes = self._passes - 1, self._passes > 0
        if not passes and not await self._released(request):
            self.aborted.release()
            return Response(status_code=499)
        answer = self.write(body) if self.write else sglang_answer(body, [40, 41])
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    async def _released(self, request: Request) -> bool:
        """False if the client went first."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        waiting: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._gate.wait()), asyncio.ensure_future(gone())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for one in waiting:
            one.cancel()
        return self._gate.is_set()

    def app(self) -> Starlette:
        """The ASGI application."""
        handler: Callable[[Request], Awaitable[Response]] = self.chat
        return Starlette(routes=[Route("/v1/chat/completions", handler, methods=["POST"])])


@pytest.fixture(scope="session")
def template(tiny_dir: Path) -> Template:
    """The tiny model's template; all roles may be appended."""
    return Template.load(str(tiny_dir), append_roles=ROLES)


@pytest.fixture
def player(template: Template) -> Iterator[Player]:
    """A player with the tiny model's template."""
    player = Player(template)
    yield player
    player.close()


@pytest.fixture(scope="session")
def new_player(template: Template) -> Iterator[Callable[..., Player]]:
    """Makes players, of the tiny model's template or another; those that nobody closed are closed at the end."""
    made: list[Player] = []

    def make(other: Template | None = None, **options: Any) -> Player:
        made.append(Player(other or template, **options))
        return made[-1]

    yield make
    for player in made:
        player.close()


@pytest.fixture(scope="session")
def chatml(tiny_dir: Path) -> Template:
    """The tiny tokenizer with ChatML's tokens and template: "<|im_end|>\\n" closes every message."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return Template(tokenizer, FAMILIES["default"], append_roles=ROLES)


@pytest.fixture
def chatml_player(chatml: Template) -> Iterator[Player]:
    """A player with ChatML."""
    player = Player(chatml)
    yield player
    player.close()


@pytest.fixture(scope="session")
def identity() -> Callable[[NDArray[Any]], tuple[list[int], list[int]]]:
    """`named_tokens`."""
    return named_tokens


@pytest.fixture(scope="session")
def answer() -> Callable[..., dict[str, Any]]:
    """`sglang_answer`."""
    return sglang_answer


@pytest.fixture(scope="session")
def geometry() -> RoutingGeometry:
    """The tiny model's."""
    return GEOMETRY


@pytest.fixture(scope="session")
def scripted() -> Iterator[ScriptedEngine]:
    """The scripted engine, running."""
    engine = ScriptedEngine()
    with Served(engine.app()) as served:
        engine.url = served.url
        yield engine


@pytest.fixture
def engine(scripted: ScriptedEngine) -> Iterator[ScriptedEngine]:
    """The scripted engine, as new."""
    scripted.reset()
    yield scripted
    scripted.reset()


@pytest.fixture(scope="session")
def served_app() -> type[Served]:
    """`Served`."""
    return Served


@pytest.fixture(scope="session")
def serve(tiny_dir: Path, scripted: ScriptedEngine) -> Callable[..., Served]:
    """Makes a session server in front of the scripted engine; enter it. Arguments are SessionConfig's."""

    def make(**options: Any) -> Served:
        return Served(create_app(SessionConfig(**({"model": str(tiny_dir), "upstream": scripted.url} | options))))

    return make


@pytest.fixture(scope="session")
def served(serve: Callable[..., Served]) -> Iterator[Served]:
    """A session server that allows every role."""
    with serve(append_roles=frozenset(ROLES), served_model="tiny") as served:
        yield served


@pytest.fixture
def http(served: Served, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client of it; the engine is as new."""
    with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait."""
    with ThreadPoolExecutor(8) as pool:
        yield pool
