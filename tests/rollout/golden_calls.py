"""What is asked of an engine whose answers are compared with SGLang's recorded ones: the same calls, in the same order.

The engine serves `build_tiny(seed=0)` in float32 as "tiny", with a context of 160 tokens and weight version "0".
Decoding is greedy and answers end by length where nothing else is asked, so that the numbers are the same wherever
they are computed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from tests.rollout.gateways import SMG, gateway

CONTEXT = 160
PROMPT = [10, 11, 12, 13, 14, 100, 30, 31]
USER = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0, "ignore_eos": True}
TRAINED = {"logprobs": True, "return_meta_info": True, "return_routed_experts": True}
WRONG_IDS: dict[str, Any] = {"no ids": [], "text ids": ["a"], "one id": 10}
"""Without ids outside the vocabulary: they end SGLang's scheduler, and with it the server."""
Answers = dict[str, dict[str, Any]]


class Caller:
    """Calls one engine and keeps every answer under its name.

    Args:
        http: a client of the engine.
        model: the directory that it serves, for weight updates.
    """

    def __init__(self, http: httpx.Client, model: Path) -> None:
        self.http, self.model = http, model
        self.answers: Answers = {}

    def __call__(self, name: str, method: str, path: str, body: Any = None, *, text: str | None = None) -> Any:
        """Ask with a JSON body, or with `text` as it is; returns the answer's JSON, or its text."""
        words = {"content": text} if text is not None else {"json": body} if body is not None else {}
        headers = {"content-type": "application/json"}
        answer = self.http.request(method, path, headers=headers, **words)
        kind = answer.headers.get("content-type", "").partition(";")[0]
        said = answer.json() if kind == "application/json" else answer.text
        assert name not in self.answers, name
        self.answers[name] = {"status": answer.status_code, "type": kind, "body": said}
        return said

    def chat(self, name: str, **fields: Any) -> Any:
        """POST /v1/chat/completions for PROMPT, four greedy tokens; None takes a field out."""
        body = {"model": "tiny", "messages": USER, "input_ids": PROMPT, "max_tokens": 4, **GREEDY}
        body |= {"chat_template_kwargs": {"enable_thinking": False}, **fields}
        return self._fresh(name, "/v1/chat/completions", body)

    def generate(self, name: str, *, params: dict[str, Any] | None = None, **fields: Any) -> Any:
        """POST /generate for PROMPT, four greedy tokens; None takes a field out."""
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4, **GREEDY, **(params or {})}, **fields}
        return self._fresh(name, "/generate", body)

    def _fresh(self, name: str, path: str, body: dict[str, Any]) -> Any:
        """Ask with an empty prefix cache, so that an answer does not depend on what was asked before."""
        self.http.post("/flush_cache")  # a gateway passes it on, or knows no such thing
        return self(name, "POST", path, {key: value for key, value in body.items() if value is not None})

    def during(self, act: Callable[[], object], ask: Callable[[], object], *, tokens: int = 20) -> None:
        """Start `ask` in a thread, `act` once about `tokens` tokens exist, and wait until `ask` has its answer."""
        failed: list[BaseException] = []

        def run() -> None:
            try:
                ask()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while self._used() < tokens and time.monotonic() < deadline:
            time.sleep(0.01)
        act()
        thread.join(60)
        assert not thread.is_alive(), "no answer"
        assert not failed, failed

    def _used(self) -> int:
        (load,) = self.http.get("/v1/loads").json()["loads"]
        return int(load["num_used_tokens"]) if load["num_running_reqs"] else 0


def weights_digest(model: Path) -> str:
    """Digest of a model's weights: the recorded numbers are those of one model."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def chat_calls(call: Caller) -> None:
    """Chat as sessions ask it, and what clients can get wrong."""
    chat = call.chat
    plain = chat("normal", **TRAINED, routed_experts_start_len=0)
    second = plain["choices"][0]["meta_info"]["output_token_logprobs"][1]
    chat("stop token", **TRAINED, ignore_eos=False, stop_token_ids=[second[1]])
    chat("stop token kept", **TRAINED, ignore_eos=False, stop_token_ids=[second[1]], no_stop_trim=True)
    chat("stop text", **TRAINED, stop=[second[2]])
    chat("rows from the prompt's last", **TRAINED, routed_experts_start_len=len(PROMPT) - 1)
    chat("rows from the answer's first", **TRAINED, routed_experts_start_len=len(PROMPT))
    chat("rows from too far", **TRAINED, routed_experts_start_len=len(PROMPT) + 1)
    chat("rows from before", **TRAINED, routed_experts_start_len=-1)
    chat("rows without meta info", return_routed_experts=True)
    chat("bare")
    chat("ids", return_prompt_token_ids=True, return_token_ids=True)
    chat("alternatives", **TRAINED, top_logprobs=2)
    chat("templated", **TRAINED, input_ids=None)
    chat("thinking", **TRAINED, input_ids=None, chat_template_kwargs=None)
    chat("named", rid="mine", return_meta_info=True)
    chat("prompt too long", **TRAINED, input_ids=[10] * CONTEXT)
    chat("answer too long", **TRAINED, max_tokens=CONTEXT)
    chat("no limit", input_ids=[10] * (CONTEXT - 3), max_tokens=None, return_meta_info=True)
    for name, ids in WRONG_IDS.items():
        chat(name, input_ids=ids)
    chat("no messages", messages=[])
    chat("no field messages", messages=None)
    chat("messages of text", messages="hi")
    chat("negative temperature", temperature=-1.0)
    chat("top_p above one", top_p=1.5)
    chat("no tokens", max_tokens=0)
    chat("another model", model="other")
    chat("unknown field", surprise=1)
    call("not json", "POST", "/v1/chat/completions", text="{")
    call("no body", "POST", "/v1/chat/completions")
    call.during(
        lambda: call("abort chat", "POST", "/abort_request", {"rid": "long chat"}),
        lambda: chat("aborted", **TRAINED, rid="long chat", max_tokens=140),
    )


def generate_calls(call: Caller) -> None:
    """SGLang's own endpoint."""
    ask = call.generate
    ask("normal", return_logprob=True, return_routed_experts=True)
    ask("bare")
    ask("with texts", return_logprob=True, return_text_in_logprobs=True)
    ask("alternatives", return_logprob=True, top_logprobs_num=2)
    for name, start in (
        ("last", len(PROMPT) - 1),
        ("answer", len(PROMPT)),
        ("beyond", len(PROMPT) + 1),
        ("before", -1),
    ):
        ask(f"rows from {name}", return_routed_experts=True, routed_experts_start_len=start)
    ask("of text", input_ids=None, text="hi")
    ask("of both", text="hi")
    ask("of neither", input_ids=None)
    ask("prompt too long", input_ids=[10] * CONTEXT)
    ask("answer too long", params={"max_new_tokens": CONTEXT})
    for name, ids in WRONG_IDS.items():
        ask(name, input_ids=ids)
    ask("negative temperature", params={"temperature": -1.0})
    ask("unknown parameter", params={"surprise": 1})
    ask("parameter of another type", params={"temperature": "hot"})
    call("not json", "POST", "/generate", text="{")
    call.during(
        lambda: call("abort", "POST", "/abort_request", {"rid": "long gen"}),
        lambda: ask("aborted", rid="long gen", params={"max_new_tokens": 140}, return_logprob=True,
                    return_routed_experts=True),
    )  # fmt: skip


def info_calls(call: Caller) -> None:
    """What gateways, session servers and trainers ask about an engine."""
    for path in ("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/v1/models", "/v1/loads",
                 "/health", "/health_generate", "/nowhere"):  # fmt: skip
        call(path, "GET", path)
    call("wrong method", "GET", "/generate")


def control_calls(call: Caller) -> None:
    """Weights, cache, pauses, aborts."""

    def post(name: str, path: str, body: Any = None) -> Any:
        return call(name, "POST", f"/{path}", body)

    model = str(call.model)
    post("update", "update_weights_from_disk", {"model_path": model, "weight_version": "1", "flush_cache": True})
    call("version after update", "GET", "/model_info")
    call.generate("answer after update")
    post("update without a version", "update_weights_from_disk", {"model_path": model})
    post("update from nowhere", "update_weights_from_disk", {"model_path": "/nowhere", "weight_version": "2"})
    call("version after failure", "GET", "/model_info")
    post("update without a path", "update_weights_from_disk", {})
    post("flush", "flush_cache")
    call("flush by get", "GET", "/flush_cache")
    post("continue without pause", "continue_generation", {})
    post("pause in an unknown mode", "pause_generation", {"mode": "surprise"})
    post("abort nobody", "abort_request", {"rid": "nobody"})
    post("abort all", "abort_request", {"abort_all": True})
    post("abort without a name", "abort_request", {})
    long = {"max_new_tokens": 100}
    for mode in ("in_place", "retract"):

        def pause_update_continue(mode: str = mode) -> None:
            post(f"pause {mode}", "pause_generation", {"mode": mode})
            post(f"flush in {mode}", "flush_cache")
            body = {"model_path": model, "weight_version": f"after {mode}", "flush_cache": False}
            post(f"update in {mode}", "update_weights_from_disk", body)
            post(f"continue {mode}", "continue_generation", {})

        call.during(
            pause_update_continue,
            lambda mode=mode: call.generate(  # type: ignore[misc]
                f"through {mode}", params=long, return_logprob=True, return_routed_experts=True
            ),
        )
    call.during(
        lambda: post("pause abort", "pause_generation", {"mode": "abort"}),
        lambda: call.generate("through abort", params=long, return_logprob=True, return_routed_experts=True),
    )
    post("continue abort", "continue_generation", {})
    post("end before begin", "end_weight_update", {})
    tensors = {"serialized_named_tensors": ["AAAA"], "weight_version": "3"}
    post("tensors before begin", "update_weights_from_tensor", tensors)
    post("begin", "begin_weight_update", {})
    post("end", "end_weight_update", {})
    post("new version", "update_weight_version", {"new_version": "4"})
    call("version after naming it", "GET", "/model_info")


def worker_calls(call: Caller, url: str) -> None:
    """What a gateway (`call`'s) says of the engine at `url`: what it learnt by asking it stands in its listing."""
    added = call("add", "POST", "/workers", {"url": url, "worker_type": "regular"})
    _until(call.http, lambda workers: bool(workers) and workers[0]["is_healthy"])
    call("list", "GET", "/workers")
    call("models", "GET", "/v1/models")
    assert httpx.post(f"{url}/flush_cache", trust_env=False).status_code == 200  # the gateway passes no flush on
    call.chat("chat", **TRAINED)
    call("add again", "POST", "/workers", {"url": url, "worker_type": "regular"})
    call("remove", "DELETE", f"/workers/{added['worker_id']}")
    _until(call.http, lambda workers: not workers)
    call("list without", "GET", "/workers")
    call("remove again", "DELETE", f"/workers/{added['worker_id']}")


def _until(gateway: httpx.Client, fits: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Wait for a listing that fits: a gateway takes workers in and lets them go in its own time."""
    deadline = time.monotonic() + 60
    while not fits(listing := gateway.get("/workers").json()["workers"]):
        assert time.monotonic() < deadline, listing
        time.sleep(0.1)


CALLS: dict[str, Callable[[Caller], None]] = {
    "chat": chat_calls,
    "generate": generate_calls,
    "info": info_calls,
    "control": control_calls,
}
KINDS = ("chat", "generate", "info", "workers", "control")
"""In the order in which they are asked: after the last, SGLang no longer has the name that it was started with."""


def answers_of(kind: str, url: str, model: Path) -> Answers:
    """The answers of the engine at `url`, which serves the directory `model`, to one kind of calls.

    "workers" puts the gateway smg in front of it, and skips the test where that is not installed.
    """
    with ExitStack() as stack:
        asked = stack.enter_context(gateway(SMG)).url if kind == "workers" else url
        http = stack.enter_context(httpx.Client(base_url=asked, timeout=60, trust_env=False))
        call = Caller(http, model)
        if kind == "workers":
            worker_calls(call, url)
        else:
            CALLS[kind](call)
        return call.answers
