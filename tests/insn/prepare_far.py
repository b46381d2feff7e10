"""What segment loads and far transfers need around them: selectors, far pointers, frames.

Source: Intel SDM volume 2, instruction pages; volume 3, 3.4.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.insn.draft import RW_PAGES
from tests.insn.instance import Instance
from tests.insn.segments import (
    ANY_SELECTORS,
    CODE_SELECTORS,
    CS,
    DS,
    ES,
    FS,
    GS,
    SS,
    WRITABLE_SELECTORS,
    base_of,
)  # fmt: skip
from tests.insn.state import ESP, PAGE_SIZE, TF
from tests.insn.values import chance

SEGMENT_NUMBER = {"ES": ES, "SS": SS, "DS": DS, "FS": FS, "GS": GS}
POINTER_LOADS = {"les": ES, "lds": DS, "lss": SS, "lfs": FS, "lgs": GS}


def _selector(instance: Instance) -> int:
    return instance.rng.choice(WRITABLE_SELECTORS if chance(instance.rng, 60) else ANY_SELECTORS)


def _code_selector(instance: Instance) -> int:
    return instance.rng.choice(CODE_SELECTORS if chance(instance.rng, 85) else ANY_SELECTORS)


def _loads(instance: Instance, segment: int, selector: int | None) -> None:
    """Afterwards the segment register holds the selector (None: what it was made of isn't known)."""
    draft = instance.draft

    def change() -> None:
        draft.selectors[segment] = draft.selectors[segment] if selector is None else selector

    instance.after.append(change)


def _move_to_segment(instance: Instance) -> None:
    instance.reg_field = instance.rng.choice((ES, SS, DS, FS, GS)) if chance(instance.rng, 95) else CS
    selector: int | None = _selector(instance)
    instance.choose_address()
    if not instance.memory:
        selector = instance.draft.settle(instance.rm_field, selector)
    elif instance.va is not None:
        assert selector is not None
        instance.late.append((instance.va, selector.to_bytes(2, "little")))
    _loads(instance, instance.reg_field, None if selector is None else selector & 0xFFFF)


def _pop_segment(instance: Instance) -> None:
    draft, selector = instance.draft, _selector(instance)
    esp = draft.settle(ESP)
    if esp is not None:
        draft.keep(draft.stack_va(esp), selector.to_bytes(2, "little"))
    instance.after.append(lambda: draft.move(ESP, instance.operand_size))
    _loads(instance, SEGMENT_NUMBER[instance.row.operands[0]], selector if esp is not None else None)


def _load_pointer(instance: Instance) -> None:
    selector = _selector(instance)
    instance.choose_address()
    if instance.va is not None:
        instance.late.append((instance.va + instance.operand_size, selector.to_bytes(2, "little")))
    instance.take_registers()
    _loads(instance, POINTER_LOADS[instance.row.mnemonic], selector)


def _ask_about_selector(instance: Instance) -> None:
    """LAR, LSL, VERR, VERW."""
    selector = instance.rng.choice(ANY_SELECTORS)
    instance.choose_address()
    if instance.memory:
        if instance.va is not None:
            instance.late.append((instance.va, selector.to_bytes(2, "little")))
    else:
        instance.draft.settle(instance.rm_field, selector)
    instance.take_registers()


def _far_call_frame(instance: Instance) -> None:
    """The return address may be on the stack although the target is no good."""
    draft = instance.draft
    esp = draft.settle(ESP)
    if esp is not None:
        size = 2 * instance.operand_size
        draft.blind_on_fault.append((draft.stack_va(esp) - size, size))
    else:
        draft.blind_on_fault += [(page, PAGE_SIZE) for page in RW_PAGES]
    instance.after.append(lambda: draft.spoil(ESP))


def _far_direct(instance: Instance) -> None:
    """JMP and CALL ptr16:32."""
    draft, selector = instance.draft, _code_selector(instance)
    if instance.row.mnemonic == "call":
        _far_call_frame(instance)
    size = instance.operand_size
    instance.immediates = bytes(size) + selector.to_bytes(2, "little")
    number = len(draft.starts) + 1 + instance.rng.randrange(2)
    if size == 4:
        instance.after.append(lambda: draft.far.append((len(draft.code) - 6, number, base_of(selector))))
    _loads(instance, CS, selector)


def _far_indirect(instance: Instance) -> None:
    """JMP and CALL m16:32."""
    draft, selector = instance.draft, _code_selector(instance)
    if instance.row.mnemonic == "call":
        _far_call_frame(instance)
    instance.choose_address()
    if instance.va is not None:
        number = len(draft.starts) + 1 + instance.rng.randrange(2)
        draft.absolute.append((instance.va, number, base_of(selector)))
        instance.late.append((instance.va + instance.operand_size, selector.to_bytes(2, "little")))
    _loads(instance, CS, selector)


def _far_return(instance: Instance) -> None:
    """RETF and IRET: EIP, CS and for IRET the flags on the stack."""
    draft, selector, size = instance.draft, _code_selector(instance), instance.operand_size
    draft.fault_page_only = True
    esp = draft.settle(ESP)
    if esp is not None:
        va = draft.stack_va(esp)
        number = len(draft.starts) + 1 + instance.rng.randrange(2)
        draft.absolute.append((va, number, base_of(selector)))
        instance.late.append((va + size, selector.to_bytes(2, "little")))
        if instance.row.mnemonic == "iret":
            flags = instance.rng.getrandbits(12) & ~TF
            instance.late.append((va + 2 * size, flags.to_bytes(4, "little")[:size]))
    if instance.row.operands:
        instance.immediates = instance.rng.choice((0, 4, 8, 3, 0x100, 0xFFFF)).to_bytes(2, "little")
    draft.spoil(ESP)
    _loads(instance, CS, selector)


PREPARE_KEY: dict[str, Callable[[Instance], None]] = {
    "8E": _move_to_segment, "9A": _far_direct, "EA": _far_direct,
    "FF/3m": _far_indirect, "FF/5m": _far_indirect,
    **dict.fromkeys(("07", "17", "1F", "0FA1", "0FA9"), _pop_segment),
    **dict.fromkeys(("C4m", "C5m", "0FB2m", "0FB4m", "0FB5m"), _load_pointer),
    **dict.fromkeys(("0F02", "0F03", "0F00/4", "0F00/5"), _ask_about_selector),
    **dict.fromkeys(("CA", "CB", "CF"), _far_return),
}  # fmt: skip
