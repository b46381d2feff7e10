# Drives the watchdog card of docs/examples at DOG: it barks after a second on IRQ 5, and is silenced.

DOG = 0x300

start:
    call set_up_idt
    call set_up_irq5
    mov dx, DOG+1
    mov eax, 0
    in al, dx
    lea esi, [before_text]
    call say
    mov dx, DOG
    mov al, 1                   # a second
    out dx, al
wait_for_it:
    cli
    cmp dword ptr [irq5_count], 0
    jne barked
    sti
    hlt
    jmp wait_for_it
barked:
    mov eax, [irq5_count]
    lea esi, [irq_text]
    call say
    mov dx, DOG+1
    mov eax, 0
    in al, dx
    lea esi, [barking_text]
    call say
    mov dx, DOG
    mov al, 0
    out dx, al
    mov dx, DOG+1
    mov eax, 0
    in al, dx
    lea esi, [silent_text]
    call say
    jmp power_off

before_text: .asciz "before "
irq_text: .asciz "interrupts "
barking_text: .asciz "barking "
silent_text: .asciz "silenced "
