"""When an address space runs directly and when translated: `user_mode = "auto"`.

A trap (system call, fault, interrupt) of directly run code costs more than one of translated code; between
traps direct code gains. So every stretch of user code without a trap earns its time less a price, the time
that direct execution must save to pay for one trap. Who has earned enough goes direct, where enough is more
the more pages a child must be shown; who then loses as much comes back, and has to earn twice as much the
next time. Why these figures: docs/decisions/030-when-direct.md.
Left out: what kind of trap it was.
"""

from __future__ import annotations

import msgspec

EARN_NS = 20_000_000  # to go direct; what starting a child and its first traps cost, times that
PAGE_NS = 50_000  # besides, for each page it must be shown: 8 µs, times that
LOSE_NS = 5_000_000  # to come back
EARN_MOST_NS = 5_000_000_000  # after coming back again and again
STRETCHES_PER_TRAP = 6  # price of a trap in times of its measured cost: direct code saves a sixth, at best


class Pace(msgspec.Struct):
    """What an address space has earned. New ones run translated."""

    direct: bool = False
    balance_ns: int = 0
    goal_ns: int = EARN_NS


class Auto:
    """The rule. `price_ns`: see above."""

    def __init__(self, ns_per_trap: int) -> None:
        self.price_ns = STRETCHES_PER_TRAP * ns_per_trap
        self.went_direct = 0
        self.came_back = 0

    def translated(self, pace: Pace, stretch_ns: int, traps: int, pages: int = 0) -> bool:
        """Translated user code ran for `stretch_ns`, with as many traps. True: it goes direct from now on.

        `pages`: how many a child must be shown first.
        """
        if pace.direct:
            return False  # the rest of one that runs directly: what must not run natively
        balance = pace.balance_ns + stretch_ns - traps * self.price_ns
        if balance < pace.goal_ns + pages * PAGE_NS:
            pace.balance_ns = max(balance, 0)
            return False
        pace.direct, pace.balance_ns = True, 0
        self.went_direct += 1
        return True

    def direct(self, pace: Pace, stretch_ns: int) -> bool:
        """Direct code ran for `stretch_ns` until it trapped. True: it is translated from now on."""
        balance = pace.balance_ns + stretch_ns - self.price_ns
        if balance < -LOSE_NS:
            pace.direct, pace.balance_ns = False, 0
            pace.goal_ns = min(2 * pace.goal_ns, EARN_MOST_NS)
            self.came_back += 1
            return True
        if balance > pace.goal_ns:  # it was right to go
            pace.goal_ns = max(pace.goal_ns // 2, EARN_NS)
            pace.balance_ns = 0
        else:
            pace.balance_ns = balance
        return False
