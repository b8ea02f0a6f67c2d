"""What each group of filter rules is worth: a small proxy model trained on what is kept with it and without it.

Every variant filters the same sample of the raw corpus, trains the same byte-level model for the same number of tokens,
and is measured in bits per byte on held-out text that no rule sees. Seeds change the initial weights and the order of
the documents together for all variants, so that differences are paired.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ..filtering import (
    RULES,
    DuplicateConfig,
    FilterConfig,
    FilterSummary,
    InputFile,
    Threshold,
    filter_corpus,
    find_inputs,
    read_documents,
)
from ..filtering.diversity import Topics, distinct_ngrams
from ..model import Llama, ModelConfig
from .batches import PackedSequences
from .errors import RecipeError
from .evaluation import evaluate_loss
from .loop_config import LoopConfig
from .recipe import Recipe
from .run_folder import write_json
from .shards import TokenShards, write_shard
from .stages import Positive, Stage
from .statistics import t_interval
from .trainer import Trainer

EVERYTHING, NOTHING = "everything", "nothing"
NEAR_DUPLICATES, FREQUENT_LINES = "near_duplicates", "frequent_lines"
_BOS, _EOS, _FIRST_BYTE = 1, 2, 3
_VOCABULARY = 256 + _FIRST_BYTE
_BYTES_TOKENIZER = hashlib.sha256(b"bytes").hexdigest()
_TOPIC_DOCUMENTS = 4_000


class AblationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How large an ablation is."""

    megabytes: float = 20.0
    """Raw text that every variant filters, a sample of the recipe's inputs by content."""
    tokens: Positive = 1_000_000
    """Bytes that every proxy model trains on; a smaller kept set is seen more than once."""
    seeds: Positive = 3
    hidden_size: Positive = 128
    num_hidden_layers: Positive = 4
    sequence_length: Positive = 512
    batch_size: Positive = 8
    lr: float = 3e-3
    groups: tuple[str, ...] = ()
    """Groups to take out and to put in alone; empty for all."""


class Variant(msgspec.Struct, kw_only=True):
    """One filter, measured; differences are to `everything`, positive where the variant is worse."""

    name: str
    documents: int
    megabytes: float
    bits_per_byte: list[float]  # by seed, the mean of the held-out domains
    by_domain: dict[str, list[float]]
    mean: float
    difference: float
    interval: float | None  # half of the 95% confidence interval of the difference over seeds; None for one seed
    distinct_ngrams: float
    topic_coverage: float


def groups_of(config: FilterConfig) -> list[str]:
    """Returns the groups of rules that the config has switched on, then the two of repetition across documents."""
    resolved = config.measure_options().resolved
    groups = dict.fromkeys(rule.group for rule in RULES.values() if resolved[rule.name].enabled is not False)
    near = [NEAR_DUPLICATES] if config.duplicates.jaccard < 1 else []
    lines = [FREQUENT_LINES] if config.duplicates.line_documents else []
    return [*groups, *near, *lines]


def variants_of(config: FilterConfig, groups: Iterable[str]) -> dict[str, FilterConfig]:
    """Returns all groups, none, all but each, each alone; and all with either cut by perplexity where one is set."""
    every = set(groups_of(config))
    chosen = list(groups) or groups_of(config)
    for group in chosen:
        if group not in every:
            raise RecipeError(f"there is no group {group!r} in the filter: it has {', '.join(sorted(every))}")
    variants = {EVERYTHING: _with(config, every), NOTHING: _with(config, set())}
    variants |= {f"without {group}": _with(config, every - {group}) for group in chosen}
    variants |= {f"only {group}": _with(config, {group}) for group in chosen}
    if config.perplexity is not None:
        for method in ("ngram", "prior"):
            cut = msgspec.structs.replace(config.perplexity, method=method)
            variants[f"everything and {method}"] = msgspec.structs.replace(variants[EVERYTHING], perplexity=cut)
    return variants


def _with(config: FilterConfig, on: set[str]) -> FilterConfig:
    off = {name: Threshold(enabled=False) for name, rule in RULES.items() if rule.group not in on}
    return msgspec.structs.replace(
        config,
        thresholds={**config.thresholds, **off},
        duplicates=DuplicateConfig(
            jaccard=config.duplicates.jaccard if NEAR_DUPLICATES in on else 1.0,
            line_documents=config.duplicates.line_documents if FREQUENT_LINES in on else 0,
            block_documents=config.duplicates.block_documents,
        ),
        perplexity=None,
        validation_fraction=0.0,
        examples_per_rule=0,
    )


def run_ablation(recipe: Recipe, config: AblationConfig, say: Callable[[str], None] = print) -> list[Variant]:
    """Measures every variant and writes `RUN/filter-ablation/ablation.json`; finished parts are not done again.

    Raises:
        RecipeError: the recipe has no [filter] section or no [heldout] text.
    """
    if recipe.filter is None or not recipe.heldout:
        raise RecipeError("filter-ablation needs a [filter] section and [heldout] text that the filter never sees")
    variants = variants_of(recipe.filter, config.groups)
    domains = {name: find_inputs(list(paths)) for name, paths in recipe.heldout.items()}
    settings = msgspec.to_builtins(
        (config, recipe.filter, recipe.seed, [[str(path), path.stat().st_size] for path in _files(recipe, domains)])
    )
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = recipe.run_dir / "filter-ablation" / digest
    folder.mkdir(parents=True, exist_ok=True)
    sample = folder / "sample.jsonl"
    if not sample.exists():
        say(f"sampling {config.megabytes:g} MB of the inputs")
        _write_sample(recipe.filter, config.megabytes, sample)
    heldout = {name: _byte_shards(folder / f"heldout-{name}", _texts(paths)) for name, paths in domains.items()}
    topics = Topics(list(_texts([sample], _TOPIC_DOCUMENTS)))

    measured = {}
    for name, filters in variants.items():
        place = folder / name.replace(" ", "-")
        cell = place / "measured.json"
        if not cell.exists():
            kept = filter_corpus(msgspec.structs.replace(filters, inputs=[str(sample)], html=False), place / "corpus")
            files = sorted((place / "corpus").glob("train-*.parquet"))
            shards = _byte_shards(place / "shards", _texts(files))
            bits = [
                _proxy_bits(config, shards, heldout, place / f"seed{seed}", recipe.seed + seed)
                for seed in range(config.seeds)
            ]
            texts = list(_texts(files))
            write_json(cell, {"summary": msgspec.to_builtins(kept), "bits": bits, **_diversity(texts, topics)})
        measured[name] = json.loads(cell.read_text(encoding="utf-8"))
        say(f"{name}: {statistics.mean(map(_mean_of_domains, measured[name]['bits'])):.4f} bits per byte")
    results = [_variant(name, found, measured[EVERYTHING]) for name, found in measured.items()]
    described = {"settings": msgspec.to_builtins(config), "variants": msgspec.to_builtins(results)}
    write_json(recipe.run_dir / "filter-ablation" / "ablation.json", described)
    return results


def ablation_table(variants: Iterable[Variant]) -> str:
    """Returns the variants as a Markdown table."""
    lines = [
        "| filter | documents | MB | bits per byte | difference | distinct 8-grams | topics |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in variants:
        interval = "" if one.interval is None else f" ± {one.interval:.4f}"
        difference = "" if one.name == EVERYTHING else f"{one.difference:+.4f}{interval}"
        lines.append(
            f"| {one.name} | {one.documents:,} | {one.megabytes:.1f} | {one.mean:.4f} | {difference} | "
            f"{one.distinct_ngrams:.3f} | {one.topic_coverage:.3f} |"
        )
    return "\n".join(lines)


def _files(recipe: Recipe, domains: Mapping[str, list[InputFile]]) -> list[InputFile]:
    assert recipe.filter is not None
    return [*find_inputs(recipe.filter.inputs), *(path for paths in domains.values() for path in paths)]


def _write_sample(filters: FilterConfig, megabytes: float, path: Path) -> None:
    """The documents with the smallest hashes, up to so many megabytes, in the order of the hashes."""
    chosen: list[tuple[bytes, str, str, str]] = []
    size = 0

    def smallest() -> None:
        nonlocal chosen, size
        chosen.sort()
        total, some = 0, []
        for row in chosen:
            total += len(row[2].encode("utf-8", "surrogatepass"))
            if total > megabytes * 1e6 and some:
                break
            some.append(row)
        chosen, size = some, min(total, int(megabytes * 1e6))

    for file in find_inputs(filters.inputs):
        for document in read_documents(file, html=filters.html):
            text = document.text.encode("utf-8", "surrogatepass")
            key = hashlib.blake2b(text + document.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            chosen.append((key, document.id, document.text, document.source))
            size += len(text)
            if size > 2e6 * megabytes:
                smallest()
    smallest()
    staging = path.with_suffix(".writing")
    with staging.open("w", encoding="utf-8") as out:
        for _, identifier, text, source in chosen:
            out.write(json.dumps({"id": identifier, "text": text, "source": source}) + "\n")
    staging.replace(path)


def _texts(paths: Iterable[InputFile], most: int | None = None) -> Iterator[str]:
    texts = (document.text for path in paths for document in read_documents(path))
    for number, text in enumerate(texts):
        if most is not None and number >= most:
            return
        yield text


def _byte_shards(prefix: Path, texts: Iterable[str]) -> TokenShards:
    """The UTF-8 bytes of texts as tokens; what is already written is opened."""
    name = prefix.with_name(f"{prefix.name}-00000")
    if not name.with_suffix(".json").exists():
        encoded = (text.encode("utf-8", "replace") for text in texts)
        documents = (([_BOS, *(byte + _FIRST_BYTE for byte in data), _EOS], len(data)) for data in encoded)
        write_shard(name, documents, vocab_size=_VOCABULARY, tokenizer_sha256=_BYTES_TOKENIZER)
    return TokenShards([name])


def _proxy_bits(
    config: AblationConfig, shards: TokenShards, heldout: Mapping[str, TokenShards], folder: Path, seed: int
) -> dict[str, float]:
    """Trains one proxy model; bits per byte of each held-out domain."""
    heads = max(1, config.hidden_size // 32)
    model = Llama(
        ModelConfig(
            vocab_size=_VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.hidden_size // heads,
            max_position_embeddings=config.sequence_length,
            bos_token_id=_BOS,
            eos_token_id=_EOS,
        )
    )
    model.init_weights(torch.Generator().manual_seed(seed))
    trainer = Trainer(
        model,
        Stage(name="proxy", train=("all",), tokens=config.tokens, lr=config.lr, weight_decay=0.1),
        PackedSequences(shards, config.sequence_length),
        sequence_length=config.sequence_length,
        folder=folder,
        loop=LoopConfig(batch_size=config.batch_size, micro_batch_size=config.batch_size, checkpoint_every=10**9),
        seed=seed,
    )
    trainer.run()
    bits = {}
    for name, some in heldout.items():
        source = PackedSequences(some, config.sequence_length)
        found = evaluate_loss(model, source, batch_size=config.batch_size, text_bytes=some.text_bytes)
        assert found.bits_per_byte is not None
        bits[name] = found.bits_per_byte
    return bits


def _diversity(texts: list[str], topics: Topics) -> dict[str, float]:
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))
    shuffled = [texts[place] for place in order]
    return {
        "distinct_ngrams": distinct_ngrams(shuffled),
        "topic_coverage": topics.coverage(shuffled[:_TOPIC_DOCUMENTS]),
    }


def _mean_of_domains(bits: Mapping[str, float]) -> float:
    return statistics.mean(bits.values())


def _variant(name: str, found: Mapping[str, Any], everything: Mapping[str, Any]) -> Variant:
    summary = msgspec.convert(found["summary"], FilterSummary)
    bits = [_mean_of_domains(one) for one in found["bits"]]
    differences = [one - _mean_of_domains(base) for one, base in zip(bits, everything["bits"], strict=True)]
    return Variant(
        name=name,
        documents=summary.documents_out,
        megabytes=summary.bytes_out / 1e6,
        bits_per_byte=bits,
        by_domain={domain: [one[domain] for one in found["bits"]] for domain in found["bits"][0]},
        mean=statistics.mean(bits),
        difference=statistics.mean(differences),
        interval=t_interval(differences),
        distinct_ngrams=found["distinct_ngrams"],
        topic_coverage=found["topic_coverage"],
    )
