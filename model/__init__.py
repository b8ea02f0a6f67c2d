"""The Llama/Mistral model: definition, checkpoints, LoRA, vocabulary extension and generation.

from redwhale.model import load_model, PackedDocuments

model = load_model("checkpoint", dtype=torch.bfloat16)
logits = model(input_ids, PackedDocuments.from_lengths([len(input_ids)]))
"""

from .attention import PackedDocuments, packed_attention
from .attention_backends import set_attention_backend
from .checkpoint import CheckpointReader, load_model, save_model, write_checkpoint
from .config import ModelConfig, read_config
from .depth_upscaling import source_layers, upscale_checkpoint
from .embedding_init import NewRows, RowFinish, extend_checkpoint, make_rows, new_rows, write_extended
from .errors import CheckpointError, GenerationError
from .fp8_base import Fp8Base
from .generation import generate, generate_batch
from .init_methods import NewVocabulary, fill_rows
from .kv_cache import KeyValueCache
from .llama import Llama
from .lora import ADAPTABLE_LAYERS, LINEAR_LAYERS, LoRALinear, add_lora, merge_lora
from .new_checkpoint import create_checkpoint, parameter_count, parameter_shapes
from .peft_format import load_adapter, save_adapter
from .presets import PRESETS, preset, tiny, with_vocab_size
from .rope_layout import RoPELayout, to_half, to_interleaved
from .sampling import check_settings, penalize_repetition, sample

__all__ = [
    "ADAPTABLE_LAYERS",
    "LINEAR_LAYERS",
    "PRESETS",
    "CheckpointError",
    "CheckpointReader",
    "Fp8Base",
    "GenerationError",
    "KeyValueCache",
    "Llama",
    "LoRALinear",
    "ModelConfig",
    "NewRows",
    "NewVocabulary",
    "PackedDocuments",
    "RoPELayout",
    "RowFinish",
    "add_lora",
    "check_settings",
    "create_checkpoint",
    "extend_checkpoint",
    "fill_rows",
    "generate",
    "generate_batch",
    "load_adapter",
    "load_model",
    "make_rows",
    "merge_lora",
    "new_rows",
    "packed_attention",
    "parameter_count",
    "parameter_shapes",
    "penalize_repetition",
    "preset",
    "read_config",
    "sample",
    "save_adapter",
    "save_model",
    "set_attention_backend",
    "source_layers",
    "tiny",
    "to_half",
    "to_interleaved",
    "upscale_checkpoint",
    "with_vocab_size",
    "write_checkpoint",
    "write_extended",
]
