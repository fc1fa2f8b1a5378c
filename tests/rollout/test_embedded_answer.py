"""Completions -> answers, without a model: text, stop trimming, tool calls, reasoning, logprobs, routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from transformers import AutoTokenizer

from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.wire import decode_sglang
from pacenote.rollout.embedded_answer import Answers, Asked
from pacenote.rollout.embedded_protocol import ChatBody, GenerateBody
from pacenote.rollout.embedded_request import Completion, SamplingParams

GEOMETRY = RoutingGeometry(num_layers=3, layers=(1, 2), num_experts=8, top_k=2)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>2</arg_value></tool_call>"


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_dir)


def _answers(tokenizer: Any, *, tools: bool = True, reasoning: bool = True) -> Answers:
    return Answers(
        tokenizer,
        GEOMETRY,
        model="m",
        tool_call_parser="glm47" if tools else None,
        reasoning_parser="glm45" if reasoning else None,
    )


def _done(ids: list[int], *, reason: dict[str, Any] | None = None, rows: int = 0, **more: Any) -> Completion:
    experts = np.arange(rows * 4).reshape(rows, 2, 2) % 8 if rows else None
    return Completion(
        output_ids=tuple(ids),
        logprobs=tuple(-0.5 for _ in ids),
        top_logprobs=more.pop("top", ()),
        finish_reason=reason or {"type": "length", "length": len(ids)},
        rows=None if experts is None else experts.astype(np.uint8),
        weight_versions=more.pop("versions", (("3", 0, len(ids)),)),
    )


def _asked(prompt: list[int] | None = None, routes_from: int = 0, **params: Any) -> Asked:
    return Asked(
        rid="r", prompt_ids=prompt or [1, 2], params=SamplingParams(**params), routes_from=routes_from, started=0.0
    )


def _chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


def _message(tokenizer: Any, text: str, prompt: list[int] | None = None, **fields: Any) -> tuple[dict[str, Any], str]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stop = {"type": "stop", "matched": ids[-1]}
    answer = _answers(tokenizer).chat(_chat(**fields), _asked(prompt), _done(ids, reason=stop), "9")
    choice = answer["choices"][0]
    return choice["message"], choice["finish_reason"]


def test_tool_calls_are_taken_out_of_the_text(tokenizer: Any) -> None:
    message, finish = _message(tokenizer, "Sure." + CALL + "<|observation|>", tools=TOOLS)
    assert message["content"] == "Sure."
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": 2}
    assert finish == "tool_calls"
    bare, _ = _message(tokenizer, CALL + "<|observation|>", tools=TOOLS)
    assert bare["content"] is None


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_offered_tools_calls_stay_text(tokenizer: Any, fields: dict[str, Any]) -> None:
    message, finish = _message(tokenizer, CALL + "<|observation|>", **fields)
    assert (message["content"], message.get("tool_calls"), finish) == (CALL, None, "stop")


def test_malformed_calls_stay_content(tokenizer: Any) -> None:
    text = "<tool_call>add<arg_key>a</arg_key>"
    message, finish = _message(tokenizer, text + "<|user|>", tools=TOOLS)
    assert (message["content"], message.get("tool_calls"), finish) == (text, None, "stop")


def test_reasoning_needs_the_prompt_or_the_text_to_open_it(tokenizer: Any) -> None:
    think = tokenizer.convert_tokens_to_ids("<think>")
    opened, _ = _message(tokenizer, "why</think>what<|user|>", prompt=[1, think])
    assert (opened["reasoning_content"], opened["content"]) == ("why", "what")
    together, _ = _message(tokenizer, "why</think>what<|user|>", prompt=[1, think], separate_reasoning=False)
    assert (together["reasoning_content"], together["content"]) == (None, "why</think>what")
    closed, _ = _message(tokenizer, "hello<|user|>", prompt=[1, 2])
    assert (closed["reasoning_content"], closed["content"]) == (None, "hello")


def test_the_matched_stop_is_cut_from_the_text_only(tokenizer: Any) -> None:
    ids = tokenizer.encode("abc<|user|>", add_special_tokens=False)
    by_token, by_text = {"type": "stop", "matched": ids[-1]}, {"type": "stop", "matched": "bc"}

    def text(reason: dict[str, Any], **params: Any) -> str:
        answer = _answers(tokenizer).generate(GenerateBody(), _asked(**params), _done(ids, reason=reason), "9")
        assert answer["output_ids"] == ids
        assert answer["meta_info"]["completion_tokens"] == len(ids)
        return str(answer["text"])

    assert text(by_token) == "abc"
    assert text(by_token, skip_special_tokens=False) == "abc"
    assert text(by_token, skip_special_tokens=False, no_stop_trim=True) == "abc<|user|>"
    assert text(by_text) == "a"
    assert text(by_text, no_stop_trim=True) == "abc"


def test_routes_start_where_asked_and_hold_all_layers(tokenizer: Any) -> None:
    for start in (0, 2):
        body = GenerateBody(return_routed_experts=True)
        asked = _asked([1, 2, 3], routes_from=start)
        meta = _answers(tokenizer).generate(body, asked, _done([4, 5], rows=4), "9")["meta_info"]
        record = decode_sglang(meta["routed_experts"], GEOMETRY, rows=4 - start, provenance=1, version=0)
        expected = _done([4, 5], rows=4).rows
        assert expected is not None
        np.testing.assert_array_equal(record.experts, expected[start:])


def test_routes_of_a_request_that_never_ran_are_null(tokenizer: Any) -> None:
    body = _chat(return_routed_experts=True, return_meta_info=True, logprobs=True)
    done = _done([], reason={"type": "abort", "message": "x"}, versions=())
    answer = _answers(tokenizer).chat(body, _asked(), done, "9")
    meta = answer["choices"][0]["meta_info"]
    assert (meta.get("routed_experts"), meta["weight_version"], meta["output_token_logprobs"]) == (None, "9", [])
    assert answer["choices"][0]["finish_reason"] == "abort"


def test_logprobs_are_finite_json(tokenizer: Any) -> None:
    top = (((-0.5, 3), (-np.inf, 4)),)
    body = _chat(logprobs=True, top_logprobs=2, return_meta_info=True)
    answer = _answers(tokenizer).chat(body, _asked(), _done([3], top=top), "9")
    [entry] = answer["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -0.5
    assert bytes(entry["bytes"]).decode() == entry["token"]
    assert [best["logprob"] for best in entry["top_logprobs"]] == [-0.5, -9999.0]
    assert answer["choices"][0]["meta_info"]["output_top_logprobs"][0][1][:2] == [-9999.0, 4]
    assert b"null,4" not in orjson.dumps(answer)


def test_the_version_is_that_of_the_last_token(tokenizer: Any) -> None:
    done = _done([3, 4], versions=(("1", 0, 1), ("2", 1, 2)))
    meta = _answers(tokenizer).generate(GenerateBody(), _asked(), done, "9")["meta_info"]
    assert meta["weight_version"] == "2"
    assert meta["weight_versions"] == [
        {"version": "1", "start": 0, "end": 1},
        {"version": "2", "start": 1, "end": 2},
    ]
