"""Assembly to machine code: by keystone, or from a file of what keystone made at an earlier start.

The stubs take keystone some 40 ms, its own loading included. The file lies in the folder of one version of
the kept translations (store.py), named by a hash of the sources, so of all texts, and of keystone's version:

    <folder>/<version>/assembled    magic, version, BLAKE2b of the rest, a msgpack map: key -> machine code

It is machine code that will run, so the same rules hold: it must be the user's, nobody else's to write to.
Whatever is wrong with it is said in the log, and keystone does the work. Written when something was missing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack

from bus.checksum import blake2b
from cpu_node.folders import Refused, check_owner, open_folder
from cpu_node.literals import hexadecimal

if TYPE_CHECKING:
    from keystone import Ks

NAME = "assembled"
LARGEST = 1 << 20  # bytes of such a file
_MAGIC = b"BPASMD\x01\n"
_DIGEST = 32

log = logging.getLogger(__name__)

_known: dict[bytes, bytes] = {}  # by key
_unsaved: list[bytes] = []  # keys that the file did not have


def assemble(text: str, ha: int) -> bytes:
    """64-bit machine code of `text` at `ha`."""
    key = _key(text, ha)
    code = _known.get(key)
    if code is None:
        made, _ = _assembler().asm(hexadecimal(text), ha)
        code = _known[key] = bytes(made)
        _unsaved.append(key)
    return code


@functools.cache
def _assembler() -> Ks:
    from keystone import KS_ARCH_X86, KS_MODE_64, Ks  # loading it takes longer than most starts need it

    return Ks(KS_ARCH_X86, KS_MODE_64)


def _key(text: str, ha: int) -> bytes:
    """What identifies a piece: its text and where it is to lie."""
    return blake2b(f"{ha:#x}\n{text}".encode(), digest_size=_DIGEST).digest()


def load(folder: Path, tag: bytes) -> None:
    """Know what the file of this folder and version holds. Never raises."""
    try:
        with _opened(folder, tag) as at:
            fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=at)
            with open(fd, "rb") as file:
                status = os.fstat(fd)
                check_owner(status, NAME)
                if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                    raise Refused(f"{NAME} is none of ours")
                found = _unpack(file.read(), tag)
    except FileNotFoundError:
        return
    except (OSError, Refused) as error:
        log.warning("%s: %s; assembled anew", folder, error)
        return
    for key, code in found.items():
        _known.setdefault(key, code)


def keep(folder: Path, tag: bytes) -> None:
    """Write the file, if something was assembled since `load`. Never raises."""
    if not _unsaved:
        return
    _unsaved.clear()
    name = f"{NAME}-{os.getpid():x}.new"
    try:
        with _opened(folder, tag) as at:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(name, flags, 0o600, dir_fd=at), "wb") as file:
                file.write(_pack(tag))
            os.rename(name, NAME, src_dir_fd=at, dst_dir_fd=at)
    except (OSError, Refused) as error:
        log.warning("%s: %s; what was assembled is not kept", folder, error)


@contextlib.contextmanager
def _opened(folder: Path, tag: bytes) -> Iterator[int]:
    root = open_folder(folder, None)
    try:
        at = open_folder(Path(tag.hex()[:32]), root)
        try:
            yield at
        finally:
            os.close(at)
    finally:
        os.close(root)


def _pack(tag: bytes) -> bytes:
    body: bytes = msgpack.packb(_known)
    return _MAGIC + tag + blake2b(body, digest_size=_DIGEST).digest() + body


def _unpack(data: bytes, tag: bytes) -> dict[bytes, bytes]:
    """Raises Refused."""
    head = _MAGIC + tag
    digest, body = data[len(head) : len(head) + _DIGEST], data[len(head) + _DIGEST :]
    if not data.startswith(head) or blake2b(body, digest_size=_DIGEST).digest() != digest:
        raise Refused(f"{NAME} is damaged")
    found = msgpack.unpackb(body, strict_map_key=False)
    if not isinstance(found, dict):
        raise Refused(f"{NAME} is damaged")
    return found
