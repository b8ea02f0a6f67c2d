import gzip
import json
import sys

import pytest
import zstandard

from redwhale.filtering import CorpusError, find_inputs, read_documents

PARAGRAPHS = [
    "고래는 바다에 사는 포유류로, 폐로 숨을 쉬기 때문에 정기적으로 물 위로 올라와야 한다.",
    "새끼는 어미의 젖을 먹고 자라며, 무리를 지어 먼 거리를 이동한다. 똠방각하라는 말도 나온다.",
]
PAGE = f"""<!DOCTYPE html><html><head><meta charset="CHARSET"><title>고래</title><script>var 숨김 = 1;</script></head>
<body><header><nav><a href="/">처음으로</a> <a href="/login">로그인</a></nav></header>
<article><h1>고래 이야기</h1><p>{PARAGRAPHS[0]}</p><p>{PARAGRAPHS[1]}</p></article>
<footer>Copyright 고래 연구소</footer></body></html>"""


def page(encoding: str = "utf-8", declared: str = "utf-8") -> bytes:
    return PAGE.replace("CHARSET", declared).encode(encoding)


def response(url: str, body: bytes, *, content_type: str = "text/html", status: str = "200 OK") -> bytes:
    http = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    return record("response", url, "application/http; msgtype=response", http)


def record(kind: str, url: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


RECORDS = [
    record("warcinfo", "http://a.kr/", "application/warc-fields", b"software: test\r\n"),
    record("request", "http://a.kr/1", "application/http; msgtype=request", b"GET /1 HTTP/1.1\r\nHost: a.kr\r\n\r\n"),
    response("http://a.kr/1", page()),
    response("http://a.kr/2", page("cp949", "euc-kr"), content_type="text/html; charset=euc-kr"),
    response("http://a.kr/3", b"\x89PNG\r\n", content_type="image/png"),
    response("http://a.kr/4", page(), status="404 Not Found"),
    response("http://a.kr/5", b""),
    # CP949 that the server and the page call UTF-8.
    response("http://a.kr/6", page("cp949"), content_type="text/html; charset=utf-8"),
]
PACK = {
    "a.warc": b"".join,
    "a.warc.gz": lambda records: b"".join(map(gzip.compress, records)),
    "a.warc.zst": lambda records: b"".join(map(zstandard.compress, records)),
}


def read(path, **options):
    broken = []
    return list(read_documents(path, on_broken=broken.append, **options)), broken


def assert_main_text(text: str) -> None:
    assert all(paragraph in text for paragraph in PARAGRAPHS)
    assert not any(noise in text for noise in ("로그인", "Copyright", "숨김", "<p>"))


@pytest.mark.parametrize("name", PACK)
def test_pages_of_a_warc_file_are_read_and_everything_else_is_set_aside_with_its_reason(tmp_path, name):
    (tmp_path / name).write_bytes(PACK[name](RECORDS))
    documents, broken = read(tmp_path / name)
    assert [document.id for document in documents] == ["http://a.kr/1", "http://a.kr/2", "http://a.kr/6"]
    assert {document.source for document in documents} == {"a"}
    for document in documents:
        assert_main_text(document.text)
    assert [(one.record, one.reason) for one in broken] == [
        (3, "the response is image/png, not HTML"),
        (4, "the response has status 404"),
        (5, "the text is empty"),
    ]


@pytest.mark.parametrize(
    ("encoding", "declared"), [("utf-8", "utf-8"), ("cp949", "euc-kr"), ("cp949", "utf-8"), ("utf-8", "euc-kr")]
)
def test_html_files_are_decoded_whatever_they_declare(tmp_path, encoding, declared):
    (tmp_path / "글.html").write_bytes(page(encoding, declared))
    (document,), broken = read(tmp_path / "글.html")
    assert not broken
    assert (document.id, document.source) == ("글.html:1", "글")
    assert_main_text(document.text)


@pytest.mark.parametrize("declared", ["euc-kr", "ks_c_5601-1987", "utf-8", "no-such-charset"])
def test_a_page_with_a_broken_byte_keeps_its_text_and_shows_the_damage(tmp_path, declared):
    encoding = "utf-8" if declared in ("utf-8", "no-such-charset") else "cp949"
    data = page(encoding, declared).replace("고래 이야기".encode(encoding), b"\xff" + "고래 이야기".encode(encoding))
    (tmp_path / "a.html").write_bytes(data)
    (document,), _ = read(tmp_path / "a.html")
    assert_main_text(document.text)
    assert "\ufffd" in document.text


def test_html_in_json_lines_is_extracted_on_request(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": PAGE, "id": "x"}), encoding="utf-8")
    (raw,), _ = read(tmp_path / "a.jsonl")
    (extracted,), _ = read(tmp_path / "a.jsonl", html=True)
    assert "<article>" in raw.text
    assert_main_text(extracted.text)


@pytest.mark.parametrize("name", PACK)
def test_a_truncated_warc_file_is_damaged_and_what_came_before_is_read(tmp_path, name):
    whole = PACK[name](RECORDS[2:4])
    (tmp_path / name).write_bytes(whole[: -len(PACK[name](RECORDS[3:4])) // 2])
    with pytest.raises(CorpusError, match=rf"{name}' is damaged"):
        read(tmp_path / name)


def test_what_is_no_warc_is_damaged(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"hello\r\n" * 50)
    with pytest.raises(CorpusError, match="a.warc' is damaged"):
        read(tmp_path / "a.warc")


def test_web_files_are_found_in_folders(tmp_path):
    for name in ("b.warc.gz", "c.htm", "d.html", "e.warc", "f.css"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_inputs([tmp_path])] == ["b.warc.gz", "c.htm", "d.html", "e.warc"]


@pytest.mark.parametrize(("module", "name"), [("fastwarc.warc", "a.warc"), ("resiliparse.extract.html2text", "a.html")])
def test_a_missing_package_is_one_sentence_with_the_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(PACK["a.warc"](RECORDS) if name == "a.warc" else page())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CorpusError, match=rf'needs {module.partition(".")[0]}: pip install "redwhale\[web\]"'):
        read(tmp_path / name)


def test_batches_of_a_warc_file_cover_its_bytes(tmp_path):
    from redwhale.filtering.documents import read_batches

    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(gzip.compress(response(f"http://a.kr/{n}", page())) for n in range(300)))
    batches = list(read_batches(path, batch_bytes=20_000))
    assert len(batches) > 5
    assert sum(batch.file_bytes for batch in batches) == path.stat().st_size
    numbers = [batch.first_record + n for batch in batches for n in range(len(batch.records))]
    assert numbers == list(range(1, 301))
    assert batches[0].records[0].body == page()
