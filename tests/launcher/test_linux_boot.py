"""The Linux boot protocol: what is refused, and what a plan puts where."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from launcher.acpi_tables import TABLES_PA
from launcher.boot_plan import BOOT_GDT, BootPlan, VirtioPlace, prepare
from launcher.config import MachineConfig, read_config
from launcher.errors import ConfigError
from launcher.linux_boot import BELOW_4G_LOWMEM, COMMAND_LINE_PA, ZERO_PAGE_PA, read_header

CODE = b"\xf4" * 4096
SETUP_SECTORS = 3
INIT_SIZE = 0x180_0000
PM = '[[device]]\nname = "pm"\ntype = "acpi_pm"\nports = { pm = 0x600 }\nirqs = { sci = 9 }\n'


def bzimage(protocol: int = 0x20F, **bytes_at: tuple[int, str, int]) -> bytes:
    """A kernel as boot.rst describes it, with a protected-mode part of hlt instructions."""
    setup = bytearray((SETUP_SECTORS + 1) * 512)
    setup[0x1F1] = SETUP_SECTORS
    fields = {
        "syssize": (0x1F4, "<I", len(CODE) // 16),
        "boot_flag": (0x1FE, "<H", 0xAA55),
        "jump": (0x200, "<H", 0x6AEB),
        "magic": (0x202, "<I", 0x53726448),
        "version": (0x206, "<H", protocol),
        "loadflags": (0x211, "<B", 1),
        "code32_start": (0x214, "<I", 0x100000),
        "initrd_addr_max": (0x22C, "<I", 0x7FFF_FFFF),
        "xloadflags": (0x236, "<H", 0),
        "cmdline_size": (0x238, "<I", 2047),
        "pref_address": (0x258, "<Q", 0x100_0000),
        "init_size": (0x260, "<I", INIT_SIZE),
    } | bytes_at
    for offset, form, value in fields.values():
        struct.pack_into(form, setup, offset, value)
    return bytes(setup) + CODE


def machine(
    folder: Path,
    kernel: bytes,
    memory: str = "64M",
    cmdline: str = "",
    initrd: bytes | None = None,
    more: str = "",
) -> MachineConfig:
    (folder / "kernel").write_bytes(kernel)
    text = f'[machine]\nname = "m"\nmemory = "{memory}"\n[boot]\nkind = "linux"\nkernel = "kernel"\n'
    text += f'cmdline = "{cmdline}"\n'
    if initrd is not None:
        (folder / "initrd").write_bytes(initrd)
        text += 'initrd = "initrd"\n'
    (folder / "m.toml").write_text(text + more)
    return read_config(folder / "m.toml")


def image_at(plan: BootPlan, pa: int) -> bytes:
    found = [image for base, image in plan.images if base == pa]
    assert len(found) == 1
    return found[0]


BAD_KERNELS = {
    "empty": (b"", "is no bzImage"),
    "text": (b"hello\n" * 1000, "is no bzImage (no boot flag"),
    "elf": (b"\x7fELF" + bytes(4096), "is no bzImage (no boot flag"),
    "boot sector": (bzimage(magic=(0x202, "<I", 0)), "is no bzImage (no HdrS"),
    "cut in the setup": (bzimage()[:1024], "is truncated"),
    "cut in the kernel": (bzimage()[:-1], "is truncated (6143 bytes, its header says 6144)"),
    "64-bit": (bzimage(xloadflags=(0x236, "<H", 0x3F)), "is a 64-bit kernel"),
    "old": (bzimage(protocol=0x0204), "has boot protocol 2.04, older than 2.10"),
    "zImage": (bzimage(loadflags=(0x211, "<B", 0)), "is a zImage"),
}


@pytest.mark.parametrize(("kernel", "problem"), BAD_KERNELS.values(), ids=BAD_KERNELS)
def test_a_bad_kernel_is_refused_in_one_line(kernel: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(machine(tmp_path, kernel))
    line = str(caught.value)
    assert problem in line
    assert str(tmp_path / "kernel") in line
    assert "\n" not in line


def test_a_missing_kernel_or_initrd_names_the_key(tmp_path: Path) -> None:
    config = machine(tmp_path, bzimage(), initrd=b"x")
    (tmp_path / "initrd").unlink()
    with pytest.raises(ConfigError, match=r"m\.toml: boot\.initrd: .*No such file.*make guest"):
        prepare(config)
    (tmp_path / "kernel").unlink()
    with pytest.raises(ConfigError, match=r"m\.toml: boot\.kernel: .*No such file.*make guest"):
        prepare(config)


def test_the_command_line_may_fill_what_the_kernel_takes(tmp_path: Path) -> None:
    plan = prepare(machine(tmp_path, bzimage(), cmdline="a" * 2047))
    assert image_at(plan, COMMAND_LINE_PA) == b"a" * 2047 + b"\0"
    with pytest.raises(ConfigError, match=r"boot\.cmdline: is 2048 characters long, this kernel takes 2047"):
        prepare(machine(tmp_path, bzimage(), cmdline="a" * 2048))
    with pytest.raises(ConfigError, match=r"boot\.cmdline: has a character which is not ASCII \('ä'\)"):
        prepare(machine(tmp_path, bzimage(), cmdline="root=ä"))


def test_the_initrd_lies_at_the_top_and_never_on_the_kernel(tmp_path: Path) -> None:
    free = (64 << 20) - (0x100_0000 + INIT_SIZE)
    plan = prepare(machine(tmp_path, bzimage(), initrd=b"i" * 5000))
    assert image_at(plan, (64 << 20) - 0x2000) == b"i" * 5000
    prepare(machine(tmp_path, bzimage(), initrd=bytes(free)))
    with pytest.raises(ConfigError, match=r"initrd: does not fit into memory .*24576 KiB of 64 MiB are free"):
        prepare(machine(tmp_path, bzimage(), initrd=bytes(free + 1)))
    with pytest.raises(ConfigError, match=r"machine\.memory: 32 MiB is too little, the kernel needs 40 MiB"):
        prepare(machine(tmp_path, bzimage(), memory="32M"))


def test_a_big_machine_keeps_the_initrd_where_every_kernel_maps_it(tmp_path: Path) -> None:
    plan = prepare(machine(tmp_path, bzimage(), memory="1G", initrd=b"i"))
    assert image_at(plan, BELOW_4G_LOWMEM - 0x1000) == b"i"
    low = bzimage(initrd_addr_max=(0x22C, "<I", 0x37F_FFFF))
    plan = prepare(machine(tmp_path, low, initrd=b"i"))
    assert image_at(plan, 0x380_0000 - 0x1000) == b"i"


def test_the_zero_page_tells_the_kernel_about_the_machine(tmp_path: Path) -> None:
    kernel = bzimage()
    plan = prepare(machine(tmp_path, kernel, cmdline="quiet", initrd=b"i" * 10))
    page = image_at(plan, ZERO_PAGE_PA)
    header_end = 0x202 + 0x6A
    assert len(page) == 4096
    changed = {*range(0x210, 0x211), *range(0x218, 0x220), *range(0x228, 0x22C)}
    for offset in range(0x1F1, header_end):
        assert offset in changed or page[offset] == kernel[offset]
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<II", page, 0x218) == ((64 << 20) - 0x1000, 10)
    assert struct.unpack_from("<I", page, 0x228) == (COMMAND_LINE_PA,)
    assert struct.unpack_from("<I", page, 0x1E0) == (63 << 10,)
    assert page[0x1EF] == 0  # the sentinel: the rest of the page is as boot.rst wants it
    assert page[0x006:0x010] == bytes(10)  # screen_info: no text mode
    ranges = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * i) for i in range(page[0x1E8])]
    assert ranges == plan.e820
    assert (0, 0x9FC00, 1) in ranges
    assert (0x100000, (64 << 20) - 0x100000, 1) in ranges
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_the_cpu_starts_as_the_32_bit_boot_protocol_says(tmp_path: Path) -> None:
    plan = prepare(machine(tmp_path, bzimage()))
    start = plan.start
    assert image_at(plan, start["eip"]) == CODE
    assert (start["esi"], start["cs"], start["ds"]) == (ZERO_PAGE_PA, 0x10, 0x18)
    assert start["ebp"] == start["edi"] == start["ebx"] == 0
    assert image_at(plan, start["gdt_base"]) == BOOT_GDT
    assert start["gdt_limit"] == len(BOOT_GDT) - 1
    for selector, kind in ((start["cs"], 0x9B), (start["ds"], 0x93)):
        limit_low, _base, _mid, access, flags, _high = struct.unpack_from("<HHBBBB", BOOT_GDT, selector)
        assert (limit_low, access, flags) == (0xFFFF, kind, 0xCF)


def test_images_overlap_neither_each_other_nor_reserved_memory(tmp_path: Path) -> None:
    more = '[[device]]\nname = "pm"\ntype = "acpi_pm"\nports = { pm = 0x600 }\nirqs = { sci = 9 }\n'
    plan = prepare(machine(tmp_path, bzimage(), initrd=bytes(70000), cmdline="x" * 2047, more=more))
    spans = sorted((pa, pa + len(image)) for pa, image in plan.images)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert struct.unpack_from("<Q", image_at(plan, ZERO_PAGE_PA), 0x70) == (0xE0000,)
    assert image_at(plan, 0xE0000).startswith(b"RSD PTR ")


def test_without_power_management_there_are_no_tables(tmp_path: Path) -> None:
    plan = prepare(machine(tmp_path, bzimage()))
    assert struct.unpack_from("<Q", image_at(plan, ZERO_PAGE_PA), 0x70) == (0,)


@pytest.mark.machine
def test_debians_kernel_is_accepted() -> None:
    kernel = Path(__file__).parents[2] / "build" / "guest" / "vmlinuz"
    header = read_header(kernel.read_bytes(), kernel)
    assert header.protocol >= 0x20F
    assert header.pref_address == 0x100_0000


def test_the_modules_lie_behind_the_initrd_where_there_is_a_virtio_device(tmp_path: Path) -> None:
    config = machine(tmp_path, bzimage(), initrd=b"i" * 512, more=PM)
    config = replace(config, boot=msgspec.structs.replace(config.boot, modules=tmp_path / "modules"))
    without = prepare(config)  # which are not read then
    assert image_at(without, (64 << 20) - 0x1000) == b"i" * 512
    (tmp_path / "modules").write_bytes(b"m" * 5000)
    plan = prepare(config, [VirtioPlace(0xD000_0000, 0x200, 10)])
    assert image_at(plan, (64 << 20) - 0x2000) == b"i" * 512 + b"m" * 5000
    assert b"LNRO0005" in image_at(plan, TABLES_PA)
    assert b"LNRO0005" not in image_at(without, TABLES_PA)


def test_a_virtio_device_that_nothing_tells_of_is_refused(tmp_path: Path) -> None:
    config = machine(tmp_path, bzimage())
    with pytest.raises(ConfigError, match=r"device: no acpi_pm, .* virtio device; add one"):
        prepare(config, [VirtioPlace(0xD000_0000, 0x200, 10)])
