"""Operations of the model's hot path, one file each, usable without the rest of the engine.

Every function here is plain PyTorch with a hand-written backward that saves only what it needs.
The package imports torch and nothing else of the project.
"""

from .linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from .rms_norm import rms_norm
from .rope import apply_rope, rope_cos_sin
from .swiglu import swiglu

__all__ = [
    "LinearCrossEntropyOutput",
    "apply_rope",
    "linear_cross_entropy",
    "rms_norm",
    "rope_cos_sin",
    "swiglu",
]
