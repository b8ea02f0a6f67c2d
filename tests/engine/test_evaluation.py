import math

import pytest
import torch
from tiny import KOBEST, korean_texts

from redwhale.engine.choice_scoring import log_likelihoods
from redwhale.engine.evaluation import evaluate_text
from redwhale.engine.kobest import KOBEST_TASKS, read_task
from redwhale.model import load_model
from redwhale.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(finished):
    return finished.run_dir / "sft" / "model"


@pytest.fixture(scope="module")
def reference(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)


@torch.inference_mode()
def reference_log_probabilities(reference, ids):
    """ln p of ids[1:] under transformers, in fp64."""
    log_p = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
    return [float(log_p[i, token]) for i, token in enumerate(ids[1:])]


def test_bits_per_byte_equals_transformers_document_by_document(checkpoint, reference):
    tokenizer, texts = Tokenizer(checkpoint / "tokenizer.model"), korean_texts()[:3]
    window, nats, tokens = 50, 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for begin in range(0, len(ids) - 1, window):
            scores = reference_log_probabilities(reference, ids[begin : begin + window + 1])
            nats -= sum(scores)
            tokens += len(scores)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    result = evaluate_text(load_model(checkpoint), tokenizer, texts, window=window, batch_size=3)
    assert result.tokens == tokens
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)


def test_no_window_is_longer_than_the_models_context(checkpoint):
    """Positions behind it were never trained: the loss there says nothing about the text."""
    tokenizer, texts = Tokenizer(checkpoint / "tokenizer.model"), ["\n".join(korean_texts()[:12])]
    model = load_model(checkpoint)
    limit = model.config.max_position_embeddings
    assert len(tokenizer.encode(texts[0])) > 2 * limit
    assert evaluate_text(model, tokenizer, texts, window=4 * limit) == evaluate_text(
        model, tokenizer, texts, window=limit
    )


@pytest.mark.parametrize("task", KOBEST_TASKS)
def test_choice_log_likelihoods_equal_transformers(checkpoint, reference, task):
    tokenizer, items = Tokenizer(checkpoint / "tokenizer.model"), read_task(KOBEST, task)[:5]
    actual = log_likelihoods(load_model(checkpoint), tokenizer, items, max_tokens=200)
    for item, scores in zip(items, actual, strict=True):
        context = [tokenizer.bos_id, *tokenizer.encode(item.context)]
        for choice, score in zip(item.choices, scores, strict=True):
            whole = [tokenizer.bos_id, *tokenizer.encode(item.context + choice)]
            expected = sum(reference_log_probabilities(reference, whole)[len(context) - 1 :])
            assert score == pytest.approx(expected, abs=1e-3)
