import hashlib
import io
import pickle
import random
import re
import unicodedata

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from redwhale.tokenizer import (
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    decompose_pieces,
    load_model_proto,
)

KOREAN = "할머니께서 오늘 아침 맛있는 김치찌개를 끓였습니다."


def trained_hangul(trained):
    return [piece.piece for piece in trained.pieces if re.fullmatch("▁?[가-힣]+", piece.piece)]


def test_decomposition_spells_the_piece_and_equals_an_obvious_bpe(base, trained, slow_bpe):
    pieces = [*trained_hangul(trained), "▁the", "ing▁of", "▁한국어▁the", "x한y", "▁▁▁가", "🐳", "é"]
    names = [piece.piece for piece in base.pieces]
    reference = slow_bpe(base)
    for piece, ids in zip(pieces, decompose_pieces(base, pieces), strict=True):
        assert ids == reference(piece)
        spelled = b"".join(bytes([i - 3]) if 3 <= i < 259 else names[i].encode() for i in ids)
        assert spelled.decode() == piece


def test_encoding_a_piece_as_text_is_not_its_decomposition(base, base_path, trained):
    naive = Tokenizer(base_path)
    pieces = trained_hangul(trained)
    wrong = sum(naive.encode(piece) != ids for piece, ids in zip(pieces, decompose_pieces(base, pieces), strict=True))
    assert wrong == len(pieces) > 100


def test_decomposition_without_byte_fallback_is_refused(make_proto):
    proto = make_proto([("a", -1)])
    del proto.pieces[3:259]
    proto.trainer_spec.byte_fallback = False
    with pytest.raises(TokenizerError, match="spells the piece 'a한' as 'a'; use a base with byte fallback"):
        decompose_pieces(proto, ["a한"])


def test_real_base_decomposes_hangul_exactly(real_base_path, trained, slow_bpe):
    base = load_model_proto(real_base_path)
    pieces = trained_hangul(trained)
    reference = slow_bpe(base)
    assert decompose_pieces(base, pieces) == [reference(piece) for piece in pieces]


def test_missing_file_is_refused(tmp_path):
    for load in (load_model_proto, Tokenizer):
        with pytest.raises(TokenizerError, match=r"cannot read the tokenizer model '.*none.model' \(No such file"):
            load(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"not a model\n", b"IQ== 0\nIg== 1\n", b"\x00" * 64])
def test_other_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    for load in (load_model_proto, Tokenizer):
        with pytest.raises(TokenizerError, match=r"is not a SentencePiece model; give the tokenizer\.model of a Llama"):
            load(path)


def test_model_with_a_duplicate_piece_is_refused(tmp_path, make_proto):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(make_proto([("a", -1), ("a", -2)]).SerializeToString())
    for load in (load_model_proto, Tokenizer):
        with pytest.raises(
            TokenizerError, match=r"SentencePiece refuses '.*' \(.*a is already defined.*\); get an und"
        ):
            load(path)


def test_unigram_model_is_refused_as_base(tmp_path, english_lines):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_lines[:500]),
        model_writer=model,
        vocab_size=500,
        model_type="unigram",
        minloglevel=2,
    )
    path = tmp_path / "unigram.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(TokenizerError, match="cannot be extended: its model type is unigram, not bpe; use a base"):
        load_model_proto(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"x"), "its normaliser is 'identity', not id"),
        (lambda p: setattr(p.normalizer_spec, "remove_extra_whitespaces", True), "its whitespace handling is not"),
        (lambda p: setattr(p.trainer_spec, "byte_fallback", False), "it has no byte fallback"),
        (lambda p: setattr(p.pieces[300], "type", 4), "it has user-defined or unused pieces"),
        (lambda p: setattr(p.trainer_spec, "eos_id", -1), "it has no end-of-text piece"),
    ],
)
def test_base_that_could_not_be_exported_is_refused(base, tmp_path, change, problem):
    proto = type(base)()
    proto.CopyFrom(base)
    change(proto)
    path = tmp_path / "changed.model"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=f"cannot be extended: {problem}"):
        load_model_proto(path)


def test_tokenizer_describes_its_model(exported, tokenizer, hybrid):
    data = (exported / "tokenizer.model").read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(data).hexdigest()
    assert tokenizer.path == exported / "tokenizer.model"
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == len(hybrid.pieces)
    assert [tokenizer.id_to_piece(i) for i in (1, 258, 259)] == ["<s>", "<0xFF>", hybrid.pieces[259].piece]
    assert pickle.loads(pickle.dumps(tokenizer)).encode(KOREAN) == tokenizer.encode(KOREAN)


def test_decomposed_hangul_costs_the_same_tokens(tokenizer):
    decomposed = unicodedata.normalize("NFD", KOREAN)
    assert tokenizer.encode(decomposed) == tokenizer.encode(KOREAN)
    assert len(tokenizer.processor.encode(decomposed)) > 10 * len(tokenizer.encode(KOREAN))


def test_batch_gives_the_ids_of_single_texts(tokenizer, korean_texts, english_lines):
    texts = ["", " ", unicodedata.normalize("NFD", KOREAN), *korean_texts[:50], *english_lines[:50]]
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.encode_batch(texts, threads=2) == expected


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_round_trip_is_nfc_of_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_literal_lower_block_comes_back_as_space(tokenizer):
    assert tokenizer.encode("a▁b") == tokenizer.encode("a b")
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


def test_lone_surrogate_is_refused(tokenizer):
    for encode in (lambda: tokenizer.encode("한\ud800글"), lambda: tokenizer.encode_batch(["a", "한\ud800글"])):
        with pytest.raises(TokenizerError, match=r"holds the lone surrogate '\\ud800'; decode the source as UTF-8"):
            encode()


@pytest.mark.parametrize("index", [-1, 10**6])
def test_id_outside_the_vocabulary_is_refused(tokenizer, index):
    for use in (lambda: tokenizer.decode([1, index]), lambda: StreamDecoder(tokenizer).feed(index)):
        with pytest.raises(TokenizerError, match=f"token id {index} is outside the vocabulary of"):
            use()


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.feed(i) for i in ids] + [decoder.flush()]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_stream_of_a_text_is_whole_characters_of_it(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = stream(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert parts[-1] == ""  # nothing is held back once a text is complete
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.data())
def test_stream_of_any_ids_equals_decode(tokenizer, data):
    spaces = [i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i).startswith("▁")]
    any_id = st.one_of(
        st.sampled_from([0, 1, 2]),
        st.integers(3, 258),
        st.sampled_from([3 + byte for byte in "한🐳é\ufffd".encode()]),
        st.sampled_from(spaces),
        st.integers(0, tokenizer.vocab_size - 1),
    )
    ids = data.draw(st.lists(any_id, max_size=12))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_equals_decode_for_every_kind_of_prefix(make_proto, tmp_path):
    rng = random.Random(0)
    for dummy in (False, True):
        for remove in (False, True):
            proto = make_proto([("▁", -3.0), ("a", -4.0), ("▁a", -1.0), ("▁▁", -2.0)])
            proto.normalizer_spec.add_dummy_prefix = dummy
            proto.normalizer_spec.remove_extra_whitespaces = remove
            path = tmp_path / f"{dummy}{remove}.model"
            path.write_bytes(proto.SerializeToString())
            tokenizer = Tokenizer(path)
            for _ in range(300):
                ids = rng.choices([0, 1, 3 + 0x41, 3 + 0xED, 259, 260, 261, 262], k=rng.randint(0, 6))
                assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_stream_decoder_can_be_used_again_after_flush(tokenizer):
    decoder = StreamDecoder(tokenizer)
    for _ in range(2):
        assert decoder.feed(3 + 0xED) == ""
        assert decoder.flush() == "\ufffd"
        assert "".join(decoder.feed(i) for i in tokenizer.encode("안녕 🐳")) == "안녕 🐳"
        assert decoder.flush() == ""
