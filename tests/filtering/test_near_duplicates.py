import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from filtering_corpus import alike_pairs

from redwhale.filtering import DuplicateConfig, FilterConfig, Threshold, filter_corpus, normalize_text, read_documents
from redwhale.filtering.minhash import BANDS, band_keys, jaccard, shingles
from redwhale.filtering.rules import RULES
from redwhale.filtering.work import WorkFolder, locate

REAL = os.environ.get("REDWHALE_KOREAN_TEXT", "")
OPEN = {name: Threshold(enabled=False) for name in RULES}
"""Every rule off: what is dropped is a duplicate."""


def grams(text: str) -> set[str]:
    squeezed = "".join(text.split())
    return {squeezed[start : start + 8] for start in range(max(len(squeezed) - 7, 1))} if squeezed else set()


def random_text(rng: random.Random, characters: int) -> str:
    return "".join(rng.choice("가나다라마바사아자차카타파하고래선장 \n") for _ in range(characters))


def edited(text: str, rng: random.Random, share: float) -> str:
    """The text with so many of its characters replaced and a twentieth of its spaces gone."""
    changed = (chr(rng.randrange(0xAC00, 0xD7A4)) if rng.random() < share else character for character in text)
    return "".join(character for character in changed if character != " " or rng.random() > 0.05)


def test_the_jaccard_similarity_equals_that_of_sets_of_strings():
    rng = random.Random(0)
    texts = [random_text(rng, rng.randrange(0, 300)) for _ in range(40)] + [
        "",
        "짧다",
        "고래가  고래가\n고래가 고래가 고래",
    ]
    texts += [edited(text, rng, 0.02) for text in texts]
    left, right = (np.array([rng.randrange(len(texts)) for _ in range(400)]) for _ in range(2))
    right[:40] = left[:40] % 43 + 43
    expected = []
    for one, other in zip(left, right, strict=True):
        mine, others = grams(texts[one]), grams(texts[other])
        expected.append(len(mine & others) / max(len(mine | others), 1))
    assert jaccard(shingles(texts), left, right) == pytest.approx(expected)
    assert max(expected) > 0.9
    assert sum(0 < one < 1 for one in expected) > 15


def test_spacing_changes_no_key_and_a_text_alone_has_those_it_has_in_a_batch():
    rng = random.Random(1)
    texts = [random_text(rng, 200) for _ in range(5)]
    keys = band_keys(shingles(texts))
    assert keys.shape == (5, BANDS)
    assert (band_keys(shingles(["".join(text.split()) for text in texts])) == keys).all()
    for text, expected in zip(texts, keys, strict=True):
        assert (band_keys(shingles([text]))[0] == expected).all()
    assert not (keys[0] == keys[1]).any()


@pytest.mark.parametrize("characters", [80, 250, 1500])
def test_rows_agree_as_often_as_the_jaccard_similarity_says(characters):
    rng = random.Random(characters)
    originals = [random_text(rng, characters) for _ in range(400)]
    for share in (0.005, 0.02):
        batch = shingles(originals + [edited(text, rng, share) for text in originals])
        places = np.arange(400)
        similarity = jaccard(batch, places, places + 400)
        keys = band_keys(batch)
        found = (keys[:400] == keys[400:]).mean()
        expected = (similarity**8).mean()
        # One of 6,400 bands, which are not quite independent; short texts share values between bins.
        assert found == pytest.approx(expected, abs=0.04)


def chain(steps: int) -> list[str]:
    """Texts each of which is alike to the next, the first not to the last."""
    rng = random.Random(3)
    text = list(random_text(rng, 600))
    texts = []
    for step in range(steps):
        texts.append("".join(text))
        text[step * 60 : step * 60 + 50] = random_text(rng, 50)
    return texts


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    return str(path)


def kept_and_repeats(
    inputs: str, folder: Path, monkeypatch, **settings
) -> tuple[set[int], list[tuple[int, int, float]]]:
    """Ids that stay, and (dropped, kept, similarity) of every near-duplicate."""
    repeats: list[tuple[int, int, float]] = []
    remove = WorkFolder.remove

    def look(work: WorkFolder) -> None:
        if (work.path / "duplicates.parquet").exists():
            for row in pq.read_table(work.path / "duplicates.parquet").to_pylist():
                if row["of"] is not None:
                    ids = [
                        int(work.documents(name).column("id")[place].as_py())
                        for name, place in (locate(row["position"]), locate(row["of"]))
                    ]
                    repeats.append((ids[0], ids[1], row["jaccard"]))
        remove(work)

    monkeypatch.setattr(WorkFolder, "remove", look)
    config = FilterConfig(inputs=[inputs], validation_fraction=0, thresholds=OPEN, workers=1, mask=(), **settings)
    filter_corpus(config, folder)
    monkeypatch.setattr(WorkFolder, "remove", remove)
    return {int(row["id"]) for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()}, repeats


LINES_OFF = DuplicateConfig(line_documents=0)


def test_a_chain_of_similar_documents_does_not_collapse_into_one(tmp_path, monkeypatch):
    texts = chain(8)
    kept, repeats = kept_and_repeats(
        write(tmp_path / "a.jsonl", texts), tmp_path / "out", monkeypatch, duplicates=LINES_OFF
    )
    sets = list(map(grams, texts))
    similarity = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    assert all(similarity[n][n + 1] > 0.8 for n in range(7))
    assert similarity[0][7] < 0.5
    assert 2 <= len(kept) <= 5
    for dropped, of, measured in repeats:
        assert of in kept
        assert measured == pytest.approx(similarity[dropped][of])
        assert measured >= 0.8
    assert {dropped for dropped, _, _ in repeats} == set(range(8)) - kept


def test_the_better_of_two_stays_whatever_the_order(tmp_path, monkeypatch):
    sentence = "고래는 푸른 바다를 천천히 헤엄쳐 갔고 선장은 그것을 오래 바라보았다. "
    good = "".join(f"{n}번째 날에 {sentence}" for n in range(12)).strip()
    bad = good + " ★■◆▶▶▶▶▶♡♡♡♡♡♡"
    for name, texts in (("one", [good, bad]), ("other", [bad, good])):
        inputs = write(tmp_path / f"{name}.jsonl", texts)
        kept, _ = kept_and_repeats(inputs, tmp_path / name, monkeypatch, duplicates=LINES_OFF)
        assert kept == {texts.index(good)}


def test_a_threshold_of_one_looks_for_exact_duplicates_alone(tmp_path, monkeypatch):
    texts = chain(8) + chain(2)
    inputs = write(tmp_path / "a.jsonl", texts)
    off = DuplicateConfig(jaccard=1, line_documents=0)
    assert kept_and_repeats(inputs, tmp_path / "out", monkeypatch, duplicates=off) == (set(range(8)), [])


def test_a_crowd_of_templates_is_found_in_linear_time(tmp_path, monkeypatch):
    rng = random.Random(5)
    template = random_text(rng, 1000)
    texts = [f"{template} {rng.randrange(10**12)} {random_text(rng, 20)}" for _ in range(150)]
    texts += [random_text(rng, 300) for _ in range(20)]
    kept, repeats = kept_and_repeats(
        write(tmp_path / "a.jsonl", texts), tmp_path / "out", monkeypatch, duplicates=LINES_OFF
    )
    assert len(kept) == 21
    assert len({of for _, of, _ in repeats}) == 1


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="REDWHALE_KOREAN_TEXT names no folder with bills, reviews and general .jsonl.zst")
def test_recall_and_precision_against_every_pair_of_5000_real_documents(tmp_path, monkeypatch):
    rng = random.Random(6)
    texts: list[str] = []
    for name in ("bills", "reviews", "general"):
        documents = read_documents(Path(REAL) / f"{name}.jsonl.zst")
        texts += [document.text[:1500] for document in itertools.islice(documents, 1400)]
    originals = len(texts)
    for _ in range(5000 - originals):
        texts.append(edited(texts[rng.randrange(originals)], rng, rng.choice((0, 0.002, 0.005, 0.01, 0.02))))
    texts = [normalize_text(text) for text in texts]
    alike = alike_pairs([grams(text) for text in texts], least=0.5)
    kept, repeats = kept_and_repeats(
        write(tmp_path / "a.jsonl", texts), tmp_path / "out", monkeypatch, duplicates=LINES_OFF
    )
    near = [pair for pair, similarity in alike.items() if similarity >= 0.85]
    missed = [pair for pair in near if pair[0] in kept and pair[1] in kept]
    assert len(near) > 500
    assert 1 - len(missed) / len(near) >= 0.98
    assert len(repeats) > 300
    for dropped, of, measured in repeats:
        assert measured == pytest.approx(alike[min(dropped, of), max(dropped, of)])
        assert measured >= 0.8
