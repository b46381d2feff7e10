"""The code cache: lines by page, translations in host memory, and the way back from a host address.

When it is full, all of it is dropped: nothing is evicted piecemeal. Where there is a store (store.py), a
line's translation is taken from there if it fits, and `keep` puts there what is new.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.emit import Templates
from cpu_node.emit_soft import templates_of
from cpu_node.fast_unsafe import FastTranslator
from cpu_node.kept import MAX_CODE, Key, key_of, pack, take_over
from cpu_node.line import Chunk, Line
from cpu_node.store import Store
from cpu_node.translate import Translation, leaf_at, renew, translate

SINGLE = at.CODE_FIRST  # 4 KiB for one instruction at a time (single.py)
FIRST = at.CODE_FIRST + 0x1000
_RESERVE = 1 << 20  # more than any chunk takes
MOST_LINES = 1 << 16  # made before all is dropped, dead ones included: each takes 8 KiB and more of Python
MOST_DEAD = 6  # translations of one page that are kept though its bytes have changed since
MOST_KEPT = 48 << 20  # bytes of host code that one call of `keep` writes

log = logging.getLogger(__name__)


class CodeCache:
    """Lines and their host code. Counters are cumulative."""

    def __init__(self) -> None:
        self.code = host.view8(at.CODE, at.CODE_SIZE)
        self.lines: dict[tuple[int, int, int], Line] = {}  # (linear address, physical page, mode)
        self.templates: dict[int, Templates] = {}
        self.position = FIRST
        self.limit, self.most_lines = at.CODE_SIZE - _RESERVE, MOST_LINES
        self.made = 0  # lines, since all was dropped
        self.instructions = 0
        self.translations = 0
        self.taken_over = 0  # instructions that were found in the store
        self.flushes = 0
        self.store: Store | None = None
        self._fast = FastTranslator()
        self._starts: list[int] = []
        self._chunks: list[Chunk] = []

    @property
    def full(self) -> bool:
        return self.position > self.limit or self.made > self.most_lines

    def add(self, line: Line) -> None:
        """A new line, nothing of which is translated."""
        self.lines[line.va, line.pa_pages[0], line.mode] = line
        self.made += 1

    def translate(self, line: Line, offset: int) -> Translation:
        """Translate from an offset that has no host code yet."""
        templates = self._templates(line)
        position = self.position
        if self._fast.takes(line):
            made = self._fast.translate(line, offset, templates, position, self.code)
        else:
            line.known = None
            made = translate(line, offset, templates, position)
            self.code[position : made.chunk.end] = made.code
        for behind, target in made.patches:
            self.patch(behind, target)
        self.position = made.chunk.end
        if made.chunk.hosts:
            self._starts.append(position)
            self._chunks.append(made.chunk)
        self.instructions += len(made.chunk.hosts)
        self.translations += 1
        return made

    def _templates(self, line: Line) -> Templates:
        templates = self.templates.get(line.mode)
        if templates is None:
            templates = self.templates[line.mode] = templates_of(line.mode)
        return templates

    def function_of(self, line: Line, offset: int) -> object:
        """What of the template of an instruction is more than bytes, or is None."""
        return leaf_at(self._templates(line), line.code, offset)[4]

    def renew(self, line: Line, offset: int, text: bytes) -> bool:
        """An instruction of a verifying line is now `text`: put that in its place, if it fits there."""
        line.unfold()
        place, templates = line.host.get(offset), self.templates.get(line.mode)
        if place is None or templates is None:
            return False
        code = renew(line, offset, text, templates)
        if code is None:
            return False
        self.code[place : place + len(code)] = code
        return True

    def take_over(self, line: Line) -> bool:
        """Fill a new line from the store, if that has what fits."""
        if self.store is None or self.full:
            return False
        kept = self.store.find(line)
        if kept is None:
            return False
        position = self.position
        chunk = take_over(kept, line, position)
        self.code[position : chunk.end] = kept.code
        self.position = chunk.end
        self._starts.append(position)
        self._chunks.append(chunk)
        self.taken_over += len(chunk.hosts)
        return True

    def keep(self, most: int = MOST_KEPT, last: bool = False) -> bool:
        """Give the store what was translated since the last time, also of pages that have changed by now.

        most: bytes of host code; True if that was all. last: there is time to tidy up. Never raises.
        """
        if self.store is None or not self.store.usable:
            return True
        try:
            records, complete = self._new_records(most)
            self.store.add(records, last)
        except Exception:  # nothing of it may cost the machine
            log.exception("translations are not kept")
            self.store = None
            return True
        return complete

    def _new_records(self, left: int) -> tuple[list[bytes], bool]:
        chunks: dict[Line, list[Chunk]] = {}
        for chunk in self._chunks:
            chunks.setdefault(chunk.line, []).append(chunk)
        dead: Counter[Key] = Counter()
        records: list[bytes] = []
        for line, parts in chunks.items():
            if self.lines.get((line.va, line.pa_pages[0], line.mode)) is not line:
                key = key_of(line)
                dead[key] += 1
                if dead[key] > MOST_DEAD:
                    continue
            size = sum(chunk.end - chunk.start for chunk in parts)
            if len(parts) == line.stored or size > MAX_CODE:
                continue
            if size > left:
                return records, False
            line.stored = len(parts)
            left -= size
            records.append(pack(line, parts, self.code))
        return records, True

    def patch(self, behind: int, target: int) -> None:
        """Point the rel32 that ends at `behind` to `target`."""
        self.code[behind - 4 : behind] = (target - behind).to_bytes(4, "little", signed=True)

    def find(self, host_offset: int) -> Chunk:
        """The chunk that holds a host offset."""
        return self._chunks[bisect_right(self._starts, host_offset) - 1]

    def forget(self, lines: Iterable[Line]) -> None:
        """The lines' source is no longer what was translated; their host code becomes garbage."""
        for line in lines:
            self.lines.pop((line.va, line.pa_pages[0], line.mode), None)
            for table in list(line.tables):
                table.drop_line(line)
            line.tables.clear()
            line.waiting.clear()

    def flush(self) -> None:
        """Drop everything; the caller clears the dispatch tables."""
        self.lines.clear()
        self._starts.clear()
        self._chunks.clear()
        self.position = FIRST
        self.made = 0
        self.flushes += 1
