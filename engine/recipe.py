"""Recipes: one TOML file that describes a whole adaptation, validated key by key.

Relative paths in a recipe are relative to the folder the command runs in.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ..filtering import FilterConfig
from ..model.embedding_init import Matching
from ..model.init_methods import InitMethod
from ..tokenizer import TokenizerConfig
from .errors import RecipeError
from .eval_config import EvalConfig
from .init_choice import Choice
from .loop_config import LoopConfig
from .optimizer_config import AboveZero, NotNegative, OptimizerName
from .packing import Engine
from .plans import plan_stages
from .schedules import Schedule
from .selectors import check_selectors
from .stages import Fraction, LoRAConfig, Positive, Precision, Stage

CORPUS = "corpus"
"""Name of the filtered corpus in a mix."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class PretrainConfig(LoopConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A small base model trained from scratch, where no pretrained checkpoint is at hand."""

    corpus: tuple[str, ...]
    """Files or folders of base-language text."""
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    sequence_length: Positive = 256
    max_position_embeddings: Positive = 2048
    rope_theta: float = 10_000.0
    tokens: Positive
    """Token budget."""
    lr: AboveZero = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of twice num_attention_heads = {heads}"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} must divide num_attention_heads = {heads}"
            )


class BaseConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model to adapt: a checkpoint folder, or one to pretrain."""

    checkpoint: str | None = None
    """Hugging Face checkpoint folder of the Llama/Mistral family."""
    tokenizer: str | None = None
    """Its SentencePiece model; by default `tokenizer.model` in the checkpoint folder."""
    pretrain: PretrainConfig | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.pretrain is None):
            raise ValueError("base needs either a checkpoint or a [base.pretrain] section, and not both")
        if self.pretrain is not None and self.tokenizer is None:
            raise ValueError("base.pretrain needs base.tokenizer, the SentencePiece model to train with")


class InitConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the rows of new vocabulary entries begin."""

    embedding: InitMethod = "decomposition"
    head: str = "decomposition"
    """A method; "+prior" behind it shifts the rows to their tokens' frequencies in the corpus."""
    compare: tuple[str, ...] = ("random",)
    """Choices measured beside the chosen one: "EMBEDDING/HEAD", or one method for both."""
    match: Matching = "none"
    """Norms of new rows: as they come, or those of the base's rows."""
    byte_only: InitMethod | None = None
    """Another method for pieces whose base tokens are all bytes of characters."""
    break_collisions: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    """Noise for rows that coincide with others, in standard deviations of the base's entries."""
    second_checkpoint: str | None = None
    """A checkpoint with its tokenizer that knows the new language, for "focus" and "omp"; by default they use token
    vectors from the corpus."""
    base_text: tuple[str, ...] = ()
    """Files of base-language text whose probabilities a prior should leave alone."""
    fit_documents: Positive = 1_000
    """Documents of the training split that "focus", "omp", "distillation" and a prior look at."""
    fit_steps: Positive = 100
    """Steps of "distillation"."""
    heldout_documents: Positive = 200
    """Documents of the validation split to measure on."""
    provenance: bool = True
    """Write provenance.parquet: for each new row its base rows, weights and norm."""

    def __post_init__(self) -> None:
        for name in (str(self.choice), *self.compare):
            Choice.parse(name)
        if self.byte_only == "distillation":
            raise ValueError('byte_only = "distillation" is not possible: it fits all input rows together')

    @property
    def choice(self) -> Choice:
        """The methods of the run's own rows."""
        return Choice.parse(f"{self.embedding}/{self.head}")


class PackConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the filtered corpus, and others beside it, become token shards."""

    engine: Engine = "local"
    """Processes of this machine, or Ray Data on as many machines as its cluster has."""
    workers: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Processes that tokenise; 0 for one a core."""
    extra: dict[str, tuple[str, ...]] = {}
    """Other corpora by name, for mixes: files, folders and globs as for `filter.inputs`, packed unfiltered."""
    output: str | None = None
    """Address on an object store, such as s3://bucket/shards, that gets a copy of the shards, the manifest last."""

    def __post_init__(self) -> None:
        for name, paths in self.extra.items():
            if not re.fullmatch(r"[a-z0-9_-]+", name):
                raise ValueError(f"extra corpus {name!r} must be named with a-z, 0-9, _ and - alone")
            if name in ("train", "validation", CORPUS) or name.startswith("heldout"):
                raise ValueError(f"extra corpus {name!r} has a name that shards of the run's own have: choose another")
            if not paths:
                raise ValueError(f"extra corpus {name!r} names no files")


class TrainConfig(LoopConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continued pretraining in stages."""

    sequence_length: Positive = 4096
    plan: str | None = None
    """One of `redwhale.engine.plans.PLANS`, in place of stages."""
    tokens: Positive | None = None
    """Token budget of the whole plan."""
    lr_scale: AboveZero = 1.0
    """Multiplies the learning rates of the plan."""
    stages: tuple[Stage, ...] = ()
    mix: dict[str, AboveZero] = msgspec.field(default_factory=dict)
    """Weights of the corpora in tokens, "corpus" being the filtered one; empty for that alone."""
    verify: bool = False
    """Compare the checksums of all shards before training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.plan is None) != (self.tokens is None) or (self.plan is None) == (not self.stages):
            raise ValueError("give either stages, or a plan with its tokens")
        if self.plan is not None:
            plan_stages(self.plan, 1)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages share a name: {', '.join(names)}")

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages, or those of the plan."""
        if self.plan is None or self.tokens is None:
            return self.stages
        return plan_stages(self.plan, self.tokens, lr_scale=self.lr_scale)


class SFTLoRAConfig(LoRAConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters of fine-tuning, with RedWhale's rank and alpha."""

    r: Positive = 64
    alpha: AboveZero = 16.0


class SFTConfig(LoopConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Supervised fine-tuning on instruction data; the defaults are RedWhale's."""

    data: tuple[str, ...]
    """jsonl, JSON or parquet files with rows in the shape of messages, ShareGPT or Alpaca."""
    heldout: tuple[str, ...] = ()
    """The same kind of files, for the loss before and after."""
    template: str = "redwhale"
    """"redwhale" (also EEVE's), "chatml", "llama-2", or a file with a chat template in Jinja."""
    train: tuple[str, ...] = ("lora",)
    lora: SFTLoRAConfig = SFTLoRAConfig()
    lr: AboveZero = 2e-4
    optimizer: OptimizerName = "adamw"
    schedule: Schedule = "cosine"
    warmup: Fraction = 0.05
    weight_decay: NotNegative = 0.0
    epochs: Positive = 1
    """Times the data is seen, in even batches: less than one sequence a step is seen once more."""
    sequence_length: Positive = 1024
    batch_size: Positive = 128
    """Most sequences in a global batch, each holding as many whole examples as fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_selectors(self.train)


class ExportConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The folder that is handed over."""

    precision: Literal["bf16", "fp32", "stored"] = "stored"
    """Dtype of the weights; "stored" keeps that of training."""
    verify: bool = True
    """Compare logits with transformers after writing, where it is installed."""
    adapter: bool = False
    """Also hand over the last step's adapters alone, for peft."""
    gguf: str | None = None
    """llama.cpp's `convert_hf_to_gguf.py`; it writes `model.gguf` beside the folder."""
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "auto"] = "auto"
    """Type of the GGUF's weights, in the converter's words."""
    license: str | None = None
    """Of the exported model, as Hugging Face spells it (`apache-2.0`); the card says so."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole adaptation; a step without a section is not part of it."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run folder."""
    runs: str = "runs"
    """Folder of all run folders."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"."""
    precision: Precision = "auto"
    """Of the model's weights and forward pass; "auto" is bf16 where the processor multiplies it natively."""
    heldout: dict[str, tuple[str, ...]] = {}
    """Held-out text by domain, for token ratio and bits per byte, beside the corpus' own validation split."""
    base: BaseConfig
    filter: FilterConfig | None = None
    tokenizer: TokenizerConfig | None = None
    init: InitConfig | None = None
    pack: PackConfig | None = None
    train: TrainConfig | None = None
    sft: SFTConfig | None = None
    eval: EvalConfig | None = None
    export: ExportConfig | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a TOML file.
        overrides: `section.key=value` strings that replace or add values, such as
            `train.stages[0].lr=1e-4`; the value is TOML, or else taken as a string.

    Raises:
        RecipeError: naming the file and the path of the first bad key.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, a recipe is a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    raw.setdefault("name", Path(path).stem)
    if any(override.startswith("train.stages[") for override in overrides):
        _spell_out_plan(raw)
    for override in overrides:
        apply_override(raw, override)
    try:
        return msgspec.convert(raw, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{path}: {_explain(str(error), raw)}") from None


def _spell_out_plan(raw: dict[str, Any]) -> None:
    """Put the stages of a raw recipe's plan in its place, so that one of them can be changed."""
    train = raw.get("train", {})
    if isinstance(train, dict) and isinstance(train.get("tokens"), int) and "plan" in train and "stages" not in train:
        stages = plan_stages(train.pop("plan"), train.pop("tokens"), lr_scale=train.pop("lr_scale", 1.0))
        train["stages"] = msgspec.to_builtins(stages)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a raw recipe, in place.

    Raises:
        RecipeError: if the override has no `=`, or an index or a section that does not exist.
    """
    key, separator, text = override.partition("=")
    parts = _path_parts(key)
    if not separator or not parts:
        raise RecipeError(f"{override!r} is not an override; write it as section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node: Any = raw
    for depth, part in enumerate(parts):
        where = "".join(_shown(p) for p in parts[:depth]).lstrip(".") or "the recipe"
        _require_container(node, part, f"override {override!r}: {where}")
        if depth < len(parts) - 1:
            node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[parts[-1]] = value


def _require_container(node: Any, part: str | int, where: str) -> None:
    """Raise RecipeError unless `node[part]` can be set."""
    if isinstance(part, str) and not isinstance(node, dict):
        raise RecipeError(f"{where} is not a section")
    if isinstance(part, int) and not (isinstance(node, list) and part < len(node)):
        size = len(node) if isinstance(node, list) else 0
        raise RecipeError(f"{where} has {size} entries, there is no [{part}]")


def _path_parts(key: str) -> list[str | int]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\[\d+\])*(\.[A-Za-z0-9_-]+(\[\d+\])*)*", key):
        return []
    return [int(i) if i else name for name, i in re.findall(r"([A-Za-z0-9_-]+)|\[(\d+)\]", key)] if key else []


def _shown(part: str | int) -> str:
    return f"[{part}]" if isinstance(part, int) else f".{part}"


def _explain(message: str, raw: dict[str, Any]) -> str:
    """msgspec's message, led by the key it is about and followed by the value that was given."""
    text, _, location = message.partition(" - at `$")
    key = location.rstrip("`").lstrip(".")
    text = text.replace("`", "")
    if not key:
        return text
    node: Any = raw
    for part in _path_parts(key):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return f"{key}: {text}"
    given = "" if isinstance(node, dict | list) else f" ({node!r})"
    return f"{key}: {text}{given}"
