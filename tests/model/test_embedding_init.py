"""New vocabulary rows follow their method's definition, and an extended checkpoint keeps every old bit."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redwhale.model import (
    CheckpointError,
    NewVocabulary,
    PackedDocuments,
    RowFinish,
    extend_checkpoint,
    fill_rows,
    load_model,
    new_rows,
)
from redwhale.model.checkpoint import write_checkpoint
from redwhale.model.row_collisions import TOLERANCE, coinciding

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECES = [[5], [7, 7, 9], [299, 0, 3, 12], [250, 251]]
NEW = NewVocabulary(PIECES)


def base_rows(dtype=torch.float32):
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decomposition_averages_the_rows_of_the_base_pieces(dtype):
    rows, decompositions = base_rows(dtype), [[5], [7, 7, 9], [39, 0, 3, 12, 8]]
    actual = new_rows(rows, NewVocabulary(decompositions), "decomposition", torch.Generator()).rows
    assert actual.dtype == dtype
    for row, ids in zip(actual, decompositions, strict=True):
        for column in range(16):
            mean = sum(float(rows[i, column]) for i in ids) / len(ids)
            # Rounded once: half a unit in the last place of bf16, a few of fp32.
            assert float(row[column]) == pytest.approx(mean, rel=2**-8 if dtype == torch.bfloat16 else 1e-6, abs=1e-7)
    assert torch.equal(actual[0], rows[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_averages_all_base_rows(dtype):
    rows = base_rows(dtype)
    actual = new_rows(rows, NewVocabulary([[1], [2, 3]]), "mean", torch.Generator()).rows
    assert actual.dtype == dtype
    for column in range(16):
        mean = sum(float(value) for value in rows[:, column]) / 40
        assert actual[:, column].tolist() == pytest.approx(
            [mean, mean], rel=2**-8 if dtype == torch.bfloat16 else 1e-5, abs=1e-7
        )


def test_random_rows_have_the_spread_of_the_base_and_come_from_the_generator():
    rows = base_rows() * 0.02 + 1.0  # an offset must not count as spread
    drawn = [
        new_rows(rows, NewVocabulary([[0]] * 500), "random", torch.Generator().manual_seed(s)).rows for s in (4, 4, 5)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    mean = float(rows.double().mean())
    variance = sum((float(v) - mean) ** 2 for v in rows.flatten()) / (rows.numel() - 1)
    # 8,000 draws: the standard deviation is known to 0.8%, the mean to 0.0002.
    assert float(drawn[0].std()) == pytest.approx(variance**0.5, rel=0.04)
    assert float(drawn[0].mean()) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("method", ["decomposition", "mean", "random"])
def test_no_new_pieces_give_no_rows(method):
    assert new_rows(base_rows(), NewVocabulary([]), method, torch.Generator()).rows.shape == (0, 16)


def test_impossible_rows_are_refused():
    with pytest.raises(CheckpointError, match="decomposes into no base token"):
        new_rows(base_rows(), NewVocabulary([[1], []]), "decomposition", torch.Generator())
    with pytest.raises(CheckpointError, match="unknown initialisation 'zeros'"):
        new_rows(base_rows(), NewVocabulary([[1]]), "zeros", torch.Generator())  # type: ignore[arg-type]


def test_an_extended_checkpoint_keeps_old_rows_and_all_other_tensors_bit_identical(variant, tmp_path):
    _, folder = variant
    extra = tmp_path / "tokenizer.model"
    extra.write_bytes(b"pieces")
    extend_checkpoint(folder, tmp_path / "extended", NEW, extra_files=[extra])
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "extended/model.safetensors")
    assert after.keys() == before.keys()  # a tied base has no head, and gets none
    for name, tensor in after.items():
        old = before[name]
        if name in (EMBEDDING, HEAD, "lm_head.bias"):
            assert tensor.shape == (304, *old.shape[1:])
            assert torch.equal(tensor[:300], old)
            for row, ids in zip(tensor[300:], PIECES, strict=True):
                torch.testing.assert_close(row, sum(old[i] for i in ids) / len(ids), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, old), name
    assert (tmp_path / "extended/tokenizer.model").read_bytes() == b"pieces"
    assert load_model(tmp_path / "extended").config.vocab_size == 304


def test_old_tokens_keep_their_logits(variant, tmp_path, ids):
    _, folder = variant
    extend_checkpoint(folder, tmp_path / "extended", NEW)
    base, extended = load_model(folder), load_model(tmp_path / "extended")
    documents = PackedDocuments.from_lengths([len(ids)])
    hidden = extended.hidden_states(ids, documents)
    assert torch.equal(hidden, base.hidden_states(ids, documents))
    # The old part of the head as a product of its own: a wider product may add in another order.
    bias = None if extended.lm_head.bias is None else extended.lm_head.bias[:300]
    assert torch.equal(F.linear(hidden, extended.lm_head.weight[:300], bias), base(ids, documents))
    torch.testing.assert_close(extended(ids, documents)[:, :300], base(ids, documents), rtol=0, atol=1e-5)


def test_a_new_piece_gets_the_mean_of_the_logits_of_its_parts(base, tmp_path, ids):
    extend_checkpoint(base, tmp_path / "extended", NEW)
    logits = load_model(tmp_path / "extended")(ids, PackedDocuments.from_lengths([len(ids)]))
    expected = torch.stack([logits[:, piece].mean(-1) for piece in PIECES], -1)
    torch.testing.assert_close(logits[:, 300:], expected, rtol=0, atol=2e-5)


def test_transformers_loads_an_extended_checkpoint(variant, tmp_path):
    extend_checkpoint(variant[1], tmp_path / "extended", NEW)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    ids = torch.tensor([1, 300, 5, 303, 302, 9])
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        actual = load_model(tmp_path / "extended")(ids, PackedDocuments.from_lengths([len(ids)]))
    assert expected.shape == (6, 304)
    assert float((actual - expected).abs().max()) <= 1e-4


def test_embedding_and_head_follow_their_own_methods(base, tmp_path):
    extend_checkpoint(base, tmp_path / "extended", NEW, embedding="mean", head="random", seed=3)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "extended/model.safetensors")
    torch.testing.assert_close(after[EMBEDDING][300:], before[EMBEDDING].mean(0).expand(4, -1))
    assert float((after[HEAD][300:] - before[HEAD].mean(0)).abs().max()) > 0.1


def test_random_rows_depend_on_the_seed_and_the_matrix_and_not_on_the_file_order(base, tmp_path):
    reader_config = load_model(base).config
    tensors = load_file(base / "model.safetensors")
    write_checkpoint(tmp_path / "reversed", reader_config, reversed(tensors.items()), max_shard_bytes=50_000)
    drawn = {}
    for label, source, seed in (("a", base, 0), ("b", tmp_path / "reversed", 0), ("c", base, 1)):
        extend_checkpoint(source, tmp_path / label, NEW, embedding="random", head="random", seed=seed)
        drawn[label] = load_file(tmp_path / label / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(drawn["a"][name], drawn["b"][name])
        assert not torch.equal(drawn["a"][name][300:], drawn["c"][name][300:])
    spread = drawn["a"][EMBEDDING][300:] / drawn["a"][HEAD][300:]
    assert float(spread.std()) > 0.1  # not the same draw twice


def test_a_stored_copy_of_a_tied_head_does_not_come_untied(write_hf, tmp_path):
    write_hf(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    extend_checkpoint(tmp_path / "base", tmp_path / "extended", NEW, head="random")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight, load_model(tmp_path / "extended").lm_head.weight)


@pytest.mark.parametrize("outside", [300, 5000, -1])
def test_ids_outside_the_base_are_refused_before_anything_is_written(base, tmp_path, outside):
    with pytest.raises(CheckpointError, match=f"decomposes into token {outside}, .* only tokens 0 to 299"):
        extend_checkpoint(base, tmp_path / "extended", NewVocabulary([[1], [2, outside]]))
    assert list(tmp_path.iterdir()) == []


def test_a_base_whose_rows_and_configuration_disagree_is_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors[HEAD][:298].clone()
    write_checkpoint(tmp_path / "base", load_model(base).config, tensors.items())
    with pytest.raises(CheckpointError, match="lm_head.weight of .* has 298 rows, its config.json says 300"):
        extend_checkpoint(tmp_path / "base", tmp_path / "extended", NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_rows_of_a_padded_base_follow_its_tokens_and_padding_takes_no_part(base, tmp_path):
    """290 tokens in 300 rows: the new rows begin at 290, and huge padding rows change no statistic."""
    config, tensors = load_model(base).config, load_file(base / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        tensors[name][290:] = 1e6
    write_checkpoint(tmp_path / "padded", config, tensors.items())
    new = NewVocabulary([[5], [7, 9]])
    extend_checkpoint(tmp_path / "padded", tmp_path / "few", new, embedding="mean", head="random", first_new_row=290)
    many = NewVocabulary([[i] for i in range(15)])
    extend_checkpoint(tmp_path / "padded", tmp_path / "many", many, first_new_row=290)
    few, grown = (load_file(tmp_path / name / "model.safetensors") for name in ("few", "many"))
    for name in (EMBEDDING, HEAD):
        assert few[name].shape == (300, 64)
        assert torch.equal(few[name][:290], tensors[name][:290])
        assert torch.equal(few[name][292:], tensors[name][292:])
        assert grown[name].shape == (305, 64)
        assert torch.equal(grown[name][290:], tensors[name][:15])
    torch.testing.assert_close(few[EMBEDDING][290], tensors[EMBEDDING][:290].mean(0))
    assert float(few[HEAD][290:292].abs().max()) < 1.5
    with pytest.raises(CheckpointError, match="300 rows, its tokenizer 301 pieces"):
        extend_checkpoint(base, tmp_path / "never", new, first_new_row=301)


def test_norm_matching_gives_the_median_norm_and_variance_matching_the_base_spread():
    rows = base_rows() + 2.0
    vocabulary = NewVocabulary([[1, 2, 3], [4, 5]])
    norms = [sum(float(v) ** 2 for v in row) ** 0.5 for row in rows]
    by_norm = new_rows(rows, vocabulary, "decomposition", torch.Generator(), finish=RowFinish(match="norm")).rows
    assert by_norm.norm(dim=1).tolist() == pytest.approx([sorted(norms)[19]] * 2, rel=1e-5)
    plain = fill_rows(rows, vocabulary, "decomposition", torch.Generator()).rows
    torch.testing.assert_close(by_norm / by_norm.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))
    matched = new_rows(rows, vocabulary, "decomposition", torch.Generator(), finish=RowFinish(match="variance")).rows
    mean = rows.mean(0)
    spread = (sum(float((row - mean).square().sum()) for row in rows) / 40) ** 0.5
    assert (matched - mean).norm(dim=1).tolist() == pytest.approx([spread] * 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coinciding_rows_are_counted_and_moved_apart_by_little_noise(dtype):
    rows = base_rows(dtype)
    # The first equals base row 5, the third the second, whose parts come in another order.
    vocabulary = NewVocabulary([[5], [7, 9], [9, 7], [1, 2]])
    left = new_rows(rows, vocabulary, "decomposition", torch.Generator())
    assert (left.collisions, left.collisions_left) == (2, 2)
    broken = new_rows(rows, vocabulary, "decomposition", torch.Generator(), finish=RowFinish(break_collisions=0.05))
    assert (broken.collisions, broken.collisions_left) == (2, 0)
    moved = (broken.rows.float() - left.rows.float()).abs().amax(1)
    assert [float(value) > 0 for value in moved] == [True, False, True, False]
    assert float(moved.max()) < 0.05 * 5 * float(rows.float().std())


@pytest.mark.parametrize(("count", "size"), [(60, 16), (60, 200)])
def test_rows_that_differ_by_rounding_coincide_as_in_all_pairs(count, size):
    """Against every distance; 200 columns are more than the directions that pairs are first looked for in."""
    generator = torch.Generator().manual_seed(3)
    base, rows = torch.randn(80, size, generator=generator), torch.randn(count, size, generator=generator)
    rows[4] = base[7] * (1 + 1e-6)
    rows[9] = rows[2] + 5e-4 * rows[2].norm() * torch.nn.functional.normalize(rows[3], dim=0)
    rows[11] = rows[2] + 5e-3 * rows[2].norm() * torch.nn.functional.normalize(rows[3], dim=0)
    rows[20], rows[21] = rows[6], base[0]
    rows[30:33] = 0
    expected = []
    for number, row in enumerate(rows):
        others = torch.cat((base, rows[:number])).double()
        expected.append(bool(((others - row).norm(dim=1) <= TOLERANCE * float(row.norm())).any()))
    assert [i for i, found in enumerate(expected) if found] == [4, 9, 20, 21, 31, 32]
    assert coinciding(rows, base).tolist() == expected


def test_pieces_spelled_in_bytes_alone_can_take_a_method_of_their_own():
    surfaces = [b"\xea", b"\xb0", "가".encode(), b"a", b" "] + [b"x"] * 35
    vocabulary = NewVocabulary([[0, 1], [0, 3], [2, 3], [4, 0, 1], [4, 4]], surfaces)
    assert vocabulary.byte_only() == [True, False, False, True, False]
    rows = base_rows()
    made = new_rows(rows, vocabulary, "decomposition", torch.Generator(), finish=RowFinish(byte_only="mean"))
    assert (made.method, made.byte_only_method) == ("decomposition", "mean")
    torch.testing.assert_close(
        made.rows, torch.stack([rows.mean(0), *(rows[ids].mean(0) for ids in ([0, 3], [2, 3])), rows.mean(0), rows[4]])
    )
    assert made.weights is not None
    assert sorted(set(made.weights.owner.tolist())) == [1, 2, 4]
