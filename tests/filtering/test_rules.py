import time
import unicodedata

import pytest

from redwhale.filtering import RULES, normalize_text, prepare

RULE = RULES

PROSE = (
    "고래는 바다에 사는 포유류로, 폐로 숨을 쉬기 때문에 정기적으로 물 위로 올라와야 한다. "
    "새끼는 어미의 젖을 먹고 자라며 무리를 지어 먼 거리를 이동한다. "
    "동해에서는 조선 시대부터 고래를 잡았다는 기록이 남아 있고, 울산 반구대 암각화에도 그 모습이 새겨져 있다."
)
BILL = (
    "현행법은 휴업 신고 등에 관하여 규정하고 있음.\n그러나 신고 제도에는 수리를 요하는 신고와 그렇지 않은 신고가 있어 "
    "이를 명확하게 구분할 필요가 있음.\n이에 신고일부터 10일 이내에 수리 여부를 통지하도록 하려는 것임(안 제12조제3항)."
)
REVIEW = (
    "와 진짜 좋아ㅋㅋㅋㅋ 배우들 연기도 좋고 음악이 너무 예뻤어요!!\n"
    "중간에 살짝 지루하긴 한데... 마지막 10분은 눈물이 났다ㅠㅠ\n"
    "부모님이랑 같이 봐도 괜찮을 것 같네요 강추합니다~"
)
TECHNICAL = (
    "Git에서 커밋을 되돌리려면 `git revert HEAD`를 실행하면 된다. 이 명령은 기록을 지우지 않고 반대되는 커밋을 새로 "
    "만든다. 이미 원격 저장소에 올린 커밋이라면 reset 대신 revert를 쓰는 것이 안전하다."
)
GOOD = [PROSE, BILL, REVIEW, TECHNICAL]

MENU = (
    "로그인 회원가입 장바구니 마이페이지 고객센터 공지사항 이벤트 자주묻는질문 회사소개 이용약관 "
    "개인정보처리방침 사업자정보확인 배송조회 상품문의 베스트 신상품"
)
SPAM = "강남 카지노 추천 사이트 꽁머니 지급 가입코드 먹튀 검증 바카라 슬롯 토토 추천 사이트 안전 놀이터 주소"
ENGLISH = "The quick brown fox jumps over the lazy dog while the whale sleeps beneath the quiet waves of the sea."
MARKUP = '<div class="메뉴"><ul><li><a href="/">홈으로 가기</a></li><li><a href="/b">게시판을 보기</a></li></ul></div>'


def score(name: str, text: str) -> float:
    return RULE[name].score(prepare(normalize_text(text)))


def failing(text: str) -> set[str]:
    document = prepare(normalize_text(text))
    return {
        rule.name
        for rule in RULES.values()
        if not (rule.minimum if rule.minimum is not None else float("-inf"))
        <= rule.score(document)
        <= (rule.maximum if rule.maximum is not None else float("inf"))
    }


@pytest.mark.parametrize("text", GOOD)
def test_good_korean_passes_every_rule(text):
    assert failing(text) == set()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("length", "재미있다."),
        ("length", (PROSE + "\n") * 4000),
        ("korean_ratio", ENGLISH),
        ("korean_ratio", "ㅋㅋㅋㅋㅋㅋ ㅠㅠㅠㅠ ㅎㅎㅎㅎㅎㅎㅎ " * 3),
        ("korean_ratio", "日本語の文章はハングルを含まないので、この規則によって取り除かれるはずである。"),
        ("korean_ratio", PROSE.encode().decode("cp1252", "replace")),
        ("grammar_ratio", MENU),
        ("grammar_ratio", SPAM),
        ("eojeol_length", PROSE.replace(" ", "")),
        ("eojeol_length", "가 나 다 라 마 바 사 아 자 차 카 타 파 하 " * 2),
        ("symbol_ratio", MARKUP),
        ("symbol_ratio", "★☆★☆ 특가 ★☆★☆ 지금 바로 클릭하세요 ▶▶▶▶ ♥♥♥♥ 한정 수량 ■■■■"),
        ("broken_ratio", PROSE.replace("고래", "고\ufffd")),
        ("broken_ratio", PROSE.replace("고래", "占쏙옙")),
        ("broken_ratio", PROSE.replace("고래", "고\ue001")),
        ("duplicate_lines", "\n".join(["오늘의 추천 글을 보세요.", BILL, *["오늘의 추천 글을 보세요."] * 8])),
        (
            "top_bigram",
            "무료 체험을 " * 5 + "지금 신청하면 누구나 무료 체험을 할 수 있고 나중에 무료 체험을 그만둘 수도 있다.",
        ),
        ("duplicate_ngrams", (PROSE + " ") * 3),
        ("ellipsis_lines", "\n".join(f"{n}번째 소식은 다음과 같이 이어지는데..." for n in range(8))),
        ("bullet_lines", "\n".join(f"- {n}번 항목을 고른다" for n in range(12))),
    ],
)
def test_each_rule_finds_what_it_is_for(rule, text):
    assert rule in failing(text)


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("length", "가나 다", 4),
        ("korean_ratio", "가나 ab", 0.5),
        ("korean_ratio", "좋아ㅋㅋㅋㅋ", 2 / 4),
        ("grammar_ratio", "고래는 바다에 산다 (동물), 로그인 Python을", 4 / 6),
        ("eojeol_length", "하나 둘셋넷\n다", 2.0),
        ("symbol_ratio", "가격은 #1, $5!", 2 / 9),
        ("broken_ratio", "가나\ufffd다 占쏙옙", 4 / 7),
        ("duplicate_lines", "가나\n다라마\n\n  가나\n가나", 4 / 9),
        ("top_bigram", "가 나 다 가 나 라", 4 / 6),
        ("top_bigram", "가 가 가 나", 3 / 4),
        ("top_bigram", "가 나 다 라", 0),
        ("duplicate_ngrams", "가 나 다 라 마 바 가 나 다 라 마 사", 5 / 12),
        ("duplicate_ngrams", "가 나 다 라 마 바 가 나 다 라 마 바", 6 / 12),
        ("ellipsis_lines", "가...\n나…\n다\n라\n마\n바\n사\n아", 2 / 8),
        ("ellipsis_lines", "한 줄로 된 긴 글...", 1 / 5),
        ("bullet_lines", "- 가\n• 나\n다\n-라\n마\n바", 2 / 6),
    ],
)
def test_scores_equal_hand_counts(rule, text, expected):
    assert score(rule, text) == pytest.approx(expected)


def test_decomposed_korean_counts_as_korean_after_normalisation():
    decomposed = unicodedata.normalize("NFD", PROSE)
    assert RULE["korean_ratio"].score(prepare(decomposed)) == 0
    assert score("korean_ratio", decomposed) == score("korean_ratio", PROSE) > 0.9
    assert failing(decomposed) == set()


@pytest.mark.parametrize("text", ["", "가", " ", "\n", "ㅋ", "\U0001f433", "\U00020000 \U000f0000 \U0010ffff"])
def test_every_rule_scores_tiny_and_exotic_texts(text):
    document = prepare(text)
    for rule in RULES.values():
        assert 0 <= rule.score(document) < 100


@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.name not in ("length", "eojeol_length")])
@pytest.mark.parametrize("text", [*GOOD, MENU, SPAM, MARKUP, "가 " * 500, "가\n" * 500, "가나 다 " * 100, "…\n" * 9])
def test_ratios_lie_between_zero_and_one(rule, text):
    assert 0 <= score(rule, text) <= 1


def test_rules_have_distinct_names_and_say_what_they_measure():
    assert len(RULE) == len(RULES)
    for rule in RULES.values():
        assert rule.description
        assert rule.minimum is not None or rule.maximum is not None


@pytest.mark.parametrize(
    "unit",
    ["ㅋ", " ", "가 ", "!", "...\n", "\n", "\u200d", "<", "가\u0301", "아 이 ", "1", "\t x"],
    ids=repr,
)
def test_half_a_million_repeated_characters_take_no_quadratic_work(unit):
    text = "x" + unit * (500_000 // len(unit)) + "x"
    start = time.process_time()
    document = prepare(normalize_text(text))
    for rule in RULES.values():
        rule.score(document)
    # Linear work takes a tenth of a second, quadratic work minutes: no load on the machine brings one near the other.
    assert time.process_time() - start < 10
