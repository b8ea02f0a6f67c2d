import random
import re
from collections import Counter

import pytest

from redwhale.filtering.personal_data import KINDS, mask_personal_data

PARTICLES = ["로", "으로", "입니다", "이에요", "를", "은", "이고", "예요", "인데", "라고", ".", ", ", " ", ")"]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def rrn(rng: random.Random) -> tuple[str, str]:
    year = rng.randint(1925, 2025)
    century = rng.choice("1256" if year < 2000 else "3478")
    return f"{year % 100:02}{rng.randint(1, 12):02}{rng.randint(1, 28):02}", century + digits(rng, 6)


def card(rng: random.Random) -> str:
    """A number of a known issuer with Luhn's check digit, computed here digit by digit from the right."""
    body = rng.choice(["4", "51", "53", "55", "9", "62", "35"])
    body += digits(rng, 15 - len(body))
    total = 0
    for place, digit in enumerate(reversed(body)):
        value = int(digit) * 2 if place % 2 == 0 else int(digit)
        total += value // 10 + value % 10
    return body + str(-total % 10)


def in_fours(number: str, separator: str) -> str:
    return separator.join(number[n : n + 4] for n in range(0, 16, 4))


def mobile(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(["010", "010", "010", "011", "016", "019"]), str(rng.randint(2000, 9999)), digits(rng, 4)


def area(rng: random.Random) -> str:
    return rng.choice(["031", "032", "051", "053", "062", "042", "064", "070", "0505"])


def email(rng: random.Random) -> tuple[str, str]:
    name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) + rng.choice(
        ["", "_kr", ".lee", "88"]
    )
    return name, rng.choice(["naver.com", "gmail.com", "korea.ac.kr", "daum.net", "company.co.kr"])


BANKS = ["국민은행", "신한은행", "우리은행", "하나은행", "농협", "카카오뱅크", "기업은행", "새마을금고", "토스뱅크"]
SHAPES = ["3-2-6", "3-3-6", "6-2-6", "4-3-6", "3-4-4-2", "4-2-7", "3-6-5"]


def account(rng: random.Random, separator: str = "-") -> str:
    return separator.join(digits(rng, int(part)) for part in rng.choice(SHAPES).split("-"))


# Twenty formats: a sentence up to the number, the number, and its kind.
FORMATS = {
    "rrn": lambda r: (r.choice(["주민등록번호는 ", "번호 ", "김철수(", "신청인 "]), "-".join(rrn(r)), "rrn"),
    "rrn without hyphen": lambda r: (
        r.choice(["주민등록번호 ", "주민번호는 ", "본인은 ", "신청인 "]),
        "".join(rrn(r)),
        "rrn",
    ),
    "rrn with spaces": lambda r: (r.choice(["주민등록번호: ", "외국인등록번호는 "]), " - ".join(rrn(r)), "rrn"),
    "rrn half hidden": lambda r: ("주민등록번호 ", f"{rrn(r)[0]}-{r.choice('1234')}******", "rrn"),
    "mobile": lambda r: (r.choice(["연락처는 ", "전화:", "문의 ", "제 번호는 "]), "-".join(mobile(r)), "phone"),
    "mobile plain": lambda r: (r.choice(["연락처는 ", "전화:", "휴대폰 ", "제 번호"]), "".join(mobile(r)), "phone"),
    "mobile with dots": lambda r: ("연락 주세요 ", ".".join(mobile(r)), "phone"),
    "mobile with spaces": lambda r: (r.choice(["핸드폰 ", "여기 "]), " ".join(mobile(r)), "phone"),
    "mobile abroad": lambda r: ("해외에서는 ", f"+82-10-{r.randint(2000, 9999)}-{digits(r, 4)}", "phone"),
    "mobile abroad with spaces": lambda r: ("해외에서는 ", f"+82 10 {r.randint(2000, 9999)} {digits(r, 4)}", "phone"),
    "landline": lambda r: ("사무실은 ", f"{area(r)}-{r.randint(200, 999)}-{digits(r, 4)}", "phone"),
    "landline half bracket": lambda r: ("전화:", f"02){r.randint(200, 9999)}-{digits(r, 4)}", "phone"),
    "landline in brackets": lambda r: ("문의는 ", f"({area(r)}) {r.randint(200, 999)}-{digits(r, 4)}", "phone"),
    "card": lambda r: (r.choice(["카드번호는 ", "결제한 카드 ", "여기 "]), in_fours(card(r), "-"), "card"),
    "card plain": lambda r: (r.choice(["카드번호 ", "신용카드 "]), card(r), "card"),
    "card with spaces": lambda r: ("카드 번호는 ", in_fours(card(r), " "), "card"),
    "account": lambda r: (f"{r.choice(BANKS)} ", account(r), "account"),
    "account plain": lambda r: (f"입금 계좌는 {r.choice(BANKS)} ", account(r, ""), "account"),
    "email": lambda r: (r.choice(["메일은 ", "이메일:", "문의는"]), "@".join(email(r)), "email"),
    "email spelled": lambda r: ("메일은 ", r.choice([" (at) ", "[at]", " 골뱅이 "]).join(email(r)), "email"),
}

INNOCENT = {
    "order number": lambda r: f"주문번호는 {r.randint(2015, 2026)}-{digits(r, 4)}-{digits(r, 6)}입니다",
    "order of the day": lambda r: (
        f"주문번호 {r.randint(2015, 2026)}{r.randint(1, 12):02}{r.randint(1, 28):02}-{digits(r, 7)}를 확인하세요"
    ),
    "order plain": lambda r: f"주문번호 {digits(r, r.choice([10, 12, 13, 14, 16]))}의 배송이 시작되었습니다",
    "parcel": lambda r: f"운송장번호 {digits(r, 4)}-{digits(r, 4)}-{digits(r, 4)}로 조회하세요",
    "date": lambda r: f"{r.randint(1900, 2030)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}에 열린 행사였다",
    "date with dots": lambda r: f"{r.randint(1900, 2030)}.{r.randint(1, 12):02}.{r.randint(1, 28):02}. 작성한 글이다",
    "period": lambda r: (
        f"{r.randint(1990, 2020)}.{r.randint(1, 12)}.{r.randint(1, 28)} - "
        f"2024.{r.randint(1, 12)}.{r.randint(1, 28)} 동안"
    ),
    "time stamp": lambda r: (
        f"{r.randint(2000, 2026)}-{r.randint(1, 12):02}-{r.randint(1, 28):02} "
        f"{r.randint(10, 23)}:{r.randint(10, 59)}:00에 저장했다"
    ),
    "amount": lambda r: f"모두 {r.randint(1, 999)},{digits(r, 3)},{digits(r, 3)}원을 썼다",
    "amount plain": lambda r: f"보증금 {r.randint(10**6, 10 ** r.randint(7, 12))} 원을 받았다",
    "isbn": lambda r: f"이 책은 ISBN 978-89-{digits(r, 4)}-{digits(r, 3)}-{digits(r, 1)}이다",
    "business": lambda r: f"사업자등록번호 {digits(r, 3)}-{digits(r, 2)}-{digits(r, 5)}인 회사",
    "case": lambda r: (
        f"대법원 {r.randint(1980, 2025)}다{digits(r, 5)} 판결과 "
        f"{r.randint(1980, 2025)}. {r.randint(1, 12)}. {r.randint(1, 28)}. 선고"
    ),
    "version": lambda r: f"버전 {r.randint(1, 9)}.{r.randint(0, 20)}.{r.randint(0, 20)}.{r.randint(0, 9999)}로 올렸다",
    "statistics": lambda r: (
        f"인구는 {r.randint(10**4, 10**7)}명이고 면적은 {r.randint(100, 999)}.{digits(r, 2)} km²이다"
    ),
    "table": lambda r: " ".join(digits(r, r.randint(2, 5)) for _ in range(6)) + " 순서로 적었다",
    "company phone": lambda r: f"대표번호 {r.choice(['1588', '1544', '1661', '1899'])}-{digits(r, 4)}로 전화하세요",
}


@pytest.mark.parametrize("name", FORMATS)
def test_personal_data_in_each_of_twenty_formats_is_masked_with_its_kind(name):
    rng = random.Random(name)
    found = 0
    for _ in range(400):
        before, number, kind = FORMATS[name](rng)
        after = rng.choice(PARTICLES)
        text, counts = mask_personal_data(f"{before}{number}{after} 다음에 다시 이야기하자.")
        found += counts == {kind: 1} and text == f"{before}<|{kind}|>{after} 다음에 다시 이야기하자."
    assert found >= 0.99 * 400


def test_there_are_twenty_formats():
    assert len(FORMATS) == 20


def test_order_numbers_dates_and_amounts_are_left_alone():
    rng = random.Random(0)
    masked = Counter()
    for name, make in INNOCENT.items():
        for _ in range(300):
            masked[name] += bool(mask_personal_data(f"{make(rng)}. 그 뒤의 이야기는 다음에 적는다.", KINDS)[1])
    assert sum(masked.values()) <= 0.01 * 300 * len(INNOCENT), masked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("보증금 1100000 원, 전화:02)123-4567", "보증금 1100000 원, 전화:<|phone|>"),
        ("주문번호 2024-0001-000123 은 010-1234-5678 과 다르다", "주문번호 2024-0001-000123 은 <|phone|> 과 다르다"),
        ("주민번호9001011234567이고", "주민번호<|rrn|>이고"),
        ("전화: 평일에만 받습니다. 그 뒤의 글도 남는다.", "전화: 평일에만 받습니다. 그 뒤의 글도 남는다."),
        ("０１０－１２３４－５６７８로", "<|phone|>로"),
        ("접속 기록 211.234.10.77에서, 127.0.0.1이 아니라", "접속 기록 <|ip|>에서, 127.0.0.1이 아니라"),
        ("110-123-456789 (신한은행 홍길동)", "<|account|> (신한은행 홍길동)"),
        ("hong@naver.com과 lee.k@korea.ac.kr로", "<|email|>과 <|email|>로"),
        ("010-1234-5678@naver.com", "<|email|>"),
        ('id="swlnappltextshared0105230100xml_1"', 'id="swlnappltextshared0105230100xml_1"'),
        ("014-1234-5678-9012는 전화가 아니다", "014-1234-5678-9012는 전화가 아니다"),
        ("991332-1234567은 날짜가 아니다", "991332-1234567은 날짜가 아니다"),
        ("4111-1111-1111-1112는 검사 숫자가 틀렸다", "4111-1111-1111-1112는 검사 숫자가 틀렸다"),
    ],
)
def test_known_traps(text, expected):
    assert mask_personal_data(text)[0] == expected


@pytest.mark.parametrize(
    "address",
    [
        "서울특별시 강남구 테헤란로 123",
        "서울 종로구 세종대로 209",
        "경기도 성남시 분당구 판교역로 166번길 12",
        "부산광역시 해운대구 우동 1408-5번지",
        "전라북도 전주시 완산구 효자로 225, 103동 1502호",
        "제주특별자치도 서귀포시 중문관광로 72번길 35",
    ],
)
def test_addresses_are_masked_on_request_only(address):
    text = f"사는 곳은 {address}이고 지난달에 이사했다."
    assert mask_personal_data(text) == (text, {})
    assert mask_personal_data(text, KINDS) == ("사는 곳은 <|address|>이고 지난달에 이사했다.", {"address": 1})


def test_only_the_kinds_asked_for_are_masked():
    text = "전화 010-1234-5678, 메일 a.b@naver.com"
    assert mask_personal_data(text, ("email",)) == ("전화 010-1234-5678, 메일 <|email|>", {"email": 1})
    assert mask_personal_data(text, ()) == (text, {})


def test_masking_twice_changes_nothing():
    rng = random.Random(3)
    text = " ".join("".join(make(rng)[:2]) for make in FORMATS.values())
    once, counts = mask_personal_data(text, KINDS)
    assert sum(counts.values()) == 20
    assert mask_personal_data(once, KINDS) == (once, {})
    assert not re.search(r"\d{4}", once)
