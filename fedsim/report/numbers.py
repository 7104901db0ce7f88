"""How numbers are written in a report."""

from __future__ import annotations

import math

#: Metrics that are shares and are shown in per cent.
SHARES = frozenset({"accuracy"})

#: What stands where there is no number.
NONE = "\u2013"

_NO_BREAK = "\u00a0"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def metric(name: str, value: float | None) -> str:
    """``96.1 %`` for a share, three significant digits for anything else, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return short(value)
    if name in SHARES:
        return f"{100 * value:.1f}{_NO_BREAK}%"
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else short(value)


def short(value: float | None) -> str:
    """About three significant digits, whole numbers in full."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def unit_of(count: float) -> tuple[float, str]:
    """The size and name of the unit in which so many bytes are written: (1e6, "MB")."""
    power = 0 if count < 1000 else min(int(math.log10(count) / 3), len(_UNITS) - 1)
    return 1000.0**power, _UNITS[power]


def size(count: float) -> str:
    """Bytes with a decimal unit: ``4.31 MB``."""
    scale, unit = unit_of(count)
    value = count / scale
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{_NO_BREAK}{unit}"


def unit_of_time(seconds: float) -> tuple[float, str]:
    """The length in seconds and name of the unit in which so long a time is drawn: (60, "Minutes")."""
    if seconds < 180:
        return 1.0, "Seconds"
    return (60.0, "Minutes") if seconds < 3 * 3600 else (3600.0, "Hours")


def duration(seconds: float | None) -> str:
    """``31 ms``, ``1.42 s``, ``12.3 s``, ``4 min 10 s``, ``3 h 20 min``."""
    if seconds is None:
        return NONE
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f}{_NO_BREAK}ms"
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f}{_NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes}{_NO_BREAK}min{_NO_BREAK}{rest}{_NO_BREAK}s"
    return f"{minutes // 60:,}{_NO_BREAK}h{_NO_BREAK}{minutes % 60}{_NO_BREAK}min"


def share(value: float) -> str:
    """``0.05 %``: a share with two significant digits, ``46 %``, and never as none or all what is neither."""
    percent = 100 * value
    digits = 0 if percent >= 10 else 1 if percent >= 1 else 2
    rounded = round(percent, digits)
    if (rounded == 0) != (value == 0):
        return f"under 0.01{_NO_BREAK}%"
    return f"over 99{_NO_BREAK}%" if rounded == 100 and value < 1 else f"{rounded:.{digits}f}{_NO_BREAK}%"


def millions(number: int) -> str:
    """``5,130``, ``81.7 k``, ``11.2 M``, ``1.24 G``: a count to three digits."""
    if number < 10_000:
        return f"{number:,}"
    power = next(power for power in (1, 2, 3) if number < 999.5 * 1000**power or power == 3)
    return f"{number / 1000**power:#.3g}".rstrip(".") + f"{_NO_BREAK}{'kMG'[power - 1]}"


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 client``, ``1,200 clients``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def interval(low: float, high: float) -> str:
    """``92.9-97.3 %``, for shares."""
    return f"{100 * low:.1f}\u2013{100 * high:.1f}{_NO_BREAK}%"


def wilson(share: float, examples: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in ``examples`` independent examples (Wilson, JASA 22, 1927).

    With p the share, n the examples and z = 1.96: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    z = 1.959964
    centre = share + z * z / (2 * examples)
    spread = z * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples**2))
    scale = 1 + z * z / examples
    return (centre - spread) / scale, (centre + spread) / scale


def thinned(length: int, most: int) -> list[int]:
    """At most ``most`` positions spread evenly over ``range(length)``, the first and the last always among them."""
    if length <= most:
        return list(range(length))
    step = (length - 1) / (most - 1)
    return sorted({round(i * step) for i in range(most)})
