"""Odd signs of captions in their plain form, as the package ftfy gives them, which the published cleaning calls.

What ftfy does beyond this is left out: it also guesses wrong decodings other than UTF-8 read as Windows-1252, which
text in lower case, as it comes here, has lost the marks of anyway.
"""

import re
import unicodedata
from html import unescape

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def _windows(byte: int) -> str:
    """The sign of a byte in Windows-1252, and the control sign of that number where it has none."""
    return bytes([byte]).decode("cp1252", errors="ignore") or chr(byte)


_BYTES = {_windows(byte): byte for byte in range(0x80, 0x100)} | {" ": 0xA0}
_FOLLOWING = "".join(re.escape(_windows(byte)) for byte in range(0x80, 0xC0))
# Three bytes of UTF-8; of a misread apostrophe the cleaning has left a space, which ftfy takes for the byte A0.
_MISREAD = re.compile(f"[\u00e0-\u00ef][{_FOLLOWING}]{{2}}|\u00e2\u20ac ")

_LIGATURES = [
    *map(chr, (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06))
]
_WIDE = ["\u3000", *map(chr, range(0xFF01, 0xFFF0))]
_PLAIN = (
    {code: _windows(code) for code in range(0x80, 0xA0)}
    | {ord(sign): unicodedata.normalize("NFKC", sign) for sign in (*_LIGATURES, *_WIDE)}
    | {0xFB05: "\u017ft"}  # which keeps its long s
)
_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


def plain_signs(text: str) -> str:
    """The text with plain quotes, letters of usual width, no ligatures and no control signs, composed (NFC).

    Entities of HTML become signs where no tag is in the text. Punctuation that was UTF-8 and was read as Windows-1252
    is read again. Halves of a pair of surrogates become the sign that they make, or U+FFFD.
    """
    before = None
    while text != before:  # what an entity becomes may be mended in turn
        before = text
        if "<" not in text:
            text = _ENTITY.sub(lambda found: unescape(found[0]), text)
        text = _MISREAD.sub(_read_again, text).translate(_PLAIN).translate(_QUOTES)
        text = _SURROGATES.sub(_joined, text)
        text = _CONTROL.sub("", text)
        text = unicodedata.normalize("NFC", text)
    return text


def _read_again(found: re.Match[str]) -> str:
    try:
        return bytes(_BYTES[sign] for sign in found[0]).decode()
    except UnicodeDecodeError:
        return found[0]


def _joined(found: re.Match[str]) -> str:
    return found[0].encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
