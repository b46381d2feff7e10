"""The quick forms of delivery and IRET do what the full forms do, or nothing, for descriptors at random."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpu_node import gates, quick
from cpu_node.cpu import ESP
from cpu_node.descriptor import INTERRUPT_GATE32, SS, TRAP_GATE32, pack, pack_gate, parse
from cpu_node.errors import GuestFault
from cpu_node.flags import AC, DF, FIXED, IF, IOPL, NT, TF
from cpu_node.iret import iret
from tests.cpu_node.kit import BEYOND, CODE0, CODE1, CODE3, DATA0, DATA1, DATA3, FREE, HANDLER, TSS, Machine

V = 0x30
OTHER = FREE + 8

SELECTORS = st.sampled_from(
    [0, 3, CODE0, CODE1, CODE3, DATA0, DATA1, DATA3, FREE, FREE | 3, OTHER, OTHER | 1, BEYOND, 12]
)
RIGHTS = st.sampled_from(
    [0xC09B, 0xC0BB, 0xC0FB, 0xC09A, 0xC09F, 0xC01B, 0xC093, 0xC0B3, 0xC0F3,
     0xC092, 0x0093, 0xC097, 0xC013, 0x8B, 0xC090]
)
DESCRIPTORS = st.builds(pack, st.sampled_from([0, 0x1000]), st.sampled_from([0xFFFFF, 0x8, 0x0]), RIGHTS)


def mostly(good, strategy):
    """`good` three times in four, so that most cases have one or two things wrong."""
    return st.one_of(st.just(good), st.just(good), st.just(good), strategy)


GATES = st.builds(
    pack_gate,
    mostly(INTERRUPT_GATE32, st.sampled_from([TRAP_GATE32, 6, 7, 12, 0])),
    mostly(CODE0, SELECTORS),
    mostly(HANDLER, st.just(0x9000)),
    dpl=mostly(3, st.just(0)),
    present=mostly(True, st.just(False)),
)
FLAGS = st.integers(0, 0xFFFF).map(lambda v: v & (IOPL | IF | TF | DF | 0x8D5) | FIXED)
STACK_TOPS = mostly(0x9000, st.sampled_from([0, 4, 8, 0x9010, 0x9FF0, 0xA00C, 0x10000]))
PAGES = mostly(set(), st.sampled_from([{page} for page in (1, 2, 4, 8, 9, 10)]))
GOOD_CODE = pack(0, 0xFFFFF, 0xC0FB)
GOOD_DATA = pack(0, 0xFFFFF, 0xC0F3)
CPLS = st.sampled_from([0, 1, 3])


def outcome(m, action, *args):
    try:
        action(m.cpu, *args)
    except GuestFault as fault:
        return fault.vector, fault.error, fault.cr2, m.snapshot()
    return m.snapshot(), m.cpu.seg, sorted({call[0] for call in m.hooks.calls})


def both(build, name, action, *args):
    quick_result = outcome(build(), action, *args)
    original = getattr(quick, name)
    setattr(quick, name, lambda *rest: False)
    try:
        full_result = outcome(build(), action, *args)
    finally:
        setattr(quick, name, original)
    assert quick_result == full_result


@settings(max_examples=400, deadline=None)
@given(
    entry=GATES,
    free=mostly(GOOD_CODE, DESCRIPTORS),
    other=mostly(GOOD_DATA, DESCRIPTORS),
    cpl=CPLS,
    flags=FLAGS,
    esp=STACK_TOPS,
    inner=st.tuples(STACK_TOPS, mostly(DATA0, SELECTORS)),
    error=st.sampled_from([None, 5]),
    software=st.booleans(),
    absent=PAGES,
    supervisor=PAGES,
)
@example(pack_gate(14, CODE0, HANDLER), 0, 0, 3, FIXED, 0x9000, (0x9000, DATA0), None, False, set(), set())
def test_delivery(entry, free, other, cpl, flags, esp, inner, error, software, absent, supervisor):
    def build():
        m = Machine()
        m.describe(FREE, free)
        m.describe(OTHER, other)
        m.gate(V, entry)
        m.ring(cpl)
        m.memory.write32s(TSS + 4, [*inner, *inner])
        m.cpu.regs[ESP] = esp
        m.cpu.eflags = flags
        m.memory.absent, m.memory.supervisor = absent, supervisor
        return m

    action = gates.int_n if software else gates._enter
    args = (V,) if software else (V, error, False, True)
    both(build, "enter", action, *args)


@settings(max_examples=400, deadline=None)
@given(
    free=mostly(GOOD_CODE, DESCRIPTORS),
    other=mostly(GOOD_DATA, DESCRIPTORS),
    cpl=CPLS,
    flags=FLAGS,
    esp=STACK_TOPS,
    code=mostly(CODE3, mostly(CODE0, SELECTORS)),
    frame=st.tuples(mostly(HANDLER, st.just(0x10)), st.integers(0, 0x3FFFFF), STACK_TOPS),
    outer=mostly(DATA3, SELECTORS),
    stack=mostly(None, DESCRIPTORS),
    absent=PAGES,
    supervisor=PAGES,
    nested=mostly(False, st.just(True)),
)
@example(0, 0, 0, FIXED, 0x8000, CODE3, (HANDLER, FIXED | AC, 0x9000), DATA3, None, set(), set(), False)
def test_iret(free, other, cpl, flags, esp, code, frame, outer, stack, absent, supervisor, nested):
    def build():
        m = Machine()
        m.describe(FREE, free)
        m.describe(OTHER, other)
        m.ring(cpl)
        m.cpu.regs[ESP] = esp
        m.memory.write32s(esp, [frame[0], code, frame[1], frame[2], outer])
        if stack is not None:
            m.cpu.seg[SS] = parse(FREE, stack)
        m.cpu.eflags = flags | (NT if nested else 0)
        m.memory.absent, m.memory.supervisor = absent, supervisor
        return m

    both(build, "leave", iret, 4)
