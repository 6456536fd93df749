"""Text and class labels as people write them: encodings of caption files, gaps and numbers in label columns."""

import math
import re
from decimal import Decimal
from typing import Any

from trainkit.data import faults
from trainkit.data.account import Kind
from trainkit.data.faults import RejectedImage

FALLBACK = "cp1252"  # what Windows programs write where they do not write UTF-8
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),  # before UTF-16, whose mark begins the same way
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# What pandas.read_csv, which `datasets` reads CSV files with, takes for a missing value.
CSV_GAPS = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null"]
)  # fmt: skip
WHOLE = re.compile(r"([+-]?\d+)\.0+")
NOT_A_CLASS = re.compile(  # in CSV files, where every value is text
    r"[+-]?\d*\.\d+(e[+-]?\d+)?|[+-]?inf|\[.*\]|\{.*\}", re.IGNORECASE | re.DOTALL
)


class NotAClass(ValueError):
    """A label that does not name a class: a list, an object, a number with a fraction."""


def decode_text(content: bytes) -> tuple[str, bool]:
    """The text of a file, and whether it had to be read as cp1252.

    A byte order mark decides (UTF-8, UTF-16, UTF-32), then zero bytes (UTF-16 without a mark), then UTF-8. Line ends
    become "\\n". Raises `UnicodeDecodeError` if no encoding fits.
    """
    encoding, is_fallback = marked_encoding(content), False
    if encoding is not None:
        text = content.decode(encoding)
    else:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text, is_fallback = content.decode(FALLBACK), True
    return text.replace("\r\n", "\n").replace("\r", "\n"), is_fallback


def marked_encoding(content: bytes) -> str | None:
    """The encoding that a byte order mark or zero bytes (UTF-16 without a mark) show; None for all others."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        encoding = "utf-16-le" if content[1::2].count(0) >= content[0::2].count(0) else "utf-16-be"
    return encoding


def read_caption(content: bytes, name: str) -> tuple[str, tuple[Kind, ...]]:
    """The text of a caption file without blanks around it, and what is to be counted about it.

    Raises `RejectedImage`: bad_caption.
    """
    try:
        text, is_fallback = decode_text(content)
    except UnicodeDecodeError as error:
        raise RejectedImage(faults.BAD_CAPTION, f"{name} is not text ({error.reason}); save it as UTF-8") from None
    text = text.strip()
    return text, ((Kind.FALLBACK_ENCODING,) if is_fallback else ()) + (() if text else (Kind.EMPTY_CAPTION,))


def class_name(value: Any, is_csv: bool = False) -> str | None:
    """The class that a label names; None for a gap (None, NaN, "", and in CSV files what pandas takes for one).

    Whole numbers are the same class in every notation of a table: 3, 3.0 and "3.0" are "3". Raises `NotAClass`.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise NotAClass(f"{value[:40]!r} is not a class: it is not text") from None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float | Decimal):
        if isinstance(value, Decimal) and value.is_nan():
            return None
        if value in (math.inf, -math.inf) or value != int(value):
            raise NotAClass(f"{value} is not a class")
        return str(int(value))
    if not isinstance(value, str):
        raise NotAClass(f"{str(value)[:40]} is not a class")
    text = value.strip()
    if not text or text.casefold() == "nan" or (is_csv and text in CSV_GAPS):
        return None
    if whole := WHOLE.fullmatch(text):
        return whole[1]
    if is_csv and NOT_A_CLASS.fullmatch(text):
        raise NotAClass(f"{text[:40]} is not a class")
    return text


def caption_text(value: Any, is_csv: bool = False) -> str | None:
    """A caption on one line, or a list of them with one per line; None for a gap or something that is not text."""
    if isinstance(value, list | tuple):
        lines = [" ".join((caption_text(item) or "").split()) for item in value]
        return "\n".join(line for line in lines if line) or None
    if value is None or isinstance(value, dict) or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = str(value)
    if is_csv and text in CSV_GAPS:
        return None
    return (" ".join(text.split()) if len(text.splitlines()) > 1 else text) or None
