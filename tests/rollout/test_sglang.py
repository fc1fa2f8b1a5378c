"""What is asked of an engine, and which of its answers can be trained on."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from pacenote.replay.record import CACHED, DECODE, PREFILL, RECOMPUTED
from pacenote.replay.spec import RoutingGeometry
from pacenote.rollout.errors import BadRequest, ContextOverflow, UpstreamError
from pacenote.rollout.sglang import CLIENT_FIELDS, chat_body, read_reply, refusal
from pacenote.rollout.turn import Prompt

if TYPE_CHECKING:
    from tests.rollout.conftest import Player

Answer = Callable[..., dict[str, Any]]
OURS = {
    "model": "x", "messages": [], "input_ids": [1], "logprobs": False, "return_meta_info": False, "stream": True,
    "no_stop_trim": True, "return_routed_experts": False, "routed_experts_start_len": 3, "n": 1, "rid": "x",
    "return_prompt_token_ids": True, "return_hidden_states": True, "bootstrap_host": "evil", "bootstrap_room": 1,
    "lora_path": "x", "custom_logit_processor": "x", "logprob_start_len": 0, "top_logprobs_num": 5, "user": "x",
    "stream_options": {}, "session_params": {}, "extra_key": "x", "priority": 1, "continue_final_message": True,
}  # fmt: skip


@pytest.fixture
def prompt(player: Player) -> Prompt:
    """A prompt that extends a turn."""
    answer = player.ask([{"role": "user", "content": "a"}], [40, 41], stop="user")
    player.ask([{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}])
    return player.turn.prompt


def sent(prompt: Prompt, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """A chat body as it goes over the wire."""
    body: dict[str, Any] = orjson.loads(
        orjson.dumps(chat_body(prompt, request, **options), option=orjson.OPT_SERIALIZE_NUMPY)
    )
    return body


@pytest.fixture
def body(prompt: Prompt) -> dict[str, Any]:
    """What is asked for it."""
    return sent(prompt, {}, model="m", routing=True)


def test_what_is_forced_and_what_passes(prompt: Prompt) -> None:
    wanted = {name: f"client's {name}" for name in CLIENT_FIELDS}
    body = sent(prompt, OURS | wanted, model="served", routing=True)
    assert body == wanted | {
        "model": "served",
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "b"},
        ],
        "input_ids": prompt.token_ids().tolist(),
        "stream": False,
        "logprobs": True,
        "return_meta_info": True,
        "no_stop_trim": False,
        "return_routed_experts": True,
        "routed_experts_start_len": prompt.rows_held,
    }
    bare = sent(prompt, OURS | dict.fromkeys(CLIENT_FIELDS), model="served", routing=False)
    assert set(bare) == set(body) - set(CLIENT_FIELDS) - {"routed_experts_start_len"}
    assert bare["return_routed_experts"] is False


def test_a_sound_answer(prompt: Prompt, body: dict[str, Any], answer: Answer, geometry: RoutingGeometry) -> None:
    raw = answer(body, [50, 51, 498], matched=498, version="12", cached_tokens=len(body["input_ids"]) - 2, text="two")
    reply = read_reply(json.dumps(raw).encode(), prompt, geometry)
    made = reply.answer
    assert made.ids.tolist() == [50, 51, 498]
    assert (made.finish, made.stopped, made.version_name, reply.finish_reason) == ("stop", True, "12", "stop")
    assert made.versions.tolist() == [12, 12, 12]
    entries = raw["choices"][0]["meta_info"]["output_token_logprobs"]
    assert made.logprobs.tolist() == [entry[0] for entry in entries]
    assert made.rows is not None
    assert made.rows.rows == prompt.length + 3 - 1 - prompt.rows_held
    cached = prompt.length - 2 - prompt.rows_held
    assert made.rows.provenance.tolist() == [CACHED] * cached + [PREFILL] * 2 + [DECODE] * 2
    assert reply.logprobs == raw["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    ("matched", "finish", "stopped"), [(498, "stop", True), (51, "stop", False), ("END", "stop", False)]
)
def test_stops(
    prompt: Prompt, body: dict[str, Any], answer: Answer, matched: int | str, finish: str, stopped: bool
) -> None:
    raw = json.dumps(answer(body, [50, 498], matched=matched)).encode()
    made = read_reply(raw, prompt, None).answer
    assert (made.finish, made.stopped) == (finish, stopped)


def test_tool_calls_and_reasoning(prompt: Prompt, body: dict[str, Any], answer: Answer) -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{broken"}}]
    message = {"content": None, "tool_calls": calls, "reasoning_content": "t", "refusal": None, "secret": 1}
    reply = read_reply(json.dumps(answer(body, [500], matched=500, message=message)).encode(), prompt, None)
    assert reply.finish_reason == "tool_calls"
    assert reply.answer.message.raw == {"role": "assistant", "tool_calls": calls, "reasoning_content": "t"}
    cut = read_reply(json.dumps(answer(body, [500], message=message)).encode(), prompt, None)
    assert cut.finish_reason == cut.answer.finish == "length"
    plain = read_reply(json.dumps(answer(body, [500], message={"tool_calls": []})).encode(), prompt, None)
    assert plain.answer.message.raw == {"role": "assistant"}


@pytest.mark.parametrize(
    ("version", "number"), [("7", 7), ("default", -1), ("1.5", -1), ("-3", -1), ("9" * 10, -1), (3, 3), (None, -1)]
)
def test_weight_versions(prompt: Prompt, body: dict[str, Any], answer: Answer, version: object, number: int) -> None:
    made = read_reply(json.dumps(answer(body, [50], weight_version=version)).encode(), prompt, None).answer
    assert made.versions.tolist() == [number]
    assert made.version_name == str(version)


def test_weight_versions_by_span(prompt: Prompt, body: dict[str, Any], answer: Answer) -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
    raw = answer(body, [50, 51, 52], version="4", weight_versions=spans)
    made = read_reply(json.dumps(raw).encode(), prompt, None).answer
    assert made.versions.tolist() == [3, 4, 4]
    assert made.version_name == "4"


@pytest.mark.parametrize(("retractions", "named"), [(1, "34"), (0, "34"), (1, "ab")])
def test_rows_that_a_retraction_computed_anew(
    prompt: Prompt, body: dict[str, Any], answer: Answer, geometry: RoutingGeometry, retractions: int, named: str
) -> None:
    """SGLang sends the second time's rows: the last weights', where older ones sampled the tokens."""
    spans = [{"version": named[0], "start": 0, "end": 2}, {"version": named[1], "start": 2, "end": 4}]
    raw = answer(body, [50, 51, 52, 53], version=named[1], weight_versions=spans, num_retractions=retractions)
    made = read_reply(json.dumps(raw).encode(), prompt, geometry).answer
    assert made.rows is not None
    old, new = (int(name) if name.isdigit() else -1 for name in named)
    # Row 1 of the answer is read by the weights that sample token 2: it is theirs in either case.
    fresh = prompt.length - prompt.rows_held
    first = [RECOMPUTED] * (fresh + 1) if retractions else [PREFILL] * fresh + [DECODE]
    assert made.rows.provenance.tolist() == [*first, DECODE, DECODE]
    assert made.rows.version.tolist() == [new if retractions else old] * (fresh + 1) + [new] * 2


def meta(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["choices"][0]["meta_info"] |= fields

    return change


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        del raw["choices"][0]["meta_info"][name]

    return change


def first(entry: object) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["choices"][0]["meta_info"]["output_token_logprobs"][0] = entry

    return change


def message(value: object) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["choices"][0]["message"] = value

    return change


def choices(change_to: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["choices"] = change_to(raw["choices"])

    return change


def rows(change_to: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        info = raw["choices"][0]["meta_info"]
        info["routed_experts"] = base64.b64encode(change_to(base64.b64decode(info["routed_experts"]))).decode()

    return change


def expert(value: int) -> Callable[[dict[str, Any]], None]:
    def change(data: bytes) -> bytes:
        ids = np.frombuffer(data, dtype="<i4").copy()
        ids[-1] = value
        return ids.tobytes()

    return rows(change)


ROW = 6 * 2 * 4  # bytes
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no choices": (lambda raw: raw.pop("choices"), "expected one choice from the engine, got no choices"),
    "empty choices": (choices(lambda _: []), "got 0 choices"),
    "two choices": (choices(lambda old: old * 2), "got 2 choices"),
    "a choice that is none": (choices(lambda _: ["x"]), "got 1 choices"),
    "no meta info": (lambda raw: raw["choices"][0].pop("meta_info"), "a gateway that drops input_ids"),
    "no message": (message(None), r"expected choices\[0\]\.message"),
    "content that is no text": (message({"content": 3}), "an OpenAI message from the engine.*got int"),
    "calls that are none": (message({"tool_calls": [3]}), "an OpenAI message from the engine"),
    "no finish": (without("finish_reason"), "finished by stop or length, got none"),
    "aborted": (meta(finish_reason={"type": "abort", "message": "retracted"}), "got abort: retracted"),
    "finish as text": (meta(finish_reason="stop"), "got none: stop"),
    "no completion tokens": (without("completion_tokens"), "expected completion_tokens 2 from the engine, got None"),
    "other completion tokens": (meta(completion_tokens=3), "expected completion_tokens 2 .* got 3"),
    "no prompt tokens": (without("prompt_tokens"), "expected prompt_tokens .* got None"),
    "other prompt tokens": (meta(prompt_tokens=1), "it did not generate from the session's tokens"),
    "no logprobs": (without("output_token_logprobs"), "output_token_logprobs of at least one token"),
    "nothing sampled": (meta(output_token_logprobs=[], completion_tokens=0), "of at least one token"),
    "a logprob of null": (first([None, 50, None]), r"\[logprob, token id\] at output token 0 .*got \[None"),
    "a positive logprob": (first([0.5, 50, None]), "at output token 0"),
    "a logprob that float32 cannot hold": (first([-1e39, 50, None]), "at output token 0"),
    "a logprob as text": (first(["-1", 50, None]), "at output token 0"),
    "a logprob that is a flag": (first([False, 50, None]), "at output token 0"),
    "a negative token": (first([-1.0, -1, None]), "at output token 0"),
    "a token beyond int32": (first([-1.0, 2**31, None]), "at output token 0"),
    "a token as text": (first([-1.0, "50", None]), "at output token 0"),
    "an entry too short": (first([-1.0]), "at output token 0"),
    "no entry": (first(None), "at output token 0"),
    "version spans": (meta(weight_versions=[{"start": 0}]), "expected weight_versions of version, start and end"),
    "version spans outside": (meta(weight_versions=[{"version": "1", "start": -1, "end": 9}]), "weight_versions"),
    "no rows": (without("routed_experts"), "start SGLang with --enable-return-routed-experts"),
    "a row too few": (rows(lambda data: data[:-ROW]), "expected routed experts of .* rows"),
    "a row too many": (rows(lambda data: data + data[:ROW]), "the engine and the session disagree"),
    "rows of the whole prefix": (rows(lambda data: data * 3), "routed experts of"),
    "half a row": (rows(lambda data: data[:-4]), "routed experts of"),
    "an expert too large": (expert(16), r"expert ids in 0\.\.15, got 16"),
    "a negative expert": (expert(-1), r"expert ids in 0\.\.15, got -1"),
    "rows that are no base64": (meta(routed_experts="!" * 16), "routed experts"),
    "rows as a list": (meta(routed_experts=[[1]]), "as base64 text, got list"),
    "cached tokens as text": (meta(cached_tokens="4"), "cached_tokens as a number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_answers_that_cannot_be_trained_on(
    prompt: Prompt, body: dict[str, Any], answer: Answer, geometry: RoutingGeometry, name: str
) -> None:
    change, text = HOSTILE[name]
    raw = answer(body, [50, 51])
    read_reply(json.dumps(raw).encode(), prompt, geometry)
    change(raw)
    with pytest.raises(UpstreamError, match=text) as caught:
        read_reply(json.dumps(raw).encode(), prompt, geometry)
    assert caught.value.status == 502


@pytest.mark.parametrize("raw", [b"", b"<html>", b"\xff", b"[]", b"null", b'"x"', b'{"choices": {}}', b"{}"])
def test_what_is_no_answer(prompt: Prompt, geometry: RoutingGeometry, raw: bytes) -> None:
    with pytest.raises(UpstreamError, match="expected"):
        read_reply(raw, prompt, geometry)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "-1e999"])
def test_numbers_that_are_none(
    prompt: Prompt, body: dict[str, Any], answer: Answer, geometry: RoutingGeometry, value: str
) -> None:
    raw = answer(body, [50, 51])
    raw["choices"][0]["meta_info"]["output_token_logprobs"][1][0] = "HERE"
    with pytest.raises(UpstreamError):
        read_reply(json.dumps(raw).replace('"HERE"', value).encode(), prompt, geometry)


SGLANG_LONG = {
    "object": "error",
    "message": "The input (9 tokens) is longer than the model's context length (8 tokens).",
}
TOTAL = {"error": {"message": "Requested token count exceeds the model's maximum context length of 8 tokens."}}
SCHEDULER = {"message": "Input length (9 tokens) exceeds the maximum allowed length (8 tokens). Use a shorter input."}


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (400, SGLANG_LONG, ContextOverflow, "The input"),
        (400, TOTAL, ContextOverflow, "Requested token count"),
        (400, SCHEDULER, ContextOverflow, "Input length"),
        (413, TOTAL, ContextOverflow, "Requested token count"),
        (
            400,
            {"error": {"message": "temperature must be positive"}},
            BadRequest,
            "refused the request: temperature",
        ),
        (422, {"detail": "bad field"}, BadRequest, "bad field"),
        (400, {"detail": [{"loc": ["x"]}]}, BadRequest, "loc"),
        (400, {"error": "text"}, BadRequest, "refused the request: text"),
        (400, "text", BadRequest, '"text"'),
        (400, None, BadRequest, "null"),
        (500, TOTAL, UpstreamError, "the engine answered 500: Requested"),
        (429, {"error": {"message": "busy"}}, UpstreamError, "answered 429: busy"),
        (404, {"message": "no such model"}, UpstreamError, "answered 404: no such model"),
        (503, {}, UpstreamError, "answered 503"),
    ],
)
def test_refusals(status: int, body: object, kind: type[Exception], text: str) -> None:
    error = refusal(status, json.dumps(body).encode())
    assert type(error) is kind
    assert text in str(error)


def test_a_refusal_without_words() -> None:
    assert str(refusal(502, b"")) == "the engine answered 502: an empty body"
    assert str(refusal(502, b"\xff" * 9000)).startswith("the engine answered 502: \ufffd")
    assert len(str(refusal(400, json.dumps({"message": "x" * 9000}).encode()))) < 2100
    overflow = refusal(400, json.dumps(SCHEDULER).encode())
    assert overflow.body()["error"] == {
        "message": f"{SCHEDULER['message']} (context_length_exceeded: this model's maximum context length is less than "
        "was asked for)",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        ("", "characters, got 0"),
        ("cut", "characters, got 3"),
        ("a\\b", "characters, got 3"),
        ([], "base64 text, got list"),
        ({"routed_experts": "AAAA"}, "base64 text, got dict"),
    ],
)
def test_rows_that_are_cut_out_before_json(
    prompt: Prompt, body: dict[str, Any], answer: Answer, geometry: RoutingGeometry, sent: object, text: str
) -> None:
    raw = json.dumps(answer(body, [50, 51], routed_experts=sent)).encode()
    with pytest.raises(UpstreamError, match=text):
        read_reply(raw, prompt, geometry)


def test_other_things_of_the_rows_name(
    prompt: Prompt, body: dict[str, Any], answer: Answer, geometry: RoutingGeometry
) -> None:
    """Only where the rows stand is it them; a text may say what it likes."""
    said = '"routed_experts": "AAAA"'
    plain = read_reply(json.dumps(answer(body, [50, 51], text=said)).encode(), prompt, geometry)
    assert plain.answer.message.raw["content"] == said
    odd = {"routed_experts": "AAAA", **answer(body, [50, 51], text=said)}
    assert read_reply(json.dumps(odd).encode(), prompt, geometry).answer.rows == plain.answer.rows
