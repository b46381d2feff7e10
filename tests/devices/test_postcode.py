"""POST code port and debug console."""

from __future__ import annotations

from devices.postcode import PostCode
from tests.devices.rig import Rig


def test_the_last_code_reads_back() -> None:
    post = Rig(PostCode, "post")
    assert post.r(0) == 0
    post.w(0, 0x5A)
    assert post.r(0) == 0x5A
    assert post.device.mirror()["post", 0] == 0x5A


def test_the_debug_console_announces_itself_and_takes_characters() -> None:
    post = Rig(PostCode, "debug")
    assert post.r(0) == 0xE9
    for byte in b"hi\n":
        post.w(0, byte)
    assert post.wiring.sent == [("debug", bytes([byte])) for byte in b"hi\n"]
    assert post.r(0, "post") == 0
