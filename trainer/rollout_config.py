"""How episodes are sampled: the knobs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled."""

    upstream: str | None = None
    """SGLang-compatible engine or gateway to use; none starts the embedded engine on this machine."""
    engines: tuple[str, ...] = ()
    """URLs of the engines behind `upstream` that get the weights; none: both sides of `pairs`, or `upstream` itself."""
    pairs: tuple[str, ...] = ()
    """Prefill/decode pairs to ask instead of `upstream`, each PREFILL_URL,BOOTSTRAP_PORT,DECODE_URL; auto: those that
    the gateway lists, whose engines are then to be named."""
    served_model: str | None = None
    """The model's name at a gateway that asks for one (the engines' --served-model); none: the folder of the first
    weights."""
    max_staleness: int = 0
    """Weight versions that a trained token may be older than the newest; samples with older ones are left out."""
    prompts: int = 16
    """Prompts a step."""
    group: int = 8
    """Answers a prompt; the group's mean reward is each answer's baseline."""
    max_tokens: int = 3
    """Longest answer of one turn, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's logprobs use the same."""
    ahead: int = 0
    """Steps' worth of groups that may be in the making while the trainer learns; 0: it waits for them, and a seeded run
    repeats itself."""
    oversample: float = 0.0
    """Share of groups begun beyond those that are needed, without ahead; once enough are there the rest is aborted, and
    played again in the next step."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, and play other prompts instead (arXiv 2503.14476)."""
    max_tries: int = 4
    """Groups that may be played for one that is needed, before a step makes do with fewer."""
    episode_timeout: float | None = None
    """Seconds that an episode may take; a longer one is aborted and has no reward. None: as long as it likes."""
    reward_timeout: float | None = None
    """Seconds that a reward may take; a conversation whose reward takes longer has none. None: as long as it likes."""
    concurrency: int = 128
    """Episodes in flight at once."""
    request_timeout: float = 120.0
    """Seconds an answer may take."""
    patience: float = 600.0
    """Seconds without a finished episode after which the engine counts as stuck; one of ours is killed and started
    again."""
    restarts: int = 3
    """How often a dead or stuck engine is started again before the run stops."""
    engine_dtype: str = "bfloat16"
    """Number format of the embedded engine."""
    engine_device: str = "auto"
    """Torch device of the embedded engine; auto: the trainer's."""
    engine_port: int = 0
    """Port of the embedded engine; 0 picks a free one."""
    session_port: int = 0
    """Port of the session server; 0 picks a free one."""
    engine_threads: int = 1
    """CPU threads of the embedded engine."""
    append_roles: tuple[str, ...] = ("tool", "user")
    """Roles an environment may append to a conversation."""
    enable_thinking: bool = False
    """Whether the chat template opens a thinking block before each answer."""

    @property
    def elsewhere(self) -> bool:
        """Whether engines are somebody's, and none is started here."""
        return self.upstream is not None or bool(self.pairs)
