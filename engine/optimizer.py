"""AdamW with fp32 master weights for models whose weights are bf16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .stages import Stage


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) on fp32 copies of the parameters.

    A bf16 weight has 8 bits of mantissa, so most updates would round away; the master keeps them. For
    fp32 parameters the master is the parameter itself. Gradients of micro-batches add up in fp32.

    Args:
        parameters: what trains, by name.
        stage: betas, weight decay and gradient clipping.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], stage: Stage) -> None:
        self.parameters = dict(parameters)
        self.grad_clip = stage.grad_clip
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        matrices = [master for master in self.masters.values() if master.dim() > 1]
        vectors = [master for master in self.masters.values() if master.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": stage.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(stage.beta1, stage.beta2),
            eps=1e-8,
            fused=True,
        )

    def accumulate(self) -> None:
        """Move the gradients of one backward pass into the fp32 gradients of the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update the masters, round them into the parameters, drop the gradients.

        Returns:
            The global gradient norm before clipping, a scalar on the device (reading it waits for the device).
        """
        masters = list(self.masters.values())
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.grad_clip, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._round_masters()
        return norm

    def _round_masters(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name; with the step number, all that a bit-exact resume needs."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave, and the parameters with it."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in tensors:  # absent before the first step
                    state[key] = tensors[f"{key}.{name}"].to(master.device, copy=True)
            if state:
                self._adamw.state[master] = state
        self._round_masters()
