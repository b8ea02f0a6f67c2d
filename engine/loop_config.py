"""How the training loop runs, the same for every stage."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..model.activations import Activations
from .optimizer_config import NotNegative
from .stages import Auto, Frozen, Positive, Stage

NotNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
Tracker = Literal["tensorboard", "wandb"]


class LoopConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the loop runs, the same for every stage."""

    batch_size: Positive = 16
    """Sequences in a global batch."""
    micro_batch_size: Positive | Auto = 4
    """Most sequences in one forward pass; changes memory and speed, not what is computed. "auto", here and in the next,
    takes what is estimated fastest of what fits the device."""
    activations: Activations | Auto = "recompute-cheap"
    """What the forward pass keeps for backward, see `Llama`."""
    frozen: Frozen = "stored"
    """What the layers' frozen matrices are while a stage trains: as stored, or "fp8" (e4m3 with a scale for each
    output), for GPUs that multiply FP8. They come back bit for bit when it ends. What trains is never quantised, nor
    are the embedding, the LM head and the adapters."""
    compile: bool = False
    """Compile the decoder layers with torch.compile."""
    replicate: Positive = 1
    """Of several processes, how many groups hold the whole model each, shared within the group (HSDP)."""
    z_loss: NotNegative = 0.0
    """Weight of lse² in the loss (PaLM, arXiv 2204.02311), which keeps logits from drifting; 1e-4 is usual."""
    spike_sigma: NotNegative = 6.0
    """Skip a step whose loss or gradient norm is so many standard deviations above the last 128 accepted; 0 never."""
    most_skipped: Positive = 10
    """Stop after so many skipped steps one after the other."""
    log_every: Positive = 10
    """Steps between two lines of metrics."""
    checkpoint_every: Positive = 100
    """Steps between two resumable states."""
    keep_last: Positive = 1
    """Resumable states that are kept."""
    validate_every: NotNegativeInt = 0
    """Steps between two validations; 0 validates before and after the stage only."""
    keep_best: bool = False
    """End with the weights of the best validation."""
    patience: NotNegativeInt = 0
    """Stop early after so many validations without a better one; 0 never does."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics go beside `metrics.jsonl`."""
    profile: NotNegativeInt = 0
    """Steps of which a torch.profiler trace is written, behind the first few."""

    def __post_init__(self) -> None:
        if (self.patience or self.keep_best) and not self.validate_every:
            raise ValueError("patience and keep_best compare validations: set validate_every")

    @property
    def is_auto(self) -> bool:
        """Whether something is left to `redwhale.engine.run_plan.resolve_auto`."""
        return "auto" in (self.micro_batch_size, self.activations)

    @property
    def resolved_micro_batch_size(self) -> int:
        """`micro_batch_size`.

        Raises:
            ValueError: if it is still "auto".
        """
        if self.micro_batch_size == "auto":
            raise ValueError('micro_batch_size is "auto": resolve_auto decides it')
        return self.micro_batch_size

    @property
    def resolved_activations(self) -> Activations:
        """`activations`.

        Raises:
            ValueError: if it is still "auto".
        """
        if self.activations == "auto":
            raise ValueError('activations is "auto": resolve_auto decides it')
        return self.activations


def loop_of(stage: Stage, loop: LoopConfig) -> LoopConfig:
    """The loop with what the stage itself says of it."""
    names = ("batch_size", "micro_batch_size", "activations", "frozen")
    own = {name: value for name in names if (value := getattr(stage, name)) is not None}
    return msgspec.structs.replace(loop, **own)


RESULT_NEUTRAL = frozenset(
    {
        *("log_every", "checkpoint_every", "keep_last", "trackers", "profile", "verify", "replicate"),
        *("workers", "threads", "engine", "memory_gb", "shard_mb"),
        *("output", "exchange"),
    }
)
"""Keys that change speed, logging or safety, but no result; with validations that decide nothing, `validate_every`."""
