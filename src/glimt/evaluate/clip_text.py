"""How a text is cleaned before CLIP's tokenizer cuts it, as open_clip does and as the hub does.

open_clip calls ftfy, which mends encodings. Here is what it does to text that is sound: width of
characters, quotes, ligatures, control characters, normal form. Text that was decoded wrongly
(mojibake) stays as it is.
"""

from __future__ import annotations

import html
import re
import unicodedata


def _compatible(*codes: int) -> dict[int, str]:
    return {code: unicodedata.normalize("NFKC", chr(code)) for code in codes}


_WIDTHS = _compatible(0x3000, *range(0xFF01, 0xFFF0))  # full-width and half-width forms
_LIGATURES = {
    **_compatible(0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)),
    0x149: "'n",
    0xFB05: "\u017ft",  # NFKC would make the long s a short one
}
_QUOTES = {
    **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}
_BREAKS = dict.fromkeys((0x0D, 0x2028, 0x2029), "\n")
# Control characters that are in truth the letters of Windows-1252, where it has one.
_WINDOWS = {
    code: letter.translate(_QUOTES)
    for code in range(0x80, 0xA0)
    if (letter := bytes([code]).decode("cp1252", "ignore"))
}
_CONTROLS = dict.fromkeys(
    (
        *range(0x09),
        0x0B,
        *range(0x0E, 0x20),
        0x7F,
        *range(0x206A, 0x2070),
        0xFEFF,
        *range(0xFFF9, 0xFFFD),
    )
)
_MENDED = {**_CONTROLS, **_WIDTHS, **_LIGATURES, **_QUOTES, **_BREAKS, **_WINDOWS}
_ESCAPES = re.compile("\x1b\\[((?:\\d|;)*)([a-zA-Z])")  # colours of a terminal


def clean_as_open_clip(text: str) -> str:
    """Mended, HTML entities resolved, white space joined, lower case."""
    mended = _ESCAPES.sub("", text).translate(_MENDED)
    plain = html.unescape(html.unescape(unicodedata.normalize("NFC", mended)))
    return " ".join(plain.split()).lower()


def clean_as_hub(text: str) -> str:
    """Normal form C, white space joined, lower case: as transformers' tokenizer has it."""
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()
