"""Hybrid tokenizers: Korean pieces appended to an English BPE tokenizer, with proofs that they are right."""

from .byte_level import ByteLevelBPE, decompose_tokens
from .encoder import Encoder, open_encoder
from .errors import TokenizerError
from .export import export_hf_tokenizer
from .hybrid import TokenizerConfig, TokenizerSummary, build_hybrid_tokenizer
from .merge import merge_pieces, merge_reachable, unreachable_pieces
from .proofs import CheckReport, check_tokenizer
from .report import Comparison, DomainTokens, compare, token_ratio
from .selection import choose_pieces, script_pieces
from .spm import ModelProto, Tokenizer, decompose_pieces, load_model_proto
from .stream import StreamDecoder
from .train import train_korean_bpe, train_pieces
from .vocabulary import Vocabulary, find_vocabulary, open_vocabulary
from .words import count_words, mix_words, sample_documents

__all__ = [
    "ByteLevelBPE",
    "CheckReport",
    "Comparison",
    "DomainTokens",
    "Encoder",
    "ModelProto",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerError",
    "TokenizerSummary",
    "Vocabulary",
    "build_hybrid_tokenizer",
    "check_tokenizer",
    "choose_pieces",
    "compare",
    "count_words",
    "decompose_pieces",
    "decompose_tokens",
    "export_hf_tokenizer",
    "find_vocabulary",
    "load_model_proto",
    "merge_pieces",
    "merge_reachable",
    "mix_words",
    "open_encoder",
    "open_vocabulary",
    "sample_documents",
    "script_pieces",
    "token_ratio",
    "train_korean_bpe",
    "train_pieces",
    "unreachable_pieces",
]
