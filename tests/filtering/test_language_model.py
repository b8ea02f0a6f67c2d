import json
import math
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from filtering_corpus import korean

from redwhale.filtering import CorpusError, FilterConfig, PerplexityConfig, filter_corpus
from redwhale.filtering.language_model import NgramModel, PriorModel, load_model, train_model


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [korean(rng) for _ in range(count)]


def test_the_perplexity_equals_that_of_counted_strings():
    clean, heldout = texts(50), texts(5, seed=1) + ["세상에 없던 뷁쀍 글자"]
    counts = Counter()
    total = 0
    for text in clean:
        padded = "\n" * 4 + text + "\n"
        total += len(padded)
        for end in range(1, len(padded) + 1):
            for order in range(1, 6):
                if end >= order:
                    counts[padded[end - order : end]] += 1
    for text, (score,) in zip(heldout, NgramModel.train(clean).score(heldout), strict=True):
        padded = "\n" * 4 + text + "\n"
        logs = []
        for end in range(5, len(padded) + 1):
            probability = 1e-5
            for order in range(1, 6):
                context = counts[padded[end - order : end - 1]] if order > 1 else total
                probability = (counts[padded[end - order : end]] + 2 * probability) / (context + 2)
            logs.append(math.log(probability))
        # Some n-grams of 4 million places share one.
        assert score == pytest.approx(-sum(logs) / len(logs), rel=1e-3)


def test_mean_and_deviation_of_log_frequencies_equal_those_of_counted_characters():
    clean, heldout = texts(50), texts(5, seed=1)
    counts = Counter(character for text in clean for character in text + "\n")
    total = sum(counts.values())
    for text, scores in zip(heldout, PriorModel.train(clean).score(heldout), strict=True):
        logs = [math.log((counts[character] + 0.5) / (total + 1)) for character in text + "\n"]
        assert scores == pytest.approx([np.mean(logs), np.std(logs)], rel=1e-6)


@pytest.mark.parametrize("model", [NgramModel, PriorModel])
def test_a_score_depends_on_no_other_text_and_survives_writing(model, tmp_path):
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(30)))
    train_model(model.method, [str(tmp_path / "clean.jsonl")], tmp_path / "model.npz")
    trained = load_model(tmp_path / "model.npz")
    some = texts(9, seed=2)
    together = trained.score(some)
    assert together.shape == (9, model.columns)
    for text, scores in zip(some, together, strict=True):
        assert trained.score([text])[0] == pytest.approx(scores, rel=1e-12)
    assert np.array_equal(model.train(texts(30)).score(some), together)


@pytest.mark.parametrize("method", ["ngram", "prior"])
def test_what_is_unlike_clean_text_is_cut_at_both_ends(tmp_path, method):
    rng = random.Random(3)
    good = texts(300, seed=4)
    # Among the words of the corpus syllables that it does not have.
    odd = ["".join(f"{chr(rng.randrange(0xAC00, 0xD7A4))}{word}다 " for word in korean(rng).split()) for _ in range(6)]
    named = [(f"good{n}", text) for n, text in enumerate(good)] + [(f"odd{n}", text) for n, text in enumerate(odd)]
    lines = [json.dumps({"id": name, "text": text}) for name, text in named]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "clean.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(300, seed=5)))
    cut = PerplexityConfig(train=(str(tmp_path / "clean.jsonl"),), method=method, low=0.05, high=0.05)
    config = FilterConfig(inputs=[str(tmp_path / "a.jsonl")], validation_fraction=0, perplexity=cut)
    summary = filter_corpus(config, tmp_path / "out")
    rule = {rule.name: rule for rule in summary.rules}["perplexity"]
    passed = summary.documents_in - sum(one.dropped_documents for one in summary.rules[:26])
    assert 0.05 * passed <= rule.dropped_documents <= 0.1 * passed + 4
    kept = {row["id"] for path in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(path).to_pylist()}
    assert not [name for name in kept if name.startswith("odd")]
    without = filter_corpus(FilterConfig(inputs=config.inputs, validation_fraction=0), tmp_path / "without")
    assert without.documents_out > summary.documents_out


def test_settings_that_cannot_be_are_one_clear_sentence(tmp_path):
    with pytest.raises(CorpusError, match="perplexity.method must be one of ngram, prior, not 'lstm'"):
        PerplexityConfig(train=("x",), method="lstm")
    with pytest.raises(CorpusError, match="perplexity.high must be at least 0 and below 0.5, not 0.7"):
        PerplexityConfig(train=("x",), high=0.7)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "고래"}))
    (tmp_path / "clean.jsonl").write_text("{}")
    config = FilterConfig(
        inputs=[str(tmp_path / "a.jsonl")], perplexity=PerplexityConfig(train=(str(tmp_path / "clean.jsonl"),))
    )
    with pytest.raises(CorpusError, match="perplexity.train holds no documents"):
        filter_corpus(config, tmp_path / "out")
