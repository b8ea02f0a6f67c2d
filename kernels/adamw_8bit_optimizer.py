"""AdamW with 8-bit moments as a PyTorch optimizer: groups, states, resuming. The step itself is in adamw_8bit.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from .adamw_8bit import AdamWSettings, Masters, MomentCodes, adamw_8bit_step_, check_param
from .backend import Backend
from .bf16_masters import fp32_masters

_STATE_NAMES = dict(
    zip(
        MomentCodes._fields,
        ("exp_avg_codes", "exp_avg_exponents", "root_codes", "root_exponents", "master_low"),
        strict=True,
    )
)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits and, for bf16 parameters, exact fp32 masters in 16 further bits.

    Groups may differ in every option but `backend`. States appear with a parameter's first gradient, and steps without
    one leave it as it is. A parameter's position in the groups is its number: keep their order on resuming. A step
    must not be captured in a CUDA graph, whose replays would use the addresses of the first.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        masters: Masters = "split",
        seed: int = 0,
        backend: Backend | None = None,
    ) -> None:
        """Take `params` as every optimizer of `torch.optim` does.

        Args:
            params: contiguous tensors, bf16 or fp32, or groups of them.
            lr: step size, a number: a tensor's value would have to be waited for.
            betas: decay of the first moment and of the second.
            eps: added to sqrt(v).
            weight_decay: decoupled; multiplied by `lr`.
            masters: `split` keeps 16 more bits a bf16 weight, `stochastic` rounds the weights themselves. fp32
                parameters have no use for either.
            seed: of the dither, from 0 to 2^63 − 1. Kept in the groups, and with them in `state_dict`.
            backend: see `Backend`; None for the global choice at each step.

        Raises:
            TypeError: for parameters that are neither bf16 nor fp32.
            ValueError: for options out of range, and for parameters that are not contiguous.
        """
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "masters": masters, "seed": seed}
        super().__init__(params, options)
        self.backend: Backend | None = backend

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("backend", None)  # copies and pickles hold groups and states alone

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim`; its parameters are numbered behind those before it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        beta1, beta2 = group["betas"]
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas {group['betas']} are not in [0, 1)")
        if min(group["lr"], group["eps"], group["weight_decay"]) < 0:
            raise ValueError(
                f"lr {group['lr']}, eps {group['eps']} or weight_decay {group['weight_decay']} is negative"
            )
        if group["masters"] not in get_args(Masters):
            raise ValueError(f"masters {group['masters']!r} is not one of {', '.join(get_args(Masters))}")
        if not 0 <= group["seed"] < 2**63:
            raise ValueError(f"seed {group['seed']} is not in [0, 2^63)")
        for param in group["params"]:
            check_param(param)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        gradients: Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and its gradients.
            grad_scale: one number on the device that gradients are multiplied by, such as for clipping; None for 1. If
                it is NaN, weights and moments stay as they are; the step counts all the same.
            gradients: to use instead of the parameters' `grad`, such as fp32 sums of the micro-batches of bf16
                parameters; parameters that are not in it stay as they are.

        Returns:
            What `closure` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, codes, settings = [], [], [], []
        for number, group, param in self._numbered():
            grad = param.grad if gradients is None else gradients.get(param)
            if grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = 0
                new = MomentCodes.zeros(param, group["masters"])
                state.update((name, getattr(new, field)) for field, name in _STATE_NAMES.items())
            state["step"] += 1
            params.append(param)
            grads.append(grad)
            codes.append(MomentCodes(*(state[name] for name in _STATE_NAMES.values())))
            settings.append(
                AdamWSettings(
                    *(group["lr"], group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"]),
                    *(state["step"], group["seed"], number),
                )
            )
        adamw_8bit_step_(params, grads, codes, settings, grad_scale, backend=self.backend)
        return loss

    def masters(self) -> dict[Tensor, Tensor]:
        """By parameter, in its shape: its exact fp32 master, or where there is none the weights themselves, as fp32."""
        nothing = torch.empty(0, dtype=torch.int16)
        return {
            param: fp32_masters(param.detach().view(-1), self.state[param].get("master_low", nothing)).view(param.shape)
            for _, _, param in self._numbered()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, bit for bit; its tensors are copied to the parameters' devices.

        Raises:
            ValueError: if the groups, the shapes of the states or the kind of masters do not fit the parameters.
        """
        # The base class would convert codes to the parameters' dtype; it gets the groups alone.
        super().load_state_dict({**state_dict, "state": {}})
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, (_, group, param) in zip(indices, self._numbered(), strict=True):
            if index not in state_dict["state"]:
                continue
            given = state_dict["state"][index]
            expected = MomentCodes.zeros(param.new_empty(param.shape, device="meta"), group["masters"])
            state: dict[str, Any] = {"step": int(given["step"])}
            for field, name in _STATE_NAMES.items():
                like: Tensor = getattr(expected, field)
                if name not in given or given[name].shape != like.shape or given[name].dtype != like.dtype:
                    found = f"{given[name].dtype} {tuple(given[name].shape)}" if name in given else "nothing"
                    raise ValueError(
                        f"state {name} of parameter {index} is {found}, not {like.dtype} {tuple(like.shape)}: it was "
                        "saved for another shape, dtype or kind of masters, or by another optimizer"
                    )
                state[name] = given[name].to(param.device, copy=True)
            self.state[param] = state

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """(number, group, parameter) of every parameter."""
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        return ((number, group, param) for number, (group, param) in enumerate(pairs))
