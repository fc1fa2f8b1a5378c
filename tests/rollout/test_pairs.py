"""Prefill/decode pairs of embedded engines, driven: the same tokens, logprobs and rows as one regular engine gives.

The engines are exact, so that what is equal is equal to the last bit though one decodes what another has computed.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.replay.record import DECODE, PREFILL
from pacenote.rollout.errors import UpstreamError
from pacenote.rollout.launch import Service, engine_command, free_port
from pacenote.rollout.messages import ROLES
from pacenote.rollout.pairs import Pair, Pairs, from_gateway, join, join_rows, known
from pacenote.rollout.server import SessionConfig, create_app
from tests.rollout.gateways import ROUTER_021, ROUTER_032, SMG, gateway, register
from tests.rollout.talk import MORE, USER, WAIT, chat, error, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import Served

GREEDY = {"temperature": 0.0, "max_tokens": 6}


@dataclass(frozen=True)
class Fleet:
    """Three engines with the same weights."""

    regular: Service
    prefill: Service
    decode: Service
    bootstrap: int

    @property
    def pair(self) -> str:
        return f"{self.prefill.url},{self.bootstrap},{self.decode.url}"


@pytest.fixture(scope="module")
def fleet(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    logs, bootstrap = tmp_path_factory.mktemp("pair"), free_port()
    extra = {
        "regular": [],
        "prefill": ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(bootstrap)],
        "decode": ["--disaggregation-mode", "decode"],
    }
    with ExitStack() as stack:
        services = {}
        for role, words in extra.items():
            port = free_port()
            command = engine_command(
                tiny_dir, port=port, served_model_name="tiny", context_length=400, dtype="float32", exact=True,
                weight_version="3", extra=words,
            )  # fmt: skip
            service = Service(role, command, url=f"http://127.0.0.1:{port}", log=logs / f"{role}.log")
            services[role] = stack.enter_context(service)
        for service in services.values():
            service.wait_healthy(120)
        yield Fleet(bootstrap=bootstrap, **services)
        for role in services:
            assert "Traceback" not in (logs / f"{role}.log").read_text()


@pytest.fixture
def behind(tiny_dir: Path, served_app: type[Served]) -> Callable[..., Served]:
    """Makes a session server in front of a URL."""

    def make(upstream: str, **options: Any) -> Served:
        usual: dict[str, Any] = {"append_roles": frozenset(ROLES), "served_model": "tiny", "probe": True}
        return served_app(create_app(SessionConfig(model=str(tiny_dir), upstream=upstream, **(usual | options))))

    return make


def client(served: Served) -> httpx.Client:
    return httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False)


def talk(http: httpx.Client) -> Any:
    """A session of two turns; its only sample."""
    session = start(http)
    first = said(http, session, [USER], **GREEDY)
    said(http, session, [USER, first, MORE], **GREEDY)
    [sample] = samples(http, session)
    return sample


# --- through the session server --------------------------------------------------------------------------------------


def test_a_pair_is_one_engine(fleet: Fleet, behind: Callable[..., Served]) -> None:
    with behind(fleet.regular.url) as served, client(served) as http:
        alone = talk(http)
    with behind(fleet.decode.url, pairs=(fleet.pair,)) as served, client(served) as http:
        both = talk(http)
    assert both.tokens.tolist() == alone.tokens.tolist()
    np.testing.assert_array_equal(both.logprobs, alone.logprobs)
    np.testing.assert_array_equal(both.experts, alone.experts)
    np.testing.assert_array_equal(both.provenance, alone.provenance)
    assert set(both.provenance.tolist()) == {PREFILL, DECODE}
    assert (both.version[both.loss_mask.astype(bool)] == 3).all()


@pytest.mark.parametrize("limit", [1, 2])
def test_short_answers(fleet: Fleet, behind: Callable[..., Served], limit: int) -> None:
    """One token is all the prefill side's; its routes as input are nobody's."""
    found = []
    for upstream, pairs in ((fleet.regular.url, ()), (fleet.decode.url, (fleet.pair,))):
        with behind(upstream, pairs=pairs) as served, client(served) as http:
            session = start(http)
            said(http, session, [USER], temperature=0.0, max_tokens=limit)
            found.append(samples(http, session)[0])
    np.testing.assert_array_equal(found[0].experts, found[1].experts)
    np.testing.assert_array_equal(found[0].logprobs, found[1].logprobs)


def test_seeds_draw_the_same(fleet: Fleet, behind: Callable[..., Served]) -> None:
    found = []
    for upstream, pairs in ((fleet.regular.url, ()), (fleet.decode.url, (fleet.pair,))):
        with behind(upstream, pairs=pairs) as served, client(served) as http:
            session = start(http)
            said(http, session, [USER], seed=7, max_tokens=8, temperature=1.0)
            found.append(samples(http, session)[0].tokens.tolist())
    assert found[0] == found[1]


def test_gateway_regular(fleet: Fleet, behind: Callable[..., Served]) -> None:
    with behind(fleet.regular.url) as served, client(served) as http:
        alone = talk(http)
    with gateway(SMG) as router:
        register(router, {"url": fleet.regular.url, "worker_type": "regular"})
        with behind(router.url) as served, client(served) as http:
            through = talk(http)
    np.testing.assert_array_equal(through.experts, alone.experts)
    np.testing.assert_array_equal(through.logprobs, alone.logprobs)


def test_gateway_with_a_pair_loses_the_prompts_routes(fleet: Fleet, behind: Callable[..., Served]) -> None:
    """So nothing is answered through it; driven by the gateway's own listing the same pair is good."""
    with behind(fleet.regular.url) as served, client(served) as http:
        alone = talk(http)
    with gateway(SMG, "--pd-disaggregation") as router:
        register(router, {"url": fleet.prefill.url, "worker_type": "prefill", "bootstrap_port": fleet.bootstrap})
        register(router, {"url": fleet.decode.url, "worker_type": "decode"})
        with behind(router.url) as served, client(served) as http:
            session = start(http)
            message = error(chat(http, session, [USER], **GREEDY), 503, "upstream_unproven")
            assert "routes of the prompt" in message
            assert "--pair" in message
            assert not records(http, session)
        with behind(router.url, pairs=("auto",)) as served, client(served) as http:
            through = talk(http)
    np.testing.assert_array_equal(through.experts, alone.experts)


@pytest.mark.parametrize("release", [ROUTER_021, ROUTER_032])
def test_gateways_that_drop_fields_are_refused(release: str, fleet: Fleet, behind: Callable[..., Served]) -> None:
    with gateway(release) as router:
        register(router, {"url": fleet.regular.url, "worker_type": "regular"})
        with behind(router.url) as served, client(served) as http:
            message = error(chat(http, start(http), [USER], **GREEDY), 503, "upstream_unproven")
            assert "return_meta_info" in message or "input_ids" in message
            assert "sglang-router up to 0.3.2" in message
            assert http.get("/health").status_code == 200


# --- when a side fails -----------------------------------------------------------------------------------------------


def body(**more: Any) -> bytes:
    fields = {
        "model": "tiny", "messages": [USER], "input_ids": [10, 11, 12, 13], "max_tokens": 6, "temperature": 0,
        "ignore_eos": True, "logprobs": True, "return_meta_info": True, "return_routed_experts": True,
    }  # fmt: skip
    return orjson.dumps(fields | more)


def ask(pair: Pair, sent: bytes, *, timeout: float = 20.0) -> bytes:
    async def go() -> bytes:
        pairs = Pairs(lambda: known(pair), timeout=timeout)
        try:
            return await pairs.chat(sent)
        finally:
            await pairs.close()

    return asyncio.run(go())


def idle(service: Service) -> bool:
    """Nothing runs or waits there, soon."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        load = httpx.get(f"{service.url}/v1/loads", trust_env=False).json()["loads"][0]
        if not load["num_running_reqs"] + load["num_waiting_reqs"]:
            return True
        time.sleep(0.05)
    return False


def test_a_decode_side_that_is_down(fleet: Fleet) -> None:
    pair = Pair(prefill=fleet.prefill.url, bootstrap_port=fleet.bootstrap, decode=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UpstreamError, match="no answer from the engine"):
        ask(pair, body())
    assert idle(fleet.prefill)
    assert ask(Pair.read(fleet.pair), body())  # and the prefill side is as before


def test_a_prefill_side_that_is_down(fleet: Fleet) -> None:
    pair = Pair(prefill=f"http://127.0.0.1:{free_port()}", bootstrap_port=fleet.bootstrap, decode=fleet.decode.url)
    with pytest.raises(UpstreamError, match="no answer from the engine"):
        ask(pair, body())
    assert idle(fleet.decode)


def test_a_side_that_is_too_slow(fleet: Fleet) -> None:
    """A paused decode side: the prefill side does not go on waiting for it."""
    httpx.post(f"{fleet.decode.url}/pause_generation", json={"mode": "in_place"}, trust_env=False)
    try:
        with pytest.raises(UpstreamError, match="did not answer within"):
            ask(Pair.read(fleet.pair), body(), timeout=1.0)
        assert idle(fleet.prefill)
    finally:
        httpx.post(f"{fleet.decode.url}/continue_generation", json={}, trust_env=False)
    assert idle(fleet.decode)


def test_a_refusal_is_the_engines_own(fleet: Fleet) -> None:
    from pacenote.rollout.errors import ContextOverflow

    with pytest.raises(ContextOverflow):
        ask(Pair.read(fleet.pair), body(input_ids=[10] * 500))
    assert idle(fleet.prefill)
    assert idle(fleet.decode)


def test_a_client_that_leaves(fleet: Fleet, behind: Callable[..., Served]) -> None:
    with behind(fleet.decode.url, pairs=(fleet.pair,)) as served, client(served) as http:
        session = start(http)
        said(http, session, [USER], max_tokens=1)
        with pytest.raises(httpx.ReadTimeout):
            http.post(
                f"{session}/v1/chat/completions",
                json={"messages": [USER], "max_tokens": 300, "ignore_eos": True},
                timeout=0.3,
            )
        assert idle(fleet.decode)
        assert idle(fleet.prefill)
        assert len(records(http, session)) == 1


def test_many_at_once(fleet: Fleet) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(Pair.read(fleet.pair), body(), timeout=60), range(6)))
    metas = [orjson.loads(answer)["choices"][0]["meta_info"] for answer in answers]
    assert len({meta["routed_experts"] for meta in metas}) == 1
    assert len({meta["id"] for meta in metas}) == 6


def test_a_request_without_a_room_is_refused(fleet: Fleet) -> None:
    for side in (fleet.prefill, fleet.decode):
        answer = httpx.post(f"{side.url}/v1/chat/completions", content=body(), trust_env=False)
        assert answer.status_code == 400
        assert "bootstrap room" in answer.text


def test_no_pair() -> None:
    async def none() -> list[Pair]:
        return []

    with pytest.raises(UpstreamError, match="at least one prefill and one decode worker"):
        asyncio.run(Pairs(none, timeout=1.0).chat(body()))
    with pytest.raises(UpstreamError, match="listing of workers"):
        asyncio.run(Pairs(from_gateway(f"http://127.0.0.1:{free_port()}", timeout=1.0), timeout=1.0).chat(body()))


# --- joining ---------------------------------------------------------------------------------------------------------


@given(
    held=st.integers(0, 5), generated=st.integers(1, 5), size=st.sampled_from((8, 24)), seed=st.integers(0, 99),
    cached=st.booleans(),
)  # fmt: skip
def test_rows_are_prefills_and_then_decodes(held: int, generated: int, size: int, seed: int, cached: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 255, (held + generated, size), dtype=np.uint8)
    mine, theirs = truth[:held], truth.copy()
    if not cached:
        theirs[:held] = 0
    given = [base64.b64encode(x.tobytes()).decode() for x in (mine, theirs)]
    joined = join_rows(given[0], given[1], held, held + generated)
    assert base64.b64decode(joined) == truth.tobytes()


def encoded(rows: list[list[int]]) -> str:
    return base64.b64encode(np.array(rows, dtype="<i4").tobytes()).decode()


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        (encoded([[1, 2]]), encoded([[0, 0], [0, 0], [5, 6]]), "expected 2 rows of 8 bytes from prefill"),
        (encoded([[0, 0], [0, 0]]), encoded([[0, 0], [0, 0], [5, 6]]), "are all zeros"),
        (encoded([[1, 2], [3, 4]]), "", "expected 3 rows from decode"),
        (None, encoded([[0, 0], [0, 0], [5, 6]]), "routed_experts in base64 from prefill"),
        ("***", encoded([[0, 0], [0, 0], [5, 6]]), "routed_experts in base64 from prefill"),
    ],
)
def test_rows_that_cannot_be_joined(prefill: Any, decode: Any, message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        join_rows(prefill, decode, 2, 3)


def answer(**meta: Any) -> bytes:
    usual = {
        "prompt_tokens": 2, "completion_tokens": 2, "weight_version": "1", "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-1.0, 7, None], [-2.0, 8, None]],
        "routed_experts": encoded([[0, 0], [0, 0], [5, 6]]),
    }  # fmt: skip
    return orjson.dumps({"choices": [{"meta_info": usual | meta}]})


PREFILLED = {"completion_tokens": 1, "routed_experts": encoded([[1, 2], [3, 4]])}


def test_answers_are_joined() -> None:
    first = answer(**PREFILLED, cached_tokens=1, input_token_logprobs=[[None, 5, None], [-0.5, 6, None]])
    meta = orjson.loads(join(first, answer(cached_tokens=0), start=0))["choices"][0]["meta_info"]
    assert meta["routed_experts"] == encoded([[1, 2], [3, 4], [5, 6]])
    assert (meta["cached_tokens"], len(meta["input_token_logprobs"]), meta["completion_tokens"]) == (1, 2, 2)


def test_an_answer_of_one_token_is_prefills() -> None:
    """SGLang's decode side computes nothing then, and sends no rows at all."""
    one = {"completion_tokens": 1, "output_token_logprobs": [[-1.0, 7, None]]}
    meta = orjson.loads(join(answer(**PREFILLED), answer(**one, routed_experts=None), start=0))["choices"][0][
        "meta_info"
    ]
    assert meta["routed_experts"] == PREFILLED["routed_experts"]
    unasked = join(answer(**one, routed_experts=None), answer(**one, routed_experts=None), start=0)
    assert orjson.loads(unasked)["choices"][0]["meta_info"]["routed_experts"] is None
    with pytest.raises(UpstreamError, match="are all zeros"):
        join(answer(**one, routed_experts=encoded([[0, 0], [0, 0]])), answer(**one, routed_experts=None), start=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_version": "2"}, "agree on weight_version"),
        ({"prompt_tokens": 3}, "agree on prompt_tokens"),
        ({"output_token_logprobs": [[-1.0, 9, None]]}, "first token 9"),
        ({"output_token_logprobs": []}, "first token"),
    ],
)
def test_answers_that_do_not_belong_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        join(answer(**PREFILLED | change), answer(), start=0)
    with pytest.raises(UpstreamError, match=r"choices\[0\].meta_info from prefill"):
        join(b"<html>", answer(), start=0)


@pytest.mark.parametrize("text", ["http://a:1,8998", "http://a:1,x,http://b:1", "http://a:1,8998,http://a:1", "a,1,b"])
def test_pairs_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Pair.read(text)
