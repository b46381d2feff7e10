"""A folder for a store; stores that a test opened are closed behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_node.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def _close(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stores hold descriptors; close what a test opened."""
    made: list[Store] = []
    original = Store.__init__

    def init(self: Store, *args: object, **kwargs: object) -> None:
        made.append(self)
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "__init__", init)
    yield
    for store in made:
        store.close()
