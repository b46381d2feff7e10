"""The address map: lookup, refusals that name both sides, plain-data round trip."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.addressmap import AddressMap, MapConflict
from bus.ranges import BadRange, IoRange, MmioRange, PortRange


def sample() -> AddressMap:
    amap = AddressMap()
    regs = PortRange("regs", 8, posted=frozenset({0}), mirrored=frozenset({5, 6}), relaxed=frozenset({5}))
    amap.add_device("uart0", (regs,), {"regs": 0x3F8}, 1)
    amap.add_device("ioapic", (MmioRange("regs", 0x1000, widths=(4,)),), {"regs": 0xFEC0_0000}, None)
    amap.add_line("uart0", "intr", 4)
    return amap


def test_find() -> None:
    amap = sample()
    assert amap.find("port", 0x3F7) is None
    assert amap.find("port", 0x400) is None
    for port in range(0x3F8, 0x400):
        entry = amap.find("port", port)
        assert entry is not None
        assert entry.node == "uart0"
    entry = amap.find("mmio", 0xFEC0_0FFF)
    assert entry is not None
    assert (entry.node, entry.mirror_page) == ("ioapic", None)


def test_mirrored_registers_get_slots_in_order() -> None:
    entry = sample().find("port", 0x3F8)
    assert entry is not None
    assert (entry.mirror_page, entry.mirror_slots) == (1, {5: 0, 6: 1})


def test_plain_data_round_trip() -> None:
    amap = sample()
    again = AddressMap.from_plain(msgpack.unpackb(msgpack.packb(amap.to_plain())))
    assert again.entries("port") == amap.entries("port")
    assert again.entries("mmio") == amap.entries("mmio")
    assert again.lines() == amap.lines()


def test_an_overlap_names_both_devices_and_the_range() -> None:
    amap = sample()
    with pytest.raises(MapConflict, match=r"port 0x3fc-0x3ff: both uart0\.regs .* and mine\.a .* claim it"):
        amap.add_device("mine", (PortRange("a", 8),), {"a": 0x3FC}, None)


def test_the_same_numbers_in_the_other_space_are_no_overlap() -> None:
    sample().add_device("mine", (MmioRange("a", 8),), {"a": 0x3F8}, None)


@pytest.mark.parametrize(
    ("r", "base"),
    [(PortRange("a", 8), 0xFFFC), (PortRange("a", 8), -8), (MmioRange("a", 0x1000), 0xFFFF_F800)],
)
def test_outside_the_space(r: IoRange, base: int) -> None:
    with pytest.raises(MapConflict, match="outside"):
        AddressMap().add_device("mine", (r,), {"a": base}, None)


def test_a_base_must_suit_the_widest_access() -> None:
    with pytest.raises(MapConflict, match="not aligned"):
        AddressMap().add_device("mine", (PortRange("a", 8, widths=(1, 4)),), {"a": 0x302}, None)


@pytest.mark.parametrize("bases", [{}, {"a": 0x300, "b": 0x310}, {"b": 0x300}])
def test_region_names_must_match(bases: dict[str, int]) -> None:
    with pytest.raises(MapConflict, match=r"regions \['a'\]"):
        AddressMap().add_device("mine", (PortRange("a", 8),), bases, None)


def test_an_isa_line_has_one_driver() -> None:
    with pytest.raises(MapConflict, match=r"IRQ 4: both uart0 \(intr\) and mine \(line\) drive it"):
        sample().add_line("mine", "line", 4)


@pytest.mark.parametrize("irq", [-1, 2, 16])
def test_lines_that_are_no_isa_lines(irq: int) -> None:
    with pytest.raises(MapConflict, match="not an ISA line"):
        AddressMap().add_line("mine", "line", irq)


def test_describe_names_everything_once() -> None:
    text = sample().describe()
    assert "port 03f8-03ff" in text
    assert "mmio fec00000-fec00fff" in text
    assert "IRQ 4" in text
    assert len(text.splitlines()) == 4


@given(claims=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12))
def test_against_a_table_of_every_port(claims: list[tuple[int, int]]) -> None:
    amap, owner = AddressMap(), dict[int, str]()
    for i, (base, length) in enumerate(claims):
        ports = range(base, base + length)
        node = f"d{i}"
        if any(port in owner for port in ports):
            with pytest.raises(MapConflict):
                amap.add_device(node, (PortRange("a", length),), {"a": base}, None)
        else:
            amap.add_device(node, (PortRange("a", length),), {"a": base}, None)
            owner.update(dict.fromkeys(ports, node))
    for port in range(80):
        entry = amap.find("port", port)
        assert (entry.node if entry else None) == owner.get(port)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PortRange("", 1), "name"),
        (lambda: PortRange("a", 0), "length"),
        (lambda: PortRange("a", 8, widths=()), "widths"),
        (lambda: PortRange("a", 8, widths=(1, 3)), "widths"),
        (lambda: PortRange("a", 8, widths=(1, 1)), "widths"),
        (lambda: PortRange("a", 2, posted=frozenset({2})), "posted offsets"),
        (lambda: PortRange("a", 2, mirrored=frozenset({-1})), "mirrored offsets"),
        (lambda: PortRange("a", 2, prompt=frozenset({0})), "aren't posted"),
        (lambda: PortRange("a", 2, relaxed=frozenset({0})), "aren't mirrored"),
    ],
)
def test_ranges_that_make_no_sense(make: object, words: str) -> None:
    with pytest.raises(BadRange, match=words):
        make()  # type: ignore[operator]


def test_names_of_registers() -> None:
    """By offset; inside of a wide one; two for reading and writing; and they travel with the map."""
    regs = PortRange("regs", length=16, widths=(1, 2, 4), names={0: "RBR|THR", 4: "LSR", 12: "HIGH"})
    amap = AddressMap()
    amap.add_device("dev", [regs], {"regs": 0x100}, None)
    again = AddressMap.from_plain(msgpack.unpackb(msgpack.packb(amap.to_plain()))).entries("port")[0].range
    assert again == regs
    assert hash(again) == hash(regs)
    names = [(again.register(offset, False), again.register(offset, True)) for offset in (0, 2, 4, 8, 15)]
    assert names == [
        ("RBR", "THR"),
        ("RBR+2", "THR+2"),
        ("LSR", "LSR"),
        ("regs+0x8", "regs+0x8"),
        ("HIGH+3", "HIGH+3"),
    ]
    for names_ in ({16: "X"}, {-1: "X"}, {0: ""}):
        with pytest.raises(BadRange, match="name"):
            PortRange("regs", length=16, names=names_)


def test_names_are_no_part_of_what_a_machine_was_built_upon() -> None:
    """A class that only names its registers otherwise may take over (devices/tryout.py)."""
    assert repr(PortRange("regs", length=8, names={0: "X"})) == repr(PortRange("regs", length=8))
