"""Training the last rows of embedding and LM head: their gradients are those of the whole, nothing else moves."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from redwhale.kernels import AdamW8bit
from redwhale.model import CheckpointError, Llama, ModelConfig, PackedDocuments, save_model
from redwhale.model.phi import build_model

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
PHI = replace(TINY, model_type="phi", num_key_value_heads=4)
FIRST_EMBED, FIRST_HEAD = 70, 64
DOCUMENTS = PackedDocuments.from_lengths([11, 29])
IDS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))
TARGETS = IDS.roll(-1).masked_fill(torch.arange(40) == 10, -100)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(config: ModelConfig = TINY, dtype: torch.dtype = torch.float32, pad_vocab_to: int = 1) -> Llama:
    made = build_model(config, pad_vocab_to=pad_vocab_to)
    made.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger than at the start of training, so that no gradient is almost zero
        for parameter in made.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return made.to(dtype)


def backward(made: Llama, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    output = made.loss(ids, TARGETS, DOCUMENTS, **options)
    (output.loss_sum / 7).backward()
    return output.loss_sum.detach()


def full_gradients(config: ModelConfig, pad_vocab_to: int = 1, **options) -> dict[str, torch.Tensor]:
    """In float64 by plain autograd: PyTorch's embedding and cross-entropy over all logits."""
    made = model(config, pad_vocab_to=pad_vocab_to).double().requires_grad_()
    x = torch.nn.functional.embedding(IDS, made.model.embed_tokens.weight)
    made.model.embed_tokens.forward = lambda input, **_: x
    logits = made(IDS, DOCUMENTS)
    counted = TARGETS != -100
    loss = torch.nn.functional.cross_entropy(
        logits, TARGETS, reduction="sum", label_smoothing=options.get("label_smoothing", 0.0)
    )
    loss = loss + options.get("z_loss", 0.0) * logits.logsumexp(-1)[counted].square().sum()
    (loss / 7).backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


CASES = {
    "plain": (TINY, 1),
    "tied": (replace(TINY, tie_word_embeddings=True), 1),
    "padded": (TINY, 64),
    "tied padded": (replace(TINY, tie_word_embeddings=True), 64),
    "phi": (PHI, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activations", ["recompute-cheap", "full"])
def test_gradients_are_those_rows_of_the_full_gradient(case, activations):
    config, pad = CASES[case]
    tied = config.tie_word_embeddings
    options: dict[str, Any] = {"z_loss": 1e-2, "label_smoothing": 0.1}
    expected = full_gradients(config, pad, **options)
    made = model(config, pad_vocab_to=pad).requires_grad_(False)
    made.model.activations = activations
    trained = made.train_rows(FIRST_EMBED, FIRST_EMBED if tied else FIRST_HEAD)
    firsts = {EMBED: FIRST_EMBED} if tied else {EMBED: FIRST_EMBED, HEAD: FIRST_HEAD}
    assert list(trained) == [f"{name}[{first}:]" for name, first in firsts.items()]
    backward(made, **options)
    for (name, first), rows in zip(firsts.items(), trained.values(), strict=True):
        assert rows.shape == (97 - first, 32)  # not the padding rows
        assert rows.grad is not None
        torch.testing.assert_close(rows.grad.double(), expected[name][first:97], rtol=2e-4, atol=1e-5)
        assert expected[name][first:97].abs().max() > 1e-2
    assert all(parameter.grad is None for parameter in made.parameters())


def test_the_head_of_phi_trains_its_bias_beside_rows():
    expected = full_gradients(PHI)
    made = model(PHI).requires_grad_(False)
    assert made.lm_head.bias is not None
    made.lm_head.bias.requires_grad_()
    made.train_rows(None, FIRST_HEAD)
    backward(made)
    assert made.lm_head.bias.grad is not None
    torch.testing.assert_close(made.lm_head.bias.grad.double(), expected["lm_head.bias"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_all_other_rows_and_parameters_bit_identical(case):
    config, pad = CASES[case]
    made = model(config, torch.bfloat16, pad).requires_grad_(False)
    tied = config.tie_word_embeddings
    trained = made.train_rows(FIRST_EMBED, FIRST_EMBED if tied else FIRST_HEAD)
    before = copy.deepcopy(made.state_dict())
    optimizer = AdamW8bit(trained.values(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        backward(made)
        optimizer.step()
        optimizer.zero_grad()
    firsts = {EMBED: FIRST_EMBED, HEAD: FIRST_EMBED if tied else FIRST_HEAD}
    for name, value in made.state_dict().items():
        first = firsts.get(name, len(value))
        assert torch.equal(value[:first], before[name][:first]), name
        assert torch.equal(value[97:], before[name][97:]), name
        if name in firsts:
            assert (value[first:97] != before[name][first:97]).any(1).all(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [True, False])
def test_buffers_hold_the_sum_of_the_micro_batches_gradients(case, rows):
    config, pad = CASES[case]
    tied = config.tie_word_embeddings

    def prepared():
        made = model(config, pad_vocab_to=pad).requires_grad_(False)
        if rows:
            trained = made.train_rows(FIRST_EMBED, FIRST_EMBED if tied else FIRST_HEAD)
            return made, list(trained.values())
        weights = [made.model.embed_tokens.weight] if tied else [made.model.embed_tokens.weight, made.lm_head.weight]
        return made, [weight.requires_grad_() for weight in weights]

    batches = [IDS, IDS.flip(0), (IDS * 5) % 97]
    plain, plain_trained = prepared()
    for ids in batches:
        backward(plain, ids)
    buffered, trained = prepared()
    buffers = [torch.zeros(parameter.shape) for parameter in trained]
    buffered.set_gradient_buffers(buffers[0], None if tied else buffers[1])
    for ids in batches:
        backward(buffered, ids)
    for parameter, buffer, expected in zip(trained, buffers, plain_trained, strict=True):
        assert parameter.grad is None
        assert expected.grad is not None
        torch.testing.assert_close(buffer, expected.grad, rtol=1e-5, atol=1e-5)
    buffered.set_gradient_buffers(None, None)
    backward(buffered, batches[0])
    assert all(parameter.grad is not None for parameter in trained)


def test_buffers_of_bf16_rows_add_up_in_fp32():
    made = model(dtype=torch.bfloat16).requires_grad_(False)
    (rows,) = made.train_rows(None, FIRST_HEAD).values()
    buffer = torch.zeros(rows.shape)
    made.set_gradient_buffers(None, buffer)
    backward(made)
    once = buffer.clone()
    for _ in range(2):
        backward(made)
    torch.testing.assert_close(buffer, 3 * once, rtol=1e-6, atol=0)
    assert not torch.equal(once, once.bfloat16().float())


def test_none_undoes_it_and_nothing_is_registered(tmp_path):
    made = model().requires_grad_(False)
    names, state = [name for name, _ in made.named_parameters()], set(made.state_dict())
    trained = made.train_rows(FIRST_EMBED, FIRST_HEAD)
    assert [name for name, _ in made.named_parameters()] == names
    assert set(made.state_dict()) == state
    assert trained[f"{EMBED}[{FIRST_EMBED}:]"].data_ptr() == made.model.embed_tokens.weight[FIRST_EMBED:].data_ptr()
    save_model(made, tmp_path / "saved")
    assert made.train_rows(None, None) == {}
    made.requires_grad_()
    backward(made)
    assert made.lm_head.weight.grad is not None
    assert made.lm_head.weight.grad[:FIRST_HEAD].any()
    assert all(rows.grad is None for rows in trained.values())


def test_only_one_of_the_two_may_train_rows_while_the_other_trains_whole():
    made = model().requires_grad_(False)
    made.lm_head.weight.requires_grad_()
    assert list(made.train_rows(FIRST_EMBED, None)) == [f"{EMBED}[{FIRST_EMBED}:]"]
    backward(made)
    expected = full_gradients(TINY)[HEAD]
    assert made.lm_head.weight.grad is not None
    torch.testing.assert_close(made.lm_head.weight.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_matrix_may_be_named_by_its_head():
    made = model(replace(TINY, tie_word_embeddings=True)).requires_grad_(False)
    assert list(made.train_rows(None, FIRST_HEAD)) == [f"{EMBED}[{FIRST_HEAD}:]"]


def test_rows_that_are_not_there_are_refused():
    with pytest.raises(CheckpointError, match="from row 97 on in a vocabulary of 97"):
        model(pad_vocab_to=64).train_rows(97, None)
    tied = model(replace(TINY, tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="row 3 or 4"):
        tied.train_rows(3, 4)
    with pytest.raises(ValueError, match="one buffer"):
        tied.set_gradient_buffers(torch.zeros(97, 32), torch.zeros(97, 32))


def test_a_matrix_that_trains_whole_as_well_is_refused():
    made = model().requires_grad_()
    made.train_rows(FIRST_EMBED, None)
    with pytest.raises(ValueError, match="must not require a gradient itself"):
        backward(made)
