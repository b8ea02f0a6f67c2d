"""Between two log lines the host never waits for the device: shown without a GPU, on tensors that have no contents.

What a GPU would be started with is captured, and every operation is looked at: one whose result depends on contents
(`item`, `nonzero`, indexing by a mask), or that copies between host and device from memory that is not pinned, would
stop the host until the device has come so far.
"""

import contextlib
import importlib
import traceback

import msgspec
import pytest
import torch
from tiny import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.losses import next_token_loss
from redwhale.engine.memory_plan import _batch, _empty_model
from redwhale.engine.plans import plan_stages
from redwhale.engine.stages import BlockSchedule, LoRAConfig
from redwhale.engine.train_step import TrainStep
from redwhale.kernels import kernel_backend
from redwhale.kernels.launch import launches_sent_to

aten = torch.ops.aten
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.allclose),
    *(aten._unique, aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.bincount),
}


class NoWaiting(TorchDispatchMode):
    """Lists what the host would wait for; `meta` stands for the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def note(self, func):
        ours = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        self.found.append(f"{func} by {ours[-3].filename}:{ours[-3].lineno}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        # A number that Python made is part of a kernel's arguments.
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or not func.is_view}
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        counts = func.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is None
        on_gpu = "meta" in devices
        indices = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        masks = any(index is not None and index.dtype == torch.bool for index in indices)
        if (func.overloadpacket in WAITING or counts or masks) and on_gpu:
            self.note(func)
        if (
            func.overloadpacket is aten._to_copy
            and target is not None
            and devices
            and {target, *devices} == {"cpu", "meta"}
        ):
            self.note(func)
        if func.overloadpacket is aten.copy_ and args[0].device != args[1].device:
            self.note(func)
        return func(*args, **kwargs)


class Forgotten:
    def append(self, launch):
        pass


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """The tables of the 8-bit optimizer go through pinned memory on a GPU."""
    module = importlib.import_module("redwhale.kernels.adamw_8bit")
    monkeypatch.setattr(module, "_sent", lambda tensor, device: torch.empty_like(tensor, device=device))


def waits(stage: Stage, steps: int = 3, sequences: int = 2, micro_batches: int = 2, **loop) -> list[str]:
    """What the host would wait for in some steps, the first left out: kernels are compiled in it."""
    made = LoopConfig(batch_size=sequences * micro_batches, micro_batch_size=sequences, **loop)
    mode = NoWaiting()
    with kernel_backend("auto"), launches_sent_to(Forgotten()):
        model = _empty_model(TINY, torch.bfloat16, "meta")
        step = TrainStep(model, stage, made, steps=10, loss=next_token_loss, first_new_row=90)
        for number in range(steps):
            batches = [_batch(sequences, 64, "meta") for _ in range(micro_batches)]
            with mode if number else contextlib.nullcontext():
                step.take(number, batches, 2 * sequences * 64)
    return mode.found


BLOCKS = BlockSchedule(layers=1, steps=1)
STAGES = {
    **{f"{plan} {s.name}": s for plan in ("redwhale", "eeve", "full") for s in plan_stages(plan, 10**6)},
    "blocks": Stage(name="blocks", train=("embed", "layers"), tokens=1, lr=1e-3, blocks=BLOCKS),
    "dropout": Stage(name="dropout", train=("lora",), tokens=1, lr=1e-3, lora=LoRAConfig(r=4, dropout=0.1)),
    "in backward": Stage(name="early", train=("all",), tokens=1, lr=1e-3, in_backward=True),
}


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw_8bit"}, {"frozen": "fp8"}], ids=["adamw", "8bit", "fp8"])
@pytest.mark.parametrize("name", STAGES)
def test_steps_never_wait_for_the_device(name, options):
    assert waits(msgspec.structs.replace(STAGES[name], **options)) == []


@pytest.mark.parametrize("activations", ["none", "full"])
def test_no_policy_waits_for_the_device(activations):
    assert waits(STAGES["redwhale odd-layers"], activations=activations) == []


def test_one_micro_batch_with_clipping_in_backward_does_not_wait():
    assert waits(STAGES["in backward"], micro_batches=1) == []


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.add_(torch.ones(3).to(x.device)),
        lambda x: x.to("cpu"),
    ],
)
def test_the_detector_sees_what_waits(bad):
    mode = NoWaiting()
    with mode:
        x = torch.empty(3, device="meta")
        with contextlib.suppress(RuntimeError, NotImplementedError):  # there is nothing to copy or to count
            bad(x)
    assert len(mode.found) == 1, mode.found
