"""The translator: guest instructions of a line to host code, by templates.

`translate` is pure but for the line's maps: it returns bytes meant for a given place in the code cache and
the patches to make elsewhere (golden tests need no CPU). A chunk is straight-line code that runs on past
conditional jumps and calls and follows jumps inside the page; every guest instruction boundary in it is a
valid entry, because nothing is cached between instructions.
Left out: anything across pages (a jump there goes through the dispatch table), optimisation.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from cpu_node import mode as modes
from cpu_node.decode import MAX_LENGTH
from cpu_node.emit import Templates
from cpu_node.emit_soft import RESTORE_ECX, SAVE_ECX, probe
from cpu_node.encode import (
    CALL,
    END,
    EXIT_CHAIN,
    EXIT_SIMULATE,
    EXIT_STALE,
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
    WINDOW,
    Leaf,
    Split,
)
from cpu_node.line import Chunk, Line

CHECK_SAVED_FROM = len(MOV_R8) + 4 + len(SAVE_ECX)  # host offset from which a check in SOFT has ECX in r12
MAX_INSTRUCTIONS = 250  # of a chunk


@dataclass(slots=True)
class Translation:
    """What one call of translate made."""

    code: bytes
    chunk: Chunk
    patches: list[tuple[int, int]]  # (end of a rel32 in older code, its new target), cache offsets
    returns: list[int]  # offsets behind calls: worth a dispatch entry


def check_source(line: Line, offset: int, length: int) -> bytes:
    """Host code that leaves by EXIT_STALE unless the guest bytes are still those translated.

    Keeps the flags: ECX waits in r9d (SOFT: r12) while JRCXZ tests (rollback.py puts it back).
    """
    va = line.va + offset
    leave = MOV_R8 + va.to_bytes(4, "little") + EXIT_STALE
    if line.mode & modes.SOFT:
        return _check_by_probe(line, offset, length, RESTORE_ECX + leave)
    out = b"\x41\x89\xc9"  # mov r9d, ecx
    at = offset
    while at < offset + length:
        left = offset + length - at
        size = 4 if left >= 4 else 2 if left >= 2 else 1
        load = {4: b"\x44\x8b", 2: b"\x44\x0f\xb7", 1: b"\x44\x0f\xb6"}[size]
        expected = int.from_bytes(line.code[at : at + size], "little")
        out += WINDOW + load + b"\x04\x25" + (line.va + at & 0xFFFFFFFF).to_bytes(4, "little")
        out += b"\x41\x8d\x88" + (-expected & 0xFFFFFFFF).to_bytes(4, "little")  # lea ecx, [r8-expected]
        stale = b"\x44\x89\xc9" + leave  # mov ecx, r9d
        out += b"\xe3\x02\xeb\x02\xeb" + bytes((len(stale),)) + stale
        at += size
    return out + b"\x44\x89\xc9"


def _check_by_probe(line: Line, offset: int, length: int, stale: bytes) -> bytes:
    """The same, where the bytes are found by the TLB: they are data to it."""
    out = MOV_R8 + (line.va + offset).to_bytes(4, "little")
    out += probe(len(out), length, False) + b"\x4f\x8d\x4c\x08\xff"  # lea r9, [r8+r9-1]
    at = 0
    while at < length:
        size = 4 if length - at >= 4 else 2 if length - at >= 2 else 1
        load = {4: b"\x45\x8b", 2: b"\x45\x0f\xb7", 1: b"\x45\x0f\xb6"}[size]
        expected = int.from_bytes(line.code[offset + at : offset + at + size], "little")
        out += load + bytes((0x41, at))  # mov r8d, [r9+at]
        out += b"\x41\x8d\x88" + (-expected & 0xFFFFFFFF).to_bytes(4, "little")  # lea ecx, [r8-expected]
        out += b"\xe3\x02\xeb\x02\xeb" + bytes((len(stale),)) + stale
        at += size
    return out + RESTORE_ECX


def leaf_at(templates: Templates, code: bytes, offset: int) -> Leaf:
    """The template of one instruction (translate has this inline)."""
    node, i = templates.root[code[offset]], offset
    while node.__class__ is list:
        i += 1
        node = node[code[i]]
    leaf: Leaf = templates.lookup(code, offset) if node is None else node
    return leaf


def renew(line: Line, offset: int, text: bytes, templates: Templates) -> bytes | None:
    """New host code, as long as the old, for an instruction of a verifying line that is `text` by now.

    The line takes the new bytes over. None where more than displacement and immediate changed, the
    instruction is no plain one, or another one that is translated overlaps it.
    """
    code, host = line.code, line.host
    if not line.verify or offset in line.devices:
        return None
    leaf = leaf_at(templates, text, 0)
    kind, n, skip, pre, post, _ = leaf
    old = code[offset : offset + n]
    plain = kind in (PLAIN, PLAIN_POST) or (kind == FUNCTION and isinstance(post, Split))
    if (not plain or offset + n > line.size or text[:n] == old
            or leaf_at(templates, code, offset) is not leaf):
        return None
    if line.alone.get(offset) != len(host):
        if any(o in host for o in range(offset + 1, offset + n)):
            return None
        before = [o for o in range(max(0, offset - MAX_LENGTH + 1), offset) if o in host]
        if any(o + leaf_at(templates, code, o)[1] > offset for o in before):
            return None
        line.alone[offset] = len(host)
    line.code = code[:offset] + text[:n] + code[offset + n :]
    if kind == FUNCTION:
        made: bytes = post(text, 0, line.va + offset)
        return check_source(line, offset, n) + made
    body: bytes = pre + text[skip:n] if skip else pre
    return check_source(line, offset, n) + body + (post if kind == PLAIN_POST else b"")


def connect(
    line: Line, position: int, end: int, fixups: list[tuple[int, int]], offsets: Sequence[int]
) -> tuple[list[tuple[int, bytes]], bytes, array[int], list[tuple[int, int]]]:
    """Where the jumps of a new chunk go. It lies from `position` to `end`, its offsets are in line.host.

    fixups: (end of a rel32, target offset). Returns (end, rel32) of each, stubs to be put behind the chunk
    for targets that aren't translated, Chunk.jumps, and the patches to make elsewhere.
    """
    host, chain, va0 = line.host, line.chain, line.va
    places, jumps, stubs = [], array("I"), b""
    stub_of: dict[int, int] = {}
    for behind, target in fixups:
        inside = 0 <= target < chain
        place = host.get(target) if inside else None
        if inside and (place is None or place < position):
            jumps.append(behind - position)
            jumps.append(target)
        if place is None:
            place = stub_of.get(target)
            if place is None:
                place = stub_of[target] = end + len(stubs)
                stubs += MOV_R8 + (va0 + target & 0xFFFFFFFF).to_bytes(4, "little") + (
                    EXIT_CHAIN if inside else JUMP_R8)
            if inside:
                line.waiting.setdefault(target, []).append(behind)
        places.append((behind, (place - behind).to_bytes(4, "little", signed=True)))
    patches = []
    if line.waiting:
        for offset in [o for o in offsets if o in line.waiting]:
            patches += [(behind, host[offset]) for behind in line.waiting.pop(offset)]
    return places, stubs, jumps, patches


def translate(line: Line, start: int, templates: Templates, position: int,
              limit: int = MAX_INSTRUCTIONS, ahead: bool = False) -> Translation:
    """Translates from line.code[start:] on, for host code at `position` in the cache.

    Enters the new instructions into line.host, and jumps to offsets not translated yet into line.waiting.
    """
    code, chain, starts, size = line.code, line.chain, line.starts, line.size
    va0 = line.va
    host = line.host
    root = templates.root
    verify, devices = line.verify, line.devices
    out: list[bytes] = []
    put = out.append
    fixups: list[tuple[int, int, int]] = []  # (index in out, position behind the rel32, target offset)
    hosts: list[int] = []
    offsets: list[int] = []
    returns: list[int] = []
    i, at, left = start, position, limit
    followed = 0
    while i >= 0:
        while True:
            if left == 0 or i >= starts or i in host:
                put(b"\xe9")
                at += 5
                fixups.append((len(out), at, i))
                put(b"")
                break
            leaf = root[code[i]]
            if leaf.__class__ is list:
                leaf = leaf[code[i + 1]]
                if leaf.__class__ is list:
                    leaf = leaf[code[i + 2]]
                    j = i + 3
                    while leaf.__class__ is list:
                        leaf = leaf[code[j]]
                        j += 1
            if leaf is None:
                leaf = templates.lookup(code, i)
            kind, n, skip, pre, post, length = leaf
            if i + n > size and kind != STOP:
                # crosses into the next page: a line of its own
                put(MOV_R8 + (va0 + i & 0xFFFFFFFF).to_bytes(4, "little") + JUMP_R8)
                at += 10
                break
            if devices and i in devices:
                kind = SIMULATE
            left -= 1
            host[i] = at
            hosts.append(at - position)
            offsets.append(i)
            if verify:
                check = check_source(line, i, min(n, size - i))
                put(check)
                at += len(check)
            if kind == PLAIN:
                put(pre)
                if skip:
                    put(code[i + skip : i + n])
                i += n
                at += length
                continue
            following = i + n
            if kind == JCC:
                target = following + int.from_bytes(code[i + skip : following], "little", signed=True)
                put(pre)
                at += 6
                fixups.append((len(out), at, target))
                put(b"")
            elif kind == PLAIN_POST:
                put(pre)
                put(code[i + skip : following])
                put(post)
                at += length
            elif kind == CALL:
                target = following + int.from_bytes(code[i + skip : following], "little", signed=True)
                put(pre + (va0 + following & 0xFFFFFFFF).to_bytes(4, "little") + PUSHED + b"\xe9")
                at += len(pre) + 13
                fixups.append((len(out), at, target))
                put(b"")
                returns.append(following)
            elif kind == JMP:
                target = following + int.from_bytes(code[i + skip : following], "little", signed=True)
                if 0 <= target < chain and target not in host and not verify:
                    i = target
                    continue
                put(b"\xe9")
                at += 5
                fixups.append((len(out), at, target))
                put(b"")
                break
            elif kind == FUNCTION:
                piece = post(code, i, va0 + i & 0xFFFFFFFF)
                put(piece)
                at += len(piece)
            elif kind == END:
                if callable(post):
                    piece = pre + post(code, i, va0 + i & 0xFFFFFFFF)
                else:
                    piece = pre + code[i + skip : following] + (post or b"") if skip else pre
                put(piece)
                at += len(piece)
                break
            elif kind == ICALL:
                if post is None:
                    piece = pre + (code[i + skip : following] if skip else b"") + STORE_IMM
                else:
                    piece = post(code, i, va0 + i & 0xFFFFFFFF) + pre
                piece += (va0 + following & 0xFFFFFFFF).to_bytes(4, "little") + PUSHED + JUMP_R8
                put(piece)
                at += len(piece)
                returns.append(following)
            elif kind == LOOP:
                target = following + int.from_bytes(code[i + skip : following], "little", signed=True)
                put(pre)
                at += length
                fixups.append((len(out), at, target))
                put(b"")
            else:
                assert kind in (SIMULATE, STOP), kind
                put(MOV_R8 + (va0 + i & 0xFFFFFFFF).to_bytes(4, "little") + EXIT_SIMULATE)
                at += 10
                if kind == STOP:
                    break
            i = following
        i = -1
        while ahead and left and followed < len(fixups) and i < 0:
            target = fixups[followed][2]
            followed += 1
            if 0 <= target < chain and target not in host:
                i = target
    places, stubs, jumps, patches = connect(line, position, at, [f[1:] for f in fixups], offsets)
    for (index, _, _), (_, rel32) in zip(fixups, places, strict=True):
        out[index] = rel32
    put(stubs)
    data = b"".join(out)
    assert position + len(data) == at + len(stubs)
    chunk = Chunk(line, position, at + len(stubs), array("I", hosts), array("H", offsets), jumps)
    return Translation(data, chunk, patches, returns)
