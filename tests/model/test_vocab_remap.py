import pytest
import torch
from tiny import TINY, tiny_model

from redwhale.model import CheckpointError, PackedDocuments, extend_checkpoint, load_model, save_model
from redwhale.model.init_methods import NewVocabulary
from redwhale.model.vocab_remap import remap_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(tiny_model(), folder)
    return folder


def logits(folder, ids):
    with torch.inference_mode():
        return load_model(folder)(torch.tensor(ids), PackedDocuments.from_lengths([len(ids)]))


def test_rows_of_kept_tokens_give_the_same_bits(checkpoint, tmp_path):
    kept = [i for i in range(TINY.vocab_size) if i < 8 or i % 3]
    remap_checkpoint(checkpoint, tmp_path / "m", kept)
    new = list(range(0, len(kept), 5))
    assert torch.equal(logits(tmp_path / "m", new), logits(checkpoint, [kept[i] for i in new])[:, kept])


def test_extending_keeps_the_logits_of_old_tokens_to_the_bit(checkpoint, tmp_path):
    extend_checkpoint(checkpoint, tmp_path / "m", NewVocabulary([[3, 4]] * 100))
    ids = list(range(3, 40))
    assert torch.equal(logits(tmp_path / "m", ids)[:, : TINY.vocab_size], logits(checkpoint, ids))


def test_new_rows_are_the_mean(checkpoint, tmp_path):
    remap_checkpoint(checkpoint, tmp_path / "m", [*range(TINY.vocab_size), None])
    rows = load_model(tmp_path / "m").model.embed_tokens.weight
    assert torch.allclose(rows[-1], rows[:-1].mean(0))


def test_ids_outside_and_left_out_specials_are_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="has no token 99999, only 0 to"):
        remap_checkpoint(checkpoint, tmp_path / "m", [0, 1, 2, 99_999])
    with pytest.raises(CheckpointError, match="bos_token_id of .* is token 1, which the new vocabulary leaves out"):
        remap_checkpoint(checkpoint, tmp_path / "m", [0, 2, 3])
    assert not (tmp_path / "m").exists()
