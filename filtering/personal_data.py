"""Personal data in Korean text, replaced by typed placeholders: <|rrn|>, <|phone|>, <|card|>, <|account|>, ...

Korean particles follow digits without a space, so a number ends where its digits and separators end, never at `\\b`.
A number that is part of a longer one with hyphens is none of these. Every pattern is bounded, and the search first
takes stretches of digits and separators out of the text, so that its time is linear whatever the text.
"""

import bisect
import re
from collections.abc import Callable, Collection, Iterator

_DIGIT = "[0-9０-９]"
_DASH = "[-–—‐‑−－]"
_BETWEEN = "[-–—‐‑−－.· ]"

_STRETCH = re.compile(r"[0-9０-９+(][0-9０-９+() .\-–—‐‑−－·*]{6,}")
_LETTER = re.compile("[A-Za-z가-힣☎]")
_WORD = re.compile("[A-Za-z_]")
_NO_DIGIT = re.compile("[^0-9０-９]")
_HALF_WIDTH = str.maketrans("０１２３４５６７８９", "0123456789")
_DOUBLED = str.maketrans("0123456789", "0246813579")  # twice a digit, its digits added up
_START = rf"(?<!{_DIGIT})(?<!{_DIGIT}[-–—‐‑−－.])"
_END = rf"(?!{_DIGIT})(?![-–—‐‑−－.]{_DIGIT})"
_GAP = rf"(?: ?{_BETWEEN} ?|)"
_MOBILE = rf"[1１][016789０１６７８９][)]?{_GAP}{_DIGIT}{{3,4}}{_GAP}{_DIGIT}{{4}}"
_LANDLINE = (
    rf"(?:[2２]|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70|80|50[2-8])(?:[)] ?|[)]?{_GAP}){_DIGIT}{{3,4}}{_GAP}{_DIGIT}{{4}}"
)
_RRN_NUMBER = re.compile(rf"{_START}{_DIGIT}{{6}}(?: ?{_DASH} ?| )?[1-8１-８](?:{_DIGIT}{{6}}{_END}|\*{{6}})")
_PHONE_NUMBER = re.compile(
    rf"[(]?{_START}(?:(?:\+ ?|00)?82{_BETWEEN}?(?:[(]0[)])?0?|[0０])(?:{_MOBILE}|{_LANDLINE}){_END}"
)
_CARD_NUMBER = re.compile(
    rf"{_START}(?:{_DIGIT}{{4}}({_BETWEEN}?){_DIGIT}{{4}}\1{_DIGIT}{{4}}\1{_DIGIT}{{4}}"
    rf"|3[47]{_DIGIT}{{2}}({_BETWEEN}?){_DIGIT}{{6}}\2{_DIGIT}{{5}}){_END}"
)
_IP_NUMBER = re.compile(rf"{_START}(?:[0-9]{{1,3}}\.){{3}}[0-9]{{1,3}}{_END}")
_ACCOUNT_NUMBER = re.compile(
    rf"{_START}(?:{_DIGIT}{{10,14}}|{_DIGIT}{{2,6}}({_DASH}|[. ]){_DIGIT}{{1,8}}(?:\1{_DIGIT}{{1,8}}){{0,3}}){_END}"
)
# E-mail is found by its sign, since every Latin word may be the start of one.
_EMAIL_SIGN = re.compile(r" ?(?:@|＠|\(at\)|\[at\]|\(골뱅이\)|골뱅이) ?")
_EMAIL_SIGNS = ("@", "＠", "at)", "at]", "골뱅이")
_EMAIL_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}(?:\.| ?\(dot\) ?| ?\[dot\] ?)){1,5}[A-Za-z]{2,10}")
_EMAIL_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-"
_REGION = (
    "(?:서울|부산|대구|인천|광주|대전|울산|세종|경기|강원|제주|충북|충남|전북|전남|경북|경남"
    "|충청[북남]|전라[북남]|경상[북남])"
)
_ADDRESS = re.compile(
    rf"{_REGION}(?:특별자치시|특별자치도|특별시|광역시|시|도)?(?: ?[가-힣]{{1,5}}[시군구]){{0,2}} ?"
    r"(?:[가-힣0-9]{1,10}[읍면동리가] ?)?(?:[가-힣]{1,8}[0-9]{0,4}(?:대로|로|길)(?: ?[0-9]{1,4}번?[가나다라]?길)? ?)?"
    r"(?<=[읍면동리가로길 ])(?:산 ?)?[0-9]{1,5}(?:-[0-9]{1,4})?(?:번지)?"
    r"(?:,? ?(?:[가-힣A-Za-z0-9]{1,15} ?)?[0-9]{1,4}동)?(?:,? ?[0-9]{1,4}층)?(?:,? ?[0-9]{1,5}호)?(?![0-9,.]?[0-9])"
)

# Words before a number that say what it is; the one that stands closest to it decides.
_CONTEXT = re.compile(
    r"(?P<other>(?:주문|운송장|송장|접수|관리|상품|제품|품목|모델|일련|사건|문서|예약|승인|거래|사업자|법인|상표|특허|출원|허가"
    r"|신고|우편|참조|청구|고지|회원|수험|발급|증권|도서|자산|추적|택배|배송|티켓|쿠폰|인증|시리얼|계약|견적|물품|면허|공고|의안)"
    r" ?(?:등록)?(?:번호|코드|No|no)|학번|사번|바코드|ISBN|isbn|ISSN|버전|[Vv]ersion|조회수"
    r"|타임스탬프|timestamp|좌표|위도|경도)"
    r"|(?P<rrn>주민|등록번호|외국인|민번)"
    r"|(?P<card>카드|[Cc]ard|CARD|비자|마스터|VISA)"
    r"|(?P<bank>계좌|예금주|입금|송금|통장|은행|뱅크|국민|신한|농협|새마을|우체국|수협|신협|씨티|토스|카카오|KB|NH|IBK|SC|KEB"
    r"|(?:우리|하나|기업|산업|제일)[ :)]{0,3}$)"
    r"|(?P<phone>전화|연락|휴대|핸드폰|폰|팩스|F(?:AX|ax)|[Tt]el|TEL|☎|문의|T\.|HP|H\.P)"
)
_AMOUNT = re.compile(r" ?(?:원|달러|엔|유로|위안|만 ?원|억|%|km|kg)| ?[건명개회](?![가-힣])")
_AFTER_BANK = re.compile(
    r" ?[(\[]? ?(?:예금주|국민|신한|우리|하나|농협|기업|새마을|우체국|카카오|토스|케이|SC|부산|대구|광주|전북|경남"
    r"|수협|신협|KB|NH|IBK)"
)
_BEFORE = 24
_AFTER = 14
_LATEST_YEAR = 30


def _digits(text: str) -> str:
    return _NO_DIGIT.sub("", text).translate(_HALF_WIDTH)


def _plain(matched: str) -> bool:
    return matched.strip("()+ ").isdigit()


def _is_rrn(matched: str, before: str, after: str) -> bool:
    """A date of birth, and a digit of sex and century that fits it; foreigners have 5 to 8 (no checksum since 2020)."""
    digits = _digits(matched)
    year, month, day, century = int(digits[:2]), int(digits[2:4]), int(digits[4:6]), digits[6]
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return False
    if matched.endswith("*"):
        return True
    if century in "3478" and year > _LATEST_YEAR:
        return False
    closest = _closest(before, "rrn", "other", "bank")
    if not _plain(matched):
        return closest != "other"
    # Without a separator any number of 13 digits may look like one.
    likely = closest is None and not (century in "12" and year < 20) and not _AMOUNT.match(after)
    return closest == "rrn" or likely


def _is_phone(matched: str, before: str, after: str) -> bool:
    """Numbering plan of Korea; numbers of companies (15xx-xxxx) are no personal data."""
    digits = _digits(matched)
    if digits.startswith(("82", "0082")) and not matched.startswith("+") and _plain(matched):
        return _closest(before, "phone", "other") == "phone"
    if _plain(matched):
        if not 9 <= len(digits) <= 12 or _AMOUNT.match(after):
            return False
        return _closest(before, "phone", "other") != "other"
    return digits.startswith(("01", "82")) or _closest(before, "phone", "other") != "other"


def _is_card(matched: str, before: str, after: str) -> bool:
    """Luhn's checksum and a known issuer, or four groups of four after a word that speaks of cards."""
    digits = _digits(matched)
    closest = _closest(before, "card", "other")
    if closest == "other":
        return False
    issuer = digits[0] in "4569" or digits[:2] in ("34", "35", "36", "37", "38") or 2221 <= int(digits[:4]) <= 2720
    if closest == "card" and digits[0] in "234569":
        return True
    return issuer and sum(map(int, digits[-1::-2] + digits[-2::-2].translate(_DOUBLED))) % 10 == 0


def _is_ip(matched: str, before: str, after: str) -> bool:
    """Four bytes that are no version number and no private or local address."""
    parts = [int(part) for part in matched.split(".")]
    if max(parts) > 255 or max(parts) < 32 or before[-1:] in ("v", "V"):
        return False
    local = parts[0] in (0, 10, 127, 255) or parts[:2] in ([192, 168], [169, 254])
    if local or (parts[0] == 172 and 16 <= parts[1] <= 31):
        return False
    return _closest(before, "other") is None


def _is_account(matched: str, before: str, after: str) -> bool:
    """Ten to fourteen digits beside the name of a bank or a word for payments."""
    if not 10 <= len(_digits(matched)) <= 14 or _AMOUNT.match(after):
        return False
    closest = _closest(before, "bank", "other")
    return closest == "bank" or (closest is None and _AFTER_BANK.match(after) is not None)


# In order of precedence: what one kind takes, the later ones leave alone.
_NUMBERS: dict[str, tuple[re.Pattern[str], Callable[[str, str, str], bool]]] = {
    "rrn": (_RRN_NUMBER, _is_rrn),
    "phone": (_PHONE_NUMBER, _is_phone),
    "card": (_CARD_NUMBER, _is_card),
    "ip": (_IP_NUMBER, _is_ip),
    "account": (_ACCOUNT_NUMBER, _is_account),
}
KINDS = (*_NUMBERS, "email", "address")
"""Kinds of personal data; every one has a placeholder <|KIND|>."""
PLACEHOLDER = re.compile(rf"<\|(?:{'|'.join(KINDS)})\|>")
DEFAULT_KINDS = tuple(kind for kind in KINDS if kind != "address")
"""What is masked unless the user says otherwise: addresses also stand in news and on maps."""


def mask_personal_data(text: str, kinds: Collection[str] = DEFAULT_KINDS) -> tuple[str, dict[str, int]]:
    """Returns a normalised text with personal data replaced by <|KIND|>, and how many of each kind there were.

    Resident registration numbers (also half hidden ones), phones, cards (Luhn), accounts beside a bank's name, public
    IP addresses, e-mail, and street addresses where asked for. Linear in the text's length.
    """
    counts: dict[str, int] = {}
    pieces: list[str] = []
    done = 0
    for start, end, kind in _found(text, kinds):
        if start < done:
            continue
        pieces += (text[done:start], f"<|{kind}|>")
        counts[kind] = counts.get(kind, 0) + 1
        done = end
    if not pieces:
        return text, counts
    pieces.append(text[done:])
    return "".join(pieces), counts


def _found(text: str, kinds: Collection[str]) -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    if "email" in kinds and any(sign in text for sign in _EMAIL_SIGNS):
        found += _emails(text)
    if "address" in kinds:
        found += [(*match.span(), "address") for match in _ADDRESS.finditer(text)]
        found.sort()
    for stretch in _STRETCH.finditer(text):
        # Dates and amounts have fewer digits than any of the numbers; the IP address alone may have as few.
        digits = len(stretch[0]) - len(_NO_DIGIT.findall(stretch[0]))
        if digits < 9 and "*" not in stretch[0] and stretch[0].count(".") < 3:
            continue
        for kind, (pattern, is_personal) in _NUMBERS.items():
            if kind not in kinds:
                continue
            for match in pattern.finditer(text, stretch.start(), stretch.end()):
                start, end = match.span()
                place = bisect.bisect(found, (start,))
                taken = (place and found[place - 1][1] > start) or (place < len(found) and found[place][0] < end)
                # Digits inside of an identifier or a link are no number of anyone.
                if taken or _WORD.match(text, end) or (start and _plain(match[0]) and _WORD.match(text, start - 1)):
                    continue
                if is_personal(match[0], text[max(0, start - _BEFORE) : start], text[end : end + _AFTER]):
                    found.insert(place, (start, end, kind))
    return found


def _emails(text: str) -> Iterator[tuple[int, int, str]]:
    done = 0
    for sign in _EMAIL_SIGN.finditer(text):
        domain = _EMAIL_DOMAIN.match(text, sign.end()) if sign.start() >= done else None
        if domain is not None:
            head = text[max(done, sign.start() - 64) : sign.start()]
            local = len(head) - len(head.rstrip(_EMAIL_CHARACTERS))
            if local:
                done = domain.end()
                yield sign.start() - local, done, "email"


def _closest(before: str, *groups: str) -> str | None:
    """Which of these groups of `_CONTEXT` has the word that stands closest to the number."""
    closest = None
    if not _LETTER.search(before):
        return None
    for match in _CONTEXT.finditer(before):
        if match.lastgroup in groups:
            closest = match.lastgroup
    return closest
