"""AdamW of bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861): moments in 8 bits by block, or in paged memory."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .errors import TrainingError
from .update_rules import BLOCK, Fp32Rule, MastersKind, Update

_LEAST_8BIT = 4096
"""Smaller parameters keep fp32 moments, as in bitsandbytes' own optimizers."""
_LEAST_PAGED = 100_000
"""Smaller moments stay in the GPU's memory, as in bitsandbytes' own optimizers."""


class BitsandbytesAdamW(Fp32Rule):
    """AdamW with the moments and kernels of bitsandbytes, on fp32 weights and gradients.

    Args:
        masters: what stands for a bf16 weight in fp32 between steps.
        bits: 8 or 32, of each moment.
        paged: keep moments in memory that the GPU's driver moves between GPU and host as needed.

    Raises:
        TrainingError: if bitsandbytes is not installed, or paged memory is asked for without a GPU.
    """

    def __init__(self, masters: MastersKind, *, bits: int, paged: bool) -> None:
        super().__init__(masters)
        self.bits, self.paged = bits, paged
        self._functional = _import_functional()
        if paged and not torch.cuda.is_available():
            raise TrainingError(
                "paged optimizers move memory between a GPU and the host, and there is no GPU here: choose "
                '"adamw", "adamw_8bit" or "bnb_adamw_8bit"'
            )
        self._code_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def new_moments(self, weight: Tensor) -> dict[str, Tensor]:
        """See `Fp32Rule`."""
        entries, device = weight.numel(), weight.device
        if self.bits == 32 or entries < _LEAST_8BIT:
            return {name: self._zeros(entries, torch.float32, device) for name in ("exp_avg", "exp_avg_sq")}
        blocks = -(-entries // BLOCK)
        return {
            "exp_avg_codes": self._zeros(entries, torch.uint8, device),
            "exp_avg_scales": torch.zeros(blocks, device=device),
            "exp_avg_sq_codes": self._zeros(entries, torch.uint8, device),
            "exp_avg_sq_scales": torch.zeros(blocks, device=device),
        }

    def update_fp32(self, update: Update, factor: Tensor, skip: Tensor) -> None:
        """See `Fp32Rule`."""
        # The kernels can neither skip nor read a factor from the device.
        touched = [update.weight, *update.state.values()]
        before = [tensor.clone() for tensor in touched]
        self._step(update._replace(gradient=(update.gradient * factor).masked_fill_(skip, 0.0)))
        for tensor, old in zip(touched, before, strict=True):
            tensor.copy_(torch.where(skip, old, tensor))

    def _step(self, update: Update) -> None:
        state, s = update.state, update.settings
        common: dict[str, Any] = {
            **{"g": update.gradient, "p": update.weight, "beta1": s.beta1, "beta2": s.beta2, "beta3": 0.0},
            **{"alpha": 0.0, "eps": s.eps, "step": s.step, "lr": s.lr, "weight_decay": s.weight_decay},
        }
        if "exp_avg" in state:
            self._functional.optimizer_update_32bit(
                "adam", state1=state["exp_avg"], state2=state["exp_avg_sq"], **common
            )
            return
        signed, unsigned = self._tables(update.weight.device)
        self._functional.optimizer_update_8bit_blockwise(
            "adam",
            state1=state["exp_avg_codes"],
            state2=state["exp_avg_sq_codes"],
            qmap1=signed,
            qmap2=unsigned,
            absmax1=state["exp_avg_scales"],
            absmax2=state["exp_avg_sq_scales"],
            **common,
        )

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the codes of the first moment and of the second stand for."""
        if device not in self._code_tables:
            create = self._functional.create_dynamic_map
            self._code_tables[device] = create(signed=True).to(device), create(signed=False).to(device)
        return self._code_tables[device]

    def _zeros(self, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.paged or entries < _LEAST_PAGED:
            return torch.zeros(entries, dtype=dtype, device=device)
        # The tensor keeps the memory alive.
        return torch.as_tensor(_ManagedMemory(entries, dtype, device), device=device).zero_()


class _ManagedMemory:
    """CUDA managed memory, which the driver moves between GPU and host; freed with the last tensor that uses it."""

    def __init__(self, entries: int, dtype: torch.dtype, device: torch.device) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._address = ctypes.c_uint64(0)
        size, attach_global = ctypes.c_size_t(entries * dtype.itemsize), ctypes.c_uint(1)
        torch.cuda.synchronize(device)  # makes the device's context the current one
        code = self._driver.cuMemAllocManaged(ctypes.byref(self._address), size, attach_global)
        if code != 0:
            raise TrainingError(
                f"CUDA error {code} on asking for {size.value:,} bytes of paged memory: free memory of the host, or "
                "choose an optimizer that is not paged"
            )
        self.__cuda_array_interface__ = {
            "shape": (entries,),
            "typestr": "<f4" if dtype == torch.float32 else "|u1",
            "data": (self._address.value, False),
            "strides": None,
            "version": 2,
        }

    def __del__(self) -> None:
        if self._address.value:
            self._driver.cuMemFree_v2(self._address)


def _import_functional() -> ModuleType:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise TrainingError('this optimizer needs bitsandbytes: pip install "redwhale[gpu]"') from None
