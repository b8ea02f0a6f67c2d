"""What a stage may say about its optimizer; a stage inherits these fields."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

OptimizerName = Literal["adamw", "adamw_8bit", "bnb_adamw_8bit", "bnb_paged_adamw", "bnb_paged_adamw_8bit"]
Masters = Literal["auto", "fp32", "split", "stochastic", "none"]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
AboveZero = Annotated[float, msgspec.Meta(gt=0)]
BelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW (arXiv 1711.05101): in what precision it keeps its state, when it runs, and what differs by parameter."""

    optimizer: OptimizerName = "adamw"
    """`adamw` keeps fp32 moments, `adamw_8bit` 8-bit ones, rounded without bias. Those of bitsandbytes (`bnb_…`)
    need that package; the paged ones keep their moments in memory that moves between GPU and host."""
    masters: Masters = "auto"
    """What keeps the changes of a bf16 weight that are smaller than its spacing: `fp32` copies, `split` (16 more bits a
    weight, exactly as good as fp32), `stochastic` rounding, or `none` (rounding to nearest). `auto` is `split` for
    `adamw_8bit` and `fp32` for all others. fp32 weights need none of it."""
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: AboveZero = 1e-8
    grad_clip: NotNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of matrices; norm weights and biases never decay."""
    decay_embeddings: bool = True
    """Whether the embedding and the LM head decay too."""
    embed_lr: AboveZero | None = None
    """Peak learning rate of the embedding, and of a head tied to it; None for the stage's."""
    head_lr: AboveZero | None = None
    """Peak learning rate of the LM head; None for the stage's."""
    lora_b_lr_ratio: AboveZero = 1.0
    """Learning rate of the adapters' B over that of A (LoRA+, arXiv 2402.12354)."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is complete, and drop the gradient. The results are the same to the
    bit. A single micro-batch with clipping takes a second forward and backward pass, for the norm; with several
    micro-batches clipping leaves the updates to the end of the step."""

    def __post_init__(self) -> None:
        if self.optimizer == "adamw_8bit" and self.masters in ("fp32", "none"):
            raise ValueError(
                f'masters "{self.masters}" does not exist for optimizer "adamw_8bit"; choose "split", which keeps the '
                'same bits as fp32 masters in half the memory, or "stochastic", which keeps nothing'
            )

    @property
    def resolved_masters(self) -> Literal["fp32", "split", "stochastic", "none"]:
        """`masters` with `auto` decided."""
        if self.masters == "auto":
            return "split" if self.optimizer == "adamw_8bit" else "fp32"
        return self.masters

    def lr_and_weight_decay(self, name: str, dimensions: int, lr: float) -> tuple[float, float]:
        """Peak learning rate and weight decay of the parameter called `name`, of so many dimensions.

        Args:
            name: as of `named_parameters`, or that of a row range.
            dimensions: 1 for norms and biases, which never decay.
            lr: the stage's peak learning rate.
        """
        if is_embedding(name):
            lr = self.embed_lr or lr
        elif is_head(name):
            lr = self.head_lr or lr
        elif name.endswith(".lora_B"):
            lr *= self.lora_b_lr_ratio
        decays = dimensions > 1 and (self.decay_embeddings or not (is_embedding(name) or is_head(name)))
        return lr, self.weight_decay if decays else 0.0


def is_embedding(name: str) -> bool:
    """Whether a parameter's name is the embedding's, or that of some of its rows; a tied head has it too."""
    return "embed_tokens" in name


def is_head(name: str) -> bool:
    """Whether a parameter's name is the LM head's, or that of some of its rows."""
    return "lm_head" in name
