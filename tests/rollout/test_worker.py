"""The worker's type: what it refuses, and which state follows which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.rollout.worker import NEXT, State, Worker, worker_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:30000", "http://127.0.0.1:30000"),
        (" https://Node1/ ", "https://node1"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
    ],
)
def test_urls_have_one_spelling(text: str, url: str) -> None:
    assert worker_url(text) == url == worker_url(url)


@pytest.mark.parametrize(
    "text", ["", "node1:30000", "ftp://node1", "http://", "http://n:99999", "http://n/v1", "http://n?x", "http://u@n"]
)
def test_other_urls_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a URL http://HOST:PORT"):
        worker_url(text)


def test_prefill_needs_its_port_and_only_prefill_has_one() -> None:
    with pytest.raises(ValueError, match=r"needs its bootstrap port.*--disaggregation-bootstrap-port"):
        Worker(url="http://n", role="prefill", wanted="1")
    for role in ("regular", "decode"):
        with pytest.raises(ValueError, match="only a prefill worker has a bootstrap port"):
            Worker(url="http://n", role=role, bootstrap_port=8998, wanted="1")
    with pytest.raises(ValueError, match="1 to 65535"):
        Worker(url="http://n", role="prefill", bootstrap_port=0, wanted="1")
    with pytest.raises(ValueError, match="expected a role of regular, prefill, decode"):
        Worker(url="http://n", role="both", wanted="1")


def test_the_way_of_a_life() -> None:
    worker = Worker(url="http://n", wanted="1")
    for state in (State.REGISTERED, State.CONFIRMED, State.CURRENT, State.DRAINING, State.GONE):
        worker = worker.to(state, seen="1")
    with pytest.raises(ValueError, match="it is the end"):
        worker.to(State.STARTING)
    with pytest.raises(ValueError, match="should serve weight version '1' and was seen to serve None"):
        Worker(url="http://n", wanted="1").to(State.REGISTERED)


@given(st.lists(st.tuples(st.sampled_from(State), st.sampled_from([None, "1", "2"])), max_size=12))
def test_no_order_of_events_leads_to_the_router_with_other_weights(events: list[tuple[State, str | None]]) -> None:
    worker = Worker(url="http://n", wanted="2")
    for state, seen in events:
        legal = state in NEXT[worker.state]
        try:
            worker = worker.to(state, seen=seen)
        except ValueError:
            assert not legal or (state in ("registered", "confirmed", "current") and seen != "2")
        else:
            assert legal
            assert not worker.at_router or worker.verified
    assert worker.state is not State.CURRENT or [s for s, _ in events if s is State.CONFIRMED]


@given(
    st.dictionaries(st.sampled_from("abc"), st.sampled_from("12")),
    st.dictionaries(st.sampled_from("abc"), st.sampled_from("12")),
)
def test_a_life_is_told_by_what_both_say(before: dict[str, str], after: dict[str, str]) -> None:
    worker = Worker(url="http://n", wanted="1", instance=before)
    assert worker.restarted(after) == any(after.get(name, value) != value for name, value in before.items())
