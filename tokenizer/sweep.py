"""Token ratio by the number of added pieces."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from .byte_level import is_byte_level, learn_extension
from .encoder import open_encoder
from .errors import TokenizerError
from .hybrid import TokenizerConfig, corpus_words, select, trained_candidates
from .merge import merge_pieces
from .report import compare
from .spm import load_model_proto
from .train import core_count


class SweepRow(msgspec.Struct, frozen=True, kw_only=True):
    """One vocabulary size of a sweep."""

    added: int
    mean_ratio: float
    ratios: dict[str, float]  # by domain
    never_used: int  # added pieces that no domain's text uses


def sweep_sizes(
    documents: Iterable[tuple[str, str]],
    base_path: Path,
    config: TokenizerConfig,
    sizes: Sequence[int],
    domains: Mapping[str, Sequence[str]],
) -> list[SweepRow]:
    """Train once, prune to each size, and measure; every size is a part of the next larger.

    Raises:
        TokenizerError: for sizes below 1 or above what was trained, and whatever `build_hybrid_tokenizer` refuses.
    """
    if not sizes or min(sizes) < 1:
        raise TokenizerError(f"sizes are {list(sizes)}; give positive numbers of pieces")
    base = open_encoder(base_path)
    words, _ = corpus_words(documents, config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if is_byte_level(base_path):
            extension = learn_extension(base_path, words, config)
            trained: Sequence[str] = extension.candidates
        else:
            proto = load_model_proto(base_path)
            extension, trained = None, trained_candidates(proto, words, config)
        if max(sizes) > len(trained):
            raise TokenizerError(f"{max(sizes)} pieces are more than the {len(trained)} candidates; raise vocab_size")
        for size in sorted(sizes, reverse=True):
            smaller = msgspec.structs.replace(config, max_added=size)
            if extension is None:
                trained = select(proto, trained, words, smaller).pieces
                path = Path(folder) / "tokenizer.model"
                path.write_bytes(merge_pieces(proto, trained).SerializeToString())
            else:
                trained = extension.select(trained, smaller)
                extension.extended(trained).write(Path(folder), files_of=base_path)
                path = Path(folder) / "tokenizer.json"
            row = compare("", base, open_encoder(path), domains, threads=config.threads or core_count())
            ratios = {domain.domain: domain.ratio for domain in row.domains}
            rows.append(
                SweepRow(added=len(trained), mean_ratio=row.mean_ratio, ratios=ratios, never_used=row.never_used)
            )
    return rows[::-1]


def knee(sizes: Sequence[int], ratios: Sequence[float]) -> int:
    """Return the size where a falling curve bends most: farthest below the straight line between its ends.

    Kneedle with no smoothing (Satopaa et al. 2011).
    """
    width, height = sizes[-1] - sizes[0], ratios[0] - ratios[-1]
    if len(sizes) < 3 or not width or not height:
        return sizes[-1]
    gains = [(ratios[0] - r) / height - (s - sizes[0]) / width for s, r in zip(sizes, ratios, strict=True)]
    return sizes[gains.index(max(gains))]
