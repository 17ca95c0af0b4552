"""Numbers in words, as the page's text has them."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """A number with its sign and three digits, a true minus: "−1,690", "+0.0120", "+1.20e−05"."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    rounded = float(f"{value:.3g}")
    text = f"{rounded:+,.0f}" if plain and abs(rounded) >= 100 else f"{value:+#.3g}"
    return text.replace("-", "−")


def correlation(value: float) -> str:
    """A correlation with its sign and two decimals, a true minus: "−0.31"."""
    return f"{value:+.2f}".replace("-", "−")


def correlation_interval(low: float, high: float) -> str:
    """An interval of a correlation: "[−0.71, +0.55]"."""
    return f"[{correlation(low)}, {correlation(high)}]"
