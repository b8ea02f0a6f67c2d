"""Every method agrees with a slow and obvious computation on a small vocabulary."""

import itertools
import math

import pytest
import torch

from redwhale.model import CheckpointError, NewVocabulary, fill_rows
from redwhale.model.init_similarity import cooccurrence_vectors, pursuit_weights, second_vocabulary_vectors, sparsemax

DECOMPOSITIONS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
SURFACES = [b"x" * (1 + i % 4) for i in range(12)]


def rows_of(count=12, size=6, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def slow(rows, weigh):
    """Weighted means of Python lists in double precision; `weigh(ids)` gives unnormalised weights."""
    made = []
    for ids in DECOMPOSITIONS:
        weights = weigh(ids)
        made.append(
            [
                sum(w * float(rows[i, c]) for w, i in zip(weights, ids, strict=True)) / sum(weights)
                for c in range(rows.shape[1])
            ]
        )
    return torch.tensor(made)


@pytest.mark.parametrize(
    ("method", "matrix", "weigh"),
    [
        ("decomposition", "embedding", lambda ids: [1] * len(ids)),
        ("first", "head", lambda ids: [1] + [0] * (len(ids) - 1)),
        ("length-weighted", "head", lambda ids: [1 + i % 4 for i in ids]),
        ("position-weighted", "embedding", lambda ids: list(range(1, len(ids) + 1))),
        ("position-weighted", "head", lambda ids: list(range(len(ids), 0, -1))),
        ("exponential", "embedding", lambda ids: [math.exp(2 * k) for k in range(len(ids))]),
        ("exponential", "head", lambda ids: [math.exp(-2 * k) for k in range(len(ids))]),
    ],
)
def test_weighted_means_of_sub_tokens(method, matrix, weigh):
    rows = rows_of()
    filled = fill_rows(rows, NewVocabulary(DECOMPOSITIONS, SURFACES), method, torch.Generator(), matrix=matrix)
    torch.testing.assert_close(filled.rows, slow(rows, weigh), rtol=1e-5, atol=1e-6)
    assert filled.weights is not None
    sums = torch.zeros(3).index_add_(0, filled.weights.owner, filled.weights.weights)
    torch.testing.assert_close(sums, torch.ones(3))


def test_multivariate_rows_have_the_mean_and_covariance_of_the_base():
    rows = rows_of(400, 5) @ rows_of(5, 5, seed=1) + torch.arange(5.0)  # correlated, off zero
    drawn = fill_rows(rows, NewVocabulary([[0]] * 40_000), "multivariate", torch.Generator().manual_seed(0)).rows
    expected = torch.cov(rows.double().T)
    scale = float(expected.diagonal().max())
    assert float((torch.cov(drawn.double().T) - expected).abs().max()) < 0.03 * scale
    assert float((drawn.mean(0) - rows.mean(0)).abs().max()) < 0.03 * scale**0.5


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Against every support: the projection onto the simplex is the best of the projections onto its faces."""
    scores = rows_of(20, 5, seed=3).double()
    for row, found in zip(scores, sparsemax(scores), strict=True):
        candidates = []
        for size in range(1, 6):
            for support in itertools.combinations(range(5), size):
                point = torch.zeros(5).double()
                chosen = list(support)
                point[chosen] = row[chosen] + (1 - row[chosen].sum()) / size
                if float(point.min()) >= 0:
                    candidates.append(point)
        best = min(candidates, key=lambda point: float((point - row).square().sum()))
        torch.testing.assert_close(found, best)


def test_focus_takes_similar_tokens_by_sparsemax_of_cosines_and_decomposes_what_has_no_vector():
    rows, similarity = rows_of(), rows_of(15, 4, seed=5)
    similarity[13] = 0
    similarity[2] = 0  # a base token without a vector is never taken
    vocabulary = NewVocabulary(DECOMPOSITIONS, similarity=similarity)
    filled = fill_rows(rows, vocabulary, "focus", torch.Generator())
    torch.testing.assert_close(filled.rows[1], rows[[1, 5]].mean(0))
    for number in (0, 2):
        base = [i for i in range(12) if i != 2]
        cosines = torch.stack([torch.cosine_similarity(similarity[12 + number], similarity[i], dim=0) for i in base])
        expected = sum(w * rows[i] for w, i in zip(sparsemax(cosines), base, strict=True))
        torch.testing.assert_close(filled.rows[number], expected, rtol=1e-4, atol=1e-5)
    assert filled.weights is not None
    assert 2 not in filled.weights.ids[filled.weights.owner != 1].tolist()


def test_matching_pursuit_picks_greedily_and_solves_least_squares():
    similarity = rows_of(33, 16, seed=7)
    owner, ids, weights = pursuit_weights(similarity, 3, sparsity=4)
    base = similarity[:30].double() / similarity[:30].double().norm(dim=1, keepdim=True)
    for number in range(3):
        target = similarity[30 + number].double()
        picked, residual = [], target
        for _ in range(4):
            matches = [abs(float(residual @ row)) if i not in picked else -1 for i, row in enumerate(base)]
            picked.append(matches.index(max(matches)))
            atoms = similarity[picked].double()
            solved = torch.linalg.lstsq(atoms.T, target[:, None]).solution[:, 0]
            residual = target - solved @ atoms
        assert ids[owner == number].tolist() == picked
        torch.testing.assert_close(weights[owner == number].double(), solved, rtol=1e-3, atol=1e-4)


def test_token_vectors_factorise_positive_pointwise_mutual_information():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 9, (40,), generator=generator) for _ in range(12)]
    vectors = cooccurrence_vectors(documents, 11, dimensions=9, window=2)
    counts = torch.zeros(11, 11).double()
    for ids in documents:
        for i, j in itertools.product(range(40), repeat=2):
            if 0 < abs(i - j) <= 2:
                counts[ids[i], ids[j]] += 1
    token = counts.sum(1)
    information = (counts * counts.sum() / (token[:, None] * token[None, :])).log().nan_to_num(neginf=0).clamp_min(0)
    left, values, _ = torch.linalg.svd(information)
    expected = torch.nn.functional.normalize(left[:, :9] * values[:9].sqrt(), dim=1)
    # Singular vectors have no sign of their own: the products of the vectors are what they mean.
    torch.testing.assert_close(vectors.double() @ vectors.T.double(), expected @ expected.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(vectors[9:], torch.zeros(2, 9))
    assert torch.equal(vectors, cooccurrence_vectors(documents, 11, dimensions=9, window=2))


def test_vectors_of_a_second_vocabulary_are_found_by_bytes_and_else_by_what_spells_it():
    second = rows_of(4, 3)
    # The base has b and its byte piece, and a special token; the new tokens are 가, which the second has, and 나.
    own = [b"b", b"", b"z", b"b", "가".encode(), "나".encode()]
    found = second_vocabulary_vectors(second, [b"a", b"b", "가".encode(), b""], own, [[2], [0, 3]])
    zero = torch.zeros(3)
    expected = torch.stack([zero, zero, zero, second[1], second[2], (second[0] + second[3]) / 2])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("method", "words"), [("focus", "vectors"), ("omp", "vectors"), ("length-weighted", "bytes")])
def test_methods_say_what_they_lack(method, words):
    with pytest.raises(CheckpointError, match=f'"{method}" needs .*{words}'):
        fill_rows(rows_of(), NewVocabulary(DECOMPOSITIONS), method, torch.Generator())


def test_a_corpus_without_neighbours_gives_no_token_vectors():
    with pytest.raises(CheckpointError, match="no two neighbouring tokens"):
        cooccurrence_vectors([torch.tensor([1])], 5)
