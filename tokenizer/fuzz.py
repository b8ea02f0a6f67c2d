"""Texts that tokenizers go wrong on, the same every time."""

import random
import unicodedata
from collections.abc import Iterator

FIXED = (
    "",
    "할머니께서 오늘 아침 맛있는 김치찌개를 끓였습니다.",
    "GPU 8장으로 Llama-2를 학습했다(2024년 3월, 비용 1,234,567원).",
    "👩‍👩‍👧‍👦 👍🏽 🇰🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ 고래🐳가 1️⃣",
    "大韓民國 憲法 第1條 — 金氏와 李氏, 樂 樂",
    "ＡＢＣ １２３ 한글　전각 ｢｣ ￦",
    " 앞 공백",
    "   세 칸 앞 공백과 뒤 공백   ",
    "단어  사이   여러    칸     공백",
    "\n",
    "\t",
    " ",
    "줄\n바꿈\r\n\n\n두 번\t탭\t\t둘\n    return None\n",
    "ㅋㅋㅋㅋㅋ ㅠㅠ ㅇㅇ ㄱㄱ 하하하하하 ㅋ 갸ㅋ뷁",
    "\u1112\u1161 \u1112 \u11ab\u1161 \u115f \u1160가",
    "가나 " * 4000,
    "국어" * 3000,
    "-" * 999 + " " * 999 + "가 나" * 100,
    "a\0b\u200b\ufeffc\u00a0d\u2028e\ufffd\u0085f\x0bg\x0ch",
    "<0x41> <0xEA> </ s> < s> [INST] <|im_start|",
    "a▁b ▁▁ ▁",
    "def f(x):\n\treturn {k: v for k, v in x.items() if v != None}  # 주석\n",
    'SELECT 이름 FROM 표 WHERE id=1;--\n<div class="제목">본문&nbsp;</div>',
    "https://ko.wikipedia.org/wiki/%ED%95%9C%EA%B5%AD?a=1&b=한글#절 user@example.co.kr C:\\폴더\\파일.txt",
    "é è ñ ü ß Ω π Ж 你好 こんにちは สวัสดี العربية עברית ἀ",
    "don't I'LL we'Ve '한글's 12,345.67 1e-5 ½ ② Ⅳ ㎏ ㉠ №",
)
_ALPHABET = [
    *"하국어은는ㅋ가힣뷁aeAtZ1９=-_ \n\t▁#*漢🐳'.,<|>[]é",
    "\u1100",
    "\u1161",
    "\u11a8",
    "\u0301",
    "습니다",
    "the",
    "  ",
]
_RUNS = (" ", "-", "=", "#", "하", "ㅋ", "▁", "\n", "0", "🐳")


def fuzz_texts(count: int = 10_000, seed: int = 0) -> Iterator[str]:
    """Yield fixed texts, decomposed and long ones, runs of one character, then `count` random texts.

    NFD, lone jamo, hanja, emoji sequences, full-width forms, spaces in every place, line ends, literal ▁, things that
    look like special tokens, 100 kB lines, code and URLs. No lone surrogates, which are no text.
    """
    yield from FIXED
    yield from (unicodedata.normalize("NFD", text) for text in FIXED)
    yield from (line * (100_000 // len(line.encode())) for line in (FIXED[1] + " ", FIXED[2] + "  ", "가나다라마바사"))
    for length in range(1, 70):
        for character in _RUNS:
            run = character * length
            yield from (run, f"a{run}b", f"\n{run}한", f"국어 {run} the")
    rng = random.Random(seed)
    for _ in range(count):
        some = rng.sample(_ALPHABET, rng.randint(1, 6))
        yield "".join(rng.choices(some, k=rng.randint(1, 40)))
    # Characters of Unicode 3.2 alone: Hugging Face's library orders marks that are newer than its tables otherwise.
    known = [code for code in range(0x20, 0x3000) if unicodedata.ucd_3_2_0.category(chr(code)) != "Cn"]
    for _ in range(count // 10):
        yield "".join(chr(rng.choice((rng.randint(0xAC00, 0xD7A3), rng.choice(known)))) for _ in range(20))
