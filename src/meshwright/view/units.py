"""Numbers as people read them: bytes in KiB and MiB, times in ms, counts with separators."""

from __future__ import annotations

import math

from meshwright.plan.size import bytes_text

__all__ = ["bytes_text", "count_text", "error_text", "percent_text", "seconds_text", "value_text"]


def seconds_text(seconds: float) -> str:
    """A duration with three significant digits, as in `12.3 ms`; from a minute on `2 min 05 s`.

    >>> seconds_text(0.0123), seconds_text(1.5), seconds_text(125), seconds_text(7260)
    ('12.3 ms', '1.50 s', '2 min 05 s', '2 h 01 min')
    """
    if seconds >= 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours:,} h {rest:02d} min"
    if seconds >= 59.95:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{seconds * 1e6:.2f} µs" if seconds else "0 s"


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}"


def count_text(value: float) -> str:
    """A count: whole from ten on and with separators, one decimal below.

    >>> count_text(12345.6), count_text(3.21), count_text(4)
    ('12,346', '3.2', '4')
    """
    if value < 9.95 and value != int(value):
        return f"{value:.1f}"
    return f"{value:,.0f}"


def value_text(value: float) -> str:
    """A loss or another metric: four significant digits, an exponent where it is tiny or huge.

    >>> value_text(2.31449), value_text(0.0003), value_text(123456.0), value_text(0.0)
    ('2.314', '3.000e-04', '1.235e+05', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def percent_text(share: float) -> str:
    """A share of one in per cent; below 1 % with a decimal, and never a rounded-off nothing.

    >>> percent_text(0.1849), percent_text(0.004), percent_text(0.0)
    ('18 %', '0.4 %', '0 %')
    """
    if 0 < share < 0.0005:
        return "< 0.1 %"
    digits = 1 if 0 < share < 0.00995 else 0
    return f"{share * 100:.{digits}f} %"


def error_text(error: float) -> str:
    """A relative error with two digits, as in `3.1e-15`; exactly none is `0`."""
    return "0" if error == 0 else f"{error:.1e}"
