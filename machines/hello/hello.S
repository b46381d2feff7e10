# A small guest: it says hello on the serial port, counts timer interrupts, echoes what is typed, powers off.
#
# Assembled by keystone (Intel syntax) when the machine starts. The launcher puts it at 0x100000 and starts it at
# its first byte: flat 32-bit protected mode, interrupts and paging off, stack below 0x90000.

COM1        = 0x3f8             # 16550A: data, IER +1, FCR +2, LCR +3, MCR +4, LSR +5
LSR_READY   = 0x01
LSR_THRE    = 0x20              # room for a byte to send
LSR_IDLE    = 0x40              # the last byte has left
PIC1        = 0x20              # 8259A, command; mask at +1
PIC2        = 0xa0
PIC_EOI     = 0x20
PIT_CH0     = 0x40
PIT_MODE    = 0x43
PIT_DIVISOR = 11932             # 1193182 Hz / 11932 = 100 Hz
TICKS_A_LINE = 20
TICK_LINES  = 5
PM1A_CNT    = 0x604             # ACPI power management control
SLP_TYP_S5  = 5                 # as the machine's DSDT says
SLP_EN      = 0x2000
IDT         = 0x5000            # 48 gates of 8 bytes
CODE        = 0x08
DATA        = 0x10
VEC_TIMER   = 0x20              # IRQ 0
VEC_COM1    = 0x24              # IRQ 4
VEC_SPURIOUS = 0x27             # IRQ 7

start:
    cli
    cld
    .byte 0x0f, 0x01, 0x15      # lgdt [gdtr], written out: keystone would choose the 16-bit form
    .long gdtr
    push CODE
    lea eax, [reload]
    push eax
    retf                        # loads CS from the new table
reload:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    call set_up_idt
    call set_up_pics
    call set_up_uart
    call set_up_timer
    lea esi, [greeting]
    call print
    sti

# Wait for interrupts; every TICKS_A_LINE of them print a line, TICK_LINES times.
main:
    cli
    cmp byte ptr [quit], 0
    jne power_off
    mov eax, [ticks]
    cmp eax, TICKS_A_LINE
    jae next_line
    sti                         # takes effect after hlt has begun, so no interrupt is slept through
    hlt
    jmp main
next_line:
    sub eax, TICKS_A_LINE
    mov [ticks], eax
    sti
    mov eax, [lines]
    cmp eax, TICK_LINES
    je main
    inc eax
    mov [lines], eax
    add al, '0'
    mov [tick_number], al
    lea esi, [tick_text]
    call print
    cmp dword ptr [lines], TICK_LINES
    jne main
    lea esi, [invitation]
    call print
    jmp main

power_off:
    lea esi, [farewell]
    call print
drain:
    mov dx, COM1+5
    in al, dx
    test al, LSR_IDLE
    jz drain
    mov dx, PM1A_CNT
    mov ax, SLP_EN | (SLP_TYP_S5 << 10)
    out dx, ax
stay:
    cli
    hlt
    jmp stay

# ---- interrupt handlers

on_timer:
    push eax
    inc dword ptr [ticks]
    mov al, PIC_EOI
    out PIC1, al
    pop eax
    iretd

on_com1:
    pushad
next_byte:
    mov dx, COM1+5
    in al, dx
    test al, LSR_READY
    jz all_read
    mov dx, COM1
    in al, dx
    cmp al, 'q'
    jne echo
    mov byte ptr [quit], 1
echo:
    call put
    cmp al, 13                  # Enter sends CR; give it its LF
    jne next_byte
    mov al, 10
    call put
    jmp next_byte
all_read:
    mov al, PIC_EOI
    out PIC1, al
    popad
    iretd

on_nothing:                     # spurious: no EOI
    iretd

on_exception:
    lea esi, [exception_text]
    call print
    jmp power_off

# ---- serial output

# print: the zero-terminated text at ESI
print:
    lodsb
    test al, al
    jz printed
    call put
    jmp print
printed:
    ret

# put: the byte in AL; EAX is kept
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

# ---- setting up

set_up_idt:
    mov ecx, 0
exceptions:
    lea eax, [on_exception]
    call set_gate
    inc ecx
    cmp ecx, VEC_TIMER
    jb exceptions
hardware:
    lea eax, [on_nothing]
    call set_gate
    inc ecx
    cmp ecx, 0x30
    jb hardware
    lea eax, [on_timer]
    mov ecx, VEC_TIMER
    call set_gate
    lea eax, [on_com1]
    mov ecx, VEC_COM1
    call set_gate
    .byte 0x0f, 0x01, 0x1d      # lidt [idtr]
    .long idtr
    ret

# set_gate: vector ECX gets a 32-bit interrupt gate to the handler EAX
set_gate:
    mov word ptr [IDT+ecx*8], ax
    mov word ptr [IDT+2+ecx*8], CODE
    mov word ptr [IDT+4+ecx*8], 0x8e00
    shr eax, 16
    mov word ptr [IDT+6+ecx*8], ax
    ret

set_up_pics:
    mov al, 0x11                # ICW1: edge, cascade, ICW4 follows
    out PIC1, al
    out PIC2, al
    mov al, VEC_TIMER           # ICW2: vectors 0x20-0x27 and 0x28-0x2f
    out PIC1+1, al
    mov al, VEC_TIMER+8
    out PIC2+1, al
    mov al, 0x04                # ICW3: the second one is at IRQ 2
    out PIC1+1, al
    mov al, 0x02
    out PIC2+1, al
    mov al, 0x01                # ICW4: 8086 mode
    out PIC1+1, al
    out PIC2+1, al
    mov al, 0xee                # all masked but IRQ 0 and 4
    out PIC1+1, al
    mov al, 0xff
    out PIC2+1, al
    ret

set_up_uart:
    mov dx, COM1+3
    mov al, 0x80                # DLAB: divisor 1, 115200 baud
    out dx, al
    mov dx, COM1
    mov al, 1
    out dx, al
    mov dx, COM1+1
    mov al, 0
    out dx, al
    mov dx, COM1+3
    mov al, 0x03                # 8 bits, no parity
    out dx, al
    mov dx, COM1+2
    mov al, 0x07                # FIFOs on and empty, an interrupt for every byte
    out dx, al
    mov dx, COM1+4
    mov al, 0x0b                # DTR, RTS, OUT2 (lets the interrupt through)
    out dx, al
    mov dx, COM1+1
    mov al, 0x01                # interrupt on received data
    out dx, al
    ret

set_up_timer:
    mov al, 0x34                # channel 0, both bytes, mode 2
    out PIT_MODE, al
    mov al, PIT_DIVISOR & 0xff
    out PIT_CH0, al
    mov al, PIT_DIVISOR >> 8
    out PIT_CH0, al
    ret

# ---- data

    .align 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # flat code
    .quad 0x00cf93000000ffff    # flat data
gdtr:
    .word 23
    .long gdt
idtr:
    .word 0x17f
    .long IDT
    .align 4
ticks:
    .long 0
lines:
    .long 0
quit:
    .byte 0
greeting:
    .asciz "Hello from a PC made of processes.\r\n"
tick_text:
    .ascii "tick "
tick_number:
    .asciz "0\r\n"
invitation:
    .asciz "Type something, it comes back; q powers off.\r\n"
farewell:
    .asciz "\r\nGoodbye.\r\n"
exception_text:
    .asciz "\r\nAn exception nobody expected.\r\n"
