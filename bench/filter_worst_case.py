"""The slowest each part of the filter gets on hostile lines of 100 kB: normalising, masking, counting, every rule.

Public spam filters have spent 40 seconds on one such line. The lines are made here, with a seed: repeated letters and
words, list pages, nested and unclosed brackets, digits, addresses and what the patterns almost match.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from common import parser, write_result

from redwhale.filtering import RULES, normalize_text, prepare, repair_mojibake
from redwhale.filtering.personal_data import KINDS, mask_personal_data

LIMIT_MS = 50
_UNITS = (
    *(
        "ㅋ",
        "ㅠㅜ",
        "ㅋㅎㅋㅎㅎ",
        "가",
        "가 ",
        "하하 ",
        "!",
        "~",
        "♥",
        ".",
        "…",
        "... ",
        "-",
        "- ",
        "=",
        "#",
        "* ",
        "※",
        "|",
    ),
    *("<", "<a ", "<a><", "</", "&", "&lt", "&#", "(", "((", "[", "{", "{{", "}", "({[<", "(가)", "[[가]]", "<<가>>"),
    *(
        " ",
        "\t",
        "\u3000",
        "\u200b",
        "\u200d",
        "\u3164",
        "\ufffd",
        "\ue001",
        "\u1100\u1161",
        "e\u0301",
        "\u0301",
        "ÿ",
        "ì",
    ),
    *("0", "1 ", "01", "010", "010-", "010-1234-", "010 1234 567", "+82", "02)", "900101-", "900101", "900101-1"),
    *(
        "4111 ",
        "4111-1111-",
        "1.2.",
        "1.2.3.4.",
        "255.255.255.255 ",
        "110-123-",
        "국민은행 1",
        "계좌 12-34 ",
        "2024-01-01 ",
    ),
    *(
        "a",
        "A1_",
        "a.",
        "a@",
        "@",
        "a@b",
        "a@b.",
        "a.b@c.d-",
        "@a ",
        "(at)",
        "골뱅이",
        "a (at) b",
        "http://a.b/c?",
        "%20",
    ),
    *("서울", "서울 강남구 ", "서울시 1", "로 1", "주문번호 ", "전화 ", "전화 010 "),
    *("로그인 ", "로그인", "카지노", "카지노사이트 ", "점검 중입니다", "Copyright", "占쏙옙", "다.", "다. ", "요? "),
    *("def ", "if a:", "a = ", "a(", "a()", "a.a.a(", "import ", "{};", "print(", "a[b].c"),
)


def hostile_lines(size: int = 100_000, seed: int = 0) -> dict[str, str]:
    """Lines of `size` UTF-8 bytes by a name that tells how they are made."""
    rng = random.Random(seed)
    lines = {repr(unit): unit * (size // len(unit.encode()) + 1) for unit in _UNITS}
    for number in range(60):
        units = rng.sample(_UNITS, rng.randint(2, 5))
        lines[f"mix {number}"] = "".join(rng.choices(units, k=size // 2))
    for unit in ("<a ", "(", "010-1234-567", "a@", "다", " "):
        lines[f"one letter, then {unit!r}, then another"] = "가" + unit * (size // len(unit.encode())) + "나"
    lines["a page of goods"] = " ".join(
        f"{rng.randint(0, 9999)}-{rng.randint(0, 99)} 운동화 {rng.randint(1, 99)},900원" for _ in range(4000)
    )
    lines["a page of phones"] = " ".join(
        f"010-{rng.randint(1000, 9999)}-{rng.randint(1000, 9999)}" for _ in range(8000)
    )
    lines["a page of accounts"] = "계좌 " + " ".join(
        f"110-{rng.randint(100, 999)}-{rng.randint(10**5, 10**6)}" for _ in range(8000)
    )
    lines["brackets in brackets"] = "(" * (size // 2) + ")" * (size // 2)
    return {name: line.encode()[:size].decode("utf-8", "ignore") for name, line in lines.items()}


def steps(line: str) -> dict[str, Callable[[], Any]]:
    """What happens to a document of one line, step by step."""
    text = normalize_text(line)
    prepared = prepare(text)
    return {
        "repair_mojibake": lambda: repair_mojibake(line),
        "normalize_text": lambda: normalize_text(line),
        "mask_personal_data": lambda: mask_personal_data(text, KINDS),
        "prepare": lambda: prepare(text),
        **{name: lambda rule=rule: rule.score(prepared) for name, rule in RULES.items()},
    }


def milliseconds(call: Callable[[], Any], limit: float = LIMIT_MS) -> float:
    """CPU time of a call in ms; of the fastest of five where the first is beyond `limit`."""
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        call()
        best = min(best, (time.process_time() - began) * 1e3)
        if best <= limit:
            break
    return best


def main() -> None:
    """Measure every line, print the worst case of every step, and write the result."""
    given = parser(__doc__, "filter_worst_case").parse_args()
    worst: dict[str, tuple[float, str]] = {}
    lines = hostile_lines()
    prepare("가")  # builds its tables
    for name, line in lines.items():
        for step, call in steps(line).items():
            worst[step] = max(worst.get(step, (0.0, "")), (milliseconds(call), name))
    for step, (taken, name) in sorted(worst.items(), key=lambda item: -item[1][0]):
        print(f"{step:20s} {taken:7.2f} ms  {name}")
    results = {step: {"ms": round(taken, 2), "line": name} for step, (taken, name) in worst.items()}
    write_result(
        given.result,
        __file__,
        {"lines": len(lines), "bytes_per_line": 100_000, "limit_ms": LIMIT_MS, "worst": results},
    )


if __name__ == "__main__":
    main()
