"""Rows that look at hidden states: the unigram prior meets its equations, distillation comes nearer the base."""

from dataclasses import replace

import torch

from redwhale.model import Llama, ModelConfig, NewVocabulary, PackedDocuments, fill_rows, load_model, write_extended
from redwhale.model.checkpoint import save_model
from redwhale.model.init_fit import (
    HiddenStatistics,
    add_unigram_prior,
    extend_in_memory,
    fit_input_rows,
    hidden_statistics,
    spelled_out,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DECOMPOSITIONS = [[5, 6], [7, 8, 9], [10, 11]]
FIRST = 40


def model(tied=False):
    config = ModelConfig(
        vocab_size=FIRST,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    made = Llama(config)
    made.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(15)  # hidden states that differ
    return made.requires_grad_(False).eval()


def decomposed(made):
    names = [EMBEDDING] if made.config.tie_word_embeddings else [EMBEDDING, HEAD]
    return {
        name: fill_rows(
            made.get_parameter(name), NewVocabulary(DECOMPOSITIONS), "decomposition", torch.Generator()
        ).rows
        for name in names
    }


def documents(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, FIRST + 3, (12,), generator=generator) for _ in range(count)]


def hidden_of(made, ids):
    with torch.no_grad():
        return made.hidden_states(ids, PackedDocuments.from_lengths([len(ids)]))


def test_a_model_extended_in_memory_is_the_extended_checkpoint(tmp_path):
    for tied in (False, True):
        made = model(tied)
        save_model(made, tmp_path / "base")
        rows = decomposed(made)
        write_extended(tmp_path / "base", tmp_path / "extended", rows)
        extend_in_memory(made, rows)
        stored, ids = load_model(tmp_path / "extended"), documents()[0]
        assert made.config == replace(stored.config)
        with torch.no_grad():
            texts = PackedDocuments.from_lengths([len(ids)])
            assert torch.equal(made(ids, texts), stored(ids, texts))


def test_hybrid_ids_are_spelled_out_and_aligned():
    spelled, ends = spelled_out(torch.tensor([4, 40, 41, 2]), FIRST, DECOMPOSITIONS)
    assert spelled.tolist() == [4, 5, 6, 7, 8, 9, 2]
    assert ends.tolist() == [0, 2, 5, 6]


def test_distillation_lowers_the_distance_to_the_base_and_moves_new_rows_alone():
    made, base = model(), model()
    extend_in_memory(made, decomposed(made))

    def distance(texts):
        total = 0.0
        for ids in texts:
            spelled, ends = spelled_out(ids, FIRST, DECOMPOSITIONS)
            total += float((hidden_of(made, ids) - hidden_of(base, spelled)[ends]).square().mean())
        return total

    unseen = documents(10, seed=9)
    before, start = distance(unseen), made.model.embed_tokens.weight.detach().clone()
    rows = fit_input_rows(made, DECOMPOSITIONS, documents(), first_new_row=FIRST, steps=60, lr=0.05)
    assert distance(unseen) < 0.95 * before
    assert torch.equal(made.model.embed_tokens.weight[:FIRST], start[:FIRST])
    assert torch.equal(made.model.embed_tokens.weight[FIRST:], rows)
    assert float((rows - start[FIRST:]).abs().min(1).values.max()) > 0


def test_a_step_of_distillation_goes_down_the_slope_of_the_squared_distance():
    """Against differences of the loss, written out token by token; Adam's first step is of one length everywhere."""
    made, base, text = model(), model(), documents(1)[0]
    extend_in_memory(made, decomposed(made))
    weight, scale = made.model.embed_tokens.weight, float(base.model.embed_tokens.weight.std())
    spelling, wanted = [], []
    for token in text.tolist():
        spelling += DECOMPOSITIONS[token - FIRST] if token >= FIRST else [token]
        wanted.append(hidden_of(base, torch.tensor(spelling))[-1].double())
    wanted = torch.stack(wanted)

    def loss():
        return float((hidden_of(made, text).double() - wanted).square().mean() / wanted.square().mean())

    slopes = torch.zeros(3, 16)
    for row in range(3):
        for column in range(16):
            start = float(weight[FIRST + row, column])
            values = []
            for step in (0.01, -0.01):
                with torch.no_grad():
                    weight[FIRST + row, column] = start + step * scale
                values.append(loss())
            with torch.no_grad():
                weight[FIRST + row, column] = start
            slopes[row, column] = values[0] - values[1]
    before = weight[FIRST:].clone()
    moved = fit_input_rows(made, DECOMPOSITIONS, [text], first_new_row=FIRST, steps=1, lr=0.05) - before
    steep = slopes.abs() > 0.05 * slopes.abs().max()
    assert int(steep.sum()) > 10
    torch.testing.assert_close(moved[steep], -slopes[steep].sign() * 0.05 * scale, rtol=1e-2, atol=0)


def test_hidden_statistics_are_the_moments_of_all_positions():
    made = model()
    extend_in_memory(made, decomposed(made))
    texts = documents(4)
    states = torch.cat([hidden_of(made, ids) for ids in texts]).double()
    old = states @ made.lm_head.weight[:FIRST].double().T
    states = torch.cat((states, old.logsumexp(1, keepdim=True)), 1)
    found = hidden_statistics(made, texts, FIRST)
    torch.testing.assert_close(found.mean, states.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.second, states.T @ states / len(states), rtol=1e-5, atol=1e-6)


def normal_states(mean, seed):
    """States and a ln Σ exp(old logits) that goes with the first of their directions, all normal."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(60_000, 8, generator=generator).double() * 0.3 + mean
    log_mass = 5 + 0.5 * (states[:, :1] - mean[0]) + 0.1 * torch.randn(60_000, 1, generator=generator).double()
    wide = torch.cat((states, log_mass), 1)
    return wide, HiddenStatistics(wide.mean(0), wide.T @ wide / len(wide))


def mean_odds(states, rows):
    """Mean of exp(logit) / Σ exp(old logits) for each row, counted one by one."""
    return (states[:, :-1] @ rows.double().T - states[:, -1:]).exp().mean(0)


def test_a_prior_gives_tokens_their_frequency_on_one_text_and_little_mass_on_the_other():
    """On normal states, where the mean of a log-normal variable is exact."""
    target_states, target = normal_states(torch.tensor([2.0, 0, 0, 1, 0, 0, 0, 0]), 0)
    other_states, other = normal_states(torch.tensor([0.0, 2, 0, 1, 0, 0, 0, 0]), 1)
    frequencies = torch.tensor([0.1, 0.02, 0.005])
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    shifted = add_unigram_prior(rows, frequencies, target, other, other_mass=1e-3, ridge=1e-9)
    # A share f of all tokens is f / (1 − Σf) of the old ones.
    expected = (frequencies / (1 - 0.125)).double()
    torch.testing.assert_close(mean_odds(target_states, shifted), expected, rtol=0.05, atol=0)
    expected_other = (frequencies / 0.125 * 1e-3 / (1 - 1e-3)).double()
    torch.testing.assert_close(mean_odds(other_states, shifted), expected_other, rtol=0.05, atol=0)
    # Without the other text, its probabilities are free, and the target's are still met.
    alone = add_unigram_prior(rows, frequencies, target, ridge=1e-9)
    torch.testing.assert_close(mean_odds(target_states, alone), expected, rtol=0.05, atol=0)


def test_a_prior_stays_bounded_for_rows_whose_variance_leaves_no_solution():
    _, target = normal_states(torch.tensor([2.0, 0, 0, 1, 0, 0, 0, 0]), 0)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)) * 100
    shifted = add_unigram_prior(rows, torch.tensor([0.1, 0.02, 0.005]), target)
    assert float((shifted - rows).norm(dim=1).max()) < 2 * float(rows.norm(dim=1).max())
