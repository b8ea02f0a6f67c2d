"""What the steps of a run share: the recipe, the run folder, and where each step's output lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...filtering import InputFile, find_inputs, read_documents
from ...model import Llama, load_model, read_config
from ...tokenizer import Tokenizer, find_vocabulary, load_model_proto, open_vocabulary
from ..device import resolve_device, resolve_precision
from ..errors import CheckpointError, RecipeError
from ..evaluation import TextEncoder
from ..loop_config import RESULT_NEUTRAL, LoopConfig
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import RunFolder, StepResult
from ..world import ALONE, World

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Unit:
    """One folder's worth of work: a step, or one stage of `train`."""

    step: str
    """The command that runs it."""
    name: str
    """Its folder below the run's."""
    config: Any
    """JSON value; together with the inputs it decides whether finished work is still current."""
    inputs: Callable[[], Mapping[str, str]]
    """Hashes of what it reads."""
    run: Callable[[Path], StepResult]
    """Does the work in the given folder, going on from what an interrupted run left there."""
    check: Callable[[], object] = lambda: None
    """Raises for input from outside the run that cannot be used; called for all units before any of them works."""
    shared: bool = False
    """Whether all processes of a run do this together; else the first one does it, and the others wait."""


@dataclass(frozen=True)
class Context:
    """A recipe bound to its run folder and a device."""

    recipe: Recipe
    run: RunFolder
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE
    """The processes of the run."""

    @classmethod
    def create(cls, recipe: Recipe, world: World = ALONE) -> Context:
        """Resolve device and precision; raises RecipeError for a device or a tokenizer that cannot be used."""
        tokenizer = recipe.base.tokenizer
        if recipe.tokenizer is None and tokenizer is not None and Path(tokenizer).name != "tokenizer.model":
            raise RecipeError(
                f"base.tokenizer = {tokenizer!r} must be a file named tokenizer.model where the recipe has no "
                "[tokenizer] section: it is copied beside every checkpoint"
            )
        device = world.start(resolve_device(recipe.device))
        return cls(recipe, RunFolder(recipe.run_dir), device, resolve_precision(recipe.precision, device), world)

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    # Where things are. A step that the recipe does not have is passed through.

    @property
    def base_model(self) -> Path:
        checkpoint = self.recipe.base.checkpoint
        return Path(checkpoint) if checkpoint is not None else self.run.path / "base" / "model"

    @property
    def base_tokenizer(self) -> Path:
        """The base's SentencePiece model, or byte-level tokenizer.json."""
        tokenizer = self.recipe.base.tokenizer
        return Path(tokenizer) if tokenizer is not None else find_vocabulary(self.base_model)

    @property
    def tokenizer_folder(self) -> Path:
        return self.run.path / "tokenizer" if self.recipe.tokenizer is not None else self.base_tokenizer.parent

    @property
    def initial_model(self) -> Path:
        """What continued pretraining starts from."""
        return self.run.path / "init" / "model" if self.recipe.init is not None else self.base_model

    def stage_name(self, index: int) -> str:
        """Folder of stage `index`, such as train/1-embed+head."""
        assert self.recipe.train is not None
        return f"train/{index + 1}-{self.recipe.train.all_stages[index].name}"

    @property
    def trained_model(self) -> Path:
        if self.recipe.train is None:
            return self.initial_model
        return self.run.path / self.stage_name(len(self.recipe.train.all_stages) - 1) / "model"

    @property
    def final_model(self) -> Path:
        return self.run.path / "sft" / "model" if self.recipe.sft is not None else self.trained_model

    # What the steps do with them.

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_folder / "tokenizer.model")

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, to lie beside every checkpoint."""
        return [path for name in _TOKENIZER_FILES if (path := self.tokenizer_folder / name).exists()]

    def load(self, folder: Path, tokenizer: TextEncoder, dtype: torch.dtype | None = None) -> Llama:
        """A checkpoint on the run's device, in its precision or another; it must have a row for every piece."""
        check_rows(folder, tokenizer)
        return load_model(folder, device=self.device, dtype=dtype or self.dtype)

    def load_shared(self, folder: Path, tokenizer: TextEncoder, dtype: torch.dtype | None = None) -> Llama:
        """The same, in host memory where several processes are going to share it: it need not fit a device."""
        check_rows(folder, tokenizer)
        device = self.device if self.world.size == 1 else "cpu"
        return load_model(folder, device=device, dtype=dtype or self.dtype)

    def corpus_files(self, split: str) -> list[Path]:
        """The filtered corpus, in order; `split` is "train" or "validation"."""
        manifest = self.run.step("filter").require()
        return [self.run.path / "filter" / name for name in manifest["outputs"] if name.startswith(f"{split}-")]

    def heldout_texts(self, limit: int) -> dict[str, list[str]]:
        """At most `limit` held-out documents by domain; "korean" is the corpus' own validation split, if it has one."""
        files: dict[str, Sequence[InputFile]] = {}
        if self.recipe.filter is not None and (validation := self.corpus_files("validation")):
            files["korean"] = validation
        files.update({domain: find_inputs(paths) for domain, paths in self.recipe.heldout.items()})
        return {domain: list(first_texts(paths, limit)) for domain, paths in files.items()}

    def outputs_digest(self, step: str) -> str:
        """Hash of what a finished step wrote.

        Raises:
            RunError: if it is not finished.
            RecipeError: if it is not, and the recipe has no section that would make it.
        """
        self.check_source(step)
        return self.run.step(step).require()["outputs_digest"]

    def check_source(self, step: str) -> None:
        """Raise for a step that is not finished and that the recipe has no section for."""
        folder, section = self.run.step(step), step.partition("/")[0]
        if getattr(self.recipe, section) is None and folder.manifest() is None:
            raise RecipeError(f"{folder.path} does not exist, and the recipe has no [{section}] section to make it")

    def check_init(self) -> None:
        """Raise where new pieces get no rows, so that nothing can be done with the model."""
        if self.recipe.tokenizer is not None and self.recipe.init is None:
            raise RecipeError("[tokenizer] adds pieces that the model has no rows for: add an [init] section")

    def file_hashes(self, files: Iterable[InputFile]) -> dict[str, str]:
        """Hashes of files outside the run, by path."""
        files = list(files)
        return dict(zip(map(str, files), self.run.file_hashes(files), strict=True))

    def base_hashes(self) -> dict[str, str]:
        """Hash of the base model and its tokenizer, wherever they come from."""
        if self.recipe.base.checkpoint is None:
            return {"base": self.outputs_digest("base")}
        return self.checkpoint_hashes(self.base_model, self.base_tokenizer)

    def checkpoint_hashes(self, folder: Path, tokenizer: Path) -> dict[str, str]:
        """Hashes of a checkpoint from outside the run."""
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
        return self.file_hashes([*files, tokenizer])

    def tokenizer_hashes(self) -> dict[str, str]:
        if self.recipe.tokenizer is not None:
            return {"tokenizer": self.outputs_digest("tokenizer")}
        return self.file_hashes([self.base_tokenizer])

    def initial_hashes(self) -> dict[str, str]:
        return {"init": self.outputs_digest("init")} if self.recipe.init is not None else self.base_hashes()

    def trained_hashes(self) -> dict[str, str]:
        if self.recipe.train is None:
            return self.initial_hashes()
        name = self.stage_name(len(self.recipe.train.all_stages) - 1)
        return {name: self.outputs_digest(name)}

    def final_hashes(self) -> dict[str, str]:
        return {"sft": self.outputs_digest("sft")} if self.recipe.sft is not None else self.trained_hashes()

    def check_base(self, *, byte_level: bool = False) -> None:
        """Raise for a base checkpoint or tokenizer that is not there; `byte_level` says that such a one will do."""
        if self.recipe.base.checkpoint is not None:
            read_config(self.base_model)
        if self.recipe.base.checkpoint is not None or self.recipe.base.tokenizer is not None:
            (open_vocabulary if byte_level else load_model_proto)(self.base_tokenizer)

    def check_heldout(self) -> None:
        """Raise for held-out files that are not there, and for a domain without a document."""
        for domain, paths in self.recipe.heldout.items():
            if not list(first_texts(find_inputs(paths), 1)):
                raise RecipeError(f"heldout.{domain} holds no document ({', '.join(paths)}); leave it out")

    def heldout_hashes(self) -> dict[str, str]:
        """Hashes of the held-out files, by domain, place in the domain and path."""
        files = {
            f"heldout.{domain}[{place}] {path}": path
            for domain, paths in self.recipe.heldout.items()
            for place, path in enumerate(find_inputs(paths))
        }
        return dict(zip(files, self.run.file_hashes(files.values()), strict=True))


def check_rows(checkpoint: Path, tokenizer: TextEncoder) -> None:
    """Raise CheckpointError for a checkpoint with fewer rows than the tokenizer has pieces."""
    rows = read_config(checkpoint).vocab_size
    if rows < tokenizer.vocab_size:
        raise CheckpointError(
            f"{checkpoint} has {rows} rows but the tokenizer {tokenizer.vocab_size} pieces: "
            "run the init step, or use the checkpoint's own tokenizer"
        )


def first_texts(paths: Iterable[InputFile], limit: int | None = None) -> Iterator[str]:
    """Texts of the documents in files, in order, at most `limit`."""
    count = 0
    for path in paths:
        for document in read_documents(path):
            if limit is not None and count >= limit:
                return
            count += 1
            yield document.text


def texts_with_progress(label: str, paths: Iterable[InputFile]) -> Iterator[str]:
    """Texts of all documents in files, showing how far the files are read."""
    paths = list(paths)
    with Progress(label, sum(path.stat().st_size for path in paths), "B") as progress:
        for path in paths:
            yield from first_texts([path])
            progress.update(path.stat().st_size)


def config_of(section: Any, **more: Any) -> dict[str, Any]:
    """A section as JSON values, without the keys that only change speed or logging."""
    raw = msgspec.to_builtins(section)
    neutral = set(RESULT_NEUTRAL)
    if isinstance(section, LoopConfig) and not (section.patience or section.keep_best):
        neutral.add("validate_every")
    return {**{key: value for key, value in raw.items() if key not in neutral}, **more}


def model_outputs(folder: Path) -> list[str]:
    """Files of the checkpoint `folder/model`, relative to `folder`."""
    return sorted(str(path.relative_to(folder)) for path in (folder / "model").iterdir())
