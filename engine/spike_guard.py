"""Which steps to skip: those whose loss or gradient norm is not finite, or far beyond the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_STD_FLOOR = 0.01
"""Least standard deviation, as a share of the mean: a loss that hardly changes must not make every ripple a spike."""


@dataclass(frozen=True, kw_only=True)
class SpikeReport:
    """What a `SpikeGuard` has seen, on the host."""

    skipped: int
    """Steps skipped in all."""
    consecutive: int
    """Steps skipped since the last one that was not."""
    first_step: int | None
    """First of those, counted from 0; None where there are none."""
    loss: float
    """Of the last step that was skipped; 0 where there is none, like `norm`."""
    norm: float
    loss_limit: float
    """What the next loss may not exceed, +∞ where there is no limit, like `norm_limit`."""
    norm_limit: float

    def sentence(self, stage: str, *, lr: float, begin: Mapping[str, int], end: Mapping[str, int]) -> str:
        """What to tell a user whose training skips one step after the other.

        Args:
            stage: its name.
            lr: its peak learning rate.
            begin: sequences of each corpus that were used before step `first_step`.
            end: the same after the last step.
        """
        assert self.first_step is not None, "no step was skipped"
        first, last = self.first_step + 1, self.first_step + self.consecutive
        places = ", ".join(f"{name} {begin[name]:,} to {end[name] - 1:,}" for name in end if end[name] > begin[name])
        return (
            f"stage {stage!r} skipped its last {self.consecutive} steps, {first} to {last}: at step {last} the loss is "
            f"{self.loss:.4g} (limit {self.loss_limit:.4g}) and the gradient norm {self.norm:.4g} (limit "
            f"{self.norm_limit:.4g}); lower the learning rate (lr = {lr:g}) or look at these sequences, in training "
            f"order: {places}"
        )


class SpikeGuard:
    """Finds steps to skip from the losses and gradient norms of the last steps that were not skipped.

    A step is skipped if its loss or its norm is not finite, or exceeds mean + sigma · standard deviation of the last
    `window` accepted values, the deviation taken as at least 1% of the mean. Skipping what harmed PaLM's training is
    that report's remedy (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1). Everything stays on the device: only
    `report` waits for it.

    Args:
        sigma: distance of the limit in standard deviations; 0 sets none, so that only values that are not finite skip.
        device: of the losses and norms.
        window: accepted steps that the limit is computed from.
        warmup: accepted steps before there is a limit.

    Example:
        skip = guard.check_loss(loss) | guard.check_norm(norm)
        optimizer.finish_step(skip)
        guard.record(step, loss, norm, skip)
    """

    def __init__(
        self,
        sigma: float = 6.0,
        *,
        device: torch.device | str = "cpu",
        window: int = 128,
        warmup: int = 32,
    ) -> None:
        if sigma < 0 or not 2 <= warmup <= window:
            raise ValueError(f"{sigma=}, {warmup=}, {window=}: needed are sigma >= 0 and 2 <= warmup <= window")
        self.sigma, self.window, self.warmup = sigma, window, warmup
        self._slots = torch.arange(window, device=device)
        # Row 0 losses, row 1 norms: a ring, of which the slot `accepted % window` is the next.
        self._values = torch.zeros(2, window, dtype=torch.float64, device=device)
        self._accepted, self._skipped, self._consecutive, self._first_step = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)
        )
        self._last_skipped = torch.zeros(2, dtype=torch.float64, device=device)
        self.limits = self._limits_of_window()
        """[2] fp64 on the device: what a loss and what a gradient norm may not exceed; +∞ where there is no limit."""

    def check_loss(self, loss: Tensor) -> Tensor:
        """Whether a step with this loss, a scalar on the device, is to be skipped: bool scalar on the device."""
        return self._exceeds(loss, self.limits[0])

    def check_norm(self, norm: Tensor) -> Tensor:
        """Whether a step with this gradient norm, a scalar on the device, is to be skipped: bool on the device."""
        return self._exceeds(norm, self.limits[1])

    @torch.no_grad()
    def record(self, step: int, loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Take note of a step.

        Args:
            step: its number from 0, for the report.
            loss: scalar on the device, like `norm`.
            norm: before clipping.
            skipped: bool scalar on the device. What is skipped plays no part in later limits.
        """
        skipped = skipped.bool()
        values = torch.stack((loss.detach().double(), norm.detach().double()))
        taken = (self._slots == self._accepted % self.window) & ~skipped
        self._values = torch.where(taken, values[:, None], self._values)
        self._last_skipped = torch.where(skipped, values, self._last_skipped)
        self._first_step = torch.where(skipped & (self._consecutive == 0), step, self._first_step)
        self._consecutive = torch.where(skipped, self._consecutive + 1, 0)
        self._skipped = self._skipped + skipped
        self._accepted = self._accepted + ~skipped
        self.limits = self._limits_of_window()

    def report(self) -> SpikeReport:
        """The state on the host; waits for the device once."""
        counts = torch.stack((self._skipped, self._consecutive, self._first_step)).double()
        values = torch.cat((counts, self._last_skipped, self.limits)).tolist()
        skipped, consecutive, first_step = (int(value) for value in values[:3])
        loss, norm, loss_limit, norm_limit = values[3:]
        return SpikeReport(
            skipped=skipped,
            consecutive=consecutive,
            first_step=first_step if consecutive else None,
            loss=loss,
            norm=norm,
            loss_limit=loss_limit,
            norm_limit=norm_limit,
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs to decide as an unbroken one would."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave.

        Raises:
            ValueError: if it was made with another window.
        """
        if tensors["values"].shape != self._values.shape:
            raise ValueError(f"the saved window has {tensors['values'].shape[1]} steps, not {self.window}")
        for name in _STATE:
            setattr(self, f"_{name}", tensors[name].to(self._values.device, copy=True))
        self.limits = self._limits_of_window()

    @torch.no_grad()
    def _limits_of_window(self) -> Tensor:
        """[2] fp64: of losses and of norms; +∞ where there is no limit."""
        filled = self._slots < self._accepted
        count = self._accepted.clamp(min=2, max=self.window)
        mean = torch.where(filled, self._values, 0.0).sum(1) / count
        deviations = torch.where(filled, self._values - mean[:, None], 0.0)
        std = (deviations.square().sum(1) / (count - 1)).sqrt()
        limits = mean + self.sigma * torch.maximum(std, _STD_FLOOR * mean.abs())
        limited = self._accepted >= (self.warmup if self.sigma else torch.inf)
        return torch.where(limited, limits, torch.inf)

    @staticmethod
    def _exceeds(value: Tensor, limit: Tensor) -> Tensor:
        value = value.detach().double()
        return ~value.isfinite() | (value > limit)


_STATE = ("values", "accepted", "skipped", "consecutive", "first_step", "last_skipped")
