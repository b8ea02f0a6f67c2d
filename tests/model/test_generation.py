"""Sampling draws from the nucleus and nothing else; generation ends where it should."""

import pytest
import torch

from redwhale.model import CheckpointError, PackedDocuments, generate, load_model, sample


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Token probabilities of nucleus sampling, by going through the tokens one by one in float64."""
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    weights = [float(w) for w in torch.exp(scaled - scaled.max())]
    total = sum(weights)
    kept: dict[int, float] = {}
    for token in sorted(range(len(weights)), key=lambda i: -weights[i]):
        kept[token] = weights[token] / total
        if sum(kept.values()) >= top_p:
            break
    mass = sum(kept.values())
    return {token: p / mass for token, p in kept.items()}


LOGITS = [0.3, 2.0, -1.0, 1.1, -4.0, 1.7, 0.0, -0.6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_most_likely_token(dtype):
    assert sample(torch.tensor(LOGITS, dtype=dtype), 0.0, 0.1) == 1
    assert sample(torch.tensor([1.0, 5.0, 5.5, -1.0], dtype=dtype), 0.0, 1.0) == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95, 1.0])
def test_samples_follow_the_brute_force_nucleus(temperature, top_p):
    generator = torch.Generator().manual_seed(1)
    draws = 2000
    counts = torch.zeros(len(LOGITS))
    for _ in range(draws):
        counts[sample(torch.tensor(LOGITS), temperature, top_p, generator)] += 1
    expected = nucleus(LOGITS, temperature, top_p)
    for token in range(len(LOGITS)):
        p = expected.get(token, 0.0)
        # Four standard deviations of a binomial count; a token outside the nucleus may not come at all.
        assert abs(float(counts[token]) - draws * p) <= 4 * (draws * p * (1 - p)) ** 0.5, token


def test_the_nucleus_is_never_empty():
    assert nucleus(LOGITS, 1.0, 0.0) == {1: 1.0}
    assert {sample(torch.tensor(LOGITS), 1.0, 0.0) for _ in range(20)} == {1}


def test_a_low_temperature_nears_the_most_likely_token():
    generator = torch.Generator().manual_seed(0)
    assert {sample(torch.tensor(LOGITS), 1e-3, 1.0, generator) for _ in range(50)} == {1}


def test_sampled_text_is_a_function_of_the_seed(base):
    model = load_model(base)
    texts = [tuple(generate(model, [1, 5], max_new_tokens=20, temperature=1.5, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_a_greedy_token_is_the_argmax_of_the_full_pass(base, ids):
    model = load_model(base)
    text = ids[:5].tolist()
    for token in list(generate(model, text, max_new_tokens=10)):
        logits = model(torch.tensor(text), PackedDocuments.from_lengths([len(text)]))
        assert token == int(logits[-1].argmax())
        text.append(token)


def test_generation_ends_before_a_stop_id(base):
    model = load_model(base)
    free = list(generate(model, [1, 7, 9], max_new_tokens=30))
    stop = free[10]
    assert list(generate(model, [1, 7, 9], max_new_tokens=30, stop_ids={stop})) == free[: free.index(stop)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_generation_yields_no_more_than_asked_for(base, count):
    assert len(list(generate(load_model(base), [1, 7, 9], max_new_tokens=count))) == count


@pytest.mark.parametrize("prompt_tokens", [155, 160])
def test_generation_ends_where_the_context_is_full(base, prompt_tokens):
    model = load_model(base)
    assert model.config.max_position_embeddings == 160
    prompt = [1] + [5] * (prompt_tokens - 1)
    # Position 159 is the last that can be read, and it predicts one more token.
    assert len(list(generate(model, prompt, max_new_tokens=100))) == 161 - prompt_tokens


def test_prompts_that_cannot_be_continued_are_refused(base):
    model = load_model(base)
    with pytest.raises(CheckpointError, match="the prompt is empty"):
        list(generate(model, []))
    with pytest.raises(CheckpointError, match="the prompt has 161 tokens, the model's context only 160"):
        list(generate(model, [5] * 161))


def test_generated_tokens_record_no_gradient(base):
    model = load_model(base).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved for backward"), lambda t: t):
        assert len(list(generate(model, [1, 2, 3], max_new_tokens=3))) == 3
