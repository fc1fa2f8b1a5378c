"""The embedded engine as a process, over real HTTP, with httpx and the OpenAI SDK."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI

from pacenote.replay.spec import RoutingGeometry, geometry_from_config
from pacenote.replay.wire import decode_sglang
from pacenote.rollout.embedded import main
from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.trainer.model import build_tiny

PROMPT = [10, 11, 12, 13, 14]
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def service(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port = free_port()
    command = engine_command(
        tiny_dir, port=port, served_model_name="tiny", context_length=256, max_running_requests=8, dtype="float32"
    )
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with Service("engine", command, url=f"http://127.0.0.1:{port}", log=log) as service:
        service.wait_healthy(120)
        yield service
        assert service.alive, service.tail()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client
        client.post("/continue_generation", json={})


@pytest.fixture(scope="module")
def geometry(tiny_dir: Path) -> RoutingGeometry:
    return geometry_from_config(json.loads((tiny_dir / "config.json").read_text()))


def _chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def _generate(http: httpx.Client, *, ids: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    answer = http.post("/generate", json={"input_ids": ids or PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def _running(http: httpx.Client) -> int:
    load = http.get("/v1/loads").json()["loads"][0]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def _wait(what: Any, timeout: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.01)
    return False


def test_chat_with_ids_has_everything_that_training_needs(http: httpx.Client, geometry: RoutingGeometry) -> None:
    body = _chat(
        http,
        input_ids=PROMPT,
        max_tokens=6,
        ignore_eos=True,
        logprobs=True,
        return_meta_info=True,
        return_routed_experts=True,
        return_prompt_token_ids=True,
        unknown_field={"is": "ignored"},
    )
    [choice] = body["choices"]
    meta = choice["meta_info"]
    assert choice["prompt_token_ids"] == PROMPT
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (5, 6, 0)
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert meta["id"] == body["id"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == logprobs
    ids = [entry[1] for entry in meta["output_token_logprobs"]]
    assert len(ids) == 6
    assert "sglext" not in body
    record = decode_sglang(meta["routed_experts"], geometry, rows=10, provenance=1, version=0)
    # The same tokens as a prompt route in the same way, and a later start gives the tail.
    again = _chat(
        http,
        input_ids=PROMPT + ids,
        max_tokens=1,
        return_meta_info=True,
        return_routed_experts=True,
        routed_experts_start_len=4,
    )["choices"][0]["meta_info"]["routed_experts"]
    tail = decode_sglang(again, geometry, rows=7, provenance=1, version=0)
    np.testing.assert_array_equal(np.sort(tail.experts[:6]), np.sort(record.experts[4:]))


def test_without_meta_info_routes_are_at_the_top(http: httpx.Client, geometry: RoutingGeometry) -> None:
    body = _chat(http, input_ids=PROMPT, max_tokens=2, ignore_eos=True, return_routed_experts=True)
    assert "meta_info" not in body["choices"][0]
    decode_sglang(body["sglext"]["routed_experts"], geometry, rows=6, provenance=1, version=0)


def test_openai_sdk_and_chat_template(service: Service, http: httpx.Client, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    client = OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list().data] == ["tiny"]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=4,
        temperature=0.0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, "return_prompt_token_ids": True, "return_token_ids": True},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [len(entry.top_logprobs) for entry in content.content] == [2] * 4
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content.content)  # greedy
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert extra["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)
    assert answer.choices[0].message.content == tokenizer.decode(extra["response_token_ids"], skip_special_tokens=True)
    with pytest.raises(BadRequestError, match="longer than the model's context length"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 400}])


def test_generate(http: httpx.Client, geometry: RoutingGeometry) -> None:
    params = {"max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 7}
    body = _generate(http, sampling_params=params, return_logprob=True, top_logprobs_num=3, return_routed_experts=True)
    meta = body["meta_info"]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == body["output_ids"]
    assert [entry[2] for entry in meta["output_token_logprobs"]] == [None] * 5
    assert [len(entry) for entry in meta["output_top_logprobs"]] == [3] * 5
    decode_sglang(meta["routed_experts"], geometry, rows=9, provenance=1, version=0)
    assert _generate(http, sampling_params=params)["output_ids"] == body["output_ids"]
    texts = http.post("/generate", json={"text": "hello", "sampling_params": {"max_new_tokens": 1}}).json()
    assert texts["meta_info"]["prompt_tokens"] > 0
    assert "output_token_logprobs" not in texts["meta_info"]


def test_seeded_chats_repeat_and_unseeded_ones_differ(http: httpx.Client) -> None:
    def content(**fields: Any) -> str:
        return str(_chat(http, input_ids=PROMPT, max_tokens=12, ignore_eos=True, **fields)["choices"][0]["message"])

    assert content(seed=1) == content(seed=1) != content(seed=2)
    assert content() != content()


def test_a_forced_stop_token_ends_the_answer(http: httpx.Client) -> None:
    body = _chat(
        http, input_ids=PROMPT, logit_bias={"300": 100.0}, stop_token_ids=[300], logprobs=True, return_meta_info=True
    )
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["matched_stop"], choice["message"]["content"]) == ("stop", 300, "")
    assert [entry[1] for entry in choice["meta_info"]["output_token_logprobs"]] == [300]
    assert body["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "Messages cannot be empty"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"n": 2}, "n=2 is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"regex": "a+"}, "regex"),
        ({"stream": True}, "stream=true is not supported"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [-1]}, "outside of the vocabulary"),
        ({"input_ids": [10**9]}, "outside of the vocabulary"),
        ({"input_ids": [1] * 256}, "longer than the model's context length"),
        ({"input_ids": [1] * 250, "max_tokens": 7}, "maximum context length of 256 tokens"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"routed_experts_start_len": 6}, r"routed_experts_start_len must be in \[0, 5\]"),
        ({"routed_experts_start_len": -1}, "routed_experts_start_len"),
        ({"logprobs": True, "top_logprobs": 101}, "top_logprobs"),
        ({"input_ids": None, "messages": [{"role": "user", "content": {"a": 1}}], "tools": [3]}, "tools"),
    ],
)
def test_bad_chats_get_400_in_sglangs_shape(http: httpx.Client, fields: dict[str, Any], words: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": USER, "input_ids": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    body = answer.json()
    kind = "Bad Request" if "validation error" in body["message"] else "BadRequestError"
    assert (body["object"], body["type"], body["code"], body["param"]) == ("error", kind, 400, None)
    assert re.search(words, body["message"])


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "unread"),
        (b"[]", "unread"),
        (b"{}", "refused"),
        (b'{"input_ids": [1], "sampling_params": {"n": 2}}', "refused"),
        (b'{"input_ids": [1], "sampling_params": {"surprise": 2}}', "parameter"),
        (b'{"input_ids": [1], "sampling_params": {"temperature": "hot"}}', "parameter"),
    ],
)
def test_bad_generates_get_400(http: httpx.Client, body: bytes, kind: str) -> None:
    """Three shapes as SGLang's: for bodies that cannot be read, for requests refused, for sampling parameters."""
    answer = http.post("/generate", content=body)
    assert answer.status_code == 400
    said = answer.json()
    if kind == "unread":
        assert (said["object"], said["type"]) == ("error", "Bad Request")
    else:
        assert said["error"] if kind == "parameter" else said["error"]["message"]
        assert isinstance(said["error"], str) == (kind == "parameter")


def test_ids_come_before_text(http: httpx.Client) -> None:
    greedy = {"max_new_tokens": 3, "temperature": 0}
    both = _generate(http, text="hi", sampling_params=greedy)
    assert both["output_ids"] == _generate(http, sampling_params=greedy)["output_ids"]


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/nowhere").json() == {"detail": "Not Found"}
    assert http.get("/generate").status_code == 405


def test_information(http: httpx.Client, tiny_dir: Path) -> None:
    assert http.get("/health").status_code == http.get("/health_generate").status_code == 200
    for path in ("/model_info", "/get_model_info"):
        info = http.get(path).json()
        assert info["model_path"] == str(tiny_dir)
        assert (info["is_generation"], info["model_type"]) == (True, "glm4_moe_lite")
    for path in ("/server_info", "/get_server_info"):
        info = http.get(path).json()
        assert (info["served_model_name"], info["context_length"], info["status"]) == ("tiny", 256, "ready")
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 256


def test_many_at_once_are_each_answered_for_themselves(http: httpx.Client, service: Service) -> None:
    prompts = [[number, number + 1, number + 2] for number in range(24)]
    params = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}

    def ask(ids: list[int]) -> list[int]:
        answer = httpx.post(
            service.url + "/generate", json={"input_ids": ids, "sampling_params": params}, timeout=60, trust_env=False
        )
        return list(answer.json()["output_ids"])

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [_generate(http, ids=ids, sampling_params=params)["output_ids"] for ids in prompts]


def test_a_client_that_leaves_frees_its_slot(http: httpx.Client, service: Service) -> None:
    http.post("/pause_generation", json={"mode": "in_place"})  # it cannot finish by itself
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            service.url + "/generate", json={"input_ids": PROMPT}, timeout=httpx.Timeout(5, read=0.3), trust_env=False
        )
    assert _wait(lambda: _running(http) == 0)
    http.post("/continue_generation", json={})
    assert len(_generate(http, sampling_params={"max_new_tokens": 2, "ignore_eos": True})["output_ids"]) == 2


def test_pause_flush_abort_and_continue(http: httpx.Client, service: Service) -> None:
    with ThreadPoolExecutor(2) as pool:
        http.post("/pause_generation", json={"mode": "in_place"})
        bodies = [{"input_ids": PROMPT, "rid": f"mine-{n}", "sampling_params": {"max_new_tokens": 3}} for n in range(2)]
        posts = [pool.submit(httpx.post, service.url + "/generate", json=body, timeout=60) for body in bodies]
        assert _wait(lambda: _running(http) == 2)
        assert http.get("/health_generate").status_code == 503
        duplicate = http.post("/generate", json=bodies[0])
        assert duplicate.status_code == 400
        assert "Duplicate request ID" in duplicate.text
        assert http.post("/abort_request", json={"rid": "mine-0"}).status_code == 200
        aborted = posts[0].result(30)
        assert aborted.status_code == 200
        assert aborted.json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert not posts[1].done()
        assert http.post("/continue_generation", json={}).status_code == 200
        assert posts[1].result(30).json()["meta_info"]["id"] == "mine-1"
    assert http.post("/flush_cache").status_code == http.get("/flush_cache").status_code == 200
    assert http.post("/pause_generation", json={"mode": "nap"}).status_code == 400
    assert http.post("/abort_request", json={}).status_code == 400


def test_weights_from_disk(http: httpx.Client, tiny_dir: Path, tmp_path: Path) -> None:
    def ask() -> tuple[list[int], str]:
        body = _generate(http, sampling_params={"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True})
        return body["output_ids"], body["meta_info"]["weight_version"]

    before = ask()
    for bad in (tmp_path, tmp_path / "nowhere"):
        answer = http.post("/update_weights_from_disk", json={"model_path": str(bad), "weight_version": "bad"})
        assert answer.status_code == 400
        assert answer.json()["success"] is False
    assert ask() == before
    other = build_tiny(tmp_path / "other", seed=5)
    answer = http.post("/update_weights_from_disk", json={"model_path": str(other), "weight_version": "5"})
    assert (answer.status_code, answer.json()["success"]) == (200, True)
    assert http.get("/model_info").json()["weight_version"] == "5"
    ids, version = ask()
    assert version == "5"
    assert ids != before[0]
    http.post("/update_weights_from_disk", json={"model_path": str(tiny_dir), "weight_version": "default"})
    assert ask() == before


def test_sigterm_ends_a_busy_engine_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    command = engine_command(tiny_dir, port=port, context_length=512)
    service = Service("engine", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "log")
    with service, ThreadPoolExecutor(1) as pool:
        service.wait_healthy(120)
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
        post = pool.submit(httpx.post, service.url + "/generate", json=body, timeout=60)
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            assert _wait(lambda: _running(client) == 1)
        assert service.pid is not None
        os.kill(service.pid, signal.SIGTERM)
        assert _wait(lambda: service.exit_code == 0)
        assert post.result(20).json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert service.log.read_text() == ""


@pytest.fixture
def torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("torch_threads")
def test_what_the_user_can_put_right_is_one_sentence(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        for arguments, words in (
            (["--model-path", str(tiny_dir), "--port", str(taken)], f"cannot listen on 127.0.0.1:{taken}"),
            (["--model-path", str(tmp_path / "nowhere"), "--port", str(free_port())], "no directory"),
            (["--model-path", str(tmp_path), "--port", str(free_port())], "not a mixture-of-experts"),
        ):
            assert main(arguments) == 2
            error = capsys.readouterr().err
            assert words in error
            assert error.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["--model-path", str(tiny_dir), "--threads", "0"])
    assert caught.value.code == 2
    assert "threads" in capsys.readouterr().err
