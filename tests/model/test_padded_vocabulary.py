"""Padding rows of embedding and head are nowhere to be seen: not in logits, loss, gradients or checkpoints."""

import pytest
import torch

from redwhale.model import PackedDocuments, generate, load_model, save_model

DOCUMENTS = PackedDocuments.from_lengths([60])


@pytest.fixture
def pair(variant):
    """The same checkpoint without and with padding, its padding rows filled with what would win every argmax."""
    plain, padded = load_model(variant[1]), load_model(variant[1], pad_vocab_to=128)
    assert padded.lm_head.out_features == 384
    with torch.no_grad():
        padded.lm_head.weight[300:] = 100.0
    return plain.requires_grad_(), padded.requires_grad_()


def test_logits_and_greedy_text_are_those_without_padding(pair, ids):
    plain, padded = pair
    actual = padded(ids, DOCUMENTS)
    assert actual.shape == (60, 300)
    torch.testing.assert_close(actual, plain(ids, DOCUMENTS), rtol=0, atol=1e-5)
    prompt = ids[:10].tolist()
    assert list(generate(padded, prompt, max_new_tokens=20)) == list(generate(plain, prompt, max_new_tokens=20))


def test_loss_and_gradients_are_those_without_padding_and_padding_rows_get_none(pair, ids):
    results = []
    for model in pair:
        output = model.loss(ids, ids.roll(-1), DOCUMENTS, chunk_tokens=7)
        output.loss_sum.backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, plain_grads), (padded, padded_grads) = results
    torch.testing.assert_close(padded.loss_sum, plain.loss_sum)
    assert int(padded.correct) == int(plain.correct)
    for name, gradient in padded_grads.items():
        rows = plain_grads[name].shape[0]
        torch.testing.assert_close(gradient[:rows], plain_grads[name], rtol=1e-4, atol=1e-5, msg=name)
        assert not gradient[rows:].any()


def test_a_saved_checkpoint_holds_no_padding(pair, variant, tmp_path):
    save_model(pair[1], tmp_path / "saved")
    original, saved = load_model(variant[1]).state_dict(), load_model(tmp_path / "saved").state_dict()
    assert original.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, original[name]), name
