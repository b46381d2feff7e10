"""The machine's memory, as the launcher holds it: descriptors of all regions, and of the memory node's marks.

They are opened here and given to each process of the memory node in turn, so that none of them is the last
that has them.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from launcher.errors import ConfigError
from launcher.forkserver import ChildSpec
from memory_node.marks import make_marks
from memory_node.node import MARKS
from memory_node.regions import Kind, Region
from memory_node.store import BadAccess, open_region, write_pieces


def with_memory(spec: ChildSpec) -> ChildSpec:
    """The memory node with what it isn't given yet: all zeros. ConfigError for a file that can't be used."""
    machine, fds = spec.config["machine"], dict(spec.fds)
    for plain in spec.config["regions"]:
        region = Region.from_plain(plain)
        if region.kind is not Kind.RESERVED and region.name not in fds:
            try:
                fds[region.name] = open_region(machine, region)
            except (BadAccess, OSError) as e:
                file = region.file or region.name
                raise ConfigError(file, "memory", str(e), "name another file, or give it less memory") from e
    fds.setdefault(MARKS, make_marks(machine))
    return replace(spec, fds=fds)


def load_images(spec: ChildSpec, images: Iterable[tuple[int, bytes]]) -> None:
    """Write (pa, bytes) into RAM."""
    size = next(int(plain["size"]) for plain in spec.config["regions"] if plain["name"] == "ram")
    write_pieces(spec.fds["ram"], size, images)
