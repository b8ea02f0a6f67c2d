"""Bytes to text for Korean files: strict decoders in an order that needs no detector."""

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def decode_strictly(data: bytes) -> str | None:
    """Decodes UTF-16 that begins with its byte-order mark, else strict UTF-8, else strict CP949, else returns None.

    A mark is dropped. CP949 holds all of EUC-KR. Strict UTF-8 never accepts Korean CP949 text of useful length, so the
    order decides.
    """
    if data.startswith(_UTF16_BOMS):
        encodings = ("utf-16",)
    else:
        data = data.removeprefix(_UTF8_BOM)
        encodings = ("utf-8", "cp949")
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None
