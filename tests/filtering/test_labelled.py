from collections import Counter

import pytest
from labelled_korean import BAD, GENRES, OPTIONAL, bad_documents, good_documents

from redwhale.filtering import RULES, Document, MeasureOptions, Threshold, measure_documents

GOOD_DOCUMENTS = good_documents(330, seed=1)
BAD_DOCUMENTS = bad_documents(15, seed=2)


def measure(labelled, **thresholds):
    documents = [Document(id=str(n), text=one.text, source=one.kind) for n, one in enumerate(labelled)]
    return measure_documents(documents, MeasureOptions(thresholds=thresholds))


@pytest.fixture(scope="module")
def good():
    return measure(GOOD_DOCUMENTS)


@pytest.fixture(scope="module")
def bad():
    return measure(BAD_DOCUMENTS)


def test_the_set_is_large_mixed_and_without_repeats():
    assert len(GOOD_DOCUMENTS) >= 300
    assert len(BAD_DOCUMENTS) >= 300
    assert len({one.kind for one in GOOD_DOCUMENTS}) == len(GENRES) >= 10
    assert len({one.kind for one in BAD_DOCUMENTS}) == len(BAD) >= 20
    assert len({one.text for one in GOOD_DOCUMENTS}) == len(GOOD_DOCUMENTS)


def test_nearly_all_bad_documents_and_hardly_any_good_ones_are_dropped(good, bad):
    assert sum(bool(one.failed) for one in bad) >= 0.95 * len(bad)
    assert sum(bool(one.failed) for one in good) <= 0.02 * len(good)


def test_every_rule_finds_what_it_is_for_and_little_else(good, bad):
    drops = Counter(name for one in [*good, *bad] for name in one.failed)
    wrong = Counter(name for one in good for name in one.failed)
    for name, rule in RULES.items():
        if rule.enabled:
            assert drops[name] > 0, f"no document of the set tests {name}"
            assert wrong[name] <= 0.05 * drops[name], name
    for kind, (_, rules) in BAD.items():
        of_kind = [measured for one, measured in zip(BAD_DOCUMENTS, bad, strict=True) if one.kind == kind]
        found = sum(any(rule in measured.failed for rule in rules) for measured in of_kind)
        assert found >= 0.9 * len(of_kind), kind


@pytest.mark.parametrize("kind", OPTIONAL)
def test_hate_speech_and_code_are_dropped_on_request_only(kind):
    (rule,) = OPTIONAL[kind][1]
    labelled = bad_documents(30, seed=3, kinds={kind: OPTIONAL[kind]})
    assert not any(rule in one.failed for one in measure(labelled))
    on_request = measure(labelled, **{rule: Threshold(enabled=True)})
    assert sum(rule in one.failed for one in on_request) >= 0.95 * len(labelled)
    wrong = measure(GOOD_DOCUMENTS, **{rule: Threshold(enabled=True)})
    assert sum(rule in one.failed for one in wrong) <= 0.02 * len(wrong)


def test_a_document_scores_the_same_alone_and_among_others(good, bad):
    labelled = [*GOOD_DOCUMENTS, *BAD_DOCUMENTS]
    together = [*good, *bad]
    for place in range(0, len(labelled), 7):
        (alone,) = measure([labelled[place]])
        assert alone.scores == together[place].scores
        assert alone.failed == together[place].failed
