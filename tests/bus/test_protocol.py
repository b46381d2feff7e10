"""The protocol of docs/live-swap.md, explored: every order of frames, crashes, broken connections and swaps
that a scenario allows. `make model`, or BACKPLANE_MODEL=large, goes further."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bus.stream
from tests.bus.protocol_explore import LARGER, SCENARIOS, Failed, explore, walk
from tests.bus.protocol_faults import FAULTS, Fault
from tests.bus.protocol_model import Rules, Scenario

LARGE = os.environ.get("BACKPLANE_MODEL") == "large"
WALKS = 2000 if LARGE else 60


@pytest.fixture(autouse=True, scope="module")
def window() -> Iterator[None]:
    """What a scenario makes of them is put back."""
    kept = bus.stream.WINDOW, bus.stream.ACK_EVERY
    yield
    bus.stream.WINDOW, bus.stream.ACK_EVERY = kept


@pytest.mark.parametrize("name", {**SCENARIOS, **LARGER} if LARGE else SCENARIOS)
def test_whatever_happens_all_is_delivered_once_and_in_order(name: str) -> None:
    found = explore({**SCENARIOS, **LARGER}[name])
    assert found.states > 10_000, "the scenario allows nothing"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_model_finds_a_fault(fault: Fault) -> None:
    with pytest.raises(Failed) as found:
        explore(fault.scenario, fault.rules, limit=300_000)
    assert found.value.trace, found.value.reason
    explore(fault.scenario)  # which without the fault is in order


PROGRAMS = st.text(alphabet="pqdmDaoirR", min_size=20, max_size=40)


@settings(max_examples=WALKS, deadline=None)
@given(
    program=PROGRAMS,
    window=st.integers(2, 6),
    eager=st.booleans(),
    renewals=st.sampled_from([0, 0, 2]),
    cpu_bound=st.booleans(),
    calm=st.sampled_from([3.0, 10.0, 40.0]),
    seed=st.integers(0, 1 << 32),
)
def test_long_random_runs(
    program: str, window: int, eager: bool, renewals: int, cpu_bound: bool, calm: float, seed: int
) -> None:
    if renewals:
        program = program.replace("R", "r")  # the model tells what comes again by its value
    scenario = Scenario(
        program, window, crashes=30, breaks=30, swaps=10, drops=10, late=10, eager=eager,
        renewals=renewals, cpu_bound=cpu_bound,
    )
    assert walk(scenario, seed, Rules(), calm) > len(program)
