# Takes tickets of the card at CARD for ever and prints them: register 1 above register 0.

CARD = 0x300

start:
    mov dx, CARD+1
    mov eax, 0
    in al, dx
    mov ah, al
    mov dx, CARD
    in al, dx
    lea esi, [ticket_text]
    call say
    jmp start

ticket_text: .asciz "ticket "
