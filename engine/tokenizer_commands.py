"""`redwhale tokenizer build`, `check`, `report`, `sweep` and `prune`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ..filtering import InputFile, find_inputs, read_documents
from ..model import CheckpointReader, ModelConfig, parameter_count, preset
from ..model.vocab_remap import remap_checkpoint
from ..tokenizer import (
    Comparison,
    TokenizerConfig,
    TokenizerError,
    build_hybrid_tokenizer,
    check_tokenizer,
    compare,
    export_hf_tokenizer,
    load_model_proto,
    open_encoder,
)
from ..tokenizer.base_pruning import prune_base
from ..tokenizer.proofs import proof_lines
from ..tokenizer.sweep import knee, sweep_sizes
from .errors import RecipeError
from .flops import training_flops
from .kobest_texts import kobest_texts
from .model_commands import unused
from .recipe import apply_override
from .run_folder import write_json
from .steps.hybrid_tokenizer import sourced_texts


def build(options: argparse.Namespace) -> None:
    """Write a hybrid tokenizer and say what came of it."""
    summary = build_hybrid_tokenizer(
        _corpus(options.corpus),
        options.base,
        options.folder,
        _config(options.overrides),
        domains=_domains(options),
        english_sample=_lines(options.english),
    )
    write_json(options.folder / "summary.json", msgspec.to_builtins(summary))
    print(f"{options.folder}: {summary.vocab_size:,} pieces, {summary.added:,} of them new")
    for domain in summary.domains:
        print(f"  {domain.domain}: token ratio {domain.ratio:.3f}, {domain.hybrid_chars_per_token:.2f} chars/token")
    if summary.english_lines:
        print(f"  {len(summary.english_changes):,} of {summary.english_lines:,} English lines encode differently")
        for line in summary.english_changes:
            print(f"    {line}")


def check(options: argparse.Namespace) -> None:
    """Print every proof.

    Raises:
        TokenizerError: when one fails.
    """
    texts = [text for texts in _domains(options).values() for text in texts]
    report = check_tokenizer(
        options.path, base=options.base, texts=texts, english=_lines(options.english), fuzz=options.fuzz
    )
    print(proof_lines(report))
    failed = [made.name for made in report.checks if made.failed]
    if failed:
        raise TokenizerError(f"{options.path} fails {len(failed)} of {len(report.checks)} proofs: {'; '.join(failed)}")


def report(options: argparse.Namespace) -> None:
    """Print a table of tokenizers by domain, and what the larger vocabulary costs a model."""
    base, domains = open_encoder(options.base), _domains(options)
    compared = [compare(str(path), base, open_encoder(path), domains) for path in (options.base, *options.tokenizers)]
    config = preset(options.preset) if options.preset else None
    costs = [_cost(config, base.vocab_size, row) if config else None for row in compared]
    print("\n".join(comparison_lines(compared, costs)))
    if options.json:
        rows = [{**msgspec.to_builtins(row), "cost": cost} for row, cost in zip(compared, costs, strict=True)]
        write_json(options.json, {"base": str(options.base), "tokenizers": rows})


def sweep(options: argparse.Namespace) -> None:
    """Write sweep.json and, with matplotlib, sweep.png; print the table and the knee."""
    try:
        sizes = sorted({int(size) for size in options.sizes.split(",")})
    except ValueError:
        raise RecipeError(f"--sizes {options.sizes} is no list of numbers; write it as 4000,8000,16000") from None
    rows = sweep_sizes(_corpus(options.corpus), options.base, _config(options.overrides), sizes, _domains(options))
    bend = knee([row.added for row in rows], [row.mean_ratio for row in rows])
    options.folder.mkdir(parents=True, exist_ok=True)
    write_json(options.folder / "sweep.json", {"knee": bend, "sizes": msgspec.to_builtins(rows)})
    for row in rows:
        print(f"{row.added:>8,} pieces  mean ratio {row.mean_ratio:.4f}" + ("  <- knee" if row.added == bend else ""))
    try:
        from .sweep_plot import plot_sweep
    except ModuleNotFoundError as missing:
        print(f'no plot: it needs {missing.name}, pip install "redwhale[report]"')
    else:
        plot_sweep(rows, bend, options.folder / "sweep.png")
        print(f"wrote {options.folder / 'sweep.png'}")


def prune(options: argparse.Namespace) -> None:
    """Write a smaller checkpoint and tokenizer, and the old id of every new one."""
    folder = unused(options.folder)
    base = load_model_proto(options.checkpoint / "tokenizer.model")
    rows = CheckpointReader(options.checkpoint).config.vocab_size
    if rows != len(base.pieces):
        raise RecipeError(
            f"{options.checkpoint} has {rows} rows, its tokenizer.model {len(base.pieces)} pieces: they do not belong "
            "together"
        )
    texts = [text for texts in _domains(options).values() for text in texts]
    pruned, old_ids = prune_base(base, texts, min_frequency=options.min_frequency)
    with tempfile.TemporaryDirectory() as staging:
        files = export_hf_tokenizer(pruned, staging)
        old = Path(staging) / "old_ids.json"
        write_json(old, old_ids)
        remap_checkpoint(options.checkpoint, folder, old_ids, extra_files=[*files, old])
    print(f"{folder}: {len(old_ids):,} of {rows:,} pieces; old_ids.json has the old id of each")


def comparison_lines(rows: Sequence[Comparison], costs: Sequence[dict[str, Any] | None]) -> list[str]:
    """A text table: each tokenizer on each domain, then its mean and its cost."""
    lines = []
    for row, cost in zip(rows, costs, strict=True):
        lines.append(f"{row.name}: {row.vocab_size:,} pieces, mean token ratio {row.mean_ratio:.3f}")
        for domain in row.domains:
            lines.append(
                f"  {domain.domain:<20} ratio {domain.ratio:.3f}  chars/token {domain.hybrid_chars_per_token:.2f}  "
                f"tokens/eojeol {domain.hybrid_tokens_per_eojeol:.2f}  bytes {domain.hybrid_byte_share:.2%}"
            )
        if row.new_pieces > 0:
            lines.append(f"  {row.never_used:,} of {row.new_pieces:,} new pieces are never used here")
        if cost:
            lines.append(
                f"  {cost['parameter_growth']:+,} parameters ({cost['parameter_growth_share']:+.1%}); a document takes "
                f"{cost['flops_saved_share']:.1%} fewer forward FLOPs"
            )
    return lines


def _cost(config: ModelConfig, base_size: int, row: Comparison) -> dict[str, Any]:
    """Parameters that a vocabulary adds to a model, and what its shorter documents save of the forward FLOPs."""
    before = parameter_count(replace(config, vocab_size=base_size))
    after = parameter_count(replace(config, vocab_size=row.vocab_size))
    per_token = [training_flops(replace(config, vocab_size=size), {}).per_token for size in (base_size, row.vocab_size)]
    # Attention's pairs are left out: of documents of this length they are a few hundredths, and fall with the square.
    return {
        "parameter_growth": after - before,
        "parameter_growth_share": after / before - 1,
        "forward_flops_per_token": per_token[1],
        "flops_saved_share": 1 - row.mean_ratio * per_token[1] / per_token[0],
    }


def _config(overrides: Sequence[str]) -> TokenizerConfig:
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override)
    try:
        return msgspec.convert(raw, TokenizerConfig)
    except msgspec.ValidationError as error:
        raise RecipeError(f"tokenizer: {error}") from None


def _named(text: str) -> tuple[str, list[InputFile]]:
    name, separator, path = text.partition("=")
    if not separator or not name:
        raise RecipeError(f"{text!r} does not name its domain; write it as NAME=PATH")
    return name, find_inputs([path])


def _corpus(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    sources: dict[InputFile, str] = {}
    paths: list[InputFile] = []
    for argument in arguments:
        if "=" in argument and not Path(argument).exists():
            name, files = _named(argument)
            sources |= dict.fromkeys(files, name)
        else:
            files = find_inputs([argument])
        paths += files
    return sourced_texts("read corpus", paths, sources)


def _domains(options: argparse.Namespace) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for text in options.text:
        name, files = _named(text)
        domains.setdefault(name, []).extend(d.text for file in files for d in read_documents(file))
    if getattr(options, "kobest", None):
        domains |= kobest_texts(options.kobest)
    return domains


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    files = find_inputs([str(path)])
    return [line for file in files for d in read_documents(file) for line in d.text.splitlines() if line.strip()]
