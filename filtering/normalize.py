"""Text normalisation that changes characters and never words, and the content id computed from its result."""

import hashlib
import re
import unicodedata

_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters other than newline and tab, soft hyphen, zero-width and bidirectional marks, byte-order mark.
# A zero-width joiner stays before a pictograph, where it makes one emoji out of several.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    "|\u200d(?![\u2600-\u27bf\U0001f300-\U0001faff])"
)
# Every space separator, and the two Hangul fillers that pages use as blanks.
_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000\u3164\uffa0]")
_MARKS = "!?~♡♥★☆^"
_REPEATED = re.compile(rf"([ㅋㅎㅠㅜㅡㅇㄷㄱㅂㅅㅉㄲㅗㅏㅓㅣ{_MARKS}])\1{{2,}}")
_PAIRS = ("ㅋㅎ", "ㅎㅋ", "ㅠㅜ", "ㅜㅠ")
_REPEATED_PAIR = re.compile(rf"({'|'.join(_PAIRS)})\1{{2,}}")
_BLANK_LINES = re.compile("\n{3,}")

_HANGUL = re.compile("[가-힣]")
# What a browser shows for the bytes 0x80-0x9F of a page it takes for latin-1 (WHATWG windows-1252).
_WINDOWS_1252 = {
    ord(bytes([byte]).decode("cp1252")): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}


def normalize_text(text: str) -> str:
    """Returns `text` in NFC with plain spaces and newlines and without control or zero-width characters.

    Lines lose trailing blanks, two or more blank lines become one, and blanks around the whole text go. A run of three
    or more of one emoticon jamo, or of a pair of them, keeps two (좋아ㅋㅋㅋㅋ becomes 좋아ㅋㅋ), and one of four
    or more exclamation, question, tilde or heart marks keeps three. Words, digits, dots and indentation stay as they
    are. U+FFFD stays too, and unpaired surrogates become U+FFFD: the rules judge them. Idempotent, in linear time.
    """
    # Most text needs none of the four; isprintable is false for all that they look for but the fillers.
    if not text.replace("\n", "").replace("\t", "").isprintable() or "\u3164" in text or "\uffa0" in text:
        text = _SURROGATE.sub("\ufffd", text)
        text = _NEWLINE.sub("\n", text)
        text = _INVISIBLE.sub("", text)
        text = _SPACE.sub(" ", text)
    text = unicodedata.normalize("NFC", text)
    text = _REPEATED.sub(_shortened, text)
    if any(pair in text for pair in _PAIRS):
        text = _REPEATED_PAIR.sub(r"\1\1", text)
    if " \n" in text or "\t\n" in text:
        # Not a regex: `[ \t]+$` takes quadratic time on a long run of blanks inside a line.
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip()


def _shortened(run: re.Match[str]) -> str:
    return run[0][: 3 if run[1] in _MARKS else 2]


def repair_mojibake(text: str) -> str:
    """Returns the Korean text behind UTF-8 or CP949 bytes that were read as latin-1 or windows-1252.

    Any other text comes back unchanged: a repair is made only where `text` holds no Hangul, all of it fits one of the
    two encodings, and Hangul syllables are half of the decoded non-ASCII characters and a tenth of all.
    """
    if text.isascii() or _HANGUL.search(text):
        return text
    try:
        data = text.translate(_WINDOWS_1252).encode("latin-1")
    except UnicodeEncodeError:
        return text
    for encoding in ("utf-8", "cp949"):
        try:
            decoded = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        foreign = sum(not character.isascii() for character in decoded)
        hangul = len(_HANGUL.findall(decoded))
        # The second condition guards English pages with one accented name that happens to decode.
        if 2 * hangul >= foreign and 10 * hangul >= len(decoded):
            return decoded
    return text


def content_id(text: str) -> int:
    """Returns the 64-bit id of a text that `normalize_text` returned.

    It is the little-endian integer of the 8-byte BLAKE2b digest of the UTF-8 bytes, the same on every machine and
    Python version. Among n distinct texts some two share an id with a probability of about n^2 / 2^65.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
