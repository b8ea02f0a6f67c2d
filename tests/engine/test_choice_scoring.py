"""Continuations behind a shared context score as each text alone does, whatever is shared, cut or batched."""

import dataclasses

import pytest
import torch
from tiny import TINY, tiny_model

from redwhale.engine.choice_scoring import TokenRequest, score_continuations
from redwhale.model import Llama, PackedDocuments
from redwhale.model.rope_scaling import RoPEScaling

LIMIT = TINY.max_position_embeddings


def requests(seed=0):
    """Groups with continuations of 1 to 9 tokens, some alike at their start, and texts longer than the context."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return tuple(torch.randint(3, TINY.vocab_size, (count,), generator=generator).tolist())

    made = []
    for length in (1, 5, 30, LIMIT - 4, LIMIT + 20):
        context, common = ids(length), ids(2)
        made += [TokenRequest(context, common + ids(count)) for count in (1, 3, 7)]
        made += [TokenRequest(context, ids(1)), TokenRequest(context, ids(1))]
    return made


@torch.inference_mode()
def alone(model, request):
    """(ln p, greedy) from the logits of one text by itself, in fp64."""
    text = (request.context + request.continuation)[-(LIMIT + 1) :]
    logits = model(torch.tensor(text[:-1]), PackedDocuments.from_lengths([len(text) - 1]))
    count = len(request.continuation)
    log_p, targets = logits[-count:].double().log_softmax(-1), torch.tensor(text[-count:])
    return float(log_p.gather(1, targets[:, None]).sum()), bool((log_p.argmax(-1) == targets).all())


def model_like(**changes):
    model = Llama(dataclasses.replace(TINY, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(20)  # attention that depends on positions
    return model


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_scores_equal_those_of_each_text_alone(share, max_tokens):
    assert_scores_are_those_of_each_text_alone(tiny_model(), share_prefixes=share, max_tokens=max_tokens)


def test_a_sliding_window_ends_within_the_shared_context():
    assert_scores_are_those_of_each_text_alone(model_like(model_type="mistral", sliding_window=9))


def test_positions_that_depend_on_the_texts_length_share_nothing():
    scaling = RoPEScaling(rope_type="dynamic", factor=LIMIT / 16)
    assert_scores_are_those_of_each_text_alone(model_like(rope_scaling=scaling, max_position_embeddings=16))


def test_a_context_without_a_token_predicts_nothing():
    with pytest.raises(ValueError, match="at least one token"):
        score_continuations(tiny_model(), [TokenRequest((5,), (6,)), TokenRequest((), (6, 7))])


def assert_scores_are_those_of_each_text_alone(model, **options):
    asked = requests()
    found = score_continuations(model, asked, **options)
    for request, score in zip(asked, found, strict=True):
        log_likelihood, greedy = alone(model, request)
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert score.greedy == greedy


def test_the_most_likely_token_is_greedy():
    model, context = tiny_model(), (5, 6, 7)
    logits = model(torch.tensor(context), PackedDocuments.from_lengths([3]))[-1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    found = score_continuations(model, [TokenRequest(context, (best,)), TokenRequest(context, (worst,))])
    assert [score.greedy for score in found] == [True, False]


def test_a_shared_context_passes_through_the_model_once():
    model, seen = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    context = tuple(range(10, 50))
    score_continuations(model, [TokenRequest(context, (3, 4)), TokenRequest(context, (5, 6, 7))])
    assert seen == [len(context) + 1 + 2]  # the last token of a continuation is not read
