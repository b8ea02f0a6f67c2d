import json
import random
import unicodedata

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from redwhale.tokenizer import (
    Tokenizer,
    TokenizerError,
    export_hf_tokenizer,
    load_model_proto,
    merge_pieces,
    merge_reachable,
    script_pieces,
)
from redwhale.tokenizer.export import _json, require_exportable, tokenizer_json

HAND_WRITTEN = [
    "",
    "할머니께서 오늘 아침 맛있는 김치찌개를 끓였습니다.",
    unicodedata.normalize("NFD", "대법원 판결문을 읽은 변호사는"),
    "GPU 8장으로 Llama-2를 학습했다(2024년 3월, 비용 1,234,567원).",
    "👩‍👩‍👧‍👦 👍🏽 🇰🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ 고래🐳가",
    "大韓民國 憲法 第1條 — 金氏와 李氏",
    "ＡＢＣ １２３ 한글　전각",
    " 앞 공백",
    "   세 칸 앞 공백과 뒤 공백   ",
    "단어  사이   여러    칸     공백",
    "\n",
    "줄\n바꿈\r\n\n\n두 번\t탭\t\t둘\n    return None\n",
    "ㅋㅋㅋㅋㅋ ㅠㅠ ㅇㅇ ㄱㄱ 하하하하하 ㅋ",
    "\u1112\u1161 \u1112 \u11ab\u1161 \u115f",
    "국어" * 3000,
    "가 나" * 1000 + "-" * 999 + " " * 999,
    "a\0b\u200b\ufeffc\u00a0d\u2028e\ufffd",
    "<0x41> <0xEA> </ s> < s>",
    "a▁b ▁▁ ▁",
]
RUNS = [
    pattern.format(run=character * length)
    for length in range(1, 70)
    for character in (" ", "-", "=", "#", "하", "ㅋ", "▁", "\n")
    for pattern in ("{run}", "a{run}b", "\n{run}한", "국어 {run} the")
]


def fuzz(count):
    rng = random.Random(0)
    alphabet = list("하국어은는ㅋaeAt1=-_ \n\t▁#*漢🐳") + ["\u1100", "\u1161", "습니다", "the", "  "]
    for _ in range(count):
        some = rng.sample(alphabet, rng.randint(1, 5))
        yield "".join(rng.choices(some, k=rng.randint(1, 30)))


@pytest.fixture(scope="module")
def hf(exported):
    return tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))


def mismatches(hf, tokenizer, texts):
    texts = list(texts)
    encoded = hf.encode_batch(texts, add_special_tokens=False)
    return [
        text
        for text, theirs, ours in zip(texts, encoded, tokenizer.encode_batch(texts), strict=True)
        if theirs.ids != ours
    ]


def test_ids_equal_those_of_the_model_on_the_corpora(hf, tokenizer, korean_texts, english_lines):
    assert mismatches(hf, tokenizer, korean_texts + english_lines) == []


def test_ids_equal_those_of_the_model_on_hard_texts(hf, tokenizer):
    assert mismatches(hf, tokenizer, HAND_WRITTEN + RUNS) == []
    assert mismatches(hf, tokenizer, fuzz(3000)) == []


# The one composition, of Unicode 13, that the Unicode tables of Python and of tokenizers disagree on is left out.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\U00011930"), max_size=30))
def test_ids_equal_those_of_the_model_on_any_text(hf, tokenizer, text):
    assert mismatches(hf, tokenizer, [text]) == []


def test_decoding_gives_the_text_of_the_model(hf, tokenizer, korean_texts):
    for text in HAND_WRITTEN[:-1] + korean_texts[:50]:
        ids = tokenizer.encode(text)
        assert hf.decode(ids) == tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_ids_of_a_real_base_equal_those_of_the_model(real_base_path, trained, korean_texts, english_lines, tmp_path):
    base = load_model_proto(real_base_path)
    export_hf_tokenizer(merge_reachable(base, script_pieces(trained, base))[0], tmp_path)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    texts = HAND_WRITTEN + RUNS + list(fuzz(2000)) + korean_texts[:100] + english_lines[:1000]
    assert mismatches(hf, tokenizer, texts) == []


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_transformers_loads_the_same_tokenizer(exported, tokenizer, tmp_path, model_type, korean_texts):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    texts = HAND_WRITTEN + korean_texts[:20]
    expected = [[1, *ids] for ids in tokenizer.encode_batch(texts)]
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        hf = loader.from_pretrained(tmp_path)
        assert hf(texts)["input_ids"] == expected
        assert set(hf(texts[0])) == {"input_ids", "attention_mask"}
        assert (hf.bos_token_id, hf.eos_token_id, hf.unk_token_id) == (1, 2, 0)
        assert len(hf) == tokenizer.vocab_size
        ids = expected[3]
        assert hf.decode(ids, skip_special_tokens=True) == texts[3]
        assert hf("a", "b")["input_ids"] == [1, *tokenizer.encode("a"), 1, *tokenizer.encode("b")]


def test_saving_with_transformers_keeps_the_ids(exported, tokenizer, tmp_path):
    transformers.AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert hf(HAND_WRITTEN)["input_ids"] == [[1, *ids] for ids in tokenizer.encode_batch(HAND_WRITTEN)]


def test_chat_template_and_length_reach_transformers(hybrid, tmp_path):
    template = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    paths = export_hf_tokenizer(hybrid, tmp_path / "new" / "folder", chat_template=template, model_max_length=4096)
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert hf.model_max_length == 4096
    chat = [{"role": "user", "content": "안녕"}]
    assert hf.apply_chat_template(chat, tokenize=False) == "<s>[user] 안녕</s>"
    # What follows a special token gets its own ▁, as in every chat segment encoded alone.
    segment = Tokenizer(paths[0]).encode("[user] 안녕")
    assert hf.apply_chat_template(chat, return_dict=True)["input_ids"] == [1, *segment, 2]


def test_literal_special_is_a_special_in_hf_files_only(hf, tokenizer):
    assert hf.encode("a</s>b", add_special_tokens=False).ids == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert 2 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"


def test_control_pieces_are_not_built_from_merges(make_proto, tmp_path):
    proto = make_proto([("</", -1.0), ("s>", -2.0), *((c, -3.0 - i) for i, c in enumerate("</s>"))])
    merges = tokenizer_json(proto)["model"]["merges"]
    assert merges == [["<", "/"], ["s", ">"]]


def test_base_without_dummy_prefix_keeps_its_ids(make_proto, tmp_path):
    proto = make_proto([("▁a", -1.0), ("▁", -2.0), ("a", -3.0)])
    proto.normalizer_spec.add_dummy_prefix = False
    export_hf_tokenizer(proto, tmp_path)
    hf, tokenizer = (
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        Tokenizer(tmp_path / "tokenizer.model"),
    )
    for text in ("a a", " a", "aa"):
        assert hf.encode(text).ids == [1, *tokenizer.encode(text)]
        assert hf.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a a") == [261, 259]


@pytest.mark.parametrize("lengths", [(2, 3), (2, 3, 4, 5, 6, 7, 8), (2, 4, 8, 16), (3, 2, 5, 7), tuple(range(2, 17))])
def test_whitespace_runs_of_equal_score_grow_from_the_left(make_proto, tmp_path, slow_bpe, lengths):
    proto = make_proto([("a", -1.0), ("▁a", -2.0), *(("▁" * n, -1e9) for n in (1, *lengths))])
    export_hf_tokenizer(proto, tmp_path)
    hf, tokenizer = (
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        Tokenizer(tmp_path / "tokenizer.model"),
    )
    reference = slow_bpe(proto)
    for length in range(80):
        for text in (" " * length, "a" + " " * length + "a"):
            ids = reference(("▁" + text.replace(" ", "▁")) if text else "")
            assert hf.encode(text).ids == [1, *ids]
            assert tokenizer.encode(text) == ids


def with_score_zero(base, pieces):
    """Append pieces as Chinese-LLaMA does."""
    tied = merge_pieces(base, pieces)
    for piece in tied.pieces[len(base.pieces) :]:
        piece.score = 0
    return tied


def write_unchecked(proto, folder):
    (folder / "tokenizer.json").write_bytes(_json(tokenizer_json(proto)))
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), Tokenizer(folder / "tokenizer.model")


def test_pieces_appended_with_score_zero_cannot_be_exported(base, hybrid, hf, tokenizer, tmp_path):
    pieces = [piece.piece for piece in hybrid.pieces[len(base.pieces) :]]
    tied = with_score_zero(base, pieces)
    with pytest.raises(TokenizerError, match="share the score 0, so Hugging Face files could not give the same ids"):
        export_hf_tokenizer(tied, tmp_path)
    assert list(tmp_path.iterdir()) == []
    # The refusal is deserved: written all the same, the two files disagree on words that the corpus does not hold.
    rng = random.Random(0)
    words = ["".join(rng.choices(pieces, k=4)) for _ in range(500)]
    assert mismatches(*write_unchecked(tied, tmp_path), words) != []
    assert mismatches(hf, tokenizer, words) == []


def test_tied_scores_go_leftmost_in_sentencepiece_and_by_rank_in_hf_files(make_proto, tmp_path):
    base = make_proto([("가", -1.0), ("나", -2.0), ("다", -3.0), ("▁", -1e9)])  # ids 259 to 262
    tied_hf, tied = write_unchecked(with_score_zero(base, ["나다", "가나"]), tmp_path)
    assert tied.encode("가나다") == [262, 264, 261]  # ▁ 가나 다
    assert tied_hf.encode("가나다", add_special_tokens=False).ids == [262, 259, 263]  # ▁ 가 나다
    hf, tokenizer = write_unchecked(merge_pieces(base, ["나다", "가나"]), tmp_path)
    assert tokenizer.encode("가나다") == hf.encode("가나다", add_special_tokens=False).ids == [262, 259, 263]


def test_piece_whose_character_is_no_piece_cannot_be_exported(make_proto, tmp_path):
    proto = make_proto([("가나", -1.0), ("가", -2.0)])
    with pytest.raises(TokenizerError, match="the piece '가나' has the character '나', which is no piece itself"):
        export_hf_tokenizer(proto, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    # SentencePiece joins characters that are no pieces, which a list of merges cannot.
    assert 259 in Tokenizer(tmp_path / "tokenizer.model").encode("가나")


def test_real_bases_can_be_exported(real_base_path):
    require_exportable(load_model_proto(real_base_path))


def test_files_are_the_same_every_time_and_leave_no_temporaries(hybrid, exported, tmp_path):
    export_hf_tokenizer(hybrid, tmp_path)
    export_hf_tokenizer(hybrid, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in exported.iterdir()}
    assert len(list(tmp_path.iterdir())) == 4


def test_failed_write_is_one_sentence_and_leaves_no_temporary(hybrid, tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"cannot write '.*tokenizer.json' \(Is a directory\); free the space"):
        export_hf_tokenizer(hybrid, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
