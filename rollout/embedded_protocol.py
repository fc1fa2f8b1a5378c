"""SGLang's HTTP bodies: what the embedded engine reads and what it answers. No torch.

Field names and defaults: `ChatCompletionRequest` and `ChatCompletionResponse` (srt/entrypoints/openai/protocol.py),
`GenerateReqInput`, `UpdateWeightFromDiskReqInput`, `PauseGenerationReqInput`, `AbortReq` (srt/managers/io_struct.py) of
SGLang 0.5.23. Unknown fields are ignored as there. Known fields that the embedded engine does not implement are refused
with 400 when they are set to something that would change the answer.
Legend: P prompt tokens, N output tokens, L all decoder layers, K experts a token.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pacenote.rollout.embedded_pair import Room
from pacenote.rollout.embedded_request import RequestError, SamplingParams


class BodyError(RequestError):
    """A body that is not JSON or whose fields have other types: refused before anybody looks at what it asks."""


class ParameterError(RequestError):
    """`sampling_params` with a field of another type, or one that there is not."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Paired(_Body):
    """Where the two sides of a prefill/decode pair meet."""

    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None

    @property
    def room(self) -> Room:
        """The three fields."""
        return Room(host=self.bootstrap_host, port=self.bootstrap_port, number=self.bootstrap_room)


class _Unsupported(_Body):
    """Fields whose defaults mean "off"; anything else is refused by `refuse_unsupported`."""

    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | None = None
    structural_tag: str | None = None
    stop_regex: str | list[str] | None = None
    custom_logit_processor: Any = None
    custom_params: Any = None
    beam_width: int | None = None
    watermark: Any = None
    choice: Any = None

    def refuse_unsupported(self) -> None:
        """Raise RequestError if a feature is asked for that would be dropped in silence otherwise."""
        neutral: dict[str, tuple[Any, ...]] = {
            "n": (None, 1),
            "frequency_penalty": (None, 0.0),
            "presence_penalty": (None, 0.0),
            "repetition_penalty": (None, 1.0),
        }
        for name in _Unsupported.model_fields:
            value = getattr(self, name)
            if value not in neutral.get(name, (None, "", [])):
                raise RequestError(f"{name}={value!r} is not supported by the embedded engine: leave it out.")


class SamplingBody(_Unsupported):
    """`sampling_params` of /generate. Unlike elsewhere, SGLang refuses a name that it does not know."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    sampling_seed: int | None = None
    logit_bias: dict[int, float] | None = None
    spaces_between_special_tokens: bool | None = None  # transformers' fast tokenizers have no such choice
    stream_interval: int | None = None  # nothing is streamed

    def params(self) -> SamplingParams:
        """Checked sampling parameters."""
        self.refuse_unsupported()
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=_texts(self.stop),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            no_stop_trim=self.no_stop_trim,
            skip_special_tokens=self.skip_special_tokens,
            seed=self.sampling_seed,
            logit_bias=self.logit_bias or {},
        )


class GenerateBody(_Paired):
    """POST /generate: one prompt, as ids or as text."""

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] | None = None
    rid: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_text_in_logprobs: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    stream: bool = False

    def params(self) -> SamplingParams:
        """Checked sampling parameters."""
        try:
            return SamplingBody.model_validate(self.sampling_params or {}).params()
        except ValidationError as error:
            raise ParameterError(describe(error)) from error


class ChatBody(_Unsupported, _Paired):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    model: str | None = None
    input_ids: list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    separate_reasoning: bool = True
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    return_meta_info: bool = False
    return_prompt_token_ids: bool = False
    return_token_ids: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    rid: str | None = None

    def params(self) -> SamplingParams:
        """Checked sampling parameters; fields that are left out take OpenAI's defaults."""
        self.refuse_unsupported()
        if not self.messages:
            raise RequestError("Messages cannot be empty.")
        if (self.response_format or {}).get("type", "text") != "text":
            raise RequestError("response_format is not supported by the embedded engine: leave it out.")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return SamplingParams(
            max_new_tokens=limit,
            min_new_tokens=self.min_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=-1 if self.top_k is None else self.top_k,
            min_p=0.0 if self.min_p is None else self.min_p,
            stop=_texts(self.stop),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            no_stop_trim=self.no_stop_trim,
            skip_special_tokens=self.skip_special_tokens,
            seed=self.seed,
            logit_bias=self.logit_bias or {},
        )

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call: none if `tool_choice` says so."""
        return [] if self.tool_choice == "none" else self.tools or []


class _Changed(_Body):
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None


class TensorBody(_Changed):
    """POST /update_weights_from_tensor."""

    serialized_named_tensors: list[str]


class DistributedBody(_Changed):
    """POST /update_weights_from_distributed."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"


class GroupBody(_Body):
    """POST /init_weights_update_group."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class LeaveBody(_Body):
    """POST /destroy_weights_update_group."""

    group_name: str = "weight_update_group"


class VersionBody(_Body):
    """POST /update_weight_version."""

    new_version: str
    abort_all_requests: bool = True


class SessionBody(_Body):
    """POST /begin_weight_update and /end_weight_update: which of several models, and there is one."""


class UpdateBody(_Body):
    """POST /update_weights_from_disk."""

    model_path: str
    weight_version: str | None = None
    abort_all_requests: bool = False
    flush_cache: bool = True


class PauseBody(_Body):
    """POST /pause_generation."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(_Body):
    """POST /abort_request; `rid` is a prefix, as in SGLang."""

    rid: str = ""
    abort_all: bool = False


def describe(error: ValidationError) -> str:
    """One line for a body that does not fit, naming the first field and what was wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{error.error_count()} validation errors: {where}: {first['msg']}"


def openai_error(message: str, status: int, kind: str | None = None) -> dict[str, Any]:
    """The body of a failed /v1 call, and of any whose own body cannot be read: SGLang's flat `ErrorResponse`."""
    kind = kind or ("BadRequestError" if status < 500 else "InternalServerError")
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def generate_error(message: str) -> dict[str, Any]:
    """The body of a failed /generate."""
    return {"error": {"message": message}}


def model_card(name: str, context_length: int) -> dict[str, Any]:
    """GET /v1/models."""
    card = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sglang",
        "root": name,
        "parent": None,
        "max_model_len": context_length,
    }
    return {"object": "list", "data": [card]}


def _texts(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
