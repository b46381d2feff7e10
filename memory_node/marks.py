"""Which pages changed since a mark: per-page content hashes, compared with those of now.

The holders of granted descriptors write without telling anyone, and the kernel's soft-dirty bits are
per process, so contents are what can be compared. A page never written costs nothing: it is a hole in
the file. Cost: about 5 ms per MiB in use, at the mark and at the question.
Marks are kept in a memfd, which outlives the process (20 bytes per page in use and mark). It has two halves:
a change writes all marks to the half that is not in force, then one 8-byte word, which says that it is.
Left out: a page rewritten with the same bytes is not reported; it needs no copying either.
"""

from __future__ import annotations

import os

import msgpack

from bus.checksum import blake2b
from memory_node.regions import PAGE
from memory_node.store import CHUNK, BadAccess, Store, data_extents

DIGEST_SIZE = 16  # so that a collision is no concern
ZERO_PAGE = blake2b(bytes(PAGE), digest_size=DIGEST_SIZE).digest()
NUMBER_SIZE = 4  # bytes of a page's number
HALVES = (1 << 40, 2 << 40)  # where they begin; what is never written takes no memory
WORD = 8  # bytes: at 0 how often all was written, at a half's beginning its length

Digests = dict[int, bytes]  # of pages that are not holes, by number


def make_marks(machine: str) -> int:
    """A memfd without marks: its descriptor."""
    return os.memfd_create(f"{machine}-marks", os.MFD_CLOEXEC)


class Marks:
    """Named marks of regions of one store."""

    def __init__(self, store: Store, fd: int | None = None) -> None:
        """`fd`: of make_marks, with the marks of an earlier process."""
        self._store = store
        self._fd = make_marks("none") if fd is None else fd
        self._marks: dict[tuple[str, str], Digests] = self._load()

    def set_mark(self, mark: str, region: str) -> None:
        """Remember the region's contents of now under a name (a second time: replaces it)."""
        self._marks[mark, region] = self._digests(region)
        self._keep()

    def drop_mark(self, mark: str, region: str) -> None:
        if self._marks.pop((mark, region), None) is not None:
            self._keep()

    def written_since(self, mark: str, region: str) -> bytes:
        """A bitmap, bit n % 8 of byte n // 8 for page n: pages whose contents differ from the mark's."""
        if (mark, region) not in self._marks:
            raise BadAccess(f"no mark {mark!r} of region {region!r}")
        before, now = self._marks[mark, region], self._digests(region)
        bitmap = bytearray((self._store.region(region).size // PAGE + 7) // 8)
        for page in before.keys() | now.keys():
            if before.get(page, ZERO_PAGE) != now.get(page, ZERO_PAGE):
                bitmap[page // 8] |= 1 << page % 8
        return bytes(bitmap)

    def _keep(self) -> None:
        rows = [(mark, region, b"".join(page.to_bytes(NUMBER_SIZE, "little") + digest
                                        for page, digest in digests.items()))
                for (mark, region), digests in self._marks.items()]  # fmt: skip
        data = msgpack.packb(rows)
        number = self._word(0) + 1
        half = HALVES[number & 1]
        at = half + WORD
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view[:CHUNK], at)
            view, at = view[done:], at + done
        os.pwrite(self._fd, len(data).to_bytes(WORD, "little"), half)
        os.pwrite(self._fd, number.to_bytes(WORD, "little"), 0)

    def _load(self) -> dict[tuple[str, str], Digests]:
        number = self._word(0)
        if not number:
            return {}
        half = HALVES[number & 1]
        rows = msgpack.unpackb(os.pread(self._fd, self._word(half), half + WORD))
        size = NUMBER_SIZE + DIGEST_SIZE
        return {
            (mark, region): {
                int.from_bytes(data[at : at + NUMBER_SIZE], "little"): data[at + NUMBER_SIZE : at + size]
                for at in range(0, len(data), size)
            }
            for mark, region, data in rows
        }

    def _word(self, at: int) -> int:
        return int.from_bytes(os.pread(self._fd, WORD, at), "little")

    def _digests(self, region: str) -> Digests:
        """Of now."""
        fd, size = self._store.fd(region), self._store.region(region).size
        digests: Digests = {}
        for start, end in data_extents(fd, size):
            for at in range(start, end, CHUNK):
                part = memoryview(os.pread(fd, min(CHUNK, end - at), at))
                for offset in range(0, len(part), PAGE):
                    page = part[offset : offset + PAGE]
                    digests[(at + offset) // PAGE] = blake2b(page, digest_size=DIGEST_SIZE).digest()
        return digests
