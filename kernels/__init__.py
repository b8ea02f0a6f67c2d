"""Operations of the model's hot path, one file each, usable without the rest of the engine.

Each has Triton kernels, a plain PyTorch reference beside them, and a hand-written backward that saves only what it
needs. Which of the two runs is a matter of `set_kernel_backend`, or of each call's `backend`. The package imports
torch, Triton where it is installed, and nothing else of the project.
"""

from .backend import Backend, kernel_backend, set_kernel_backend
from .embedding import Embedding, embedding
from .linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from .rms_norm import RMSNorm, add_rms_norm, rms_norm
from .rope import RotaryEmbedding, apply_rope, rope_cos_sin
from .row_range import row_range
from .swiglu import swiglu

__all__ = [
    "Backend",
    "Embedding",
    "LinearCrossEntropyOutput",
    "RMSNorm",
    "RotaryEmbedding",
    "add_rms_norm",
    "apply_rope",
    "embedding",
    "kernel_backend",
    "linear_cross_entropy",
    "rms_norm",
    "rope_cos_sin",
    "row_range",
    "set_kernel_backend",
    "swiglu",
]
