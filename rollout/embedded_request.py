"""What a client asked for and what it gets: sampling parameters, a request's state, its completion. No torch.

Field names and meanings are SGLang's (`SamplingParams`, `GenerateReqInput`, `meta_info`).
Legend: N output tokens, P prompt tokens, R = P + N - 1 routing rows, L MoE layers, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pacenote.rollout.embedded_pair import HandOver

GREEDY_BELOW = 1e-6  # SGLang decodes greedily below this temperature


class RequestError(ValueError):
    """A request that cannot be served; `status` is the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    `temperature` below 1e-6 is greedy. `top_k` -1 is off. `max_new_tokens` None means as many as the context holds.
    `ignore_eos` switches off every stop token, also `stop_token_ids`, as SGLang does. `seed` makes the draws of this
    request reproducible.

    Raises:
        RequestError: a value out of range (checked at construction).
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limit = self.max_new_tokens
        biases = self.logit_bias.values()
        checks = (
            (limit is None or limit >= 1, f"max_new_tokens must be at least 1, got {limit}."),
            (self.min_new_tokens >= 0, f"min_new_tokens must be at least 0, got {self.min_new_tokens}."),
            (
                limit is None or self.min_new_tokens <= limit,
                f"min_new_tokens must be in [0, max_new_tokens({limit})], got {self.min_new_tokens}.",
            ),
            (
                math.isfinite(self.temperature) and self.temperature >= 0.0,
                f"temperature must be non-negative, got {self.temperature}.",
            ),
            (0.0 < self.top_p <= 1.0, f"top_p must be in (0, 1], got {self.top_p}."),
            (0.0 <= self.min_p <= 1.0, f"min_p must be in [0, 1], got {self.min_p}."),
            (self.top_k == -1 or self.top_k >= 1, f"top_k must be -1 (disable) or at least 1, got {self.top_k}."),
            (all(self.stop), "stop must not hold an empty string."),
            (all(math.isfinite(value) for value in biases), "logit_bias must hold finite numbers."),
            (self.seed is None or 0 <= self.seed < 2**63, f"seed must be in [0, 2**63), got {self.seed}."),
        )
        for passed, message in checks:
            if not passed:
                raise RequestError(message)

    @property
    def greedy(self) -> bool:
        """True if the best token is taken instead of a draw."""
        return self.temperature < GREEDY_BELOW

    @property
    def scale(self) -> float:
        """The temperature that logits are divided by; greedy requests report logprobs at temperature 1."""
        return 1.0 if self.greedy else self.temperature

    @property
    def edited(self) -> bool:
        """True if the distribution that logprobs are of is not the model's own: tokens are biased or held back."""
        return bool(self.logit_bias) or self.min_new_tokens > 0

    @property
    def filtered(self) -> bool:
        """True if top-k, top-p or min-p cuts the distribution that is drawn from."""
        return self.top_k != -1 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request.

    Attributes:
        output_ids: N generated ids, with the stop token if one was sampled.
        logprobs: N floats, of the temperature-scaled distribution before top-k, top-p and min-p.
        top_logprobs: per token the best (logprob, id) pairs, if they were asked for.
        finish_reason: {"type": "stop", "matched": id or text} | {"type": "length", "length": N} |
            {"type": "abort", "message": text, "status_code": None, "err_type": None}.
        rows: experts uint8 | uint16 [R, L, K] of the tokens 0..P+N-2, or None.
        weight_versions: spans (version, start, end) over the output tokens.
        retractions: how often the request was sent back to the queue.
    """

    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[float, int], ...], ...]
    finish_reason: dict[str, Any]
    rows: NDArray[Any] | None
    weight_versions: tuple[tuple[str, int, int], ...]
    retractions: int = 0


class Request:
    """One sequence on its way through the engine; only the engine's thread touches it after `submit`.

    Args:
        rid: request id, unique among the live ones.
        prompt_ids: P >= 1 token ids.
        params: how to sample.
        stop_ids: ids that end the answer (the model's end tokens and the request's own).
        generator: source of this request's uniform draws.
        record_routes: keep the routed experts.
        top_logprobs: how many best alternatives to report a token.
    """

    __slots__ = (
        "future",
        "generator",
        "logprobs",
        "output_ids",
        "params",
        "prompt_ids",
        "record_routes",
        "retractions",
        "rid",
        "routes",
        "stop_ids",
        "top_count",
        "top_logprobs",
        "versions",
    )

    def __init__(
        self,
        *,
        rid: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        generator: np.random.Generator,
        record_routes: bool = False,
        top_logprobs: int = 0,
    ) -> None:
        self.rid = rid
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.stop_ids = stop_ids
        self.generator = generator
        self.record_routes = record_routes
        self.top_count = top_logprobs
        self.future: Future[Completion] = Future()
        self.output_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[tuple[tuple[float, int], ...]] = []
        self.routes: list[NDArray[Any]] = []
        self.versions: list[str] = []
        self.retractions = 0

    @property
    def length(self) -> int:
        """Tokens so far, prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    def begin(self, given: HandOver) -> None:
        """Start from a first token that another engine sampled: its draw is taken from the generator as well."""
        self.generator.random()
        self.output_ids.append(given.token)
        self.logprobs.append(given.logprob)
        self.versions.append(given.version)
        if self.top_count:
            self.top_logprobs.append(given.top)

    def add_rows(self, rows: NDArray[Any], start: int) -> None:
        """Keep the routing rows [R, L, K] of the inputs start..start+R-1.

        A retracted request computes its rows again, and these are the ones that it keeps, as SGLang does: under newer
        weights they are not those that its first logprobs belong to, which the count of retractions tells.
        """
        if self.record_routes:
            if start == 0:
                self.routes.clear()
            self.routes.append(rows)

    def abort(self, message: str) -> None:
        """Resolve the future with what there is."""
        self.complete({"type": "abort", "message": message, "status_code": None, "err_type": None})

    def complete(self, finish_reason: dict[str, Any]) -> None:
        """Resolve the future."""
        rows = None
        if self.record_routes and self.routes:
            rows = np.concatenate(self.routes)[: self.length - 1]
        done = Completion(
            output_ids=tuple(self.output_ids),
            logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.top_logprobs),
            finish_reason=finish_reason,
            rows=rows,
            weight_versions=_spans(self.versions),
            retractions=self.retractions,
        )
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(done)


def _spans(versions: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    spans: list[tuple[str, int, int]] = []
    for index, version in enumerate(versions):
        if spans and spans[-1][0] == version:
            spans[-1] = (version, spans[-1][1], index + 1)
        else:
            spans.append((version, index, index + 1))
    return tuple(spans)
