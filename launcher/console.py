"""What happens to console bytes between terminal and guest: the way out, and the text waited for."""

from __future__ import annotations

import msgspec

ESCAPE = 0x1D  # Ctrl-]
LEAVE = ord("q")
HOW_TO_LEAVE = "Ctrl-] then q leaves"


class KeyFilter(msgspec.Struct):
    """Finds Ctrl-] q among typed bytes. Ctrl-] twice sends one; before any other key it is just a key."""

    escaped: bool = False

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """(what goes to the guest, whether the user leaves); nothing after the q is looked at."""
        out = bytearray()
        for byte in typed:
            if self.escaped:
                self.escaped = False
                if byte == LEAVE:
                    return bytes(out), True
                out.append(ESCAPE)
                if byte != ESCAPE:
                    out.append(byte)
            elif byte == ESCAPE:
                self.escaped = True
            else:
                out.append(byte)
        return bytes(out), False


class TextWatch:
    """Says when a text has gone by in a stream that comes in pieces."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._tail = b""

    def feed(self, piece: bytes) -> bool:
        """True when the text ends in this piece (or later ones have been fed after it did)."""
        window = self._tail + piece
        self._tail = window[len(window) - len(self._text) + 1 :] if len(window) >= len(self._text) else window
        return self._text in window
