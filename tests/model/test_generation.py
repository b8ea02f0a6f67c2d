"""Sampling draws from the nucleus and nothing else; generation ends where it should."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from redwhale.model import (
    GenerationError,
    PackedDocuments,
    generate,
    generate_batch,
    load_model,
    penalize_repetition,
    sample,
)


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


@pytest.mark.parametrize("top_p", [0.6, 1.0])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_an_impossible_token_is_not_drawn_by_the_outermost_random_numbers(monkeypatch, uniform, top_p):
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, generator: torch.full(size, uniform, dtype=dtype))
    logits = torch.tensor([-torch.inf, 0.1, 0.2, 0.3, -torch.inf])
    assert sample(logits, 0.7, top_p) in {1, 2, 3}


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


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "is empty"),
        ([5] * 161, "has 161 tokens, the model's context only 160"),
        ([1, 300], "has the token id 300, the model only 300 tokens"),
        ([1, -1], "has the token id -1, the model only 300 tokens"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_at_once(base, prompt, message):
    model = load_model(base)
    with pytest.raises(GenerationError, match=f"the prompt {message}"):
        generate(model, prompt)
    with pytest.raises(GenerationError, match=f"prompt 2 of 3 {message}"):
        generate_batch(model, [[1], prompt, [1]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_settings_out_of_range_are_refused_at_once(base, name, value):
    model = load_model(base)
    for call in (lambda: generate(model, [1], **{name: value}), lambda: generate_batch(model, [[1]], **{name: value})):
        with pytest.raises(GenerationError, match=f"{name} is {value}; it must be"):
            call()


def test_a_model_whose_logits_are_not_numbers_generates_nothing(base):
    model = load_model(base)
    model.model.norm.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match=r"the logits are not finite in torch\.float32"):
            list(generate(model, [1], temperature=temperature))


def test_generated_tokens_record_no_gradient(base):
    model = load_model(base).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved for backward"), lambda t: t):
        assert len(list(generate(model, [1, 2, 3], max_new_tokens=3))) == 3


# Repetition


def test_the_repetition_penalty_is_that_of_transformers():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 50, generator=generator)
    logits[0, 7] = 0.0
    ids = torch.randint(0, 50, (4, 20), generator=generator)
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.7, 1.0, 1.3, 2.5):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_penalized_greedy_text_equals_that_of_transformers(variant, ids, penalty):
    theirs, folder = variant
    prompt = ids[:12].tolist()
    theirs.generation_config.eos_token_id = None
    output = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=64,
        do_sample=False,
        repetition_penalty=penalty,
        pad_token_id=0,
    )
    model = load_model(folder)
    penalized = list(generate(model, prompt, max_new_tokens=64, repetition_penalty=penalty))
    assert penalized == output[0, len(prompt) :].tolist()
    assert penalized != list(generate(model, prompt, max_new_tokens=64))


def test_penalty_temperature_and_nucleus_come_in_the_order_of_transformers(base):
    model = load_model(base)
    prompt, draws = [1, 7, 9, 44, 7], 2000
    with torch.no_grad():
        logits = model(torch.tensor(prompt), PackedDocuments.from_lengths([len(prompt)]))[-1:]
    prompt.append(int(logits.argmax()))  # a likely token is among the penalized
    with torch.no_grad():
        logits = model(torch.tensor(prompt), PackedDocuments.from_lengths([len(prompt)]))[-1:]
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(1.4), TopPLogitsWarper(0.6)]
    )
    expected = torch.softmax(processors(torch.tensor([prompt]), logits), -1)[0]
    assert 3 <= int((expected > 0).sum()) < 100
    texts = generate_batch(
        model, [prompt] * draws, max_new_tokens=1, temperature=1.4, top_p=0.6, repetition_penalty=1.5
    )
    counts = torch.bincount(torch.tensor(texts)[:, 0], minlength=300)
    deviations = (draws * expected * (1 - expected)).sqrt()
    assert bool(((counts - draws * expected).abs() <= 4.5 * deviations + 1e-9).all())


# Several texts at once

PROMPT_LENGTHS = (12, 1, 30, 5, 12)


def prompts_of(ids: torch.Tensor) -> list[list[int]]:
    return [part.tolist() for part in ids.split(PROMPT_LENGTHS)]


SETTINGS = {
    "greedy": {},
    "greedy penalized": {"repetition_penalty": 1.2},
    "sampled": {"temperature": 1.3, "seed": 11},
    "sampled from a nucleus": {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.2, "seed": 11},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_batch_gives_each_prompt_the_text_it_gets_alone(variant, ids, settings):
    model = load_model(variant[1])
    prompts = prompts_of(ids)
    free = [list(generate(model, p, max_new_tokens=24, index=i, **settings)) for i, p in enumerate(prompts)]
    assert len({tuple(text) for text in free}) == len(prompts)
    assert generate_batch(model, prompts, max_new_tokens=24, **settings) == free
    # Texts that end one after the other, so that rows of the cache move.
    stops = {free[0][6], free[2][15], free[3][2]}
    alone = [
        list(generate(model, p, max_new_tokens=24, stop_ids=stops, index=i, **settings)) for i, p in enumerate(prompts)
    ]
    assert len({len(text) for text in alone}) >= 3
    assert generate_batch(model, prompts, max_new_tokens=24, stop_ids=stops, **settings) == alone


def test_a_batch_scales_each_text_by_its_own_length(write_hf, tmp_path, ids):
    write_hf(tmp_path, rope={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=20)
    model = load_model(tmp_path)
    prompts = prompts_of(ids)
    alone = [list(generate(model, prompt, max_new_tokens=35)) for prompt in prompts]
    assert generate_batch(model, prompts, max_new_tokens=35) == alone
    # Behind the shortest prompt the scaling begins on the way; elsewhere it is there from the start.
    assert len(prompts[1]) + 5 < model.config.max_position_embeddings < len(prompts[2])


def test_texts_of_a_batch_end_where_their_own_context_is_full(base):
    prompts = [[1] + [5] * 156, [1, 7], [1] + [9] * 159]
    lengths = [len(text) for text in generate_batch(load_model(base), prompts, max_new_tokens=30)]
    assert lengths == [4, 30, 1]


def test_what_memory_held_before_does_not_reach_a_batch(base, ids):
    model = load_model(base)
    prompts = prompts_of(ids)
    expected = generate_batch(model, prompts, max_new_tokens=10)
    torch.use_deterministic_algorithms(True)  # which fills uninitialised memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert generate_batch(model, prompts, max_new_tokens=10) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_text_can_be_ended_from_outside_while_the_others_go_on(base, ids):
    model = load_model(base)
    prompts = prompts_of(ids)
    free = generate_batch(model, prompts, max_new_tokens=12)
    calls = []

    def end(index: int, token: int) -> bool:
        calls.append((index, token))
        return index == 2 and len([i for i, _ in calls if i == 2]) == 4

    texts = generate_batch(model, prompts, max_new_tokens=12, on_token=end)
    assert texts == [text[:4] if index == 2 else text for index, text in enumerate(free)]
    assert [[token for i, token in calls if i == index] for index in range(len(prompts))] == texts


def test_the_streams_of_a_seed_differ(base):
    texts = generate_batch(load_model(base), [[1, 5]] * 6, max_new_tokens=20, temperature=1.5, seed=3)
    assert len({tuple(text) for text in texts}) == 6


def test_a_batch_of_nothing_is_nothing(base):
    assert generate_batch(load_model(base), []) == []
    assert generate_batch(load_model(base), [[1], [2, 3]], max_new_tokens=0) == [[], []]
