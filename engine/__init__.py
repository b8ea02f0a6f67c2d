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
    from .checkpoints import CheckpointStore
    from .evaluation import LossResult, ValidationSet, evaluate_loss, evaluate_text
    from .loop_config import LoopConfig
    from .losses import LossFunction, next_token_loss
    from .mixture import MixedSequences
    from .optimizer import StageOptimizer
    from .optimizer_config import OptimizerConfig
    from .packing import pack_texts
    from .pipeline import run_recipe
    from .plans import PLANS, plan_stages
    from .prefetch import prefetched
    from .recipe import Recipe, load_recipe
    from .selectors import select_parameters
    from .shards import ShardManifest, TokenShards, write_shard
    from .spike_guard import SpikeGuard
    from .stages import BlockSchedule, LoRAConfig, Stage
    from .trainer import StageResult, Trainer
    from .world import World, join

# Imported when first asked for: the command line's help and the filter's worker processes pass through this
# package, and should not wait for torch.
_MODULE_OF = {
    "Batch": "batches",
    "BatchLoader": "batches",
    "BlockSchedule": "stages",
    "CheckpointStore": "checkpoints",
    "ExampleSequences": "batches",
    "IGNORE_INDEX": "batches",
    "LoRAConfig": "stages",
    "LoopConfig": "loop_config",
    "LossFunction": "losses",
    "LossResult": "evaluation",
    "MixedSequences": "mixture",
    "OptimizerConfig": "optimizer_config",
    "PLANS": "plans",
    "PackedSequences": "batches",
    "Recipe": "recipe",
    "SequenceSource": "batches",
    "ShardManifest": "shards",
    "SpikeGuard": "spike_guard",
    "Stage": "stages",
    "StageOptimizer": "optimizer",
    "StageResult": "trainer",
    "TokenSequence": "batches",
    "TokenShards": "shards",
    "Trainer": "trainer",
    "ValidationSet": "evaluation",
    "World": "world",
    "evaluate_loss": "evaluation",
    "evaluate_text": "evaluation",
    "join": "world",
    "load_recipe": "recipe",
    "next_token_loss": "losses",
    "pack_texts": "packing",
    "plan_stages": "plans",
    "prefetched": "prefetch",
    "run_recipe": "pipeline",
    "select_parameters": "selectors",
    "write_shard": "shards",
}

__all__ = [
    "IGNORE_INDEX",
    "PLANS",
    "Batch",
    "BatchLoader",
    "BlockSchedule",
    "CheckpointStore",
    "ExampleSequences",
    "LoRAConfig",
    "LoopConfig",
    "LossFunction",
    "LossResult",
    "MixedSequences",
    "OptimizerConfig",
    "PackedSequences",
    "Recipe",
    "SequenceSource",
    "ShardManifest",
    "SpikeGuard",
    "Stage",
    "StageOptimizer",
    "StageResult",
    "TokenSequence",
    "TokenShards",
    "Trainer",
    "ValidationSet",
    "World",
    "evaluate_loss",
    "evaluate_text",
    "join",
    "load_recipe",
    "next_token_loss",
    "pack_texts",
    "plan_stages",
    "prefetched",
    "run_recipe",
    "select_parameters",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
