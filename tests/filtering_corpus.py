"""A small Korean corpus with everything that a filter must catch, and the hashes of what it writes."""

import hashlib
import json
import random
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SUBJECTS = ["고래는", "선장이", "바다를", "학생들은", "국회가", "법원에서", "도서관에", "할머니와", "기술을", "마을도"]
OBJECTS = ["오래된 지도를", "새로운 법안을", "푸른 물결을", "긴 이야기를", "작은 배를", "여러 기록을", "따뜻한 빵을"]
VERBS = ["바라보았다", "설명하고 있다", "다시 고쳤으며 만족했다", "찾아 나섰다", "기억하고 있었다", "조용히 읽었다"]
MENU = "로그인 회원가입 장바구니 마이페이지 고객센터 공지사항 이벤트 회사소개 이용약관 배송조회 상품문의 베스트 신상품"
ENGLISH = "This page is written in English and it has nothing to do with the corpus that we want to build here."


def korean(rng: random.Random) -> str:
    """A document of six to twelve sentences that passes every rule."""
    sentences = [
        f"{rng.choice(SUBJECTS)} {rng.choice(OBJECTS)} {rng.choice(VERBS)}." for _ in range(rng.randint(6, 12))
    ]
    return " ".join(sentences) + f" 이것은 {rng.randrange(10**9)}번째 글이다."


def mixed_corpus(folder: Path, documents: int = 400, seed: int = 0) -> list[dict]:
    """Writes good, bad and duplicate documents to three files and returns the records in input order."""
    rng = random.Random(seed)
    texts = []
    for n in range(documents):
        kind = rng.random()
        if kind < 0.6 or not texts:
            texts.append(korean(rng))
        elif kind < 0.7:
            texts.append(rng.choice(texts))
        elif kind < 0.75:
            texts.append(unicodedata.normalize("NFD", rng.choice(texts)) + "  \r\n")
        elif kind < 0.8:
            texts.append(f"{MENU} {n}")
        elif kind < 0.85:
            texts.append(f"{ENGLISH} {n}")
        elif kind < 0.9:
            texts.append(f"짧은 글 {n}")
        elif kind < 0.95:
            texts.append((korean(rng) + "\n") * 3)
        elif kind < 0.98:
            texts.append(f"<a href='/{n}'>★☆</a> " * 20)
        else:
            # One word more than another document, and a space less.
            texts.append(f"{n}. " + rng.choice(texts).replace(" ", "", 1))
    records = [{"id": str(n), "text": text, "source": f"source{n % 3}"} for n, text in enumerate(texts)]
    third = documents // 3
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "a.jsonl").write_text("\n".join(lines[:third]) + "\n{broken\n", encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(lines[third : 2 * third]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records[2 * third :]), folder / "c.parquet")
    return records


def outputs(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def alike_pairs(sets: Sequence[set[str]], least: float) -> dict[tuple[int, int], float]:
    """Jaccard similarities of at least `least` of all pairs (earlier, later) of sets, by brute force."""
    holders: dict[str, list[int]] = defaultdict(list)
    alike: dict[tuple[int, int], float] = {}
    for place, mine in enumerate(sets):
        common = np.zeros(place + 1, dtype=np.int64)
        for gram in mine:
            common[holders[gram]] += 1
            holders[gram].append(place)
        for other in np.flatnonzero(common):
            similarity = common[other] / (len(mine) + len(sets[other]) - common[other])
            if similarity >= least:
                alike[int(other), place] = float(similarity)
    return alike
