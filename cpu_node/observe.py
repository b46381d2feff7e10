"""Accesses of guest memory, told to whoever must know each of them. For code that runs in the simulator.

The memory's methods are replaced in the instance while someone looks, so that it costs nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpu_node.paging import GuestMemory

Note = Callable[[int, int, bool, bool], None]  # (va, bytes, is it a write, with the user's rights)
_WIDTHS: dict[str, Callable[..., int]] = {  # of the memory's methods, from the arguments behind the address
    "read": lambda length, user=False: length,
    "read8": lambda user=False: 1,
    "read16": lambda user=False: 2,
    "read32": lambda user=False: 4,
    "read64": lambda user=False: 8,
    "read32s": lambda count, user=False: 4 * count,
    "write": lambda data, user=False: len(data),
    "write8": lambda value, user=False: 1,
    "write16": lambda value, user=False: 2,
    "write32": lambda value, user=False: 4,
    "write32s": lambda values, user=False: 4 * len(values),
    "probe_write": lambda length, user=False: length,
}


def observe(memory: GuestMemory, note: Note, probes: bool = False) -> None:
    """Until `stop`, `note` is called before each access (and before each probe_write); it may raise."""
    inside = False

    def noting(access: Callable[..., Any], width: Callable[..., int], writes: bool,
               unit: int) -> Callable[..., Any]:
        def noted(va: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a piece of an access that was told
                return access(va, *args, **kwargs)
            user = kwargs["user"] if "user" in kwargs else args[-1:] == (True,)
            size = width(*args, **kwargs)
            for place in range(va, va + size, unit or size):
                note(place & 0xFFFFFFFF, unit or size, writes, user)
            inside = True
            try:
                return access(va, *args, **kwargs)
            finally:
                inside = False

        return noted

    for name, width in _WIDTHS.items():
        if name == "probe_write" and not probes:
            continue
        unit = 4 if name.endswith("32s") else 0
        setattr(memory, name, noting(getattr(memory, name), width, "write" in name, unit))


def stop(memory: GuestMemory) -> None:
    """The memory as it was."""
    for name in _WIDTHS:
        vars(memory).pop(name, None)  # the class's own again
