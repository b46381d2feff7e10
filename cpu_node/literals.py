"""Numbers in assembly text, written so that keystone reads them in one way only.

keystone never sets the radix of numbers that don't say theirs: it is whatever the memory held that its
MCAsmInfo was made in, and where that was 16, `shr eax, 16` is a shift by 22. So every decimal number is
written as a hexadecimal one, with its 0x, before keystone gets to see it.
Left out: numeric local labels (1f, 1b), which that radix can spoil too.
"""

from __future__ import annotations

import re

# Strings and characters, names and numbers with a prefix or suffix are matched so as to be left alone.
_TOKEN = re.compile(r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|[A-Za-z_.$@%][\w.$@]*|\d\w*""")


def hexadecimal(text: str) -> str:
    """The same program. A number that begins with 0 is octal, as for keystone."""
    return _TOKEN.sub(_one, text)


def _one(match: re.Match[str]) -> str:
    token = match[0]
    if not token.isdecimal() or token == "0":
        return token
    try:
        return f"{int(token, 8 if token[0] == '0' else 10):#x}"
    except ValueError:  # no octal number: keystone says what it thinks of it
        return token
