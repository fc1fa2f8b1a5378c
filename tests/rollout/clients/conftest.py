"""A seat: one session behind a URL, a real client in front of it, and its books held against what was sampled.

Behind the session server stands a scripted engine, whose answers a test writes as the model would, token by token, or
the embedded engine with the policy of `policy`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from starlette.responses import JSONResponse, Response
from transformers import AutoTokenizer

from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.rollout.samples import decode_samples
from pacenote.rollout.toolcalls import parse_tool_calls, split_reasoning
from pacenote.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else litellm asks the network for prices, on import
CONTEXT = 4096  # tokens that the embedded engine has room for
ROLES = frozenset({"tool", "user"})  # that agents append
STOPS = ("<|user|>", "<|observation|>")


@dataclass(kw_only=True)
class Script:
    """What the scripted engine samples, in order: the model's text with its stop token, or an HTTP answer.

    A text without a stop token ended by length.

    Attributes:
        tokenizer: the policy's.
        write: `sglang_answer`.
        reasoning: take the reasoning out of the text, as SGLang does with `--reasoning-parser`.
        failures: answers sent that say that the engine failed.
        moves: still to come; asking for more than these is an error of status 500.
        sampled: text and logprobs of each answer that was sent.
        prompts: `input_ids` of each.
    """

    tokenizer: Any
    write: Callable[..., dict[str, Any]]
    reasoning: bool = True
    failures: int = 0
    moves: deque[str | Response] = field(default_factory=deque)
    sampled: list[tuple[str, list[float]]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def __call__(self, body: dict[str, Any]) -> Response | dict[str, Any]:
        """The answer to a chat body with `input_ids`."""
        if not self.moves:
            self.failures += 1
            return JSONResponse({"message": "the script is at its end"}, 500)
        move = self.moves.popleft()
        if isinstance(move, Response):
            self.failures += move.status_code != 400
            return move
        ids = encode(self.tokenizer, move)
        stop = next((stop for stop in STOPS if move.endswith(stop)), "")
        reasoning, text = None, move.removesuffix(stop)
        if self.reasoning:
            thinks = encode(self.tokenizer, "<think>") == body["input_ids"][-1:]
            reasoning, text = split_reasoning(text, opened=thinks)
        parsed = parse_tool_calls(text, body.get("tools") or [])
        message: dict[str, Any] = {
            "content": parsed.content or (None if parsed.tool_calls else ""),
            "reasoning_content": reasoning,
        }
        message |= {"tool_calls": [*parsed.tool_calls]} if parsed.tool_calls else {}
        answer = self.write(body, ids, matched=ids[-1] if stop else None, message=message)
        logprobs = answer["choices"][0]["meta_info"]["output_token_logprobs"]
        self.sampled.append((move, [entry[0] for entry in logprobs]))
        self.prompts.append(body["input_ids"])
        return answer


class Seat:
    """A session behind a URL.

    Args:
        server: the session server; nobody else uses it meanwhile.
        tokenizer: the policy's.
        script: what the scripted engine samples; None with the embedded engine.

    Attributes:
        url: a client's `base_url`.
    """

    def __init__(self, server: Served, tokenizer: Any, script: Script | None) -> None:
        self._server, self._before = server, len(server.statuses)
        self._http = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
        self._session = f"/sessions/{self._http.post('/sessions').json()['session_id']}"
        self.url = f"{server.url}{self._session}/v1"
        self.tokenizer = tokenizer
        self.script = script

    def play(self, *moves: str | Response) -> None:
        """Have the scripted engine sample these next; of no effect on the embedded one."""
        if self.script is not None:
            self.script.moves.extend(moves)

    def records(self) -> list[dict[str, Any]]:
        """The session's records."""
        answer = self._http.get(self._session)
        assert answer.status_code == 200, answer.text
        records: list[dict[str, Any]] = answer.json()["records"]
        return records

    def parents(self) -> list[int | None]:
        """The parent of each turn."""
        return [record["parent"] for record in self.records()]

    def samples(self) -> list[Trajectory]:
        """The session's samples."""
        answer = self._http.post(f"{self._session}/samples")
        assert answer.status_code == 200, answer.text
        return decode_samples(answer.content)

    def check(self) -> list[Trajectory]:
        """Each answer that stands is trained once, to its stop token, and nothing else is; gives the samples.

        Not for an answer whose stop token is left out, since another role than the one that it opens comes next.
        """
        records, samples = self.records(), self.samples()
        failed = [status for status in self._server.statuses[self._before :] if status >= 500 or status in (409, 429)]
        assert len(failed) == (self.script.failures if self.script else 0)  # a client may have retried in silence
        assert all(record["note"] is None for record in records)
        leaves = {*range(len(records))} - {record["parent"] for record in records}
        standing = [record for record in records if record["status"] == "completed"]
        assert len(samples) == len([place for place in leaves if records[place]["status"] == "completed"])
        trained = []
        for sample in samples:
            assert sample.experts is not None
            assert sample.loss_mask[0] == 0
            for role, start, stop, generated in sample.spans:
                mask = sample.loss_mask[start:stop] == 1
                assert generated or not mask.any()
                assert role == "assistant" or not generated
                if mask.any():
                    trained.append((self._text(sample.tokens[start:stop][mask]), sample.logprobs[start:stop][mask]))
        assert len(trained) == len(standing)
        assert sum(len(logprobs) for _, logprobs in trained) == sum(record["completion_tokens"] for record in standing)
        assert all((logprobs <= 1e-3).all() for _, logprobs in trained)
        wrote = sorted(text for text, _ in trained)
        assert wrote == sorted(map(self._wrote, standing))
        return samples

    def check_script(self, samples: Sequence[Trajectory], *, lost: Sequence[int] = ()) -> None:
        """Hold samples against the script: its logprobs, all different, are each trained once, at their own token, and
        what the engine read and wrote starts a sample.

        Args:
            lost: answers that must not be in them.
        """
        script = self.script
        assert script is not None
        assert not script.moves
        expected: list[tuple[float, int]] = []
        for place, (prompt, (text, logprobs)) in enumerate(zip(script.prompts, script.sampled, strict=True)):
            ids = encode(self.tokenizer, text)
            if place in lost:
                continue
            expected += zip(np.array(logprobs, dtype=np.float32).tolist(), ids, strict=True)
            assert any(sample.tokens.tolist()[: len(prompt) + len(ids)] == prompt + ids for sample in samples)
        found = [
            (float(sample.logprobs[place]), int(sample.tokens[place]))
            for sample in samples
            for place in np.flatnonzero(sample.loss_mask)
        ]
        assert sorted(found) == sorted(expected)

    def _wrote(self, record: Mapping[str, Any]) -> str:
        """An answer as the model wrote it, without its stop token and the end of a thought that is not there."""
        message = record["response"]
        calls = "".join(map(_written, message.get("tool_calls") or ()))
        thought = message.get("reasoning_content")
        return ("" if thought is None else f"{thought}</think>") + (message.get("content") or "") + calls

    def _text(self, ids: Any) -> str:
        text: str = self.tokenizer.decode(ids.tolist())
        return text.removeprefix("</think>").removesuffix(STOPS[0]).removesuffix(STOPS[1])

    def close(self) -> None:
        """Close its own connections."""
        self._http.close()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with control tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _written(call: Mapping[str, Any]) -> str:
    """A tool call as the model writes it."""
    function = call["function"]
    arguments = "".join(
        f"<arg_key>{name}</arg_key><arg_value>{value}</arg_value>"
        for name, value in json.loads(function["arguments"]).items()
    )
    return f"<tool_call>{function['name']}{arguments}</tool_call>"


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy's directory."""
    from tests.rollout.clients.policy import build_policy

    return build_policy(tmp_path_factory.mktemp("clients") / "policy")


@pytest.fixture(scope="session")
def tokenizer(policy_dir: Path) -> Any:
    """The policy's tokenizer."""
    return AutoTokenizer.from_pretrained(policy_dir)


@pytest.fixture(scope="session")
def on_script(
    serve: Callable[..., Served], tokenizer: Any, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A session server in front of the scripted engine: the policy's tokenizer, the routing that it scripts."""
    directory = tmp_path_factory.mktemp("scripted")
    tokenizer.save_pretrained(directory)
    shutil.copy(tiny_dir / "config.json", directory)
    with serve(model=str(directory), served_model="tiny", append_roles=ROLES) as served:
        yield served


@pytest.fixture(scope="session")
def on_embedded(
    serve: Callable[..., Served], policy_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A session server in front of an engine process with the policy."""
    port = free_port()
    command = engine_command(
        policy_dir, port=port, served_model_name="tiny", dtype="float32", context_length=CONTEXT,
        max_running_requests=4, extra=["--reasoning-parser", "glm45"],
    )  # fmt: skip
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    url = f"http://127.0.0.1:{port}"
    options: dict[str, Any] = {"served_model": "tiny", "append_roles": ROLES, "upstream": url}
    with Service("engine", command, url=url, log=log) as engine:
        engine.wait_healthy(120)
        with serve(model=str(policy_dir), **options) as served:
            yield served
        assert engine.alive, engine.tail()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def scripted_seat(
    on_script: Served, tokenizer: Any, engine: ScriptedEngine, answer: Callable[..., dict[str, Any]]
) -> Iterator[Seat]:
    """A seat at the scripted engine."""
    engine.write = script = Script(tokenizer=tokenizer, write=answer)
    seat = Seat(on_script, tokenizer, script)
    yield seat
    seat.close()


@pytest.fixture
def embedded_seat(on_embedded: Served, tokenizer: Any) -> Iterator[Seat]:
    """A seat at the embedded engine."""
    seat = Seat(on_embedded, tokenizer, None)
    yield seat
    seat.close()


@pytest.fixture(params=["scripted", "embedded"])
def seat(request: pytest.FixtureRequest) -> Seat:
    """A seat at one engine, then at the other."""
    seat: Seat = request.getfixturevalue(f"{request.param}_seat")
    return seat
