# Counts its starts in memory, which a reset does not clear; the first one ends in a reset, the second
# in power-off. The test says which reset.

BOOTS = 0x200000

start:
    inc dword ptr [BOOTS]
    mov eax, [BOOTS]
    lea esi, [text]
    call say
    cmp dword ptr [BOOTS], 2
    je power_off
    mov ebp, 0x0badcafe         # to be found in the CPU state
RESET_HOW
not_yet:                        # a device's reset takes a moment
    hlt
    jmp not_yet

no_idt:
    .short 0
    .long 0
text: .asciz "start "
