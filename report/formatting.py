"""Numbers as text: digits follow the standard error, and NaN is shown."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from palimpsest.common.metrics import Estimate, Share

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LARGEST_PLAIN = 1e12
_SMALLEST_PLAIN = 1e-3
_LARGEST_PLAIN_INTEGER = 10**15


@dataclass(frozen=True)
class Metric:
    """One measured number. `se` is its standard error in the same unit; `note` says how it was measured."""

    name: str
    value: float
    se: float | None = None
    unit: str = ""
    note: str = ""

    @classmethod
    def of(cls, name: str, found: Estimate | Share, unit: str = "", note: str = "", scale: float = 1.0) -> Self:
        """Return an estimate times `scale`."""
        return cls(name, scale * found.value, scale * found.se, unit, note)

    @property
    def measurement(self) -> str:
        """The value and its standard error without the unit, e.g. `1.823 ± 0.004`."""
        return format_measurement(self.value, self.se)

    def __str__(self) -> str:
        return f"{self.measurement} {self.unit}".rstrip()


@dataclass(frozen=True)
class Interval:
    """A measured number and its 95% interval, which need not be symmetric: `95.8 [94.5, 96.8]`.

    Raises ValueError if the interval ends before it begins.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"interval [{self.low}, {self.high}] ends before it begins: swap low and high")

    def __str__(self) -> str:
        triple = (self.value, self.low, self.high)
        half = (self.high - self.low) / 2
        if half > 0 and all(value == 0 or _SMALLEST_PLAIN <= abs(value) < _LARGEST_PLAIN for value in triple):
            value, low, high = (_fixed(float(number), _decimals(half)) for number in triple)
        else:
            value, low, high = map(format_number, triple)
        return f"{value} [{low}, {high}]"


def percent(found: Share) -> Interval:
    """Return a share with its 95% interval, in per cent."""
    return Interval(100 * found.value, 100 * found.low, 100 * found.high)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def format_number(value: float, digits: int = 4, strip: bool = True) -> str:
    """Return `value` with `digits` significant digits (integers in full); `strip` drops trailing zeros."""
    if isinstance(value, numbers.Integral) and abs(int(value)) < _LARGEST_PLAIN_INTEGER:
        return _minus(f"{int(value):,}")
    value = float(value)
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    # Exponent after rounding, so that 9.9996 to four digits counts as 10.00 and not as 10.000.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if abs(value) >= _LARGEST_PLAIN or abs(value) < _SMALLEST_PLAIN:
        mantissa = f"{value:.{digits - 1}e}".partition("e")[0]
        return _minus(f"{_strip(mantissa) if strip else mantissa} × {_power(exponent)}")
    text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return _minus(_strip(text) if strip else text)


def format_measurement(value: float, se: float | None = None) -> str:
    """Return `value ± se`, both cut at the last digit that the standard error leaves meaningful.

    The error keeps two digits when they are 10..35 and one otherwise (the rule of the Particle Data Group). A standard
    error that is not a number, infinite or negative is shown as `?`.
    """
    if se is None:
        return format_number(value)
    value, se = float(value), float(se)
    if not math.isfinite(value):
        return _not_finite(value)
    if not math.isfinite(se) or se < 0:
        return f"{format_number(value)} ± ?"
    if se == 0:
        return f"{format_number(value)} ± 0"
    largest = max(abs(value), se)
    if se < 1e-13 * largest or not 1e-300 < largest < 1e300:
        # Finer than a float can tell, or too extreme to scale: no common last digit exists.
        return f"{format_number(value)} ± {format_number(se, 2)}"
    if _SMALLEST_PLAIN <= largest < _LARGEST_PLAIN:
        decimals = _decimals(se)
        return f"{_fixed(value, decimals)} ± {_fixed(se, decimals)}"
    exponent = math.floor(math.log10(largest))
    value, se = value / 10.0**exponent, se / 10.0**exponent
    decimals = _decimals(se)
    return f"({_fixed(value, decimals)} ± {_fixed(se, decimals)}) × {_power(exponent)}"


def _decimals(se: float) -> int:
    """Return the decimals at which `se > 0` has one or two significant digits; negative left of the point."""
    mantissa, _, exponent = f"{se:.1e}".partition("e")
    digits = 2 if float(mantissa) <= 3.5 else 1
    return digits - 1 - int(exponent)


def _fixed(value: float, decimals: int) -> str:
    if decimals >= 0:
        text = f"{value:,.{decimals}f}"
    else:
        quantum = 10**-decimals
        text = f"{math.floor(value / quantum + 0.5) * quantum:,}"
    # -0.00 would claim a sign that the digits shown do not support.
    return text.lstrip("-") if not any(c in "123456789" for c in text) else _minus(text)


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def _strip(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _minus(text: str) -> str:
    return text.replace("-", "−")
