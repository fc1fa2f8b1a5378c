"""What a run is made of: one frozen value, read from recipe and command line, written into the run folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pacenote.kernels.policy import PolicyConfig
from pacenote.rollout.pairs import AUTO, Pair
from pacenote.trainer.advantage import Estimator
from pacenote.trainer.checkpoint import CheckpointConfig
from pacenote.trainer.evaluate import EvalConfig
from pacenote.trainer.fleet import EngineKind
from pacenote.trainer.lora import LoraConfig
from pacenote.trainer.megatron_config import MegatronConfig
from pacenote.trainer.model import TinyShape
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.step import ReplayMode
from pacenote.trainer.sync import SyncConfig
from pacenote.trainer.trackers import TrackConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A training run."""

    recipe: str
    """Name of the recipe that gave the defaults."""
    model: Path | None = None
    """Model directory to start from (config.json, weights, tokenizer); none: the recipe's random initialisation."""
    steps: int = 60
    """Training steps."""
    seed: int = 0
    """Seed of the initial weights, the tasks, the sampler and the shuffling."""
    replay: ReplayMode = "rollout"
    """Whose experts the update uses: rollout (the engine's), trainer (its own, from the old-logprob pass), mixed (the
    engine's in the first optimizer step of a training step, its own in later ones), off."""
    data: Path | None = None
    """JSON lines with OpenAI messages and label, instead of the recipe's task."""
    task: str = "pacenote.trainer.letters"
    """Module with make_tasks, play (the environment) and reward; with --data the file's rows are the tasks."""
    environment: str | None = None
    """Import path of the environment, module:function; none: the task's, or a single turn with --data."""
    reward: str | None = None
    """Import path of the reward, called with (messages, label); none: the task's, or `contains_label` with --data."""
    out: Path | None = None
    """Run folder; none: runs/<recipe>-<time>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs."""
    backend: Literal["hf", "megatron"] = "hf"
    """What trains the model: hf, transformers, over many ranks sharded by FSDP2; megatron, megatron-core."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    engine: EngineKind = "embedded"
    """What this machine serves the model with: embedded, or sglang-cpu, real SGLang from the environment that
    `python scripts/install_sglang.py` makes. With --rollout.upstream nothing is started here."""
    exact: bool = False
    """Logprobs of engine and trainer equal to the last bit: on a CPU, both in float32, in a form in which no number
    depends on the batch; slower. The engine's number format is then float32, whatever else is said."""
    threads: int | None = None
    """CPU threads of the trainer; none: torch's own choice."""
    algorithm: str | None = None
    """Name of the algorithm that gave the defaults of advantage, loss and overlong-buffer: grpo, dapo, dr_grpo, rloo,
    reinforce_pp, gspo or cispo; none: the recipe's own."""
    advantage: Estimator = "grpo"
    """What an answer's reward is held against; see trainer/advantage.py."""
    overlong_buffer: int = 0
    """Answers are punished in the last so many of their --rollout.max-tokens, by up to 1; 0: not at all."""
    reference: Path | None = None
    """Model directory of the reference policy of --loss.kl-coef; none: the model that the run starts from."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL of --loss.kl-coef stands: a term of the loss, or taken off the advantage of each token that leads to
    it, see trainer/kl.py."""
    gap_every: int = 1
    """Steps between measurements of the gap to the engine under the trainer's own routing, beside that under replay:
    another forward pass where --replay is rollout; 0: never."""
    samples_every: int = 5
    """Steps between readable samples in the run folder."""
    tiny: TinyShape = field(default_factory=TinyShape)
    """Shape of the randomly initialised model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: PolicyConfig = field(default_factory=PolicyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        for name, value, least in (
            ("steps", self.steps, 1),
            ("rollout.prompts", self.rollout.prompts, 1),
            ("rollout.group", self.rollout.group, 1),
            ("rollout.max-tokens", self.rollout.max_tokens, 1),
            ("rollout.concurrency", self.rollout.concurrency, 1),
            ("optim.minibatches", self.optim.minibatches, 1),
            ("optim.microbatch-tokens", self.optim.microbatch_tokens, 1),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("optim.guard.max-skips", self.optim.guard.max_skips, 0),
            ("samples-every", self.samples_every, 1),
            ("gap-every", self.gap_every, 0),
        ):
            if value < least:
                raise ValueError(f"--{name} expects at least {least}, got {value}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads expects at least 1, got {self.threads}")
        self._check_engine()
        if self.exact:
            self._check_exact()
        if self.lora.rank and self.backend != "hf":
            raise ValueError(f"--lora.rank expects --backend hf, got {self.backend}: peft adapts transformers' models")
        self._check_rollout()
        if self.kl_in == "reward" and not self.loss.kl_coef:
            raise ValueError("--kl-in reward expects --loss.kl-coef above 0, the price of the KL")
        if self.kl_in == "reward" and self.loss.kl_unbiased:
            raise ValueError("--loss.kl-unbiased expects --kl-in loss: in the reward there is nothing to weigh")
        if self.reference is not None and not self.loss.kl_coef:
            raise ValueError("--reference expects --loss.kl-coef above 0: without it nobody asks the reference policy")
        if not 0 <= self.overlong_buffer <= self.rollout.max_tokens:
            raise ValueError(
                f"--overlong-buffer expects 0 to --rollout.max-tokens {self.rollout.max_tokens}, got "
                f"{self.overlong_buffer}"
            )
        if not 0 <= self.optim.decay <= 1:
            raise ValueError(f"--optim.decay expects a share of the run in [0, 1], got {self.optim.decay}")
        if self.optim.guard.spike is not None and self.optim.guard.spike <= 1:
            raise ValueError(f"--optim.guard.spike expects a number above 1, got {self.optim.guard.spike}")
        if self.optim.lr <= 0 or self.optim.grad_clip <= 0:
            raise ValueError("--optim.lr and --optim.grad-clip expect numbers above 0")

    def _check_rollout(self) -> None:
        """What may wait for what."""
        rollout = self.rollout
        for name, number in (("max-staleness", rollout.max_staleness), ("ahead", rollout.ahead)):
            if number < 0:
                raise ValueError(f"--rollout.{name} expects at least 0, got {number}")
        if rollout.max_staleness < rollout.ahead:
            raise ValueError(
                f"--rollout.ahead {rollout.ahead} expects --rollout.max-staleness of at least as much, got "
                f"{rollout.max_staleness}: what is played ahead is of weights that many versions old"
            )
        if rollout.oversample < 0 or (rollout.oversample and rollout.ahead):
            raise ValueError(
                f"--rollout.oversample expects a share of at least 0, without --rollout.ahead, got "
                f"{rollout.oversample}: "
                "ahead of the trainer nothing has to be broken off"
            )
        if rollout.max_tries < 1:
            raise ValueError(f"--rollout.max-tries expects at least 1, got {rollout.max_tries}")
        for name, seconds in (
            ("patience", rollout.patience),
            ("episode-timeout", rollout.episode_timeout),
            ("reward-timeout", rollout.reward_timeout),
        ):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"--rollout.{name.replace('_', '-')} expects seconds above 0, got {seconds}")
        if rollout.engines and rollout.upstream is None and not rollout.pairs:
            raise ValueError("--rollout.engines expects --rollout.upstream, the gateway in front of them")
        if rollout.served_model is not None and not rollout.elsewhere:
            raise ValueError("--rollout.served-model expects --rollout.upstream: an engine of ours needs no name")
        for pair in rollout.pairs:
            if pair == AUTO and not (rollout.upstream and rollout.engines):
                raise ValueError(
                    "--rollout.pairs auto expects --rollout.upstream, the gateway that lists them, and "
                    "--rollout.engines, all that get new weights"
                )
            if pair != AUTO:
                Pair.read(pair)
        if rollout.temperature <= 0:
            raise ValueError(f"--rollout.temperature expects a number above 0, got {rollout.temperature}")

    def _check_engine(self) -> None:
        """What real SGLang on a CPU goes with."""
        if self.engine == "embedded":
            return
        if self.rollout.elsewhere:
            raise ValueError(
                f"--engine {self.engine} starts an engine here, --rollout.upstream or --rollout.pairs name one: leave "
                "one out"
            )
        if self.exact:
            raise ValueError(f"--exact expects the embedded engine, got --engine {self.engine}: it computes otherwise")
        if self.rollout.engine_device not in ("auto", "cpu"):
            raise ValueError(
                f"--engine {self.engine} expects --rollout.engine-device cpu, got {self.rollout.engine_device}"
            )

    def _check_exact(self) -> None:
        """What engine and trainer must share to be equal."""
        if self.rollout.elsewhere:
            raise ValueError(
                "--exact expects the embedded engine, got --rollout.upstream or --rollout.pairs: others compute "
                "otherwise"
            )
        if self.backend != "hf":
            raise ValueError(f"--exact expects --backend hf, got {self.backend}: it is proven there only")
        if self.lora.rank:
            raise ValueError(
                f"--exact expects --lora.rank 0, got {self.lora.rank}: the engine computes with merged weights, the "
                "trainer with adapters beside them, which rounds otherwise"
            )
        if self.device == "cuda" or self.rollout.engine_device not in ("auto", "cpu"):
            raise ValueError("--exact expects trainer and engine on the CPU: it is proven there only")
        if self.gap_every != 1:
            raise ValueError(f"--exact expects --gap-every 1, got {self.gap_every}: it is measured on every token")
        if self.threads != self.rollout.engine_threads:
            raise ValueError(
                f"--exact expects as many --threads as --rollout.engine-threads, got {self.threads} and "
                f"{self.rollout.engine_threads}: matmuls sum in another order with another number"
            )


def in_loss(config: RunConfig) -> PolicyConfig:
    """The loss, without a KL that is in the reward."""
    return replace(config.loss, kl_coef=0.0) if config.kl_in == "reward" else config.loss


def dump(config: RunConfig) -> str:
    """The configuration as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def parse(text: str) -> RunConfig:
    """The configuration back from `dump`'s text.

    Raises:
        ValueError: not such a text, or a field of another version of pacenote.
    """
    try:
        return _build(RunConfig, json.loads(text))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"expected a run's config.json, got something else ({error})") from error


def _build(kind: type[T], values: dict[str, Any]) -> T:
    hints = get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value)  # type: ignore[arg-type]
    options = get_args(hint)
    if value is not None and (hint is Path or Path in options):
        return Path(value)
    if isinstance(value, list) and (get_origin(hint) is tuple or any(get_origin(o) is tuple for o in options)):
        return tuple(value)
    return value
