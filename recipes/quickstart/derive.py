"""Pure functions behind quickstart_data.py: the texts of the quickstart from its inputs, the same bytes every time.

Every choice is made by the SHA-256 of a key, never by a random generator or by the order of a dictionary.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Row = dict[str, str]

_BLOCK = 20
_SPAM_VARIANTS = 3
_MENU_VARIANTS = 1
_INSTRUCTIONS = (
    "다음 글은 어떤 법률안의 제안이유이다. 이 법률안의 이름을 쓰시오.\n\n{text}",
    "{text}\n\n위 내용을 담은 법률안의 제목은 무엇인가요?",
    "아래 제안이유를 읽고 법률안 이름만 답해 주세요.\n\n{text}",
)
_PAGE = "홈 > 게시판 > 자유게시판\n글쓴이: 손님 | 조회 {views} | 추천 0\n\n{text}\n\n이전글 | 목록 | 다음글\n댓글 0개"


def rank(key: str) -> int:
    """Position of a key in the fixed pseudo-random order: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def blocks(text: str) -> set[str]:
    """The text without whitespace cut into pieces of 20 characters: what `shares_run` looks for."""
    squeezed = squeeze(text)
    return {squeezed[i : i + _BLOCK] for i in range(0, len(squeezed) - _BLOCK + 1, _BLOCK)}


def shares_run(text: str, known: set[str]) -> bool:
    """Whether any 20 characters of a text are a known block; every common run of 39 characters holds one."""
    squeezed = squeeze(text)
    return any(squeezed[i : i + _BLOCK] in known for i in range(len(squeezed) - _BLOCK + 1))


# Korean: bills


def sample_bills(texts: Mapping[str, str], limit_bytes: int) -> list[Row]:
    """Corpus rows from {id: text} in rank order until their texts reach `limit_bytes` of UTF-8."""
    rows, size = [], 0
    for bill_id in sorted(texts, key=rank):
        if size >= limit_bytes:
            break
        rows.append({"id": bill_id, "text": texts[bill_id], "source": "bills"})
        size += len(texts[bill_id].encode())
    return rows


def excerpt(text: str, limit: int = 300) -> str:
    """The whole sentences that open a bill's text, at most `limit` characters, without its headings."""
    lines = [line.strip() for line in text.split("\n")]
    body = " ".join(line for line in lines if line and not re.fullmatch(r"■?\s*(제안이유|주요\s?내용|및|\s)+", line))
    body = re.sub(r"^■?\s*제안이유(\s및\s주요내용)?\s+", "", body)
    if len(body) <= limit:
        return body
    end = body.rfind(". ", 0, limit)
    return body[: end + 1] if end > 0 else ""


def instruction_rows(
    texts: Mapping[str, str], names: Mapping[str, str], taken: Iterable[str], count: int
) -> list[dict]:
    """Up to `count` chat rows (start of a bill -> its name) whose bills share no run with `taken` or one another."""
    known = set().union(*map(blocks, taken))
    rows: list[dict] = []
    for bill_id in sorted(texts, key=rank):
        if len(rows) == count:
            break
        text, name = excerpt(texts[bill_id]), names.get(bill_id, "").strip()
        if len(text) < 80 or not name or shares_run(text, known):
            continue
        known |= blocks(text)
        prompt = _INSTRUCTIONS[rank("instruction " + bill_id) % len(_INSTRUCTIONS)].format(text=text)
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": name}]})
    return rows


# Korean: a small crawl with everything that a filter must repair or remove


def as_mojibake(text: str) -> str:
    """What a reader sees who decodes CP949 bytes as Latin-1."""
    return text.encode("cp949").decode("latin-1")


def without_some_gaps(text: str) -> str:
    """The text with about one word gap in twelve closed up, as hasty typists do."""
    words = text.split(" ")
    return words[0] + "".join(
        ("" if rank(f"{i} {word}") % 12 == 0 else " ") + word for i, word in enumerate(words[1:], start=1)
    )


def without_a_sentence(text: str) -> str:
    """The text without its last sentence."""
    return text[: text.rstrip()[:-1].rfind(". ") + 1]


def in_page_chrome(text: str) -> str:
    """The text as a careless extractor saves it: between breadcrumbs and paging links."""
    return _PAGE.format(views=rank(text) % 900 + 100, text=text)


def with_other_digits(text: str, key: str) -> str:
    """The text with its small numbers replaced, as spammers do to pass for new."""
    digits = iter(str(rank(f"{key} {i}")) for i in range(len(text)))
    # Longer and hyphenated numbers stay: at random they could be somebody's telephone number.
    return re.sub(r"(?<![\d-])\d{1,3}(?![\d-])", lambda match: next(digits)[-len(match[0]) :], text)


def rotated(text: str, key: str) -> str:
    """The lines (or, in a text of one line, the words) in the same circle from another start."""
    separator = "\n" if "\n" in text else " "
    parts = text.split(separator)
    start = rank(key) % len(parts)
    return separator.join(parts[start:] + parts[:start])


_NEAR_DUPLICATES: tuple[Callable[[str], str], ...] = (without_some_gaps, without_a_sentence, in_page_chrome)


def crawl_rows(good: Sequence[str], bad: Sequence[tuple[str, str]]) -> list[Row]:
    """The crawl from good texts and (kind, text) pairs of bad ones: rows {id, text, source, kind} in rank order.

    Of every seven good texts, one comes only in decomposed jamo (nfd) and one only as mojibake; the others come as they
    are, two in five of them once more unchanged (duplicate) and four in five once more edited (near_duplicate).
    """
    found: list[tuple[str, str]] = []
    for i, text in enumerate(good):
        if i % 7 == 3:
            found.append(("nfd", unicodedata.normalize("NFD", text)))
            continue
        if i % 7 == 5:
            found.append(("mojibake", as_mojibake(text)))
            continue
        found.append(("good", text))
        if i % 5 < 2:
            found.append(("duplicate", text))
        if i % 5 > 0:
            found.append(("near_duplicate", _NEAR_DUPLICATES[i % 3](text)))
    for kind, text in bad:
        found.append((kind, text))
        for n in range(_SPAM_VARIANTS if kind == "spam" else _MENU_VARIANTS if kind == "menu" else 0):
            key = f"{n} {text}"
            found.append((kind, rotated(with_other_digits(text, key), key)))
    numbers: dict[str, int] = {}
    rows = []
    for kind, text in found:
        numbers[kind] = numbers.get(kind, -1) + 1
        rows.append({"id": f"crawl-{kind}-{numbers[kind]:03d}", "text": text, "source": "crawl", "kind": kind})
    return sorted(rows, key=lambda row: rank(row["id"]))


def with_broken_line(lines: Sequence[str]) -> list[str]:
    """The lines with a truncated copy of the middle one after it, as an interrupted download leaves."""
    middle = len(lines) // 2
    return [*lines[: middle + 1], lines[middle][: len(lines[middle]) // 2], *lines[middle + 1 :]]


# English: the reference topics that every Python carries


def topic_paragraphs(text: str) -> list[str]:
    """The paragraphs of one topic without heading underlines, tables, emphasis marks and hard line breaks in prose."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line.rstrip() for line in block.split("\n") if not re.fullmatch(r"\s*([*=\-~^\"'+#])\1{2,}\s*", line)]
        if not lines or lines[0] == "-[ Footnotes ]-" or any(re.match(r"\s*(\+[-=]{2}|\|)", line) for line in lines):
            continue
        # Prose starts every line at the margin, an item of a list indents its second and later lines by two.
        prose = not any(line.startswith((" ", "*", "[")) for line in lines)
        item = lines[0].startswith("* ") and all(re.match(r"  \S", line) for line in lines[1:])
        paragraph = " ".join(line.strip() for line in lines) if prose or item else "\n".join(lines)
        paragraphs.append(re.sub(r"(?<![\w*])\*(\w[\w .-]*)\*(?![\w*])", r"\1", paragraph))
    return paragraphs


def sections(paragraphs: Iterable[str], limit: int = 4000) -> Iterator[str]:
    """Documents of at most `limit` characters, split between paragraphs; a longer paragraph stands alone."""
    current: list[str] = []
    for paragraph in paragraphs:
        if current and sum(map(len, current)) + 2 * len(current) + len(paragraph) > limit:
            yield "\n\n".join(current)
            current = []
        current.append(paragraph)
    if current:
        yield "\n\n".join(current)


def topic_rows(topics: Mapping[str, str], heldout_share: float = 0.05) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows {id, text, source}; held-out are the documents of lowest rank, at least one.

    Topics quote one another: a paragraph is kept in the first topic that has it, and a training paragraph that shares a
    run with a held-out document is dropped.
    """
    seen: set[str] = set()
    rows: list[Row] = []
    for topic in sorted(topics):
        kept = []
        for paragraph in topic_paragraphs(topics[topic]):
            key = squeeze(paragraph)
            if key in seen:
                continue
            if len(key) >= _BLOCK:
                seen.add(key)
            kept.append(paragraph)
        for number, text in enumerate(sections(kept)):
            rows.append({"id": f"{topic}-{number}", "text": text, "source": "python_topics"})
    by_rank = sorted(rows, key=lambda row: rank(row["text"]))
    count = max(1, round(len(rows) * heldout_share))
    heldout_ids = {row["id"] for row in by_rank[:count]}
    heldout = [row for row in rows if row["id"] in heldout_ids]
    blocked = set().union(*(blocks(row["text"]) for row in heldout))
    train = []
    for row in rows:
        if row["id"] in heldout_ids:
            continue
        text = "\n\n".join(part for part in row["text"].split("\n\n") if not shares_run(part, blocked))
        # The second look catches a run that crosses the end of a paragraph.
        if text.strip() and not shares_run(text, blocked):
            train.append({**row, "text": text})
    return train, heldout
