"""The training engine: recipes, token shards, staged training, evaluation, and the command line.

The parts work without a recipe:

    from redwhale.engine import PackedSequences, Stage, TokenShards, Trainer
    from redwhale.model import load_model

    shards = TokenShards.open("runs/quickstart/pack", "train")
    stage = Stage(name="embed+head", train=("embed", "head"), tokens=1_000_000, lr=2e-4)
    Trainer(load_model("checkpoint"), stage, PackedSequences(shards, 2048), sequence_length=2048, folder="out").run()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import (
        IGNORE_INDEX,
        Batch,
        BatchLoader,
        ExampleSequences,
        PackedSequences,
        SequenceSource,
        TokenSequence,
    )
    from .evaluation import LossResult, evaluate_loss, evaluate_text
    from .packing import pack_texts
    from .pipeline import run_recipe
    from .recipe import Recipe, load_recipe
    from .shards import ShardManifest, TokenShards, write_shard
    from .stages import LoRAConfig, Stage, learning_rate, select_parameters
    from .trainer import LoopConfig, StageResult, Trainer

# Imported when first asked for: the command line's help and the filter's worker processes pass through this
# package, and should not wait for torch.
_MODULE_OF = {
    "Batch": "batches",
    "BatchLoader": "batches",
    "ExampleSequences": "batches",
    "IGNORE_INDEX": "batches",
    "LoRAConfig": "stages",
    "LoopConfig": "trainer",
    "LossResult": "evaluation",
    "PackedSequences": "batches",
    "Recipe": "recipe",
    "SequenceSource": "batches",
    "ShardManifest": "shards",
    "Stage": "stages",
    "StageResult": "trainer",
    "TokenSequence": "batches",
    "TokenShards": "shards",
    "Trainer": "trainer",
    "evaluate_loss": "evaluation",
    "evaluate_text": "evaluation",
    "learning_rate": "stages",
    "load_recipe": "recipe",
    "pack_texts": "packing",
    "run_recipe": "pipeline",
    "select_parameters": "stages",
    "write_shard": "shards",
}

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchLoader",
    "ExampleSequences",
    "LoRAConfig",
    "LoopConfig",
    "LossResult",
    "PackedSequences",
    "Recipe",
    "SequenceSource",
    "ShardManifest",
    "Stage",
    "StageResult",
    "TokenSequence",
    "TokenShards",
    "Trainer",
    "evaluate_loss",
    "evaluate_text",
    "learning_rate",
    "load_recipe",
    "pack_texts",
    "run_recipe",
    "select_parameters",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
