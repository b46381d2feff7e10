"""What `launcher stats` shows of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpu_node import layout as at

if TYPE_CHECKING:
    from cpu_node.engine import Engine


def counters_of(engine: Engine) -> dict[str, Any]:
    """By name, as plain data."""
    cache, q = engine.contexts.cache, engine.record.q
    out: dict[str, Any] = {
        "exits": {at.EXIT_NAMES[reason]: n for reason, n in engine.exits.items()},
        "instructions_translated": cache.instructions,
        "instructions_taken_over": cache.taken_over,
        "code_cache_bytes": cache.position,
        "cache_flushes": cache.flushes,
        "pages_filled": engine.contexts.fills,
        "spaces": len(engine.contexts.spaces),
        "tlb_entries": q[at.TLB_FILLS // 8],
        "user_page_faults": q[at.PAGE_FAULTS // 8],
    }
    if engine.mmu_choice is not None:
        out["went_to_window"] = engine.mmu_choice.went_to_window
        out["went_to_tlb"] = engine.mmu_choice.went_to_tlb
    if engine.direct is not None:
        out["direct"] = engine.direct.counters()
    return out
