"""Text of other people: byte order marks, encodings, and characters that no text may hold."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# White space apart (tab to carriage return, and NEL), which splitting takes for what it is.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_GUESSED = 1 << 16
# A few bytes fit many alphabets; then it is Windows' western one as a rule.
_USUAL = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r"),
    *("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"),
)
SURROGATES = "lone surrogates, read as U+FFFD"
CONTROLS = "control characters, read as spaces"


def detect_encoding(head: bytes) -> str:
    """The encoding that a byte order mark or the zeros of UTF-16 show; else ``utf-8``."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    pairs = len(head) // 2
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if pairs and max(even, odd) > pairs // 4 and min(even, odd) <= pairs // 20:
        return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Text of bytes, without byte order mark; the encoding is looked for unless given.

    Raises:
        UnicodeDecodeError: bytes of another encoding.
    """
    return data.decode(encoding or detect_encoding(data[:4096])).removeprefix("\ufeff")


def guess_encoding(data: bytes) -> str:
    """The likeliest encoding of bytes that are not UTF-8: a guess for a message, never for reading."""
    from charset_normalizer import from_bytes

    beyond = sum(byte > 127 for byte in data[:_GUESSED])
    best = from_bytes(data[:_GUESSED], cp_isolation=list(_USUAL)).best() if beyond >= 10 else None
    for name in (best.encoding if best else _USUAL[0], *_USUAL):
        try:
            data.decode(name)
        except UnicodeDecodeError:
            continue
        return name
    return "latin-1"


def read_text_file(path: str | Path, what: str) -> str:
    """Text of a small file of the user's; ``what`` it is stands in the message.

    Raises:
        ValueError: it is not UTF-8 or UTF-16.
    """
    data = Path(path).read_bytes()
    try:
        return decode_text(data)
    except UnicodeDecodeError:
        raise ValueError(
            f"the {what} {path} is not UTF-8 text (it may be {guess_encoding(data)}); save it as UTF-8."
        ) from None


def mend_text(text: str) -> tuple[str, tuple[str, ...]]:
    """Text that every tokenizer and file takes, and what was mended: lone surrogates, control characters."""
    found = []
    if not text.isascii() and _SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found.append(SURROGATES)
    if _CONTROL.search(text):
        text = _CONTROL.sub(" ", text)
        found.append(CONTROLS)
    return text, tuple(found)
