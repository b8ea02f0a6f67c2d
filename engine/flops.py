"""FLOPs that a training step cannot do without, and the peaks of the devices that do them: what MFU is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import ModelConfig


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward passes over packed documents."""

    per_token: int
    """Of all linear maps."""
    per_pair: int
    """Of attention in all layers, for each pair of a query and a key that it sees."""

    def of(self, tokens: int, pairs: int) -> int:
        """FLOPs of `tokens` tokens whose documents have `pairs` pairs, as from `attention_pairs`."""
        return self.per_token * tokens + self.per_pair * pairs


def attention_pairs(lengths: Iterable[int], sliding_window: int | None = None) -> int:
    """Pairs of a query and a key that causal attention inside documents computes.

    Args:
        lengths: tokens of each document; a document of l tokens has l·(l + 1)/2 pairs.
        sliding_window: keys a query may see, itself included; None for all of its document.
    """
    pairs = 0
    for length in lengths:
        near = length if sliding_window is None else min(length, sliding_window)
        pairs += near * (near + 1) // 2 + (length - near) * near
    return pairs


def training_flops(config: ModelConfig, trained: Mapping[str, Tensor]) -> StepFlops:
    """FLOPs of a training step by what it trains, where a multiplication and an addition are two.

    These are model FLOPs, from which MFU follows (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): only what the
    mathematics asks for. What an engine computes twice to save memory is not counted (that would be hardware FLOPs,
    HFU), nor are norms, activations, biases, rotations and the softmax, which are no matrix products.

    - A linear map of O outputs and I inputs: 2·O·I forward; as many for the gradient of its input, if anything that
      trains comes before it; as many for the gradient of its weight, if it trains.
    - An adapter of rank r: 2·r·(I + O) forward; 2·r·(I + 2·O) for the gradients of A and B; 2·r·I more towards the
      input, if anything that trains comes before it.
    - Attention, for each pair and query head of D dimensions: 4·D forward and 8·D backward.
    - The LM head: of a range of rows that trains alone, its rows count for the gradient of the weight.

    Args:
        config: the model's shape.
        trained: parameters that get a gradient, under the names of the model's `named_parameters`; row ranges as
            "lm_head.weight[FIRST:]". Adapters are counted where they train.

    Returns:
        FLOPs for each token and for each attention pair.
    """
    hidden, middle, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    phi = config.model_type == "phi"
    projections = {"q_proj": (q_size, hidden), "k_proj": (kv_size, hidden), "v_proj": (kv_size, hidden)}
    attention_out = {"dense" if phi else "o_proj": (hidden, q_size)}
    wide: dict[str, tuple[int, int]] = dict.fromkeys(("fc1",) if phi else ("gate_proj", "up_proj"), (middle, hidden))
    narrow = {"fc2" if phi else "down_proj": (hidden, middle)}

    count = _LinearFlops(trained)
    per_pair = 0
    reached = any(name.startswith("model.embed_tokens.") for name in trained)  # whether backward has to come this far
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normalised = reached or count.any_trained(f"{prefix}input_layernorm.")
        attended = count.add(f"{prefix}self_attn.", projections, normalised)
        per_pair += 4 * q_size * (3 if attended else 1)
        attended = count.add(f"{prefix}self_attn.", attention_out, attended)
        if not phi:  # whose MLP reads what attention reads
            normalised = reached or attended or count.any_trained(f"{prefix}post_attention_layernorm.")
        activated = count.add(f"{prefix}mlp.", wide, normalised)
        reached = count.add(f"{prefix}mlp.", narrow, activated) or attended or reached
    reached = reached or count.any_trained("model.final_layernorm." if phi else "model.norm.")
    # The shared matrix of a tied head has the embedding's name.
    matrix = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    rows = sum(len(value) for name, value in trained.items() if name.partition("[")[0] == matrix)
    head_maps = 2 * config.vocab_size if reached else config.vocab_size
    count.flops += 2 * hidden * (head_maps + min(rows, config.vocab_size))  # without rows that only pad the matrix
    return StepFlops(count.flops, per_pair)


class _LinearFlops:
    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        self.trained = trained
        self.flops = 0

    def any_trained(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.trained)

    def add(self, prefix: str, shapes: Mapping[str, tuple[int, int]], input_trains: bool) -> bool:
        """Count linear maps [O, I] that share an input; returns whether backward has to reach their outputs."""
        for name, (outputs, inputs) in shapes.items():
            base = 2 * outputs * inputs
            self.flops += base * (1 + input_trains + (f"{prefix}{name}.weight" in self.trained))
            if (adapter := self.trained.get(f"{prefix}{name}.lora_A")) is not None:
                forward = 2 * len(adapter) * (inputs + outputs)
                self.flops += 2 * forward + 2 * len(adapter) * (outputs + inputs * input_trains)
        return input_trains or any(self.any_trained(f"{prefix}{name}.") for name in shapes)


_PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    "B200": (2250, 1125, 75),
    "GH200": (989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 417.5, 60),
    "H200": (989.4, 494.7, 66.9),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835.5, 417.5, 60),
    "H100|H800": (989.4, 494.7, 66.9),
    "H20": (148, 74, 44),
    "A100|A800": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10": (125, 62.5, 31.2),
    "L40S": (362.05, 183, 91.6),
    "L40": (181.05, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 6000 Ada": (364.2, 182.1, 91.1),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}
"""Dense TFLOP/s in bf16, TF32 and fp32 by a pattern of the device's name, the first that fits.

From NVIDIA's data sheet of each product, and for GeForce cards from the architecture papers of GA102, Ada and
Blackwell, which give bf16 with fp32 accumulation. Where a source gives a figure with sparsity alone, half of it.
"""


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Highest FLOP/s of dense matrix products by the data sheet, or None for a CPU or a GPU that is not in the table.

    Args:
        device: where training runs.
        dtype: bf16 or fp16 (the same peak); fp32 means TF32 where torch's matrix products may use it.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device), dtype)


def peak_flops_by_name(name: str, dtype: torch.dtype) -> float | None:
    """As `device_peak_flops`, by the name that the driver gives a GPU, such as "NVIDIA H100 80GB HBM3"."""
    half = dtype in (torch.bfloat16, torch.float16)
    column = 0 if half else 1 if torch.get_float32_matmul_precision() != "highest" else 2
    for pattern, peaks in _PEAK_TFLOPS.items():
        if re.search(rf"\b({pattern})\b", name):
            return peaks[column] * 1e12
    return None
