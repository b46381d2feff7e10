"""Debian's own drivers on virtio disks and a virtio console: file systems, programs run from them, bytes.

What a guest has written a second machine reads from the same files, and e2fsck looks at them in between.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.machine.drive import Screen
from tests.machine.files import GUEST, linux_machine

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]

SIZE = 48 << 20
FILE = 12 << 20
COMPLAINTS = ("BUG:", "Oops", "Call Trace", "I/O error", "EXT4-fs error", "blk_update_request")
SECOND = """
[[device]]
name = "disk1"
type = "virtio-blk"
mmio = { regs = 0xd0002000 }
irqs = { intr = 5 }
settings = { file = "second.img" }
"""


@pytest.fixture(autouse=True)
def modules() -> None:
    if not (GUEST / "modules.cpio").exists():
        pytest.fail("the guest's drivers are not there; say `make guest`")


def machine(folder: Path, base: str, name: str, more: str = "", read_only: bool = False) -> Path:
    """linux-disk.toml, or linux-pic.toml with its virtio devices, on images in `folder`."""
    file = linux_machine(folder, base, name)
    text = file.read_text()
    disk = (Path(__file__).parents[2] / "machines" / "linux-disk.toml").read_text()
    if base != "linux-disk.toml":
        text = text.replace('[boot]', '[boot]\nmodules = "modules.cpio"').replace(
            f'name = "{name}"', f'name = "{name}"\nconsole = "uart0"'
        ) + disk[disk.index('[[device]]\nname = "disk0"') :]  # fmt: skip
    text = re.sub('modules = ".*"', f'modules = "{GUEST}/modules.cpio"', text) + more
    if read_only:
        text = re.sub(r'(file = "\w+\.img")', r"\1, read_only = true", text)
    file.write_text(text)
    return file


def fsck(image: Path) -> None:
    """Clean, without a change."""
    program = shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is not None:
        done = subprocess.run([program, "-fn", str(image)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_file_systems_on_two_disks(tmp_path: Path, runtime: Path) -> None:
    """One is made in the guest (ext2), one on the host (ext4 with its journal, where the host can)."""
    images = [tmp_path / "disk.img", tmp_path / "second.img"]
    for image in images:
        image.touch()
        image.open("r+b").truncate(SIZE)
    mkfs = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if mkfs is not None:
        subprocess.run([mkfs, "-q", str(images[1])], check=True)
    made = ["vda"] if mkfs is not None else ["vda", "vdb"]
    with Screen("up", machine(tmp_path, "linux-disk.toml", "disks", SECOND), runtime=runtime) as screen:
        screen.prompt()
        screen.run("mkdir /a /b")
        for disk in made:
            screen.run(f"mke2fs -q /dev/{disk} >/dev/null; echo $?")
        screen.run("mount -t ext4 /dev/vda /a && mount -t ext4 /dev/vdb /b")
        screen.run(f"dd if=/dev/urandom of=/a/data bs=1M count={FILE >> 20} 2>/dev/null; cp /a/data /b/data")
        screen.run("cp /bin/busybox /a; sed 's/x/x/' /bin/busybox > /b/other; cp /bin/busybox /b; sync")
        sums = screen.run("cd /; sha256sum a/data b/data a/busybox b/busybox").split()[::2]
        assert len(sums) == 4
        assert (sums[0], sums[2]) == (sums[1], sums[3])
        # programs whose pages come from the disk again and again, into memory where others were
        for _ in range(5):
            screen.run("echo 3 > /proc/sys/vm/drop_caches")
            again = screen.run("/a/busybox sha256sum /b/data /b/busybox").split()[::2]
            assert again == [sums[1], sums[3]]
            screen.run("echo 3 > /proc/sys/vm/drop_caches")
            assert screen.run("/b/busybox md5sum /a/data | /a/busybox wc -c").strip() == "42"
        screen.run("umount /a /b")
        assert not [bad for bad in COMPLAINTS if bad in screen.text()], screen.text()
        screen.type("poweroff -f\r")
        screen.finish(0)
    for image in images:
        fsck(image)
    before = [image.read_bytes() for image in images]
    file = machine(tmp_path, "linux-pic.toml", "again", SECOND, read_only=True)
    with Screen("up", file, runtime=runtime) as screen:  # with the 8259, and nothing may be written
        screen.prompt()
        screen.run("mkdir /a /b; mount -t ext4 -o ro /dev/vda /a && mount -t ext4 -o ro /dev/vdb /b")
        assert screen.run("cat /sys/block/vda/ro /sys/block/vda/size /sys/block/vda/serial").split() == [
            "1", str(SIZE // 512), "disk.img",
        ]  # fmt: skip
        assert screen.run("sha256sum /a/data /b/data /a/busybox /b/busybox").split()[::2] == sums
        assert "Operation not permitted" in screen.run("echo x | dd of=/dev/vda")
        screen.type("poweroff -f\r")
        screen.finish(0)
    assert [image.read_bytes() for image in images] == before


def test_a_console_both_ways(tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    lines = [f"line {n} {random.Random(n).randrange(10**9)}" for n in range(40)]
    with Screen("up", machine(tmp_path, "linux-disk.toml", "hvc"), runtime=runtime) as screen:
        screen.prompt()
        screen.run('(stty -echo; while read l; do echo "got $l"; done) </dev/hvc0 >/dev/hvc0 &')
        screen.run("echo from the guest > /dev/hvc0")
        with Screen("console", "hvc0", runtime=runtime) as other:
            other.wait_for("from the guest")  # said before we came
            for line in lines:
                other.type(line + "\r")
            other.wait_for(f"got {lines[-1]}")
            assert re.findall("^got (.*)$", other.text(), re.MULTILINE) == lines, other.text()
            other.type("\x1dq")
            other.finish(0)
        screen.type("poweroff -f\r")
        screen.finish(0)
