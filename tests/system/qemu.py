"""Thousands of scenarios in one start of QEMU: a firmware of our own runs them one after another.

Guest memory is a file that we prepare and read: at BLOB one slot per scenario. The firmware copies a slot to
the arena and jumps there; the scenario ends in a triple fault, which resets the machine, and the firmware
copies the arena back. So every scenario starts from RESET, whatever the one before has done to the CPU.
A scenario that hangs is reset through QMP; what QEMU does tells, not the clock, as the host may be busy.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.system import common
from tests.system import places as p

CONTROL = 0x200000  # magic, running, index, count, done
BLOB = 0x400000
ROM = 0xF0000
HANG_S = 4.0  # of QEMU's own processor time, on one scenario
LOOK_S = 0.02
IDLE_LOOKS = 200  # in a row at a QEMU that sleeps, its guest halted
PROGRAM = "qemu-system-i386"
BATCH = 1500

REAL = """
cli
.byte 0x66, 0x2e, 0x0f, 0x01, 0x16, 0x40, 0x00
mov eax, cr0
or al, 1
mov cr0, eax
.byte 0x66, 0xea
.long {protected:#x}
.short 8
"""
PROTECTED = """
mov ax, 0x10
mov ds, ax
mov es, ax
mov ss, ax
cld
mov ebx, {control}
cmp dword ptr [ebx+4], 0
je following
mov edi, [ebx+8]
shl edi, 17
add edi, {blob}
xor esi, esi
mov ecx, {words}
.byte 0xf3, 0xa5
inc dword ptr [ebx+8]
mov dword ptr [ebx+4], 0
following:
mov eax, [ebx+8]
cmp eax, [ebx+12]
jae done
shl eax, 17
lea esi, [eax+{blob}]
xor edi, edi
mov ecx, {words}
.byte 0xf3, 0xa5
mov dword ptr [ebx+4], 1
mov eax, {start}
jmp eax
done:
mov dword ptr [ebx+16], 1
mov dx, 0xf4
out dx, al
hlt
"""


def firmware() -> bytes:
    """64 KiB that end at 4 GiB and are seen at F0000h too."""
    rom = bytearray(0x10000)
    protected = common.asm(
        PROTECTED.format(control=CONTROL, blob=BLOB, words=p.SIZE // 4, start=common.START), ROM + 0x100
    )
    rom[0x100 : 0x100 + len(protected)] = protected
    real = common.asm(REAL.format(protected=ROM + 0x100), 0, 16)
    rom[: len(real)] = real
    assert len(real) <= 0x40
    rom[0x40:0x46] = struct.pack("<HI", 0x17, ROM + 0x48)
    rom[0x48:0x60] = struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    rom[0xFFF0:0xFFF5] = b"\xea\x00\x00\x00\xf0"
    return bytes(rom)


def available() -> str:
    """ "" where QEMU can be had, else why not."""
    return "" if shutil.which(PROGRAM) else f"{PROGRAM} is not installed (Debian: qemu-system-x86)"


def run(images: Sequence[bytes], cpu: str = "pentium3") -> list[bytes | None]:
    """The arenas afterwards; None for one that never came to an end."""
    out: list[bytes | None] = []
    for start in range(0, len(images), BATCH):
        out += _batch(images[start : start + BATCH], cpu)
    return out


def _batch(images: Sequence[bytes], cpu: str) -> list[bytes | None]:
    size = -(-(BLOB + len(images) * p.SIZE) // (1 << 20)) << 20
    with tempfile.TemporaryDirectory(prefix="system-") as name:
        folder = Path(name)
        (folder / "rom").write_bytes(firmware())
        with open(folder / "ram", "w+b") as file:
            file.truncate(size)
            with mmap.mmap(file.fileno(), size) as ram:
                struct.pack_into("<5I", ram, CONTROL, 0x53595343, 0, 0, len(images), 0)
                for number, image in enumerate(images):
                    ram[BLOB + number * p.SIZE : BLOB + (number + 1) * p.SIZE] = image
                hung = _drive(folder, ram, size, cpu)
                return [
                    None if n in hung else ram[BLOB + n * p.SIZE : BLOB + (n + 1) * p.SIZE]
                    for n in range(len(images))
                ]


def _drive(folder: Path, ram: mmap.mmap, size: int, cpu: str) -> set[int]:
    """Run QEMU to the end of the batch; the numbers of the scenarios that hung."""
    command = [
        PROGRAM, "-M", "pc,memory-backend=ram", "-accel", "tcg,thread=single", "-cpu", cpu,
        "-m", f"{size >> 20}M",
        "-object", f"memory-backend-file,id=ram,share=on,mem-path={folder}/ram,size={size}",
        "-bios", f"{folder}/rom", "-nodefaults", "-display", "none", "-monitor", "none",
        "-device", "isa-debug-exit,iobase=0xf4", "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
    ]  # fmt: skip
    hung: set[int] = set()
    with open(folder / "errors", "wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
    try:
        last, since_s, idle, before_s = -1, 0.0, 0, 0.0
        while process.poll() is None:
            time.sleep(LOOK_S)
            index = struct.unpack_from("<I", ram, CONTROL + 8)[0]
            used_s, sleeps = _activity(process.pid)
            idle = idle + 1 if sleeps and used_s == before_s else 0
            before_s = used_s
            if index != last:
                last, since_s, idle = index, used_s, 0
            elif used_s - since_s > HANG_S or idle > IDLE_LOOKS:
                hung.add(index)
                _reset(folder / "qmp")
                since_s, idle = used_s, 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, 9)
        process.wait()
    if not struct.unpack_from("<I", ram, CONTROL + 16)[0]:
        raise RuntimeError(f"QEMU ended early: {(folder / 'errors').read_text(errors='replace')[-500:]}")
    return hung


def _activity(pid: int) -> tuple[float, bool]:
    """Processor time used, in seconds; whether all its threads sleep [proc(5)]."""
    used, sleeps = 0, True
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            words = stat.read_text().rpartition(")")[2].split()
            used += int(words[11]) + int(words[12])
            sleeps = sleeps and words[0] == "S"
    return used / os.sysconf("SC_CLK_TCK"), sleeps


def _reset(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        with link.makefile("rw") as stream:
            stream.readline()
            for command in ("qmp_capabilities", "system_reset"):
                stream.write(json.dumps({"execute": command}) + "\n")
                stream.flush()
                stream.readline()
