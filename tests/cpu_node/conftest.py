"""A CPU node for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cpu_node.node_machine import Machine


@pytest.fixture
def machine(short_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    made = Machine(short_path, getattr(request, "param", False))
    try:
        yield made
    finally:
        made.close()
