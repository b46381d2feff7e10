"""A local APIC that is enabled."""

import pytest

from cpu_node.lapic import LocalApic
from tests.cpu_node.lapic.kit import make


@pytest.fixture
def apic() -> LocalApic:
    return make()[0]
