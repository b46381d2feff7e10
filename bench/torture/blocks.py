"""The host's journal of what the guest's checker was told is written, and the same blocks in the raw image.

blocks.S tells of each run of blocks before it writes it ("W") and after fsync has returned ("A"). When "A"
comes the blocks must be in the image, unless the next "W" was for the same blocks: then they may be half
written. Where a block lies in the image is found by its own first words, in a scan.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from pathlib import Path

BLOCK = 4096
WORDS = BLOCK // 4
MAGIC = 0x42505442
MASK = 0xFFFF_FFFF
ONES = sum(1 << 32 * n for n in range(WORDS))  # times a word: that word everywhere
LINE = 64
PATIENCE = 3  # acknowledged runs after which a block that was half written must be whole


def _xorshift(x: int) -> int:
    x ^= x << 13 & MASK
    x ^= x >> 17
    return x ^ (x << 5 & MASK)


def _pattern() -> int:
    x, words = 0x2545F491, []
    for _ in range(WORDS):
        x = _xorshift(x)
        words.append(x)
    return int.from_bytes(struct.pack(f"<{WORDS}I", *words), "little")


PATTERN = _pattern()


def content(block: int, sequence: int, seed: int) -> bytes:
    """As blocks.S computes it."""
    x = _xorshift((sequence * 0x9E3779B1 ^ block * 0x85EBCA6B ^ seed) & MASK)
    data = (PATTERN ^ x * ONES).to_bytes(BLOCK, "little")
    return struct.pack("<4I", MAGIC, block, sequence, seed) + data[16:]


class Blocks:
    """Takes the checker's lines. `faults` are in words."""

    def __init__(self, image: Path, count: int, seed: int) -> None:
        self._image, self._count, self._seed = image, count, seed
        self._file = image.open("rb", buffering=0)
        self._places: dict[int, int] = {}
        self.begun = self.acknowledged = 0  # sequence numbers
        self.runs: dict[int, tuple[int, int]] = {}  # sequence -> first block and count, of the last ones
        self.latest: dict[int, int] = {}  # block -> sequence, of what is acknowledged
        self.checked = 0  # blocks, in the image, while the guest ran
        self._doubtful: dict[int, tuple[int, int]] = {}  # block -> its sequence, and when it was in doubt
        self.verified = False
        self.faults: list[str] = []

    def take(self, line: bytes) -> None:
        """One line of the checker's, 64 bytes with its end."""
        text = line.decode("ascii", "replace")
        try:
            kind, (sequence, first, count) = text[0], (int(text[at : at + 8], 16) for at in (2, 11, 20))
            if len(line) != LINE or text[28:] != "." * (LINE - 29) + "\n":
                raise ValueError
        except (ValueError, IndexError):
            self.faults.append(f"the checker said {line!r}")
            return
        match kind:
            case "W" if sequence == self.begun + 1 and self.begun == self.acknowledged:
                self.begun = sequence
                self.runs[sequence] = first, count
                self.runs.pop(sequence - 8, None)
            case "A" if sequence == self.begun == self.acknowledged + 1:
                self._acknowledge(sequence, first, count)
            case "V" if sequence == self.begun == self.acknowledged:
                self.verified = True
            case "E":
                self.faults.append(f"guest: block {first}, written in {sequence}, is wrong in word {count}")
            case "F":
                self.faults.append(f"guest: the word is {sequence:#x}, not {first:#x}")
            case "S":
                self.faults.append(f"guest: a system call failed: {sequence - (1 << 32)} at {first:#x}")
            case _:
                self.faults.append(f"the checker said {text!r}, after {self.begun} and {self.acknowledged}")

    def _acknowledge(self, sequence: int, first: int, count: int) -> None:
        if self.runs.get(sequence) != (first, count):
            self.faults.append(f"run {sequence} was acknowledged as {count} blocks from {first} on")
        self.acknowledged = sequence
        run = range(first, first + count)
        self.latest.update(dict.fromkeys(run, sequence))
        if len(self.latest) < self._count:
            return
        if not self._places:
            self._find()
        again = [b for b, (_, since) in self._doubtful.items() if sequence > since + PATIENCE]
        for block in (*run, *again):
            written = self.latest[block]
            if self._in_image(block) == content(block, written, self._seed):
                self.checked += 1
                self._doubtful.pop(block, None)
            elif block not in self._doubtful:
                self._doubtful[block] = written, sequence
            elif self._doubtful[block][0] != written:
                self._doubtful[block] = written, sequence  # was written again, as it should
            else:
                self.faults.append(f"image: block {block} isn't there, though run {written} was acknowledged"
                                   f" before {sequence}: {self._in_image(block)[:16].hex()}")  # fmt: skip
                self._doubtful.pop(block)

    def _in_image(self, block: int) -> bytes:
        self._file.seek(self._places.get(block, 0))
        return self._file.read(BLOCK)

    def _find(self) -> None:
        """Where they are. A block that is written in place stays there, and all have been by now."""
        found: Counter[int] = Counter()
        with mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ) as image:
            for at in range(0, len(image) - 16, BLOCK):
                magic, block, _, seed = struct.unpack_from("<4I", image, at)
                if (magic, seed) == (MAGIC, self._seed) and block < self._count:
                    self._places[block] = at
                    found[block] += 1
        if len(found) != self._count or max(found.values()) > 1:
            self.faults.append(f"image: {len(found)} of {self._count} blocks are there after the first pass,"
                               f" {sum(found.values()) - len(found)} twice")  # fmt: skip

    def finish(self) -> None:
        """After the end of the machine: every acknowledged write is in the image."""
        wrong = []
        for block, written in self.latest.items():
            if self._in_image(block) != content(block, written, self._seed):
                wrong.append(block)
        if wrong:
            self.faults.append(f"image: {len(wrong)} blocks are wrong at the end, as {wrong[:8]}")
        if len(self.latest) != self._count:
            self.faults.append(f"only {len(self.latest)} of {self._count} blocks were ever acknowledged")
        if not self.verified:
            self.faults.append("the guest's last reading of all blocks did not come to its end")
        self._file.close()
