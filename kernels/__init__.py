"""Operations of the model's hot path, one file each, usable without the rest of the engine.

Each has Triton kernels, a plain PyTorch reference beside them, and a hand-written backward that saves only what it
needs. Which of the two runs is a matter of `set_kernel_backend`, or of each call's `backend`. The package imports
torch, Triton where it is installed, and nothing else of the project.
"""

from .adamw_8bit_optimizer import AdamW8bit
from .backend import Backend, kernel_backend, set_kernel_backend
from .dropout import dropout_seed, seeded_dropout
from .embedding import Embedding, embedding
from .fp8_linear import Fp8Rows, fp8_input_gradient, fp8_linear, quantise_rows
from .linear_cross_entropy import LinearCrossEntropy, LinearCrossEntropyOutput, linear_cross_entropy
from .lora_linear import LoRALinear, LoRAWeights, lora_linear, lora_linears
from .lora_mlp import lora_mlp
from .rms_norm import RMSNorm, add_rms_norm, rms_norm
from .rope import RotaryEmbedding, apply_rope, rope_cos_sin
from .row_range import row_range
from .swiglu import SwiGLU, swiglu

__all__ = [
    "AdamW8bit",
    "Backend",
    "Embedding",
    "Fp8Rows",
    "LinearCrossEntropy",
    "LinearCrossEntropyOutput",
    "LoRALinear",
    "LoRAWeights",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "add_rms_norm",
    "apply_rope",
    "dropout_seed",
    "embedding",
    "fp8_input_gradient",
    "fp8_linear",
    "kernel_backend",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "quantise_rows",
    "rms_norm",
    "rope_cos_sin",
    "row_range",
    "seeded_dropout",
    "set_kernel_backend",
    "swiglu",
]
