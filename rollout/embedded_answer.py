"""Completions -> SGLang's answers: text, logprobs, routed experts, meta_info. No torch.

Legend: P prompt tokens, N output tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pacenote.replay.record import DECODE, PREFILL, RoutingRecord
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.wire import encode_sglang
from pacenote.rollout.embedded_protocol import ChatBody, GenerateBody
from pacenote.rollout.embedded_request import Completion, SamplingParams
from pacenote.rollout.toolcalls import END_THINK, THINK, parse_tool_calls, split_reasoning

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI uses this number
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # how byte-level vocabularies spell bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an answer needs to know of its request: id, P prompt ids, sampling parameters, first routing row to send."""

    rid: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    routes_from: int
    started: float


class Answers:
    """Builds answers for one model.

    Args:
        tokenizer: a transformers tokenizer.
        geometry: where the model routes.
        model: name to answer with.
        tool_call_parser: "glm47", or None to leave tool calls in the text.
        reasoning_parser: "glm45", or None to leave the reasoning in the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        geometry: RoutingGeometry,
        *,
        model: str,
        tool_call_parser: str | None,
        reasoning_parser: str | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._geometry = geometry
        self._model = model
        self._tool_calls = tool_call_parser is not None
        self._reasoning = reasoning_parser is not None
        self._pieces: dict[int, str] = {}

    def generate(self, body: GenerateBody, asked: Asked, done: Completion, version: str) -> dict[str, Any]:
        """The answer of /generate."""
        meta = self._meta(asked, done, version)
        if body.return_logprob:
            meta |= self._meta_logprobs(done, text=body.return_text_in_logprobs, top=body.top_logprobs_num > 0)
        if body.return_routed_experts and (routes := self._routes(asked, done)) is not None:
            meta["routed_experts"] = routes
        return {"text": self._text(asked.params, done), "output_ids": list(done.output_ids), "meta_info": meta}

    def chat(self, body: ChatBody, asked: Asked, done: Completion, version: str) -> dict[str, Any]:
        """The answer of /v1/chat/completions."""
        message, called = self._message(body, asked, done)
        reason = done.finish_reason
        finish = "tool_calls" if called and reason["type"] == "stop" else reason["type"]
        choice: dict[str, Any] = {
            "index": 0,
            "message": message,
            "logprobs": self._chat_logprobs(done) if body.logprobs else None,
            "finish_reason": finish,
            "matched_stop": reason.get("matched"),
        }
        if body.return_prompt_token_ids:
            choice["prompt_token_ids"] = list(asked.prompt_ids)
        if body.return_token_ids:
            choice["response_token_ids"] = list(done.output_ids)
        prompt, answer = len(asked.prompt_ids), len(done.output_ids)
        reasoned = self._reasoning_tokens(asked, done)
        response: dict[str, Any] = {
            "id": asked.rid,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or self._model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt + answer,
                "completion_tokens": answer,
                "prompt_tokens_details": None,
                "reasoning_tokens": reasoned,
                "completion_tokens_details": {"reasoning_tokens": reasoned} if reasoned else None,
            },
            "metadata": _versions(done, version),
        }
        routes = self._routes(asked, done) if body.return_routed_experts else None
        if body.return_meta_info:
            meta = self._meta(asked, done, version) | {"reasoning_tokens": reasoned}
            if body.logprobs:
                meta |= self._meta_logprobs(done, text=True, top=bool(body.top_logprobs))
            if routes is not None:
                meta["routed_experts"] = routes
            choice["meta_info"] = meta
        elif routes is not None:
            response["sglext"] = {"routed_experts": routes}
        return response

    def _message(self, body: ChatBody, asked: Asked, done: Completion) -> tuple[dict[str, Any], bool]:
        """The assistant's message and whether it calls tools."""
        text, reasoning = self._text(asked.params, done), None
        if self._reasoning and body.separate_reasoning:
            reasoning, text = split_reasoning(text, opened=self._thinks(asked))
        calls: tuple[Mapping[str, Any], ...] = ()
        if self._tool_calls and body.offered_tools:
            parsed = parse_tool_calls(text, body.offered_tools)
            text, calls = parsed.content, parsed.tool_calls
        # SGLang sends content null only where tool calls took all of the text.
        content = None if calls and not text else text
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
        return message | ({"tool_calls": [dict(call) for call in calls]} if calls else {}), bool(calls)

    def _thinks(self, asked: Asked) -> bool:
        """Whether the answer starts inside the reasoning."""
        return self._piece(asked.prompt_ids[-1]).strip() == THINK

    def _reasoning_tokens(self, asked: Asked, done: Completion) -> int:
        """How many tokens the reasoning took, its closing tag counted: SGLang's count, which asks no parser."""
        if not self._reasoning or not self._thinks(asked):
            return 0
        closing = (place for place, token in enumerate(done.output_ids, 1) if self._piece(token).strip() == END_THINK)
        return next(closing, len(done.output_ids))

    def _text(self, params: SamplingParams, done: Completion) -> str:
        ids, matched = list(done.output_ids), done.finish_reason.get("matched")
        if isinstance(matched, int) and not params.no_stop_trim:
            ids = ids[:-1]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        if isinstance(matched, str) and not params.no_stop_trim:
            text = text.partition(matched)[0]
        return text

    def _meta(self, asked: Asked, done: Completion, version: str) -> dict[str, Any]:
        return {
            "id": asked.rid,
            "finish_reason": done.finish_reason,
            "prompt_tokens": len(asked.prompt_ids),
            **_versions(done, version),
            "num_retractions": done.retractions,
            "reasoning_tokens": 0,
            "completion_tokens": len(done.output_ids),
            "cached_tokens": 0,
            "cached_tokens_details": None,
            "dp_rank": None,
            "e2e_latency": time.perf_counter() - asked.started,
            "response_sent_to_client_ts": time.time(),
        }

    def _meta_logprobs(self, done: Completion, *, text: bool, top: bool) -> dict[str, Any]:
        def entry(logprob: float, token: int) -> list[Any]:
            return [max(logprob, LOWEST_LOGPROB), token, self._piece(token) if text else None]

        meta: dict[str, Any] = {
            "input_token_logprobs": [],
            "output_token_logprobs": [entry(*pair) for pair in zip(done.logprobs, done.output_ids, strict=True)],
            "output_token_logprobs_length": len(done.output_ids),
        }
        if top:
            meta["input_top_logprobs"] = []
            meta["output_top_logprobs"] = [[entry(*pair) for pair in pairs] for pairs in done.top_logprobs]
        return meta

    def _chat_logprobs(self, done: Completion) -> dict[str, Any]:
        def entry(logprob: float, token: int) -> dict[str, Any]:
            return {
                "token": self._piece(token),
                "bytes": self._bytes(token),
                "logprob": max(logprob, LOWEST_LOGPROB),
            }

        content = []
        for row, (logprob, token) in enumerate(zip(done.logprobs, done.output_ids, strict=True)):
            best = done.top_logprobs[row] if done.top_logprobs else ()
            content.append(entry(logprob, token) | {"top_logprobs": [entry(*pair) for pair in best]})
        return {"content": content}

    def _routes(self, asked: Asked, done: Completion) -> str | None:
        """Base64 int32 [P+N-1-start, all layers, K], or None for a request that was aborted before it ran."""
        if done.rows is None:
            return None
        provenance = np.full(len(done.rows), DECODE, dtype=np.uint8)
        provenance[: len(asked.prompt_ids)] = PREFILL
        record = RoutingRecord.of(done.rows, self._geometry, provenance=provenance, version=-1)
        return encode_sglang(record.slice(min(asked.routes_from, record.rows), record.rows), self._geometry)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._pieces[token]

    def _bytes(self, token: int) -> list[int]:
        """The bytes that a token stands for: those of its text, unless it is a part of a character."""
        piece = self._piece(token)
        if "\ufffd" in piece:
            spelt = self._tokenizer.convert_ids_to_tokens(token)
            if all(letter in _BYTES for letter in spelt):
                return [_BYTES[letter] for letter in spelt]
        return list(piece.encode())


def _versions(done: Completion, version: str) -> dict[str, Any]:
    """Which weights made the answer: the last ones' name, and spans over the output tokens."""
    spans = [{"version": name, "start": start, "end": end} for name, start, end in done.weight_versions]
    return {"weight_version": spans[-1]["version"] if spans else version, "weight_versions": spans}
