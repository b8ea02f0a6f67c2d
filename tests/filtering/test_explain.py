import json
import subprocess
import sys
from pathlib import Path

import pytest

from redwhale.filtering import (
    RULES,
    CorpusError,
    Document,
    MeasureOptions,
    Threshold,
    explain_document,
    explain_file,
    measure_document,
)

PROSE = (
    "고래는 바다에 사는 포유류로, 폐로 숨을 쉬기 때문에 정기적으로 물 위로 올라와야 한다. "
    "새끼는 어미의 젖을 먹고 자라며 무리를 지어 먼 거리를 이동한다. 문의는 010-1234-5678로 하면 된다."
)
MENU = (
    "로그인 회원가입 장바구니 마이페이지 고객센터 공지사항 이벤트 회사소개 "
    "이용약관 배송조회 상품문의 베스트 신상품 사이트맵"
)


def test_every_rule_has_a_verdict_that_agrees_with_the_measurement():
    for text in (PROSE, MENU):
        document = Document("a", text, "b")
        explained = explain_document(document, MeasureOptions())
        assert explained.measured == measure_document(document, MeasureOptions())
        assert [verdict.rule for verdict in explained.verdicts] == list(RULES)
        assert tuple(one.rule for one in explained.verdicts if one.dropped) == explained.measured.failed
        for verdict in explained.verdicts:
            low = float("-inf") if verdict.minimum is None else verdict.minimum
            high = float("inf") if verdict.maximum is None else verdict.maximum
            assert verdict.dropped == (verdict.enabled and not low <= verdict.score <= high)


def test_the_text_tells_scores_thresholds_masks_and_the_verdict():
    shown = str(explain_document(Document("글 1", PROSE, "시험"), MeasureOptions()))
    assert "글 1 (시험)" in shown
    assert "\nkept\n" in shown
    assert "masked: phone 1" in shown
    assert all(name in shown for name in RULES)
    dropped = str(
        explain_document(Document("2", MENU, "s"), MeasureOptions(thresholds={"length": Threshold(minimum=9)}))
    )
    assert "dropped by grammar_ratio" in dropped
    assert "9 .. 500000" in next(line for line in dropped.splitlines() if line.startswith("length"))
    assert "DROPS" in next(line for line in dropped.splitlines() if line.startswith("grammar_ratio"))
    assert "  off  " in next(line for line in dropped.splitlines() if line.startswith("hate_words"))


def test_a_file_is_explained_by_its_first_document_or_the_one_with_an_id(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate([PROSE, MENU])))
    assert explain_file(path, MeasureOptions()).kept
    assert not explain_file(path, MeasureOptions(), identifier="1").kept
    with pytest.raises(CorpusError, match="holds no document with the id '7'"):
        explain_file(path, MeasureOptions(), identifier="7")


def test_a_file_without_a_document_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(CorpusError, match="a.jsonl' holds no document: no usable text"):
        explain_file(tmp_path / "a.jsonl", MeasureOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": {"lenght": Threshold()}}, "unknown rule 'lenght': the rules are length"),
        ({"thresholds": {"length": Threshold(minimum=9, maximum=3)}}, "thresholds.length lets nothing pass"),
        ({"mask": ("passport",)}, "unknown kind 'passport': the kinds are rrn"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(CorpusError, match=message):
        MeasureOptions(**options)


def test_placeholders_are_no_symbols_to_the_rules():
    contacts = "문의는 010-1234-5678이나 02-123-4567, 010-9876-5432로 해 주시고 메일은 whale@naver.com으로 보내 주세요."
    measured = measure_document(Document("a", contacts, "b"), MeasureOptions())
    assert measured.masked == {"phone": 3, "email": 1}
    assert measured.scores["symbol_ratio"] == 0


def test_the_command_explains_a_file_with_and_without_a_recipe(tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "redwhale.engine.cli", "filter", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    (tmp_path / "a.txt").write_text(MENU, encoding="utf-8")
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
    shown = command("--explain", tmp_path / "a.txt")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "dropped by grammar_ratio" in shown.stdout
    overridden = command(recipe, "--explain", tmp_path / "a.txt", "filter.thresholds.grammar_ratio.enabled=false")
    assert (overridden.returncode, overridden.stderr) == (0, "")
    assert "dropped by grammar_ratio" not in overridden.stdout
    nothing = command()
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
    assert "filter needs a recipe, or --explain FILE" in nothing.stderr
