"""The Linux boot protocol: a bzImage, started at its 32-bit entry.

Source: Linux Documentation/arch/x86/boot.rst ("32-bit boot protocol") and zero-page.rst; field offsets are
those of struct boot_params. The kernel's real-mode setup code is not run: what it would have asked the BIOS
for is in the zero page (memory map, ACPI tables; screen_info is all 0, which says that there is no screen).
Left out: zImage (not loaded high), protocols before 2.10, setup_data, EFI, recognising a 64-bit kernel older
than protocol 2.12 (Linux 3.8).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import acpi_tables, mp_table
from launcher.boot_plan import (
    BDA_PA,
    BOOT_GDT,
    EBDA_PA,
    GDT_PA,
    BootPlan,
    E820Range,
    VirtioPlace,
    bios_data_area,
    memory_map,
    start_state,
)
from launcher.config import LinuxBoot, MachineConfig
from launcher.errors import ConfigError
from memory_node.regions import E820_RAM

ZERO_PAGE_PA = 0x90000
COMMAND_LINE_PA = 0x91000  # up to the EBDA
STACK_PA = 0x90000  # grows down; the kernel sets up its own at once
BELOW_4G_LOWMEM = 0x3000_0000  # every 32-bit kernel maps this much directly; above, it copies the initrd

BOOT_FLAG, HEADER_MAGIC = 0xAA55, b"HdrS"
OLDEST_PROTOCOL = 0x020A  # pref_address and init_size
LOADED_HIGH = 0x01  # loadflags
XLF_KERNEL_64 = 0x01  # xloadflags: the kernel is x86-64
TYPE_OF_LOADER_UNDEFINED = 0xFF
SECTOR = 512
E820_MAX = 128  # entries which fit the zero page


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """What the loader needs of the header at 0x1F1 of the image; `raw` is all of it, for the zero page."""

    raw: bytes
    protocol: int
    protected_mode: slice  # the part of the file which is loaded at code32_start
    code32_start: int
    initrd_addr_max: int
    cmdline_size: int
    pref_address: int
    init_size: int


def read_header(kernel: bytes, file: Path) -> SetupHeader:
    """Parse and judge a bzImage; ConfigError says what is wrong with it."""
    remedy = "name an i386 bzImage (/boot/vmlinuz-*)"

    def refuse(problem: str) -> ConfigError:
        return ConfigError(file, "", problem, remedy)

    if len(kernel) < 0x268 or struct.unpack_from("<H", kernel, 0x1FE)[0] != BOOT_FLAG:
        raise refuse("is no bzImage (no boot flag 0xAA55 at 0x1FE)")
    if kernel[0x202:0x206] != HEADER_MAGIC:
        raise refuse("is no bzImage (no HdrS at 0x202)")
    (protocol,) = struct.unpack_from("<H", kernel, 0x206)
    if protocol < OLDEST_PROTOCOL:
        raise refuse(f"has boot protocol {protocol >> 8}.{protocol & 0xFF:02}, older than 2.10")
    setup_sectors = kernel[0x1F1] or 4
    (paragraphs,) = struct.unpack_from("<I", kernel, 0x1F4)
    start = (setup_sectors + 1) * SECTOR
    end = start + paragraphs * 16
    if len(kernel) < end:
        raise refuse(f"is truncated ({len(kernel)} bytes, its header says {end})")
    loadflags = kernel[0x211]
    if not loadflags & LOADED_HIGH:
        raise refuse("is a zImage (not loaded high)")
    (xloadflags,) = struct.unpack_from("<H", kernel, 0x236)
    if xloadflags & XLF_KERNEL_64:
        raise refuse("is a 64-bit kernel, this machine's processor is 32-bit")
    (code32_start,) = struct.unpack_from("<I", kernel, 0x214)
    (initrd_addr_max,) = struct.unpack_from("<I", kernel, 0x22C)
    (cmdline_size,) = struct.unpack_from("<I", kernel, 0x238)
    pref_address, init_size = struct.unpack_from("<QI", kernel, 0x258)
    raw = kernel[0x1F1 : 0x202 + kernel[0x201]]
    return SetupHeader(
        raw, protocol, slice(start, end), code32_start, initrd_addr_max, cmdline_size, pref_address, init_size
    )


def prepare_linux(
    config: MachineConfig, boot: LinuxBoot, virtio: Sequence[VirtioPlace] = ()
) -> BootPlan:
    """The plan for [boot] kind = "linux"; ConfigError for files which can't be booted."""
    kernel = _read(config, "boot.kernel", boot.kernel)
    header = read_header(kernel, boot.kernel)
    protected_mode = kernel[header.protected_mode]
    memory_end = config.memory_bytes
    kernel_end = max(
        header.code32_start + len(protected_mode), _aligned(header.pref_address + header.init_size, 4096)
    )
    if kernel_end > memory_end:
        raise config.error(
            "machine.memory",
            f"{memory_end >> 20} MiB is too little, the kernel needs {-(-kernel_end >> 20)} MiB to start",
            "give the machine more memory",
        )
    images = [
        (BDA_PA, bios_data_area(config)),
        (GDT_PA, BOOT_GDT),
        (COMMAND_LINE_PA, _command_line(config, boot, header)),
        (header.code32_start, protected_mode),
    ]
    initrd_pa = initrd_size = 0
    archives = [("boot.initrd", boot.initrd), ("boot.modules", boot.modules if virtio else None)]
    initrd = b"".join(_read(config, key, path) for key, path in archives if path is not None)
    if initrd:
        initrd_size = len(initrd)
        top = min(memory_end, header.initrd_addr_max + 1, BELOW_4G_LOWMEM)
        initrd_pa = (top - initrd_size) & ~0xFFF
        if initrd_pa < kernel_end:
            room = f"{max(0, top - kernel_end) >> 10} KiB of {memory_end >> 20} MiB are free for it"
            problem = f"does not fit into memory ({initrd_size >> 10} KiB, {room})"
            raise ConfigError(boot.initrd or boot.modules or "", "", problem, "give the machine more memory")
        images.append((initrd_pa, initrd))
    rsdp_pa = 0
    machine = acpi_tables.describe(config, virtio)
    if machine is None and virtio:
        problem = "no acpi_pm, so no ACPI tables, and by nothing else does Linux find a virtio device"
        raise config.error("device", problem, "add one with ports and an IRQ")
    if machine is not None:
        rsdp_pa, tables = acpi_tables.build(machine)
        images.append((rsdp_pa, tables))
        if machine.ioapic_pa is not None and machine.ioapic_id is not None:
            area = mp_table.extended_bios_data_area(machine, machine.ioapic_pa, machine.ioapic_id)
            images.append((EBDA_PA, area))
    e820 = memory_map(memory_end)
    images.append((ZERO_PAGE_PA, zero_page(header, e820, (initrd_pa, initrd_size), rsdp_pa)))
    return BootPlan(images, start_state(header.code32_start, STACK_PA, ZERO_PAGE_PA), e820)


def zero_page(header: SetupHeader, e820: list[E820Range], initrd: tuple[int, int], rsdp_pa: int) -> bytes:
    """struct boot_params [zero-page.rst]: 0 but for what is filled in here."""
    if len(e820) > E820_MAX:
        raise ValueError(f"{len(e820)} memory ranges, the zero page holds {E820_MAX}")
    page = bytearray(4096)
    page[0x1F1 : 0x1F1 + len(header.raw)] = header.raw
    ram_end = max(base + length for base, length, kind in e820 if kind == E820_RAM)
    extended_kib = (ram_end - (1 << 20)) >> 10
    struct.pack_into("<H", page, 0x002, min(extended_kib, 0xFFFF))  # screen_info.ext_mem_k
    struct.pack_into("<Q", page, 0x070, rsdp_pa)  # acpi_rsdp_addr
    struct.pack_into("<I", page, 0x1E0, extended_kib)  # alt_mem_k
    page[0x1E8] = len(e820)
    page[0x210] = TYPE_OF_LOADER_UNDEFINED
    struct.pack_into("<II", page, 0x218, *initrd)  # ramdisk_image, ramdisk_size
    struct.pack_into("<I", page, 0x228, COMMAND_LINE_PA)
    for number, entry in enumerate(e820):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * number, *entry)
    return bytes(page)


def _command_line(config: MachineConfig, boot: LinuxBoot, header: SetupHeader) -> bytes:
    try:
        line = boot.cmdline.encode("ascii")
    except UnicodeEncodeError as e:
        problem = f"has a character which is not ASCII ({boot.cmdline[e.start]!r})"
        raise config.error("boot.cmdline", problem, "remove it") from e
    limit = min(header.cmdline_size, EBDA_PA - COMMAND_LINE_PA - 1)
    if len(line) > limit:
        problem = f"is {len(line)} characters long, this kernel takes {limit}"
        raise config.error("boot.cmdline", problem, "shorten it")
    return line + b"\0"


def _read(config: MachineConfig, key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        problem = f"{path} cannot be read ({e.strerror})"
        raise config.error(key, problem, "name an existing file (`make guest` makes build/guest/*)") from e


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
