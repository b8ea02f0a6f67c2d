"""Turn ids into text one at a time, for generation that prints while it runs."""

from .spm import SPACE, Tokenizer

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Decode ids one by one; all that `feed` and a last `flush` return concatenates to `tokenizer.decode(all ids)`.

    A character that byte-fallback tokens spell is held back until it is complete, so every output is whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""
        self._at_start = True  # nothing visible was decoded yet: a leading ▁ is the dummy prefix

    def feed(self, index: int) -> str:
        """Return the text that becomes certain with this id, which may be empty.

        Raises TokenizerError when the id is outside the vocabulary.
        """
        piece = self._tokenizer.id_to_piece(index)
        processor = self._tokenizer.processor
        if processor.is_byte(index):
            self._pending += bytes([int(piece[1:-1], 16)])
            return self._visible(self._take(complete=False))
        text = self._visible(self._take(complete=True))
        if processor.is_control(index):
            return text
        if processor.is_unknown(index):
            return text + self._visible(processor.decode([index]))
        if self._at_start and self._tokenizer.strips_prefix and piece.startswith(SPACE):
            piece = piece[len(SPACE) :]
            self._at_start = self._tokenizer.strips_leading_spaces
        return text + self._visible(piece.replace(SPACE, " "))

    def flush(self) -> str:
        """Return what an incomplete character at the end decodes to, and start afresh for the next text."""
        text = self._take(complete=True)
        self._at_start = True
        return text

    def _visible(self, text: str) -> str:
        if text:
            self._at_start = False
        return text

    def _take(self, *, complete: bool) -> str:
        """Decode the pending bytes; without `complete`, leave a character that may still be continued."""
        text = []
        while self._pending:
            length = _utf8_length(self._pending[0])
            if len(self._pending) < length and not complete:
                break
            try:
                text.append(self._pending[:length].decode())
            except UnicodeDecodeError:
                # SentencePiece replaces byte by byte; Python's own "replace" joins bytes of one character.
                text.append(REPLACEMENT)
                length = 1
            self._pending = self._pending[length:]
        return "".join(text)


def _utf8_length(first: int) -> int:
    if first >= 0xF0:
        return 4
    if first >= 0xE0:
        return 3
    return 2 if first >= 0xC0 else 1
