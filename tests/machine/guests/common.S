# Subroutines for the test guests, put behind each of them: serial output, exceptions, IRQ 5, power-off.
#
# The guests run as they are started: flat 32-bit protected mode, GDT of the launcher (code 10h, data 18h).

COM1        = 0x3f8
LSR_THRE    = 0x20
LSR_IDLE    = 0x40
PM1A_CNT    = 0x604
S5_NOW      = 0x3400            # SLP_EN | SLP_TYP 5
IDT         = 0x5000            # 48 gates of 8 bytes
CODE        = 0x10

# print: the zero-terminated text at ESI
print:
    push eax
next_char:
    lodsb
    test al, al
    jz printed
    call put
    jmp next_char
printed:
    pop eax
    ret

# put: the byte in AL; all registers are kept
put:
    push edx
    push eax
    mov dx, COM1+5
wait_room:
    in al, dx
    test al, LSR_THRE
    jz wait_room
    pop eax
    mov dx, COM1
    out dx, al
    pop edx
    ret

# put_hex: EAX as eight digits
put_hex:
    push ecx
    push eax
    mov ecx, 8
next_digit:
    rol eax, 4
    push eax
    and al, 15
    cmp al, 10
    jb is_decimal
    add al, 39                  # 'a' - '9' - 1
is_decimal:
    add al, 48                  # '0'
    call put
    pop eax
    dec ecx
    jnz next_digit
    pop eax
    pop ecx
    ret

# say: the text at ESI, EAX in hexadecimal, end of line
say:
    call print
    call put_hex
new_line:
    push eax
    mov al, 13
    call put
    mov al, 10
    call put
    pop eax
    ret

# power_off: when the serial port has sent everything
power_off:
    mov dx, COM1+5
drain:
    in al, dx
    test al, LSR_IDLE
    jz drain
    mov dx, PM1A_CNT
    mov ax, S5_NOW
    out dx, ax
stay:
    cli
    hlt
    jmp stay

# ---- exceptions: told, then the program goes on at the address in [resume]

set_up_idt:
    pushad
    xor ecx, ecx
gates:
    lea eax, [on_other]
    call set_gate
    inc ecx
    cmp ecx, 48
    jb gates
    mov ecx, 6
    lea eax, [on_ud]
    call set_gate
    mov ecx, 13
    lea eax, [on_gp]
    call set_gate
    .byte 0x0f, 0x01, 0x1d      # lidt [idtr], written out: keystone would choose the 16-bit form
    .long idtr
    popad
    ret

# set_gate: vector ECX gets a 32-bit interrupt gate to the handler EAX
set_gate:
    mov word ptr [IDT+ecx*8], ax
    mov word ptr [IDT+2+ecx*8], CODE
    mov word ptr [IDT+4+ecx*8], 0x8e00
    shr eax, 16
    mov word ptr [IDT+6+ecx*8], ax
    ret

on_ud:
    push 0                      # no error code
    push 6
    jmp tell_exception
on_gp:
    push 13
tell_exception:
    pushad
    lea esi, [vector_text]
    mov eax, [esp+32]
    call print
    call put_hex
    lea esi, [error_text]
    mov eax, [esp+36]
    call print
    call put_hex
    lea esi, [at_text]
    mov eax, [esp+40]
    call say
    mov eax, [resume]
    mov [esp+40], eax
    popad
    add esp, 8
    iretd

on_other:
    lea esi, [other_text]
    call print
    jmp power_off

# ---- IRQ 5 of the 8259 as vector 25h: counted in [irq5_count]

set_up_irq5:
    push eax
    push ecx
    mov al, 0x11                # ICW1: edge, cascade, ICW4 follows
    out 0x20, al
    out 0xa0, al
    mov al, 0x20                # ICW2: vectors 20h-27h and 28h-2fh
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 0x04                # ICW3: the second one is at IRQ 2
    out 0x21, al
    mov al, 0x02
    out 0xa1, al
    mov al, 0x01                # ICW4: 8086 mode
    out 0x21, al
    out 0xa1, al
    mov al, 0xdf                # all masked but IRQ 5
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
    mov ecx, 0x25
    lea eax, [on_irq5]
    call set_gate
    pop ecx
    pop eax
    ret

on_irq5:
    push eax
    inc dword ptr [irq5_count]
    mov al, 0x20
    out 0x20, al
    pop eax
    iretd

vector_text: .asciz "exception "
error_text: .asciz " error "
at_text: .asciz " at "
other_text: .asciz "an exception nobody expected\r\n"
.align 4
resume: .long 0
irq5_count: .long 0
idtr:
    .short 383
    .long IDT
