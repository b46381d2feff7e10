"""docs/bus-protocol.md says what the frames say."""

from __future__ import annotations

from bus.docgen import PAGE, page
from bus.frames import TABLE


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "stale: run `python -m bus.docgen` and commit the result"
    )


def test_every_message_is_on_it_once() -> None:
    rows = [
        line for line in page().splitlines() if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    assert sorted(row.split("|")[2].strip() for row in rows) == sorted(
        cls.__name__ for cls, _ in TABLE.values()
    )
