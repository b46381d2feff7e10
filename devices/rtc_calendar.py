"""The clock registers of an MC146818 as a date, and back.

Reference: Motorola MC146818 data sheet, ADI-856 (1984), "Time, calendar and alarm locations" (table 4).
Registers are BCD or binary (DM), hours count to 12 with a PM bit or to 24 (24/12), both in register B.
The week day is a number of its own, 1 to 7, that counts on at midnight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

B_DM, B_24H = 0x04, 0x02
HOUR_PM = 0x80
DONT_CARE = 0xC0  # alarm bytes with both bits set match always
DAY_SECONDS = 86_400
CENTURY_ASSUMED = 20


def encode(value: int, register_b: int) -> int:
    return value if register_b & B_DM else value // 10 << 4 | value % 10


def decode(raw: int, register_b: int) -> int | None:
    """None for what is no BCD number."""
    if register_b & B_DM:
        return raw
    return None if raw >> 4 > 9 or raw & 0xF > 9 else (raw >> 4) * 10 + (raw & 0xF)


def encode_hour(hour: int, register_b: int) -> int:
    if register_b & B_24H:
        return encode(hour, register_b)
    return encode(hour % 12 or 12, register_b) | (HOUR_PM if hour >= 12 else 0)


def decode_hour(raw: int, register_b: int) -> int | None:
    if register_b & B_24H:
        return decode(raw, register_b)
    hour = decode(raw & ~HOUR_PM, register_b)
    if hour is None or not 1 <= hour <= 12:
        return None
    return hour % 12 + (12 if raw & HOUR_PM else 0)


@dataclass(frozen=True, slots=True)
class Calendar:
    """A valid time of the clock. `century` is the raw register where that holds no century, else None."""

    moment: datetime
    week_day: int
    century: int | None = None

    @classmethod
    def at(cls, moment: datetime) -> Calendar:
        return cls(moment, moment.isoweekday() % 7 + 1)  # Sunday is 1

    @classmethod
    def of(cls, registers: Sequence[int], register_b: int) -> Calendar | None:
        """From second, minute, hour, week day, day, month, year, century; None if that is no time."""
        second, minute, _, week_day, day, month, year, century = (decode(r, register_b) for r in registers)
        hour = decode_hour(registers[2], register_b)
        if second is None or minute is None or hour is None or week_day is None:
            return None
        if day is None or month is None or year is None or not 1 <= week_day <= 7 or year > 99:
            return None
        stray = registers[7] if century is None or not 1 <= century <= 99 else None
        full_year = year + 100 * (CENTURY_ASSUMED if stray is not None or century is None else century)
        try:
            return cls(datetime(full_year, month, day, hour, minute, second), week_day, stray)
        except ValueError:
            return None

    def registers(self, register_b: int) -> tuple[int, ...]:
        """As `of` takes them."""
        t = self.moment
        numbers = (t.second, t.minute, t.hour, self.week_day, t.day, t.month, t.year % 100, t.year // 100)
        raw = [encode(number, register_b) for number in numbers]
        raw[2] = encode_hour(t.hour, register_b)
        if self.century is not None:
            raw[7] = self.century
        return tuple(raw)

    def later(self, seconds: int) -> Calendar | None:
        """None beyond the year 9999."""
        try:
            moment = self.moment + timedelta(seconds=seconds)
        except OverflowError:
            return None
        days = (moment.date() - self.moment.date()).days
        return replace(self, moment=moment, week_day=(self.week_day - 1 + days) % 7 + 1)


def alarm_delay(calendar: Calendar, wanted: tuple[int, int, int], register_b: int) -> int | None:
    """Seconds, 1 to 86400, until hour, minute and second registers equal the `wanted` alarm bytes."""
    hour, minute, second = (None if raw >= DONT_CARE else raw for raw in wanted)
    t = calendar.moment
    start = (t.hour * 60 + t.minute) * 60 + t.second
    at = start + 1
    while at <= start + DAY_SECONDS:
        of_day = at % DAY_SECONDS
        if hour is not None and encode_hour(of_day // 3600, register_b) != hour:
            at += 3600 - of_day % 3600
        elif minute is not None and encode(of_day // 60 % 60, register_b) != minute:
            at += 60 - of_day % 60
        elif second is not None and encode(of_day % 60, register_b) != second:
            at += 1
        else:
            return at - start
    return None
