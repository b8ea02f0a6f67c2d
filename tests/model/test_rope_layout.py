"""Checkpoints whose rotated rows are interleaved compute the same once their rows are reordered."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from redwhale.model import PackedDocuments, load_model, to_half, to_interleaved


def rotate_interleaved(x, position, theta):
    """Meta's own formulation: dimensions 2i and 2i + 1 as one complex number, turned by position / theta^(2i/D)."""
    size = x.shape[-1]
    turn = torch.polar(torch.tensor(1.0).double(), position * theta ** (-torch.arange(0, size, 2).double() / size))
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)


def rotate_half(x, position, theta):
    size = x.shape[-1]
    angles = position * theta ** (-torch.arange(0, size, 2).double() / size)
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def test_scores_of_interleaved_projections_survive_the_reordering():
    heads, size, hidden = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    wq, wk = torch.randn(2, heads * size, hidden, generator=generator).double()
    x = torch.randn(2, hidden, generator=generator).double()
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        meta = rotate_interleaved(wq[rows] @ x[0], 7, 1e4) @ rotate_interleaved(wk[rows] @ x[1], 3, 1e4)
        q, k = to_half(wq, size)[rows] @ x[0], to_half(wk, size)[rows] @ x[1]
        torch.testing.assert_close(rotate_half(q, 7, 1e4) @ rotate_half(k, 3, 1e4), meta)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, None), (8, 8), (8, 4), (2, None)])
def test_the_two_orders_are_inverse_and_leave_unrotated_rows(head_dim, rotary_dim):
    rows = torch.arange(3 * head_dim)
    reordered = to_half(rows, head_dim, rotary_dim)
    assert torch.equal(to_interleaved(reordered, head_dim, rotary_dim), rows)
    assert torch.equal(to_half(rows[:, None].expand(-1, 4), head_dim, rotary_dim)[:, 0], reordered)
    rotated = rotary_dim or head_dim
    first = reordered[:head_dim].tolist()
    expected = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]
    assert first == expected


def test_a_checkpoint_in_interleaved_order_gives_the_logits_of_the_one_in_half_order(variant, tmp_path, ids):
    folder = variant[1]
    expected = load_model(folder)
    config = expected.config
    tensors = {
        name: to_interleaved(tensor, config.head_dim, config.rotary_dim)
        if ".q_proj." in name or ".k_proj." in name
        else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    documents = PackedDocuments.from_lengths([len(ids)])
    with torch.no_grad():
        logits = expected(ids, documents)
        assert torch.equal(load_model(tmp_path, rope_layout="interleaved")(ids, documents), logits)
        assert not torch.allclose(load_model(tmp_path)(ids, documents), logits, atol=1e-2)
