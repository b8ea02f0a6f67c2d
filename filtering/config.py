"""The settings of a filter run, as a recipe's [filter] section holds them."""

import msgspec

from .errors import CorpusError
from .language_model import METHODS
from .measure import MeasureOptions
from .personal_data import DEFAULT_KINDS
from .rules import Threshold
from .storage import is_url

ENGINES = ("local", "ray")


class DuplicateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts as a repetition across documents; raises CorpusError for a value out of range."""

    jaccard: float = 0.8  # near-duplicates share this much of their characters' 8-grams; 1 turns their search off
    line_documents: int = 50  # a line in more documents than this is boilerplate, and stays in about so many; 0 is off
    block_documents: int = 4  # so is one in this many where its neighbours are too

    def __post_init__(self) -> None:
        if not 0.5 <= self.jaccard <= 1:
            raise CorpusError(f"duplicates.jaccard must be from 0.5 to 1 (off), not {self.jaccard}")
        if self.line_documents < 0:
            raise CorpusError(f"duplicates.line_documents must be 0 (off) or more, not {self.line_documents}")
        if self.line_documents and not 2 <= self.block_documents <= self.line_documents:
            raise CorpusError(
                f"duplicates.block_documents must be from 2 to line_documents = {self.line_documents}, "
                f"not {self.block_documents}"
            )


class PerplexityConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cuts documents that are unlike clean text, at both ends; raises CorpusError for a value out of range."""

    train: tuple[str, ...]  # files, folders and globs of clean Korean text
    method: str = "ngram"  # "ngram": perplexity of characters; "prior": mean and deviation of their log-frequencies
    low: float = 0.01  # share of the documents that pass the rules to drop at the low end, the most predictable
    high: float = 0.02  # and at the high end, the least predictable

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CorpusError(f"perplexity.method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name, share in (("low", self.low), ("high", self.high)):
            if not 0 <= share < 0.5:
                raise CorpusError(f"perplexity.{name} must be at least 0 and below 0.5, not {share}")


class FilterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to filter and how; raises CorpusError for a value out of range and for an unknown rule."""

    inputs: list[str]  # files, folders and globs, see docs/filtering.md for their formats
    engine: str = "local"  # "local": processes of this machine; "ray": Ray Data, on as many as its cluster has
    exchange: str | None = None  # address on an object store for machines of a Ray cluster that share no file system
    workers: int = 0  # processes that filter; 0 takes every core; the result is the same for any number
    memory_gb: float = 4.0  # of the joins over the whole corpus; what does not fit goes to the disk
    shard_mb: int = 16  # input that a worker takes at a time, and that a crash costs; the result is the same for any
    validation_fraction: float = 0.01  # share of the kept documents that is held out, chosen by their content
    html: bool = False  # the texts of JSON lines, parquet and text files are HTML too
    mask: tuple[str, ...] = DEFAULT_KINDS  # kinds of personal data that placeholders replace
    thresholds: dict[str, Threshold] = {}  # changes to the rules, by rule name
    duplicates: DuplicateConfig = DuplicateConfig()  # repetition across documents
    decontaminate: tuple[str, ...] = ()  # files and folders of benchmarks whose questions and answers must not be kept
    perplexity: PerplexityConfig | None = None  # unset: no cut by perplexity
    documents_per_file: int = 100_000  # documents in each parquet file
    examples_per_rule: int = 3  # dropped documents, and kept ones, that the summary shows for each rule
    output: str | None = None  # address on an object store where the recipe's step leaves a copy of the kept files

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise CorpusError(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.exchange is not None and not is_url(self.exchange):
            raise CorpusError(f"exchange must be an address such as s3://bucket/exchange, not {self.exchange!r}")
        if self.workers < 0:
            raise CorpusError(f"workers must be 0 (every core) or more, not {self.workers}")
        if self.memory_gb < 0.25:
            raise CorpusError(f"memory_gb must be at least 0.25, not {self.memory_gb}")
        if not 1 <= self.shard_mb <= 128:
            raise CorpusError(f"shard_mb must be from 1 to 128, not {self.shard_mb}")
        if not 0 <= self.validation_fraction < 1:
            raise CorpusError(f"validation_fraction must be at least 0 and below 1, not {self.validation_fraction}")
        if self.documents_per_file < 1:
            raise CorpusError(f"documents_per_file must be at least 1, not {self.documents_per_file}")
        if self.examples_per_rule < 0:
            raise CorpusError(f"examples_per_rule must be at least 0, not {self.examples_per_rule}")
        self.measure_options()

    def measure_options(self) -> MeasureOptions:
        """How every document is measured."""
        return MeasureOptions(thresholds=self.thresholds, mask=self.mask)
