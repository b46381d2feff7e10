"""For tests of deliveries."""

V = 0x30  # an ordinary vector
EIP = 0x0010_0000
