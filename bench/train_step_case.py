"""One case of train_step.py, in a process of its own: trains a few steps and prints what it measured as JSON."""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import _cpu_seconds, peak_memory_mb
from torch import Tensor, nn

from redwhale.engine.batches import IGNORE_INDEX, Batch, BatchLoader, TokenSequence

BETAS, EPS, LEARNING_RATE, CLIP = (0.9, 0.95), 1e-8, 1e-4, 1.0
RANK = 64
STAGES: Mapping[str, tuple[str, ...]] = {
    "embed+head": ("embed", "head"),
    "half": ("layers.odd",),
    "lora": ("lora",),
    "full": ("all",),
}
"""What trains, as our trainer's selectors."""
MOST_STEPS = 1000
_OTHERS_SHARE = 0.1


class ZipfSequences:
    """Sequences of tokens as unevenly frequent as words: the same in every process.

    Args:
        vocab_size: of the tokens.
        sequence_length: tokens of a sequence.
        count: of sequences.
        document_tokens: mean length of the documents that share a sequence, drawn log-normally as those of corpora
            are; 0 for one document a sequence.
    """

    def __init__(self, vocab_size: int, sequence_length: int, count: int, document_tokens: int) -> None:
        self._vocab_size, self._length, self._count = vocab_size, sequence_length, count
        self._document_tokens = document_tokens

    def __len__(self) -> int:
        return self._count

    def sequence(self, index: int) -> TokenSequence:
        rng = np.random.default_rng(index)
        ids = rng.zipf(1.2, self._length) % self._vocab_size
        ends = np.array([self._length])
        if self._document_tokens:
            spread = 0.8  # the mean of exp(N(μ, s²)) is exp(μ + s²/2)
            drawn = rng.lognormal(np.log(self._document_tokens) - spread**2 / 2, spread, self._length)
            ends = np.unique(np.minimum(np.cumsum(np.maximum(2, drawn.astype(np.int64))), self._length))
        targets = np.append(ids[1:], IGNORE_INDEX)
        targets[ends - 1] = IGNORE_INDEX
        return TokenSequence(ids, targets, np.diff(ends, prepend=0).tolist())


class StepClock:
    """Times steps, and goes on until enough of them were undisturbed by other processes.

    The first two do not count: they bring in what later ones find in place, such as optimizer states.
    """

    def __init__(self, wanted: int, patience: float) -> None:
        self._wanted, self._gives_up = wanted, time.monotonic() + patience
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.cpu_seconds: list[float] = []
        self.others_shares: list[float] = []
        self.disturbed = 0
        self._mark()

    def _mark(self) -> None:
        self._began, self._cpu = time.perf_counter(), _cpu_seconds()

    def step_ended(self, loss: float) -> bool:
        """Takes a step's mean loss, which the device was waited for; returns whether this was the last step."""
        seconds, (busy, own) = time.perf_counter() - self._began, _cpu_seconds()
        self.losses.append(loss)
        if len(self.losses) > 2:
            cores = torch.get_num_threads()
            others = max(0.0, (busy - self._cpu[0]) - (own - self._cpu[1])) / (seconds * cores)
            patient = time.monotonic() < self._gives_up
            if others <= _OTHERS_SHARE or not patient:
                self.seconds.append(seconds)
                self.cpu_seconds.append(own - self._cpu[1])
                self.others_shares.append(others)
            else:
                self.disturbed += 1
        self._mark()
        return len(self.seconds) >= self._wanted


class _EnoughError(Exception):
    """Ends our trainer."""


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024 / 1e6


def memory_mb(device: str) -> float:
    """What the process, or its tensors on the GPU, take now."""
    return torch.cuda.memory_allocated() / 1e6 if device == "cuda" else resident_mb()


def run_redwhale(options: argparse.Namespace, data: ZipfSequences, clock: Callable[[], StepClock]) -> dict[str, Any]:
    """Our trainer: masters with every bit of fp32 ones, fp32 moments, and gradients that add up in fp32."""
    from redwhale.engine import LoopConfig, Stage, Trainer
    from redwhale.engine.stages import LoRAConfig
    from redwhale.model import load_model

    model = load_model(options.checkpoint, device=options.device, dtype=torch.bfloat16)
    loaded = memory_mb(options.device)
    stage = Stage(
        name="measured",
        train=STAGES[options.stage],
        tokens=MOST_STEPS * options.micro_batch * options.accumulation * options.sequence_length,
        lr=LEARNING_RATE,
        schedule="constant",
        warmup=0.0,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        grad_clip=CLIP,
        optimizer=options.optimizer,
        masters="split",
        lora=LoRAConfig(r=RANK, alpha=float(RANK)),
    )
    loop = LoopConfig(
        batch_size=options.micro_batch * options.accumulation,
        micro_batch_size=options.micro_batch,
        activations=options.activations,
        compile=options.compile,
        log_every=1,
        checkpoint_every=2 * MOST_STEPS,
    )
    with tempfile.TemporaryDirectory() as folder:
        steps: list[StepClock] = []

        def on_log(line: Mapping[str, Any]) -> None:
            if steps[0].step_ended(line["loss"]):
                raise _EnoughError

        shape = {"sequence_length": options.sequence_length, "folder": Path(folder)}
        trainer = Trainer(model, stage, data, loop=loop, on_log=on_log, **shape)
        trained = sum(parameter.numel() for parameter in trainer.train_step.trained.values())
        steps.append(clock())
        with contextlib.suppress(_EnoughError):
            trainer.run()
    return {"loaded_mb": loaded, "trained_parameters": trained, "clock": steps[0]}


class MasterAdamW:
    """PyTorch's fused AdamW on fp32 copies of bf16 parameters, as careful users write it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [parameter.detach().float() for parameter in parameters]
        options = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True, **options)

    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)


class AutocastAdamW:
    """PyTorch's fused AdamW on fp32 parameters, of a forward pass under autocast: what `bf16=True` is to a Trainer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        for parameter in parameters:
            parameter.data = parameter.data.float()
        options = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True, **options)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.adamw.step()
        self.adamw.zero_grad()


def _trains(name: str, stage: str) -> bool:
    if stage == "embed+head":
        return "embed_tokens" in name or "lm_head" in name
    if stage == "half":
        parts = name.split(".")
        return "layers" in parts and int(parts[parts.index("layers") + 1]) % 2 == 1
    return "lora_" in name if stage == "lora" else True


def run_transformers(
    options: argparse.Namespace, data: ZipfSequences, clock: Callable[[], StepClock]
) -> dict[str, Any]:
    """transformers with its own loss and SDPA attention, adapters of peft, and AdamW of the same precision as ours."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(options.device).train()  # type: ignore[arg-type]
    model.config.use_cache = False
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    loaded = memory_mb(options.device)
    trained_model: Any = model
    if options.stage == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
        trained_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in trained_model.named_parameters():
        parameter.requires_grad_(_trains(name, options.stage))
    if options.compile:
        trained_model = torch.compile(trained_model)
    parameters = [parameter for parameter in trained_model.parameters() if parameter.requires_grad]
    autocast = options.peer == "transformers-autocast"
    optimizer = (AutocastAdamW if autocast else MasterAdamW)(parameters)
    batch_size = options.micro_batch * options.accumulation
    loader = BatchLoader(
        data, batch_size=batch_size, micro_batch_size=options.micro_batch, seed=0, device=options.device
    )

    causal = torch.ones(
        options.sequence_length, options.sequence_length, dtype=torch.bool, device=options.device
    ).tril()

    def inputs_of(batch: Batch) -> dict[str, Tensor]:
        """What keeps packed documents apart in transformers: positions from 0, and a mask where there are several."""
        ids, positions = (x.view(-1, options.sequence_length) for x in (batch.input_ids, batch.documents.position_ids))
        begins = positions == 0
        # Its loss shifts the labels itself: the first token of a document is not to be predicted.
        inputs = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(begins, IGNORE_INDEX)}
        if options.document_tokens:
            document = begins.cumsum(1)
            inputs["attention_mask"] = (causal & (document[:, :, None] == document[:, None, :]))[:, None]
        return inputs

    def loss_of(batch: Batch, num_targets: int) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=autocast):
            # It divides the summed loss by num_items_in_batch.
            return trained_model(**inputs_of(batch), num_items_in_batch=num_targets, use_cache=False).loss

    steps, step = clock(), 0
    while True:
        micro_batches = loader.micro_batches(step)
        num_targets = sum(batch.num_targets for batch in micro_batches)
        total = torch.zeros((), device=options.device)
        for batch in micro_batches:
            loss = loss_of(batch, num_targets)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        step += 1
        if steps.step_ended(float(total)):
            break
    return {"loaded_mb": loaded, "trained_parameters": sum(p.numel() for p in parameters), "clock": steps}


def main() -> None:
    """Runs the case that the only argument describes in JSON."""
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    data = ZipfSequences(options.vocab_size, options.sequence_length, 4096, options.document_tokens)
    run = run_redwhale if options.peer == "redwhale" else run_transformers
    result = run(options, data, lambda: StepClock(options.steps, options.patience))
    clock: StepClock = result.pop("clock")
    tokens = options.micro_batch * options.accumulation * options.sequence_length
    peak = torch.cuda.max_memory_allocated() / 1e6 if options.device == "cuda" else peak_memory_mb()
    seconds = statistics.median(clock.seconds)
    measured = {
        "tokens_per_second": round(tokens / seconds, 1),
        "step_seconds": [round(value, 4) for value in clock.seconds],
        "cpu_seconds": [round(value, 3) for value in clock.cpu_seconds],
        "peak_mb": None if peak is None else round(peak, 1),
        "loaded_mb": round(result["loaded_mb"], 1),
        "trained_parameters": result["trained_parameters"],
        "losses": [round(loss, 5) for loss in clock.losses],
        "disturbed_steps": clock.disturbed,
        "others_cpu_share": round(statistics.mean(clock.others_shares), 3),
    }
    print(json.dumps(measured))
