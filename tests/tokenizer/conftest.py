"""A small English base of the Llama kind, a small Korean corpus, and the hybrid made of them."""

import io
import itertools
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece

from redwhale.tokenizer import Tokenizer, load_model_proto, merge_reachable, script_pieces, train_korean_bpe
from redwhale.tokenizer.export import export_hf_tokenizer
from redwhale.tokenizer.spm import ModelProto

WHITESPACE_SCORE = -1e9  # where Llama and Mistral keep ▁ and its runs

TIMES = ["오늘 아침", "어제 저녁에", "지난 주말에는", "내년 봄부터", "조금 전에", "매일 밤", "그해 겨울", "점심시간에"]
SUBJECTS = [
    "우리 동네 도서관은",
    "할머니께서",
    "국회 법제사법위원회가",
    "새로 온 선생님은",
    "서울의 작은 출판사가",
    "고래를 연구하는 학자들이",
    "옆집 아이와 강아지가",
    "대법원 판결문을 읽은 변호사는",
    "한국어를 배우는 학생들은",
    "부산에서 올라온 친구가",
]
PREDICATES = [
    "맛있는 김치찌개를 끓였습니다.",
    "오래된 책을 다시 펴냈다고 합니다.",
    "개정안을 의결하지 못했다.",
    "바닷가를 천천히 걸었어요!",
    "컴퓨터로 문장을 번역하고 있었다.",
    "영화가 정말 재미있었다고 말했다.",
    "쉬운 낱말부터 차근차근 가르친다.",
    "왜 그렇게 늦었는지 묻지 않았습니까?",
    "눈이 쌓인 골목길을 쓸었다.",
    "읽고 쓰는 법을 알려 주었습니다.",
]


@pytest.fixture(scope="session")
def english_lines() -> list[str]:
    return [line for text in topics.values() for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def korean_texts() -> list[str]:
    return [" ".join(parts) for parts in itertools.product(TIMES, SUBJECTS, PREDICATES)]


@pytest.fixture(scope="session")
def base_path(tmp_path_factory, english_lines) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        required_chars="가한국어",
        minloglevel=2,
    )
    proto = ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        if piece.piece == "▁":
            piece.score = WHITESPACE_SCORE
    for length in range(2, 17):
        proto.pieces.add(piece="▁" * length, score=WHITESPACE_SCORE)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    path = tmp_path_factory.mktemp("base") / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope="session")
def base(base_path) -> ModelProto:
    return load_model_proto(base_path)


@pytest.fixture(scope="session")
def trained(korean_texts, base) -> ModelProto:
    return train_korean_bpe(korean_texts, base, vocab_size=800, character_coverage=1.0, num_threads=2)


@pytest.fixture(scope="session")
def hybrid(trained, base) -> ModelProto:
    return merge_reachable(base, script_pieces(trained, base))[0]


@pytest.fixture(scope="session")
def exported(hybrid, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    export_hf_tokenizer(hybrid, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(exported) -> Tokenizer:
    return Tokenizer(exported / "tokenizer.model")


@pytest.fixture(scope="session")
def make_proto():
    """Build a small Llama-like model from (piece, score) pairs."""

    def make(scored_pieces) -> ModelProto:
        proto = ModelProto()
        for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
            proto.pieces.add(piece=piece, score=0, type=kind)
        for byte in range(256):
            proto.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=6)
        for piece, score in scored_pieces:
            proto.pieces.add(piece=piece, score=score)
        proto.trainer_spec.model_type = 2
        proto.trainer_spec.byte_fallback = True
        proto.trainer_spec.vocab_size = len(proto.pieces)
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.remove_extra_whitespaces = False
        return proto

    return make


@pytest.fixture(scope="session")
def slow_bpe():
    """SentencePiece's segmentation written the obvious way: join the best pair, the leftmost of equals, and repeat."""

    def segmenter(proto: ModelProto):
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}

        def segment(text: str) -> list[int]:
            symbols = list(text)
            while pairs := [
                (scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores
            ]:
                i = -max(pairs)[1]
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            result = []
            for symbol in symbols:
                result += [ids[symbol]] if symbol in scores else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            return result

        return segment

    return segmenter


@pytest.fixture(scope="session", params=["mistral-v1", "llama2"])
def real_base_path(request) -> Path:
    path = Path(__file__).parents[2].parent / "shared/data/tokenizers" / f"{request.param}.model"
    if not path.exists():
        pytest.skip(f"no real {request.param} tokenizer beside the checkout")
    return path
