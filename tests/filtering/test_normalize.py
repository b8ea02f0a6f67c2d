import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redwhale.filtering import content_id, normalize_text, repair_mojibake

AWKWARD = (
    "가각ㅋ漢a1 \t\n\r\x00\x07\x0b\x0c\x85\xa0\xad\u0301\u1100\u1161\u11a8\u200b\u200d"
    "\u2028\u202e\u3000\u3164\ufeff\ufffd\ud800🐳❤"
)


@given(st.one_of(st.text(), st.text(alphabet=st.sampled_from(AWKWARD), max_size=40)))
def test_normalisation_is_idempotent_and_gives_encodable_nfc(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "영화 진짜 좋아ㅋㅋ ㅠㅠ 최고!!!",
        "보증금 1100000 원, 전화: 02)123-4567 (평일 9시~18시)",
        "주문번호 2024-0001-000123 은 010-1234-5678 과 다르다...",
        "def f(x):\n    return x  # 들여쓰기\n\n표\t열",
        "가족 👨\u200d👩\u200d👧 사진 ❤️",
        "훈민정음 漢字 ﷺ é ½ ① ㎏",
    ],
)
def test_words_numbers_repeats_and_indentation_are_not_damaged(text):
    assert normalize_text(text) == text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (unicodedata.normalize("NFD", "대한민국 헌법"), "대한민국 헌법"),
        ("하나\r\n둘\r셋\x85넷\u2028다섯\x0c여섯", "하나\n둘\n셋\n넷\n다섯\n여섯"),
        ("\ufeff제로\u200b폭\u2060 문\xad자\x00", "제로폭 문자"),
        ("전각\u3000공백과\xa0줄\u3164채움", "전각 공백과 줄 채움"),
        ("줄 끝  \t\n다음", "줄 끝\n다음"),
        ("문단\n\n\n\n\n문단\n \n \n끝", "문단\n\n문단\n\n끝"),
        ("\n\n  앞뒤 \n", "앞뒤"),
        ("글자\u200d사이", "글자사이"),
        ("깨진 \ufffd 글자와 \ud83d 반쪽", "깨진 \ufffd 글자와 \ufffd 반쪽"),
    ],
)
def test_each_kind_of_noise_is_normalised(raw, expected):
    assert normalize_text(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("좋아ㅋㅋㅋㅋ", "좋아ㅋㅋ"),
        ("진짜ㅠㅠㅠㅠㅠ 슬퍼ㅜㅜㅜ", "진짜ㅠㅠ 슬퍼ㅜㅜ"),
        ("ㅠㅜㅠㅜㅠㅜㅠㅜ", "ㅠㅜㅠㅜ"),
        ("ㅋㅋㅋㅋㅎㅎㅎㅎ", "ㅋㅋㅎㅎ"),
        ("최고!!!!!!! 정말???? 음~~~~~", "최고!!! 정말??? 음~~~"),
        ("♥♥♥♥♥", "♥♥♥"),
        ("좋아ㅋㅋ 응ㅋ 와!!! 네~", "좋아ㅋㅋ 응ㅋ 와!!! 네~"),
        ("하하하하하하 아아아아 1100000원 ..... ----- ======", "하하하하하하 아아아아 1100000원 ..... ----- ======"),
        ("wooooow aaaa 00000", "wooooow aaaa 00000"),
    ],
)
def test_emoticon_runs_are_shortened_and_nothing_else(raw, expected):
    assert normalize_text(raw) == expected


@given(st.text(alphabet="ㅋㅎㅠㅜㅡ!~♥가 ", max_size=60))
def test_shortening_runs_is_idempotent_and_keeps_every_letter_it_met(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert set(once) - {" "} == set(text) - {" "}
    assert once.count("가") == text.count("가")


def test_content_id_is_the_little_endian_blake2b_of_the_utf8_bytes():
    text = "같은 글은 같은 번호"
    expected = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    assert content_id(text) == expected
    assert content_id(normalize_text(unicodedata.normalize("NFD", text) + " \r\n")) == expected
    assert content_id(text + ".") != expected
    # From `printf 고래 | b2sum -l 64`: the ids of existing corpora must never change.
    assert content_id("고래") == int.from_bytes(bytes.fromhex("4d4ca202e97a7550"), "little")


KOREAN = "붉은 고래가 동해에서 다시 발견되었다. 뷁과 똠방각하도 함께였다."


@pytest.mark.parametrize("written", ["utf-8", "cp949"])
def test_korean_read_as_latin_1_is_repaired(written):
    assert repair_mojibake(KOREAN.encode(written).decode("latin-1")) == KOREAN


def test_korean_read_as_windows_1252_is_repaired():
    shown = "".join(
        bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)
        for byte in KOREAN.encode()
    )
    assert "€" in shown or "œ" in shown or "•" in shown
    assert repair_mojibake(shown) == KOREAN


@pytest.mark.parametrize(
    "text",
    [
        "plain ASCII",
        KOREAN,
        "Le café où l'été dernier naïf garçon déjà vu",
        "¿Qué pasó, señor? ÀÉÎÕÜ",
        "Ünïcödé £5 ± ½",
        "日本語の文章です",
        "An English page that quotes the bytes " + "가".encode().decode("latin-1") + " once and goes on in English.",
    ],
)
def test_text_that_is_not_mojibake_is_left_alone(text):
    assert repair_mojibake(text) == text
