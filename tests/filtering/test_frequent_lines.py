import json
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
from filtering_corpus import korean

from redwhale.filtering import DuplicateConfig, FilterConfig, content_id, filter_corpus, normalize_text
from redwhale.filtering.frequent_lines import FrequentLines, line_hash

NOTICE = "이 게시판의 글은 저작권자의 허락 없이 옮길 수 없습니다."
FOOTER = ["고래신문사 대표이사 김고래", "주소 고래시 바다구 파도로 12", "제보 전화는 대표 번호로 받습니다"]


def lines_in(counts: dict[str, int], line_documents: int = 50, block_documents: int = 4) -> FrequentLines:
    table = sorted((line_hash(line), count) for line, count in counts.items())
    hashes, documents = (np.array([row[column] for row in table], dtype=np.uint64) for column in (0, 1))
    return FrequentLines(hashes, documents, line_documents=line_documents, block_documents=block_documents)


LAST = 2**64 - 1
"""A content id that is among the chosen documents of no line."""


def without(text: str, counts: dict[str, int], content: int = LAST) -> str:
    (left,) = lines_in(counts).without([text], [content])
    return left


def test_a_line_in_more_than_fifty_documents_goes_and_one_in_fifty_stays():
    text = f"고래가 바다를 건넜다.\n\n{NOTICE}\n\n선장은 집으로 돌아갔다."
    assert without(text, {NOTICE: 51}) == "고래가 바다를 건넜다.\n\n선장은 집으로 돌아갔다."
    assert without(text, {NOTICE: 50}) == text
    assert without(text, {}) == text


def test_a_frequent_line_stays_in_about_fifty_documents_chosen_by_content():
    text = f"고래가 바다를 건넜다.\n{NOTICE}"
    stays = sum(without(text, {NOTICE: 1000}, content_id(f"문서 {n}")) == text for n in range(1000))
    # Binomial(1000, 0.05): five standard deviations are 34.
    assert 16 <= stays <= 84


def test_a_short_frequent_line_stays_among_lines_of_its_own_document():
    reply = "\n".join(["선장이 물었다.", "정말이야?", "선원이 대답했다."])
    assert without(reply, {"정말이야?": 900}) == reply
    heading = "\n".join(["제안이유", "고래를 지키는 법이 없다.", "주요내용"])
    assert without(heading, {"제안이유": 900, "주요내용": 900}) == heading
    menu = "\n".join(["선장이 물었다.", "처음으로", "목록 보기", "선원이 대답했다."])
    assert without(menu, {"처음으로": 900, "목록 보기": 900}) == "선장이 물었다.\n선원이 대답했다."


def test_lines_of_a_block_in_four_documents_go_but_not_one_alone():
    body = ["고래가 바다를 건넜다.", "선장은 그것을 오래 바라보았다."]
    page = "\n".join([*body, *FOOTER])
    assert without(page, dict.fromkeys(FOOTER, 4)) == "\n".join([*body, FOOTER[0]])
    assert without(page, {FOOTER[1]: 4}) == page
    assert without(FOOTER[0], {FOOTER[0]: 4}) == FOOTER[0]


def test_the_corpus_loses_the_footer_of_a_site_and_counts_no_copies(tmp_path):
    rng = random.Random(0)
    texts = [f"{korean(rng)}\n{NOTICE}\n" + "\n".join(FOOTER) for _ in range(120)]
    copied = korean(rng)
    texts += [f"{copied}\n{rng.randrange(1000)}" for _ in range(60)]
    texts += [korean(rng) for _ in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    config = FilterConfig(inputs=[str(path)], validation_fraction=0, duplicates=DuplicateConfig(jaccard=0.9))
    summary = filter_corpus(config, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.parquet")
    kept = {int(row["id"]): row["text"] for row in pq.read_table(file).to_pylist()}
    site = [text for place, text in kept.items() if place < 120]
    assert len(site) > 100
    with_notice = sum(NOTICE in text for text in site)
    assert 25 <= with_notice <= 75
    # Lines that a copied article has in every copy are those of one document.
    (article,) = [text for place, text in kept.items() if 120 <= place < 180]
    assert article.startswith(copied)
    assert all(kept[place] == normalize_text(texts[place]) for place in kept if place >= 180)
    originals = Counter(texts[place].count("\n") + 1 for place in kept)
    lines_before = sum(lines * count for lines, count in originals.items())
    lines_after = sum(text.count("\n") + 1 for text in kept.values())
    assert summary.lines_removed == lines_before - lines_after > 150
    assert summary.bytes_of_lines > 50 * summary.lines_removed


def test_a_document_of_nothing_but_frequent_lines_is_dropped(tmp_path):
    rng = random.Random(1)
    sentences = [
        "고래는 오늘도 푸른 바다를 천천히 헤엄쳤다.",
        "선장이 낡은 지도를 펼쳐 놓고 길을 찾았다.",
        "아이는 언덕에서 연을 날리며 즐겁게 노래했다.",
        "할머니는 마당에 앉아 따뜻한 차를 마셨다.",
    ]
    texts = [f"{sentences[n % 4]}\n{korean(rng)}\n{sentences[(n + 1) % 4]}" for n in range(200)]
    texts.append("\n".join(sentences))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    duplicates = DuplicateConfig(line_documents=5)
    config = FilterConfig(inputs=[str(path)], validation_fraction=0, duplicates=duplicates)
    summary = filter_corpus(config, tmp_path / "out")
    dropped = {rule.name: rule for rule in summary.rules}["frequent_lines"]
    assert dropped.dropped_documents == dropped.unique_documents == 1
    assert [example.id for example in dropped.examples] == ["200"]
