"""Tokens a second and peak memory of training steps, ours and those of transformers with peft, stage by stage.

Everyone loads the same checkpoint in bf16 and trains on the same global batches, with AdamW on fp32 masters and fp32
moments, clipping, and gradient accumulation. Sequences are packed with documents that do not see each other, as in
pretraining, or hold one document each (`--document-tokens 0`). Each case runs in a process of its own. Peak memory is
all that the process ever held, libraries included, or on a GPU the most that its tensors took. The losses of the first
step must agree to one percent, else nothing is written.

- redwhale: our trainer, with split masters: the same bits as fp32 copies, in 2 bytes beside each weight.
- transformers-masters: LlamaForCausalLM in bf16 with SDPA attention and its own loss, adapters of peft, and fused AdamW
  on fp32 copies of the weights. Documents are kept apart by positions and a block-diagonal mask.
- transformers-autocast: the same with fp32 weights where they train, under autocast.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import parser, write_result
from train_step_case import STAGES

from redwhale.model import ModelConfig, create_checkpoint, parameter_count

PEERS = ("redwhale", "transformers-masters", "transformers-autocast")
_SAME_LOSS = 1e-2
_PASSED_ON = ("device", "steps", "patience", "activations", "optimizer", "compile", "checkpointing", "document_tokens")
"""Options of the command line that every case is given."""


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
    )


PRESETS = {
    # SOLAR's proportions and RedWhale's vocabulary; sequence length, micro-batch and accumulation behind.
    "cpu": (_shape(512, 1792, 8, 8, 2, 49_152), 1024, 2, 2),
    "solar-8-layers": (_shape(4096, 14_336, 8, 32, 8, 49_152), 4096, 2, 4),
    "solar": (_shape(4096, 14_336, 48, 32, 8, 49_152), 4096, 2, 8),
    "smallest": (_shape(64, 224, 2, 4, 2, 512), 32, 2, 2),
}


def measure(options: argparse.Namespace, checkpoint: Path, stage: str, peer: str) -> dict[str, Any]:
    """Run one case; exits if it fails for another reason than missing memory."""
    config, sequence_length, micro_batch, accumulation = PRESETS[options.preset]
    case = {
        "peer": peer,
        "stage": stage,
        "checkpoint": str(checkpoint),
        "vocab_size": config.vocab_size,
        "sequence_length": sequence_length,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        **{name: getattr(options, name) for name in _PASSED_ON},
    }
    command = [sys.executable, "-c", "import train_step_case; train_step_case.main()", json.dumps(case)]
    finished = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if finished.returncode and "OutOfMemoryError" in finished.stderr:
        return {"peer": peer, "out_of_memory": True}
    if finished.returncode:
        raise SystemExit(f"{peer}, {stage}:\n{finished.stderr}")
    return {"peer": peer, **json.loads(finished.stdout.splitlines()[-1])}


def check_losses(stage: str, cases: list[dict[str, Any]]) -> None:
    """Exit if the first step's losses say that the cases do not compute the same."""
    first = {case["peer"]: case["losses"][0] for case in cases if "losses" in case}
    reference = next(iter(first.values()), 0.0)
    if any(abs(loss - reference) > _SAME_LOSS * abs(reference) for loss in first.values()):
        raise SystemExit(f"{stage}: the first losses differ by more than {_SAME_LOSS:.0%}: {first}")


def compared(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Our speed over the fastest peer's, and our peak memory over that of the peer that needs least."""
    ours = cases[0]
    others = [case for case in cases[1:] if "tokens_per_second" in case]
    if "tokens_per_second" not in ours or not others:
        return {}
    speed = ours["tokens_per_second"] / max(case["tokens_per_second"] for case in others)
    memory = ours["peak_mb"] / min(case["peak_mb"] for case in others)
    # Losses of the first steps, before the roundings of bf16 have added up.
    apart = [abs(a - b) / b for case in others for a, b in zip(ours["losses"][:3], case["losses"], strict=False)]
    return {
        "speed_over_fastest_peer": round(speed, 3),
        "peak_over_smallest_peer": round(memory, 3),
        "losses_apart": float(f"{max(apart):.2g}"),
    }


def main() -> None:
    arguments = parser(__doc__, "train_step-cpu")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments.add_argument("--preset", choices=PRESETS, help="shape (default: cpu, or solar-8-layers on a GPU)")
    arguments.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    arguments.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="the first is compared")
    arguments.add_argument("--steps", type=int, default=5, help="undisturbed steps of each (default: %(default)s)")
    arguments.add_argument("--patience", type=float, default=60, help="seconds a case waits for them, at most")
    arguments.add_argument(
        "--document-tokens", type=int, default=300, help="mean length of documents; 0 for one a sequence"
    )
    arguments.add_argument("--activations", default="recompute-cheap", help="our policy (default: %(default)s)")
    arguments.add_argument("--optimizer", default="adamw", help="ours (default: %(default)s, as precise as theirs)")
    arguments.add_argument("--compile", action="store_true", help="torch.compile, for all")
    arguments.add_argument("--checkpointing", action="store_true", help="transformers' gradient checkpointing")
    options = arguments.parse_args()
    options.preset = options.preset or ("cpu" if options.device == "cpu" else "solar-8-layers")
    config, sequence_length, micro_batch, accumulation = PRESETS[options.preset]
    stages = []
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        create_checkpoint(config, checkpoint, dtype=torch.bfloat16)
        for stage in options.stages:
            cases = [measure(options, checkpoint, stage, peer) for peer in options.peers]
            check_losses(stage, cases)
            stages.append({"stage": stage, **compared(cases), "cases": cases})
            for case in cases:
                shown = (
                    "out of memory" if "out_of_memory" in case else "{tokens_per_second:9.1f} tokens/s".format(**case)
                )
                peak = "" if "out_of_memory" in case else f" {case['peak_mb']:9.0f} MB ({case['loaded_mb']:.0f} loaded)"
                print(f"{stage:11} {case['peer']:22} {shown}{peak}", flush=True)
            print(f"{stage:11} {compared(cases)}", flush=True)
    results = {
        "preset": options.preset,
        "parameters": parameter_count(config),
        "tokens_a_step": sequence_length * micro_batch * accumulation,
        "sequence_length": sequence_length,
        "micro_batch": micro_batch,
        "document_tokens": options.document_tokens,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "stages": stages,
    }
    write_result(options.result, __file__, results)


if __name__ == "__main__":
    main()
