"""docs/devices.md says what the classes declare."""

from __future__ import annotations

from devices.docgen import PAGE, page
from devices.registry import BUILT_IN


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m devices.docgen"


def test_every_device_is_there() -> None:
    text = page()
    assert all(f"\n## {name}\n" in text for name in BUILT_IN)
