"""AdamW (arXiv 1711.05101) on one parameter at a time: what it keeps between steps, and how a step changes it.

A rule holds no state of its own. What it keeps of a parameter is a dict of tensors by name, whose names begin with
`master` for what stands for the weight in fp32, and are moments otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..kernels.adamw_8bit import AdamWSettings, MomentCodes, adamw_8bit_step_
from ..kernels.bf16_masters import fp32_masters, store_nearest_, store_stochastic_
from .optimizer_config import OptimizerConfig

MastersKind = Literal["fp32", "split", "stochastic", "none"]
_CHUNK = 2**22
"""Entries that are computed in fp32 at a time, a multiple of BLOCK."""
_CPU_CHUNK = 2**18
"""The same on a CPU, whose caches hold so many from one operation to the next."""
BLOCK = 256
"""Entries that share one number of a state, where they share any."""


class Update(NamedTuple):
    """One parameter in one step."""

    weight: Tensor
    """bf16 or fp32, contiguous, without autograd; changed in place."""
    gradient: Tensor
    """In the weight's shape, bf16 or fp32; its content is undefined afterwards."""
    state: dict[str, Tensor]
    """What the rule's `new_state` returned; changed in place."""
    settings: AdamWSettings


class UpdateRule(Protocol):
    """An optimizer's arithmetic."""

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """What is kept of `weight` between steps, as before its first."""
        ...

    def update(self, updates: Sequence[Update], factor: Tensor, skip: Tensor) -> None:
        """Take one step.

        Args:
            updates: of different parameters on one device.
            factor: fp32 scalar on the device that gradients are multiplied by.
            skip: bool scalar on the device; where it is true, weights and states keep every bit.
        """
        ...


class Fp32Rule:
    """Rules that compute on fp32 weights and gradients: a bf16 weight is rebuilt in fp32 by the chunk.

    Args:
        masters: what stands for a bf16 weight in fp32 between steps.
    """

    def __init__(self, masters: MastersKind) -> None:
        self.masters = masters

    def new_moments(self, weight: Tensor) -> dict[str, Tensor]:
        """The moments of `weight` before its first step, flat."""
        raise NotImplementedError

    def update_fp32(self, update: Update, factor: Tensor, skip: Tensor) -> None:
        """Take one step on a flat fp32 weight with a flat fp32 gradient, whose state holds moments alone."""
        raise NotImplementedError

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """See `UpdateRule`."""
        state = self.new_moments(weight)
        if weight.dtype == torch.float32 or self.masters in ("stochastic", "none"):
            return state
        if self.masters == "fp32":
            return {"master": weight.detach().float().view(-1), **state}
        return {"master_low": torch.zeros(weight.numel(), dtype=torch.int16, device=weight.device), **state}

    def update(self, updates: Sequence[Update], factor: Tensor, skip: Tensor) -> None:
        """See `UpdateRule`."""
        for update in updates:
            for first, part in _chunks(update):
                self._update_chunk(part, first, factor, skip)

    def _update_chunk(self, part: Update, first: int, factor: Tensor, skip: Tensor) -> None:
        moments = {name: tensor for name, tensor in part.state.items() if not name.startswith("master")}
        low = part.state.get("master_low")
        if "master" in part.state:
            master = part.state["master"]
        else:
            master = fp32_masters(part.weight, part.weight.new_empty(0) if low is None else low)
        self.update_fp32(Update(master, part.gradient.float(), moments, part.settings), factor, skip)
        # Where the step is skipped, masters are rounded to the weights they came from.
        if part.weight.dtype == torch.float32:
            return
        if self.masters == "stochastic":
            s = part.settings
            store_stochastic_(part.weight, master, seed=s.seed, number=s.number, step=s.step, first=s.first + first)
        elif self.masters == "none":
            part.weight.copy_(master)
        else:
            store_nearest_(part.weight, master, low)


def _chunks(update: Update) -> Iterator[tuple[int, Update]]:
    """Views of consecutive entries, each with its first entry's index; a state of fewer entries is one of blocks."""
    weight, gradient = update.weight.view(-1), update.gradient.reshape(-1)
    entries = weight.numel()
    size = min(_CHUNK, _CPU_CHUNK) if weight.device.type == "cpu" else _CHUNK
    for first in range(0, entries, size):
        state = {}
        for name, tensor in update.state.items():
            block = 1 if tensor.numel() == entries else BLOCK
            state[name] = tensor[first // block : (first + size) // block]
        part = slice(first, first + size)
        yield first, Update(weight[part], gradient[part], state, update.settings)


class AdamW(Fp32Rule):
    """AdamW with fp32 moments, in torch's fused kernels."""

    def new_moments(self, weight: Tensor) -> dict[str, Tensor]:
        """See `Fp32Rule`."""
        return {
            name: torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
            for name in ("exp_avg", "exp_avg_sq")
        }

    def update(self, updates: Sequence[Update], factor: Tensor, skip: Tensor) -> None:
        """See `UpdateRule`; fp32 parameters with the same settings share launches."""
        alike: dict[tuple[float, float, int], list[Update]] = {}
        for update in updates:
            if update.weight.dtype == update.gradient.dtype == torch.float32:
                settings = update.settings
                flat = update._replace(weight=update.weight.view(-1), gradient=update.gradient.reshape(-1))
                alike.setdefault((settings.lr, settings.weight_decay, settings.step), []).append(flat)
            else:
                super().update([update], factor, skip)
        for members in alike.values():
            self._fused(members, factor, skip)

    def update_fp32(self, update: Update, factor: Tensor, skip: Tensor) -> None:
        """See `Fp32Rule`."""
        self._fused([update], factor, skip)

    def _fused(self, members: Sequence[Update], factor: Tensor, skip: Tensor) -> None:
        settings = members[0].settings
        # The kernels count up, from device memory.
        steps = torch.full((len(members),), float(settings.step - 1), device=factor.device)
        adamw(
            [member.weight for member in members],
            [member.gradient for member in members],
            [member.state["exp_avg"] for member in members],
            [member.state["exp_avg_sq"] for member in members],
            [],
            list(steps.unbind()),
            fused=True,
            grad_scale=factor.reciprocal(),
            found_inf=skip.float(),
            amsgrad=False,
            maximize=False,
            lr=settings.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
        )


_CODE_NAMES = {
    "exp_avg_codes": "first",
    "exp_avg_exponents": "first_exponents",
    "root_codes": "root",
    "root_exponents": "root_exponents",
    "master_low": "low",
}


class AdamW8bit:
    """AdamW with moments in 8 bits and, for bf16 weights, split masters or stochastic rounding (see `kernels`).

    Args:
        masters: `split` or `stochastic`.
    """

    def __init__(self, masters: Literal["split", "stochastic"]) -> None:
        self.masters: Literal["split", "stochastic"] = masters

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """See `UpdateRule`."""
        codes = MomentCodes.zeros(weight, self.masters)
        return {name: getattr(codes, field) for name, field in _CODE_NAMES.items()}

    def update(self, updates: Sequence[Update], factor: Tensor, skip: Tensor) -> None:
        """See `UpdateRule`; one launch for each combination of dtypes."""
        weights, gradients, states, settings = zip(*updates, strict=True)
        codes = [MomentCodes(**{field: state[name] for name, field in _CODE_NAMES.items()}) for state in states]
        adamw_8bit_step_(weights, gradients, codes, settings, factor.masked_fill(skip, torch.nan))


def update_rule(config: OptimizerConfig) -> UpdateRule:
    """The arithmetic that `config` names.

    Raises:
        TrainingError: if it is one of bitsandbytes, and that is not installed or has no use for this machine.
    """
    masters = config.resolved_masters
    if config.optimizer == "adamw":
        return AdamW(masters)
    if config.optimizer == "adamw_8bit":
        return AdamW8bit("stochastic" if masters == "stochastic" else "split")
    from .bitsandbytes_adamw import BitsandbytesAdamW

    return BitsandbytesAdamW(masters, bits=8 if "8bit" in config.optimizer else 32, paged="paged" in config.optimizer)


def state_alignment(config: OptimizerConfig) -> int:
    """Entries of a parameter whose number has to divide where a part of it begins."""
    if config.optimizer == "adamw_8bit":
        return BLOCK
    return 4 if config.resolved_masters == "stochastic" else 1  # random numbers are drawn by the four


def state_bytes(states: Iterable[Mapping[str, Tensor]]) -> dict[str, int]:
    """Bytes of the states of some parameters by kind: `masters` and `moments`."""
    kinds = {"masters": 0, "moments": 0}
    for name, tensor in (item for state in states for item in state.items()):
        kinds["masters" if name.startswith("master") else "moments"] += tensor.nbytes
    return kinds
