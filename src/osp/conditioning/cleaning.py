"""Captions and prompts as the published models' text encoders were given them: the cleaning of PixArt's captions.

It comes from DeepFloyd IF's and PixArt-alpha's filters of web captions (arXiv 2310.00426): lower case, without
addresses, tags, file names, article numbers and the phrases of shops. v1.0 to v1.5 take it over, each in its own way:
once or twice, and with Chinese, Japanese and Korean or without.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote_plus

from osp.checks import check_choice
from osp.conditioning.plain_signs import plain_signs


@dataclass(frozen=True)
class Cleaning:
    """How often a text is cleaned, and whether Chinese, Japanese and Korean signs stay in it."""

    times: int
    keeps_cjk: bool = True

    def __call__(self, text: str) -> str:
        """The text, cleaned; a text that is all address or article number becomes ""."""
        for _ in range(self.times):
            text = _cleaned(text, self.keeps_cjk)
        return text


CLEANINGS: Mapping[str, Cleaning] = {
    "none": Cleaning(0),
    "once": Cleaning(1),
    "twice": Cleaning(2),
    "twice_no_cjk": Cleaning(2, keeps_cjk=False),
}
"""The cleanings of the published models by name; "none" leaves a text as it is."""

RULES = 1
"""The version of the rules, which features are marked with."""


def find_cleaning(name: str, key: str = "cleaning") -> Cleaning:
    """The cleaning of this name. Raises UsageError naming `key` for one that is not known."""
    check_choice(key, name, CLEANINGS)
    return CLEANINGS[name]


Rules = Sequence[tuple[str, str]]
"""Regular expressions, and what each of their matches becomes, one after another."""

_DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_ADDRESSES: Rules = [
    (r"<person>", "person"),  # a word of captions, and no tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
]
_NAMES: Rules = [(r"@\w+\b", "")]
_CJK: Rules = [("[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", "")]
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_SIGNS: Rules = [
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # the number of a computer
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a line break that was written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_WORDS: Rules = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # 1920x1080, with the sign of any script
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS: Rules = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]
_JOINED = re.compile(r"[-_]")
_MOST_JOINED = 3  # a text with more dashes and underscores is a name like this-is-my-cat, and is taken apart


def _cleaned(text: str, keeps_cjk: bool) -> str:
    """The text after one cleaning."""
    text = unquote_plus(text).strip().lower()
    text = _without_tags(_changed(text, _ADDRESSES))
    text = _changed(text, _NAMES)
    text = text if keeps_cjk else _changed(text, _CJK)
    text = _changed(text, _SIGNS)
    if len(_JOINED.findall(text)) > _MOST_JOINED:
        text = _JOINED.sub(" ", text)
    text = unescape(unescape(plain_signs(text))).strip()
    return _changed(_changed(text, _WORDS), _ENDS).strip()


def _changed(text: str, rules: Rules) -> str:
    for pattern, becomes in rules:
        text = re.sub(pattern, becomes, text)
    return text


def _without_tags(text: str) -> str:
    """The text of a piece of HTML, with its entities as signs."""
    parser = _Tags()
    parser.feed(text)
    parser.close()
    return "".join(parser.text)


class _Tags(HTMLParser):
    """A parser that keeps the text between tags; what scripts and styles hold is none."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.text: list[str] = []
        self.hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("script", "style", "template"):
            self.hidden.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            self.hidden.remove(tag)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        sign = unescape(f"&{name};")
        self.handle_data(f"&{name}" if sign.endswith(";") else sign)

    def unknown_decl(self, data: str) -> None:
        if data.upper().startswith("CDATA["):
            self.handle_data(data[len("CDATA[") :])
