"""Boot plans under another PC: a plan as a multiboot image for `qemu-system-i386 -kernel`.

So tables, zero page and guests are judged by a machine that isn't ours. Used only where QEMU is installed.
Source: Multiboot specification 0.6.96; i440FX data sheet, 3.2.10 (PAM: makes C0000-FFFFF writable RAM).
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path

from launcher.asm_boot import assemble
from launcher.boot_plan import BootPlan

QEMU = shutil.which("qemu-system-i386")
IMAGE_MIB = 64  # room for the image, above the memory the plan knows of
HEADER_BYTES = 64
TIME_LIMIT_S = 600  # a bound on hanging, not an expectation
MULTIBOOT_MAGIC, MULTIBOOT_ADDRESSES = 0x1BADB002, 0x10000

STUB = """
    cli
    cld
    mov dx, 0xcf8
    mov eax, 0x80000058         # PAM registers 0x59-0x5f of the host bridge
    out dx, eax
    mov dx, 0xcfc
    mov eax, 0x33333300
    out dx, eax
    mov dx, 0xcf8
    mov eax, 0x8000005c
    out dx, eax
    mov dx, 0xcfc
    mov eax, 0x33333333
    out dx, eax
    lea ebx, [table]
copy:
    mov esi, [ebx]
    mov edi, [ebx+4]
    mov ecx, [ebx+8]
    test ecx, ecx
    jz go
    rep movsb
    add ebx, 12
    jmp copy
go:
    .byte 0x0f, 0x01, 0x15      # lgdt
    .long gdtr
    push {cs}
    lea eax, [flat]
    push eax
    retf
flat:
    mov eax, {ds}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, {esp}
    mov esi, {esi}
    mov eax, {eip}
    push eax
    xor eax, eax
    xor ebx, ebx
    xor ecx, ecx
    xor edx, edx
    xor edi, edi
    xor ebp, ebp
    ret
gdtr:
    .word {gdt_limit}
    .long {gdt_base}
    .align 4
table:
"""


def multiboot_image(plan: BootPlan, image_pa: int) -> bytes:
    stub_pa = image_pa + HEADER_BYTES
    stub = assemble(STUB.format(**plan.start), Path("stub"), stub_pa)
    at = stub_pa + len(stub) + 12 * (len(plan.images) + 1)
    table, data = b"", b""
    for pa, image in plan.images:
        table += struct.pack("<III", at + len(data), pa, len(image))
        data += image
    flags = MULTIBOOT_ADDRESSES
    checksum = -(MULTIBOOT_MAGIC + flags) & 0xFFFF_FFFF
    header = struct.pack("<8I", MULTIBOOT_MAGIC, flags, checksum, image_pa, image_pa, 0, 0, stub_pa)
    return header.ljust(HEADER_BYTES, b"\0") + stub + table + bytes(12) + data


def run(
    plan: BootPlan,
    scratch: Path,
    memory_mib: int,
    cpu: str = "qemu32",
    answer: tuple[bytes, bytes] | None = None,
) -> str:
    """The serial output until the machine powers off. `answer` is (what to wait for, what to type then)."""
    assert QEMU is not None
    image = scratch / "plan.mb"
    image.write_bytes(multiboot_image(plan, memory_mib << 20))
    command = [QEMU, "-M", "pc", "-accel", "tcg", "-cpu", cpu, "-m", str(memory_mib + IMAGE_MIB)]
    command += ["-display", "none", "-nodefaults"]
    command += ["-serial", "stdio", "-no-reboot", "-kernel", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        limit = threading.Timer(TIME_LIMIT_S, qemu.kill)
        limit.start()
        said = b""
        while chunk := os.read(qemu.stdout.fileno(), 4096):
            said += chunk
            if answer is not None and answer[0] in said:
                qemu.stdin.write(answer[1])
                qemu.stdin.flush()
                answer = None
        limit.cancel()
    assert qemu.returncode == 0, said
    return said.decode("ascii", errors="replace")
