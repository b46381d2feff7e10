"""The translator's inner loop as machine code: what `translate` does, for whole pages that need no checks.

Templates are copied from the trie of emit.py into memory, node by node as they are met: a node is 256 dwords,
by the next guest byte; 0: not known yet, even: the next node, odd: a leaf. A leaf says what to put out:

    +0 flags  +2 guest length  +3 guest bytes to skip  +4, +5, +6 lengths of `before`, `middle`, `after`
    +7 guest bytes at the end that go behind `middle`
    +8 offset of `middle`  +10 offset of `after`  +16 `before` ...

in the order before, guest bytes, middle, a guest address, after, a rel32 to be filled in. What no leaf can
say (templates that are functions, instructions that cross the page) is done in Python, one by one.
The result is the same, byte for byte, as that of `translate` (tests/cpu_node/test_fast.py).
Left out: lines that verify themselves, single instructions, pages with devices: `translate` does these.
"""

from __future__ import annotations

import struct
from array import array

from cpu_node import fast_loop as loop
from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.assembled import assemble
from cpu_node.emit import Templates
from cpu_node.encode import (
    CALL,
    END,
    EXIT_SIMULATE,
    FUNCTION,
    ICALL,
    JCC,
    JMP,
    JUMP_R8,
    LOOP,
    MOV_R8,
    PLAIN,
    PLAIN_POST,
    PUSHED,
    SIMULATE,
    STOP,
    STORE_IMM,
    Leaf,
    Split,
)
from cpu_node.line import PAGE, Chunk, Line
from cpu_node.translate import MAX_INSTRUCTIONS, Translation, leaf_at

_NONE = bytes(PAGE // 8)
_MAX_PART = 240  # bytes of before, middle or after
_ALL = struct.Struct("<QIIIIIIIIQIIQ")  # the parameters, in the order of fast_loop.py
_LEAF = struct.Struct("<HBBBBBBHH")
_STATE = struct.Struct("<QII")  # the first three: out, offset, left
_Parts = tuple[int, bytes, bytes, bytes, int, int]  # flags, before, middle, after; guest bytes: skipped, last


class FastTranslator:
    """One per process, which has the addresses; stubs_unsafe.install() comes first.

    Where the code cache ends, 1 MiB must be left: host code is put there before it is known how long it is.
    """

    def __init__(self) -> None:
        rwx = host.PROT_READ | host.PROT_WRITE | host.PROT_EXEC
        host.map_anonymous(at.TRANSLATOR, at.TRANSLATOR_SIZE, rwx)
        self._memory = host.view8(at.TRANSLATOR, at.TRANSLATOR_SIZE)
        code = assemble(loop.text(), at.TRANSLATOR)
        assert len(code) <= loop.PARAMETERS
        self._memory[loop.CODE : loop.CODE + len(code)] = code
        self._run = host.function64(at.TRANSLATOR + loop.CODE)
        self._end = loop.NODE  # of the arena, in bytes; offset 0 is nothing's
        self._roots: dict[int, int] = {}  # code mode -> its root node

    def takes(self, line: Line) -> bool:
        """Is it a line for this translator?"""
        return line.chain == PAGE and not line.verify and not line.devices

    def translate(self, line: Line, start: int, templates: Templates, position: int, cache: memoryview,
                  limit: int = MAX_INSTRUCTIONS, ahead: bool = True) -> Translation:
        """As cpu_node.translate.translate, with the host code already in the code cache."""
        memory, run = self._memory, self._run
        if line.known is None:
            bits = bytearray(PAGE // 8)
            for offset in line.host:
                bits[offset >> 3] |= 1 << (offset & 7)
            line.known = bytes(bits)
        memory[loop.PAGE_COPY : loop.PAGE_COPY + len(line.code)] = line.code
        memory[loop.KNOWN : loop.KNOWN + PAGE // 8] = line.known
        out = at.CODE + position
        memory[loop.HERE : loop.HERE + PAGE // 8] = _NONE
        _ALL.pack_into(memory, loop.PARAMETERS, out, start, limit, self._root(templates), line.va, 0, 0, 0, 0,
                       out, 0, 0 if ahead else limit, at.TRANSLATOR + loop.FIXUPS)
        while run():
            if not self._one(line, templates, cache):
                struct.pack_into("<I", memory, loop.PARAMETERS + loop.ENDED, 1)
        end, _, _, _, _, count, n_fixups = struct.unpack_from("<QIIIIII", memory, loop.PARAMETERS)
        line.known = memory[loop.KNOWN : loop.KNOWN + PAGE // 8].tobytes()
        offsets = array("H", memory[loop.OFFSETS : loop.OFFSETS + 2 * count].tobytes())
        hosts = array("I", memory[loop.HOSTS : loop.HOSTS + 4 * count].tobytes())
        end -= at.CODE
        here = dict(zip(offsets, [position + place for place in hosts], strict=True))
        host_of, waiting, jumps, returns = line.host, line.waiting, array("I"), []
        patches = [(behind, here[o]) for o in waiting.keys() & here.keys() for behind in waiting.pop(o)]
        pairs = iter(array("i", memory[loop.FIXUPS : loop.FIXUPS + 8 * n_fixups].tobytes()))
        for behind, target in zip(pairs, pairs, strict=True):
            if behind < 0:
                returns.append(target)
                continue
            jumps.append(behind)
            jumps.append(target)
            place = host_of.get(target)
            behind += position
            if place is None:
                waiting.setdefault(target, []).append(behind)
            else:
                cache[behind - 4 : behind] = (place - behind).to_bytes(4, "little", signed=True)
        host_of.update(here)
        return Translation(b"", Chunk(line, position, end, hosts, offsets, jumps), patches, returns)

    def _one(self, line: Line, templates: Templates, cache: memoryview) -> bool:
        """What the loop stopped at: make its leaf known, or translate it. False: the run ends there."""
        memory, text = self._memory, line.code
        out, i, left = _STATE.unpack_from(memory, loop.PARAMETERS)
        leaf = leaf_at(templates, text, i)
        kind, n = leaf[:2]
        if i + n > PAGE and kind != STOP:  # a line of its own
            code = MOV_R8 + (line.va + i & 0xFFFFFFFF).to_bytes(4, "little") + JUMP_R8
            cache[out - at.CODE : out - at.CODE + len(code)] = code
            _STATE.pack_into(memory, loop.PARAMETERS, out + len(code), i, left)
            return False
        parts = _parts(leaf)
        if parts is not None and self._learn(templates, text, i, leaf, parts):
            return True
        if parts is None:  # a template that is a function
            made = leaf[4](text, i, line.va + i & 0xFFFFFFFF)
            if kind == ICALL:
                parts = loop.WITH_VA | loop.BEHIND | loop.RETURN, made, leaf[3], PUSHED + JUMP_R8, 0, 0
            else:
                assert kind in (END, FUNCTION), kind
                parts = loop.ENDS if kind == END else 0, leaf[3] + made, b"", b"", 0, 0
        flags, before, middle, after, skip, tail = parts
        (count,) = struct.unpack_from("<I", memory, loop.PARAMETERS + loop.COUNT)
        (start,) = struct.unpack_from("<Q", memory, loop.PARAMETERS + loop.START)
        struct.pack_into("<H", memory, loop.OFFSETS + 2 * count, i)
        struct.pack_into("<I", memory, loop.HOSTS + 4 * count, out - start)
        struct.pack_into("<I", memory, loop.PARAMETERS + loop.COUNT, count + 1)
        struct.pack_into("<I", memory, loop.PLACES + 4 * i, out - start)
        for bits in (loop.KNOWN, loop.HERE):
            memory[bits + (i >> 3)] |= 1 << (i & 7)
        following = i + n
        target = 0
        if flags & loop.WITH_TARGET:
            target = following + int.from_bytes(text[i + skip : following], "little", signed=True)
            inside = 0 <= target < PAGE
            if flags & loop.FOLLOWS and inside and not memory[loop.KNOWN + (target >> 3)] >> (target & 7) & 1:
                _STATE.pack_into(memory, loop.PARAMETERS, out, target, left - 1)
                return True
        code = before + (text[i + skip : following - tail] if flags & loop.GUEST else b"") + middle
        code += text[following - tail : following]
        if flags & loop.WITH_VA:
            code += (line.va + (following if flags & loop.BEHIND else i) & 0xFFFFFFFF).to_bytes(4, "little")
        code += after + (bytes(4) if flags & loop.WITH_TARGET else b"")
        cache[out - at.CODE : out - at.CODE + len(code)] = code
        out += len(code)
        if flags & loop.WITH_TARGET:
            self._fix_up(out - start, target)
        if flags & loop.RETURN:
            self._fix_up(-1, following)
        _STATE.pack_into(memory, loop.PARAMETERS, out, following, left - 1)
        return not flags & loop.ENDS

    def _fix_up(self, behind: int, target: int) -> None:
        memory = self._memory
        (count,) = struct.unpack_from("<I", memory, loop.PARAMETERS + loop.N_FIXUPS)
        struct.pack_into("<ii", memory, loop.FIXUPS + 8 * count, behind, target)
        struct.pack_into("<I", memory, loop.PARAMETERS + loop.N_FIXUPS, count + 1)

    # ---- the trie

    def _root(self, templates: Templates) -> int:
        root = self._roots.get(templates.mode)
        if root is None:
            root = self._roots[templates.mode] = self._room(loop.NODE)
        return root

    def _room(self, size: int) -> int:
        """Zeroed memory of the arena."""
        start, self._end = self._end, self._end + (size + 15 & ~15)
        return start

    def _learn(self, templates: Templates, text: bytes, i: int, leaf: Leaf, parts: _Parts) -> bool:
        """Enter a leaf where the trie of `templates` has it. False where it isn't there."""
        path, node = [text[i]], templates.root[text[i]]
        while node.__class__ is list:
            path.append(text[i + len(path)])
            node = node[path[-1]]
        if node is not leaf or max(map(len, parts[1:4])) > _MAX_PART:
            return False
        if loop.ARENA + self._end + (len(path) + 2) * loop.NODE > at.TRANSLATOR_SIZE:
            host.map_anonymous(at.TRANSLATOR + loop.ARENA, at.TRANSLATOR_SIZE - loop.ARENA,
                               host.PROT_READ | host.PROT_WRITE | host.PROT_EXEC)
            self._end = loop.NODE
            self._roots.clear()
        memory, place = self._memory, self._root(templates)
        struct.pack_into("<I", memory, loop.PARAMETERS + loop.ROOT, place)
        for byte in path[:-1]:
            slot = loop.ARENA + place + 4 * byte
            (place,) = struct.unpack_from("<I", memory, slot)
            if not place:
                place = self._room(loop.NODE)
                struct.pack_into("<I", memory, slot, place)
        flags, before, middle, after, skip, tail = parts
        middle_at = 16 + (len(before) + 15 & ~15)
        after_at = middle_at + (len(middle) + 15 & ~15)
        start = self._room(after_at + len(after) + 16)
        lengths = len(before), len(middle), len(after)
        _LEAF.pack_into(memory, loop.ARENA + start, flags, leaf[1], skip, *lengths, tail, middle_at, after_at)
        for offset, part in ((16, before), (middle_at, middle), (after_at, after)):
            memory[loop.ARENA + start + offset : loop.ARENA + start + offset + len(part)] = part
        struct.pack_into("<I", memory, loop.ARENA + place + 4 * path[-1], start | 1)
        return True


def _parts(leaf: Leaf) -> _Parts | None:
    """What a leaf puts out, in the form of the loop; None for a function."""
    kind, n, skip, pre, post, _ = leaf
    guest = loop.GUEST if skip else 0
    target = loop.WITH_TARGET | (loop.SHORT if n - skip == 1 else 0)
    if isinstance(post, Split) and kind != CALL:
        flags, before, middle, after = loop.GUEST | loop.TAIL, post.before, post.middle, b""
        if kind == ICALL:
            flags |= loop.WITH_VA | loop.BEHIND | loop.RETURN
            middle, after = middle + pre, PUSHED + JUMP_R8
        elif kind == END:
            flags, before = flags | loop.ENDS, pre + before
        return flags, before, middle, after, n - post.disp_size - post.imm_size, post.imm_size
    if callable(post) and kind != CALL:
        return None
    match kind:
        case _ if kind == PLAIN:
            return guest, pre, b"", b"", skip, 0
        case _ if kind == PLAIN_POST:
            return loop.GUEST, pre, b"", post, skip, 0
        case _ if kind in (JCC, LOOP):
            return target, pre, b"", b"", skip, 0
        case _ if kind == CALL:
            flags = target | loop.WITH_VA | loop.BEHIND | loop.RETURN
            return flags, pre, b"", PUSHED + b"\xe9", skip, 0
        case _ if kind == JMP:
            return target | loop.FOLLOWS | loop.ENDS, b"\xe9", b"", b"", skip, 0
        case _ if kind == END:
            return guest | loop.ENDS, pre, b"", (post or b"") if skip else b"", skip, 0
        case _ if kind == ICALL:
            flags = guest | loop.WITH_VA | loop.BEHIND | loop.RETURN
            return flags, pre, STORE_IMM, PUSHED + JUMP_R8, skip, 0
        case _ if kind == SIMULATE:
            return loop.WITH_VA, MOV_R8, b"", EXIT_SIMULATE, skip, 0
        case _ if kind == STOP:
            return loop.WITH_VA | loop.ENDS | loop.MAY_CROSS, MOV_R8, b"", EXIT_SIMULATE, skip, 0
    return None
