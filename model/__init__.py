"""The Llama/Mistral model: definition, checkpoints, LoRA, vocabulary extension and generation.

from redwhale.model import load_model, PackedDocuments

model = load_model("checkpoint", dtype=torch.bfloat16)
logits = model(input_ids, PackedDocuments.from_lengths([len(input_ids)]))
"""

from .attention import KeyValueCache, PackedDocuments, packed_attention
from .attention_backends import set_attention_backend
from .checkpoint import CheckpointReader, load_model, save_model, write_checkpoint
from .config import ModelConfig, read_config
from .embedding_init import extend_checkpoint, new_rows
from .errors import CheckpointError
from .generation import generate, sample
from .llama import Llama
from .lora import LINEAR_LAYERS, LoRALinear, add_lora, merge_lora

__all__ = [
    "LINEAR_LAYERS",
    "CheckpointError",
    "CheckpointReader",
    "KeyValueCache",
    "Llama",
    "LoRALinear",
    "ModelConfig",
    "PackedDocuments",
    "add_lora",
    "extend_checkpoint",
    "generate",
    "load_model",
    "merge_lora",
    "new_rows",
    "packed_attention",
    "read_config",
    "sample",
    "save_model",
    "set_attention_backend",
    "write_checkpoint",
]
