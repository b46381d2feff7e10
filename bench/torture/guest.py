"""What the tortured guest runs: two programs in assembly, a script, a machine, a disk.

The programs (lines.S, blocks.S) are assembled with keystone into static ELF files and come with the
guest's modules, as a second cpio archive behind the first. The file system is ext4 with a journal where the
host has mkfs.ext4, else the ext2 that busybox makes.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench import boot
from launcher.asm_boot import assemble
from launcher.guest.cpio import Archive

FOLDER = Path(__file__).parent
LOAD_VA = 0x0804_8000
ELF_HEADER, PROGRAM_HEADER = 52, 32
START_VA = LOAD_VA + ELF_HEADER + 2 * PROGRAM_HEADER
DISK_MIB = 96
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"
BEGIN_REPORT, END_REPORT = "TORTURE-REPORT", "TORTURE-END"
COMMAND = "sh /torture.sh\n"
READY = "TORTURE-READY"

# The shell's own terminal is the serial port: its lines program runs in front, until its last line.
SCRIPT = """\
cd /
mkdir -p /mnt
{mkfs}
mount -t ext4 /dev/vda /mnt || exit 1
dmesg -c >/dev/null
dmesg -n 1
exec 3<>/dev/hvc0
stty raw -echo <&3
stty raw -echo
echo {ready}
blocks /mnt/blocks {blocks} {seed} /tmp/stop >&3 &
checker=$!
(
    n=0
    while [ ! -e /tmp/stop ]; do
        n=$((n + 1))
        d=/mnt/d$((n % 4))
        mkdir -p $d
        cp /bin/busybox $d/new && mv $d/new $d/f$((n % 3)) || echo "E files: cp or mv, round $n" >&3
        dd if=$d/f$((n % 3)) iflag=direct bs=64k 2>/dev/null | cmp - /bin/busybox \\
            || echo "E files: round $n differs" >&3
        [ $((n % 7)) = 0 ] && rm -r /mnt/d$(((n + 2) % 4))
        echo $n > /tmp/rounds
        sleep 1
    done
) &
lines {pause_ms} {salt_hvc0} <&3 >&3 &
lines {pause_ms} {salt_uart0}
touch /tmp/stop
stty sane
wait $checker
status=$?
wait
umount /mnt
echo {begin}
echo blocks $status, umount $?, rounds of files $(cat /tmp/rounds)
dmesg -r
echo {end}
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What the guest does. `blocks`: of 4 KiB, a multiple of 16; `pause_ms`: between two lines."""

    seed: int
    blocks: int = 1024
    pause_ms: int = 20

    def salt(self, console: str) -> int:
        """Of a console's lines."""
        return (self.seed * 7919 + (1 if console == "uart0" else 2)) & 0x7FFF_FFFF


def elf(source: Path) -> bytes:
    """A static 32-bit ELF executable that begins at the source's first instruction."""
    program = assemble(source.read_text(encoding="utf-8"), source, START_VA)
    size = START_VA - LOAD_VA + len(program)
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, START_VA, ELF_HEADER, 0, 0, ELF_HEADER,
                                 PROGRAM_HEADER, 2, 0, 0, 0)  # fmt: skip
    segment = struct.pack("<IIIIIIII", 1, 0, LOAD_VA, LOAD_VA, size, size, 7, 0x1000)
    stack = struct.pack("<IIIIIIII", 0x6474_E551, 0, 0, 0, 0, 0, 6, 16)  # PT_GNU_STACK: not executable
    return header + segment + stack + program


def archive(load: Load, own_mkfs: bool) -> bytes:
    """The modules' archive and ours."""
    script = SCRIPT.format(
        mkfs="mke2fs -b 4096 /dev/vda >/dev/null" if own_mkfs else ":",
        ready=READY, begin=BEGIN_REPORT, end=END_REPORT,
        blocks=load.blocks, seed=load.seed, pause_ms=load.pause_ms,
        salt_uart0=load.salt("uart0"), salt_hvc0=load.salt("hvc0"),
    )  # fmt: skip
    ours = Archive()
    ours.directory("bin")
    for name in ("lines", "blocks"):
        ours.file(f"bin/{name}", elf(FOLDER / f"{name}.S"))
    ours.file("torture.sh", script.encode())
    return (boot.GUEST / "modules.cpio").read_bytes() + bytes(ours)


def make(folder: Path, load: Load, name: str) -> tuple[Path, Path]:
    """machines/linux-disk.toml with all that in `folder`; the machine file and the disk's image."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    mkfs = shutil.which("mkfs.ext4", path=SBIN)
    if mkfs is not None:
        subprocess.run([mkfs, "-q", "-b", "4096", str(image)], check=True)
    (folder / "torture.cpio").write_bytes(archive(load, mkfs is None))
    values = {
        "name": name,
        "kernel": boot.GUEST / "vmlinuz",
        "initrd": boot.GUEST / "initramfs.cpio",
        "modules": folder / "torture.cpio",
    }
    text = (boot.REPO / "machines" / "linux-disk.toml").read_text(encoding="utf-8")
    for key, value in values.items():
        text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, count=1, flags=re.MULTILINE)
        assert count == 1, key
    text = text.replace('file = "disk.img"', f'file = "{image}"')
    machine = folder / "torture.toml"
    machine.write_text(text, encoding="utf-8")
    return machine, image


def fsck(image: Path) -> tuple[bool, str] | None:
    """Whether the image is clean, and what e2fsck said; None where the host has no e2fsck."""
    program = shutil.which("e2fsck", path=SBIN)
    if program is None:
        return None
    done = subprocess.run([program, "-fn", str(image)], capture_output=True, text=True, check=False)
    return done.returncode == 0, (done.stdout + done.stderr).strip()
