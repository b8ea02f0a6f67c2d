"""Raw Korean text in, a clean, deduplicated and explained corpus out.

`filter_corpus` reads JSON lines, parquet and text files, normalises every document, scores it by every rule of
`RULES`, drops what fails a rule or repeats an earlier text, and writes parquet files with a summary that says what each
rule removed, alone and together with others. Nothing here needs torch; parquet needs pyarrow and .zst needs zstandard
(`pip install "redwhale[filtering]"`).
"""

from .config import DuplicateConfig, FilterConfig, PerplexityConfig
from .decontaminate import Match, benchmark_files
from .documents import BrokenRecord, Document, find_inputs, read_documents
from .errors import CorpusError
from .explain import Explanation, Verdict, explain_document, explain_file
from .measure import Measured, MeasureOptions, measure_document, measure_documents
from .normalize import content_id, normalize_text, repair_mojibake
from .pipeline import filter_corpus
from .prepare import PreparedDocument, prepare, prepare_batch
from .rules import RULES, Rule, Threshold, passes, resolve_thresholds
from .storage import InputFile, RemoteFile
from .summary import Example, FilterSummary, RuleSummary, SourceSummary

__all__ = [
    "RULES",
    "BrokenRecord",
    "CorpusError",
    "Document",
    "DuplicateConfig",
    "Example",
    "Explanation",
    "FilterConfig",
    "FilterSummary",
    "InputFile",
    "Match",
    "MeasureOptions",
    "Measured",
    "PerplexityConfig",
    "PreparedDocument",
    "RemoteFile",
    "Rule",
    "RuleSummary",
    "SourceSummary",
    "Threshold",
    "Verdict",
    "benchmark_files",
    "content_id",
    "explain_document",
    "explain_file",
    "filter_corpus",
    "find_inputs",
    "measure_document",
    "measure_documents",
    "normalize_text",
    "passes",
    "prepare",
    "prepare_batch",
    "read_documents",
    "repair_mojibake",
    "resolve_thresholds",
]
