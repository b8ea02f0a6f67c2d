"""Prove that a tokenizer is right: every piece reachable, all its files of one mind, every text back as it was."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from .byte_level import ByteLevelBPE, is_byte_level
from .encoder import Encoder, JsonEncoder, load_json_tokenizer, open_encoder
from .errors import TokenizerError
from .fuzz import fuzz_texts
from .llama_cpp_encoder import LlamaCpp
from .merge import unreachable_pieces
from .spm import parse_model, read_model_bytes

_EXAMPLES = 5


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One proof: what was looked at, how much of it, and what failed."""

    name: str
    checked: int
    failed: int
    examples: list[str] = []  # of failures
    note: str = ""


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """All proofs of one tokenizer."""

    path: str
    vocab_size: int
    checks: list[Check]
    skipped: dict[str, str]  # proofs that could not be made, and why

    @property
    def failed(self) -> bool:
        """Whether any proof failed."""
        return any(check.failed for check in self.checks)


def check_tokenizer(
    path: str | Path,
    *,
    base: str | Path | None = None,
    texts: Iterable[str] = (),
    english: Sequence[str] = (),
    fuzz: int = 10_000,
) -> CheckReport:
    """Make every proof that can be made of a tokenizer.

    Args:
        path: a folder, a SentencePiece `.model` or a `tokenizer.json`.
        base: the tokenizer that it extends; its pieces must keep their ids, and stay reachable if they were.
        texts: encoded by every proof, beside the fuzz corpus.
        english: lines that must have the ids of the base.
        fuzz: random texts.

    Raises:
        TokenizerError: when there is no tokenizer at `path` or `base`.
    """
    encoder = open_encoder(path)
    corpus = [*fuzz_texts(fuzz), *texts]
    skipped: dict[str, str] = {}
    checks = [_reachability(encoder), _round_trip(encoder, corpus), _surrogates(encoder)]
    exported = encoder.path.with_name("tokenizer.json")
    if not exported.exists():
        skipped["tokenizer.json"] = "there is none beside the model"
    elif encoder.path != exported:
        checks.append(_parity("tokenizer.json gives the ids of the .model", encoder, JsonEncoder(exported), corpus))
    if exported.exists():
        _try(checks, skipped, "transformers", lambda: _transformers(encoder, exported, corpus))
    _try(checks, skipped, "llama.cpp", lambda: _llama_cpp(encoder, corpus))
    if base is not None:
        checks += _against_base(encoder, open_encoder(base), list(english))
    return CheckReport(path=str(path), vocab_size=encoder.vocab_size, checks=checks, skipped=skipped)


def count_parity(encoder: Encoder, exported: Path, texts: Sequence[str]) -> tuple[int, int] | None:
    """Return how many texts were compared and how many got other ids from a tokenizer.json than from `encoder`.

    Texts that write out a special such as `<s>` are left out: there the two differ by design. None where the
    `tokenizers` package is not installed.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return None
    check = _parity("", encoder, JsonEncoder(exported), texts)
    return check.checked, check.failed


def _try(checks: list[Check], skipped: dict[str, str], package: str, make: Callable[[], Check]) -> None:
    try:
        checks.append(make())
    except ImportError as missing:
        skipped[package] = f"{missing.name or package} is not installed"
    except TokenizerError as error:
        skipped[package] = str(error)


def _compared(
    name: str, texts: Sequence[str], ours: Sequence[object], theirs: Sequence[object], note: str = ""
) -> Check:
    wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    return Check(
        name=name, checked=len(texts), failed=len(wrong), examples=[t[:60] for t in wrong[:_EXAMPLES]], note=note
    )


def _reachability(encoder: Encoder) -> Check:
    lost, checked = unreachable_ids(encoder.path)
    names = _names(encoder.path)
    return Check(
        name="every piece is the encoding of some text",
        checked=checked,
        failed=len(lost),
        examples=[names[i] for i in lost[:_EXAMPLES]],
    )


def unreachable_ids(path: Path) -> tuple[list[int], int]:
    """Return the ids that no text is ever encoded to, and how many were looked at, specials and bytes left out.

    Raises TokenizerError when the file is no tokenizer of a kind for which this can be told.
    """
    if is_byte_level(path):
        bpe = ByteLevelBPE.load(path)
        return bpe.unreachable(), len(bpe.tokens())
    proto = parse_model(read_model_bytes(path), path)
    return unreachable_pieces(proto, range(len(proto.pieces))), sum(piece.type == 1 for piece in proto.pieces)


def _names(path: Path) -> dict[int, str]:
    if is_byte_level(path):
        return {i: token for token, i in ByteLevelBPE.load(path).vocab.items()}
    return {i: piece.piece for i, piece in enumerate(parse_model(read_model_bytes(path), path).pieces)}


def _round_trip(encoder: Encoder, corpus: Sequence[str]) -> Check:
    decoded = [encoder.decode(ids) for ids in encoder.encode_batch(corpus)]
    return _compared(
        "decode(encode(text)) is the normalised text", corpus, decoded, [encoder.normalized(text) for text in corpus]
    )


def _surrogates(encoder: Encoder) -> Check:
    texts = ["\ud800", "가\udfff나", "a\udc80"]

    def refused(text: str) -> bool:
        try:
            encoder.encode(text)
        except TokenizerError:
            return True
        return False

    outcome = [refused(text) for text in texts]
    shown = [text.encode("unicode_escape").decode() for text in texts]
    return _compared("lone surrogates are refused", shown, outcome, [True] * len(texts))


def _parity(name: str, encoder: Encoder, exported: JsonEncoder, corpus: Sequence[str]) -> Check:
    specials = [token.content for token in exported.tokenizer.get_added_tokens_decoder().values()]
    texts = [text for text in corpus if not any(special in text for special in specials)]
    return _compared(name, texts, encoder.encode_batch(texts), exported.encode_batch(texts))


def _transformers(encoder: Encoder, exported: Path, corpus: Sequence[str]) -> Check:
    # Before its import: it looks at the environment then, and must not look anything up on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(exported.parent, local_files_only=True)
    specials = [token.content for token in load_json_tokenizer(exported).get_added_tokens_decoder().values()]
    texts = [text for text in corpus if not any(special in text for special in specials)]
    theirs = loaded(texts, add_special_tokens=False)["input_ids"]
    return _compared(
        "transformers' AutoTokenizer gives the same ids",
        texts,
        encoder.encode_batch(texts),
        theirs,
        type(loaded).__name__,
    )


def _llama_cpp(encoder: Encoder, corpus: Sequence[str]) -> Check:
    texts = [encoder.normalized(text) for text in corpus]
    theirs = LlamaCpp(encoder.path).encode_batch(texts)
    return _compared("llama.cpp gives the same ids", texts, encoder.encode_batch(texts), theirs)


def _against_base(encoder: Encoder, base: Encoder, english: Sequence[str]) -> list[Check]:
    names, old = _names(encoder.path), _names(base.path)
    moved = [name for i, name in old.items() if names.get(i) != name]
    lost, before = (set(unreachable_ids(path)[0]) for path in (encoder.path, base.path))
    checks = [
        Check(name="the base's pieces keep their ids", checked=len(old), failed=len(moved), examples=moved[:_EXAMPLES]),
        Check(
            name="the base's pieces that were reachable still are",
            checked=len(old) - len(before),
            failed=len((lost - before) & old.keys()),
            examples=[old[i] for i in sorted((lost - before) & old.keys())[:_EXAMPLES]],
        ),
    ]
    if english:
        checks.append(
            _compared(
                "English lines keep the ids of the base",
                english,
                encoder.encode_batch(english),
                base.encode_batch(english),
            )
        )
    return checks


def proof_lines(report: CheckReport) -> str:
    """Return the proofs as lines of text."""
    lines = [f"{report.path}: {report.vocab_size:,} pieces"]
    for check in report.checks:
        verdict = "ok  " if not check.failed else "FAIL"
        lines.append(
            f"{verdict}  {check.name}: {check.failed:,} of {check.checked:,} fail"
            + (f" ({check.note})" if check.note else "")
        )
        lines += [f"        {example!r}" for example in check.examples]
    lines += [f"skip  {name}: {reason}" for name, reason in report.skipped.items()]
    return "\n".join(lines)
