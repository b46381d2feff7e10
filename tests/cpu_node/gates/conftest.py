"""Every delivery by the quick way and by the full one."""

import pytest

from cpu_node import quick
from tests.cpu_node.kit import (
    Machine,
)


@pytest.fixture(params=["quick", "full"])
def m(request, monkeypatch) -> Machine:
    if request.param == "full":
        monkeypatch.setattr(quick, "enter", lambda *args: False)
    return Machine()
