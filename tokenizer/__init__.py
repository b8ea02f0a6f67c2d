"""Hybrid tokenizers: Korean pieces appended to an English SentencePiece BPE, with proofs that they are right."""

from .errors import TokenizerError
from .export import export_hf_tokenizer
from .hybrid import TokenizerConfig, TokenizerSummary, build_hybrid_tokenizer
from .merge import hangul_pieces, merge_pieces, merge_reachable, select_hangul_pieces, unreachable_pieces
from .report import DomainTokens, token_ratio
from .spm import ModelProto, Tokenizer, decompose_pieces, load_model_proto, piece_surfaces
from .stream import StreamDecoder
from .train import sample_texts, train_korean_bpe

__all__ = [
    "DomainTokens",
    "ModelProto",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerError",
    "TokenizerSummary",
    "build_hybrid_tokenizer",
    "decompose_pieces",
    "export_hf_tokenizer",
    "hangul_pieces",
    "load_model_proto",
    "merge_pieces",
    "merge_reachable",
    "piece_surfaces",
    "sample_texts",
    "select_hangul_pieces",
    "token_ratio",
    "train_korean_bpe",
    "unreachable_pieces",
]
