"""Regions and the E820 map."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_node.regions import BadRegions, Kind, Region, check_regions, e820, pc_regions

MIB = 1 << 20


def test_pc_has_ram_below_and_above_the_legacy_hole() -> None:
    assert e820(pc_regions(64 * MIB, mirror_pages=3)) == [
        (0, 0xA0000, 1),
        (0xA0000, 0x60000, 2),
        (MIB, 63 * MIB, 1),
        (0xFEC00000, 0x400000, 2),
    ]


def test_overlay_cuts_ram_and_joins_neighbours() -> None:
    tables = (64 * MIB - 0x2000, 0x2000, 3)
    result = e820(pc_regions(64 * MIB, 0), [tables, (MIB, 0x1000, 2)])
    assert result == [
        (0, 0xA0000, 1),
        (0xA0000, 0x61000, 2),
        (MIB + 0x1000, 63 * MIB - 0x3000, 1),
        tables,
        (0xFEC00000, 0x400000, 2),
    ]


def test_rom_and_vram_are_reserved() -> None:
    regions = [Region("ram", Kind.RAM, 0, MIB), Region("bios", Kind.ROM, 0xFFFF0000, 0x10000)]
    assert e820(regions) == [(0, MIB, 1), (0xFFFF0000, 0x10000, 2)]


ranges = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12), st.sampled_from([1, 2, 3, 4])), max_size=8
)


@given(ranges)
def test_every_page_has_the_type_of_the_last_layer_over_it(overlay: list[tuple[int, int, int]]) -> None:
    plain: dict[int, int] = dict.fromkeys(range(32), 1)
    for base, length, kind in overlay:
        plain.update(dict.fromkeys(range(base, base + length), kind))
    result = e820([Region("ram", Kind.RAM, 0, 32 * 4096)], [(b * 4096, n * 4096, t) for b, n, t in overlay])
    found = {page: t for b, n, t in result for page in range(b // 4096, (b + n) // 4096)}
    assert found == plain
    assert all(low[0] + low[1] <= high[0] for low, high in pairwise(result))
    assert all(low[0] + low[1] < high[0] or low[2] != high[2] for low, high in pairwise(result))


def test_regions_survive_plain_data() -> None:
    for region in pc_regions(16 * MIB, 2, "/tmp/ram.img"):
        assert Region.from_plain(region.to_plain()) == region


@pytest.mark.parametrize(
    "change",
    [{"kind": "tape"}, {"size": 4097}, {"size": 0}, {"base": 1 << 32}, {"colour": "red"}, {"base": 5}],
)
def test_nonsense_regions_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadRegions):
        Region.from_plain({**Region("ram", Kind.RAM, 0, MIB).to_plain(), **change})


def test_overlaps_and_double_names_are_refused() -> None:
    ram = Region("ram", Kind.RAM, 0, MIB)
    with pytest.raises(BadRegions, match="ram and rom overlap at 0xf0000"):
        check_regions([Region("rom", Kind.ROM, 0xF0000, 0x10000), ram])
    with pytest.raises(BadRegions, match="one name"):
        check_regions([ram, Region("ram", Kind.ROM, MIB, 4096)])
