"""Where everything lies in a scenario's arena, the first 128 KiB of guest memory (linear = physical there).

Left out: nothing of the arena; the window of linear addresses 30000h-37FFFh is mapped by each scenario.
"""

from __future__ import annotations

SIZE = 0x20000

# page 0: control words of the common code
LOG_NEXT = 0x400  # address of the next log entry
ACTION = 0x404  # number of the action that runs
COUNT = 0x408  # how many there are
FINISHED = 0x40C  # MARK when the scenario came to its end
FINAL = 0x410  # system registers at the end
CR0_WORD, CR3_WORD, CR4_WORD = 0x440, 0x444, 0x448  # what each action starts with
GDTR_WORD, IDTR_WORD, NO_IDTR = 0x450, 0x458, 0x460
POLICY = 0x480  # a byte per vector: what its handler does in the end
MARK = 0x600D600D

GDT, GDT_LIMIT = 0x1000, 0x1FF
LDT, LDT_LIMIT = 0x1400, 0x7F
IDT, IDT_LIMIT = 0x1800, 0x7FF
TSS_MAIN, TSS_B, TSS_16, TSS_D, TSS_E, TSS_F = 0x2000, 0x2200, 0x2400, 0x2600, 0x2800, 0x2A00
DIRECTORY, TABLE0, TABLE3 = 0x3000, 0x4000, 0xF000
CODE_COMMON = 0x5000
STACK0, STACK1, STACK2, STACK3 = 0x8000, 0x8800, 0x9000, 0xA000  # tops
STACK_B, STACK_16, STACK_D, STACK_E, STACK_F = 0xA400, 0xA800, 0xAC00, 0xB000, 0xB400
TARGET = 0xB800  # NOP, NOP, INT E0h: the same in 16- and 32-bit code
TARGET_16 = 0xB840  # the same behind the upper halves of all registers cleared
LOG, LOG_END, ENTRY = 0xC000, 0xEF00, 0xA0
CODE, CODE_SLOT = 0x10000, 0x800  # of each action; also segment 1000h of virtual-8086 mode
ACTIONS = 8
STACK_V86 = 0x17F00
DATA, DATA_PAGES = 0x18000, 4
WINDOW, WINDOW_PAGES = 0x30000, 8  # linear: mapped with random rights
LARGE = 0x400000  # linear: a 4 MiB page over physical 0, with random rights
FAR_WINDOW = 0xC00000  # linear: TABLE3, whose directory entry has random rights
ABSENT = 0x800000  # linear: no directory entry
APIC = 0xFEE00000

CODE0, DATA0, CODE3, DATA3, TSS_SEL, LDT_SEL = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x30
CODE1, DATA1, CODE2, DATA2, CONFORMING = 0x39, 0x41, 0x4A, 0x52, 0x58
CODE16_0, CODE16_3, DATA16_3, DATA16_0 = 0x60, 0x6B, 0x73, 0x78
TSS_B_SEL, TSS_16_SEL, TSS_D_SEL, TSS_E_SEL = 0x80, 0x88, 0x90, 0x98
TSS_F_SEL = 0xA0  # and three more: exceptions 10 to 13 may have a task each, 100h behind one another
GATES, GATE_COUNT = 0xC0, 8  # call and task gates
RANDOM, RANDOM_COUNT = 0x100, 32  # descriptors of any kind

END_OF_ACTION = 0xE0  # INT: log, then the next action
NEXT_ACTION = 0xF0  # INT: the next action
RANDOM_VECTORS = range(0x50, 0x70)  # interrupts through random gates
APIC_VECTORS = range(0x70, 0x78)

TO_NEXT, TO_IRET, TO_IRET16 = 0, 1, 2  # POLICY
