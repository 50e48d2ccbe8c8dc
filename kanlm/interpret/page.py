"""inspect.json as one HTML page without outside resources; pictures are inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kanlm.interpret.statistics import STATISTICS

WIDTH, HEIGHT, BELOW = 160, 96, 12
"""Size of a small picture in its own units, and the room for numbers below the axis."""


def page(found: dict[str, Any]) -> str:
    """The page of an inspection."""
    return render("inspect.html.j2", **found, names=STATISTICS, shares=SHARES)


def render(template: str, **values: Any) -> str:
    """A template of this package as text."""
    environment = Environment(
        loader=PackageLoader("kanlm.interpret"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "curve": curve_svg,
        "scatter": scatter_svg,
        "short": short,
        "p": p_text,
        "change": change,
    }
    return environment.get_template(template).render(**values)


SHARES = {"share_for_90_percent", "nonlinear_share", "saturated", "outside_grid", "token_share"}
"""Statistics that are shown as per cent."""


def short(number: float | None, is_share: bool = False) -> str:
    if number is None:
        return "–"
    if is_share:
        return f"{100 * number:.1f}%" if abs(number) < 0.0995 else f"{100 * number:.0f}%"
    return f"{number:.3g}"


def p_text(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def change(row: dict[str, Any]) -> str:
    return f"{row['change']:+.4f}"


def line_path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def curve_svg(curve: dict[str, Any]) -> Markup:
    """A function, its start (dotted), its formula (thin) and the density of its inputs (grey)."""
    x, y = curve["x"], curve["y"]
    low, high = min(y + curve["start"]), max(y + curve["start"])
    if high - low < 1e-12:
        low, high = low - 1, high + 1
    left, right, pad = x[0], x[-1], 4

    def across(value: float) -> float:
        return (value - left) / (right - left) * WIDTH

    def down(value: float) -> float:
        place = pad + (high - value) / (high - low) * (HEIGHT - 2 * pad)
        return min(max(place, -HEIGHT), 2 * HEIGHT)  # a formula may leave the picture; it is clipped

    xs = [across(value) for value in x]
    grey = [HEIGHT - 0.45 * HEIGHT * value for value in curve["density"]]
    zero = [f'<path class="zero" d="M{across(0):.1f} 0V{HEIGHT}"/>' if left < 0 < right else ""]
    zero.append(f'<path class="zero" d="M0 {down(0):.1f}H{WIDTH}"/>' if low < 0 < high else "")
    size = f"0 0 {WIDTH} {HEIGHT + BELOW}"
    return Markup(
        f'<svg viewBox="{size}" role="img" aria-label="{curve["label"]}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<path class="density" d="{line_path(xs, grey)}L{WIDTH} {HEIGHT}L0 {HEIGHT}Z"/>{"".join(zero)}'
        f'<path class="start" d="{line_path(xs, [down(v) for v in curve["start"]])}"/>'
        f'<path class="learned" d="{line_path(xs, [down(v) for v in y])}"/>'
        f'<path class="formula" d="{line_path(xs, [down(v) for v in curve["formula_y"]])}"/></svg>'
        f'<text x="0" y="{HEIGHT + 10}">{left:.2g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 10}" text-anchor="end">{right:.2g}</text>'
        f'<text x="2" y="9">{high:.2g}</text><text x="2" y="{HEIGHT - 3}">{low:.2g}</text></svg>'
    )


def scatter_svg(points: Sequence[Sequence[float]]) -> Markup:
    """The two importances of a layer's functions, both on logarithmic axes."""
    shown = [(math.log10(x), math.log10(y)) for x, y in points if x > 0 and y > 0]
    if len(shown) < 2:
        return Markup("")
    size, pad = 200, 14
    ends = [(min(values), max(values)) for values in zip(*shown, strict=True)]

    def scaled(value: float, end: tuple[float, float]) -> float:
        return pad + (value - end[0]) / max(end[1] - end[0], 1e-9) * (size - 2 * pad)

    dots = "".join(
        f'<circle cx="{scaled(x, ends[0]):.0f}" cy="{size - scaled(y, ends[1]):.0f}" r="2.2"/>'
        for x, y in shown
    )
    return Markup(
        f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="two importances" class="scatter">'
        f'<path class="zero" d="M{pad} 4V{size - pad}H{size - 2}"/>{dots}'
        f'<text x="{size - 2}" y="{size - 3}" text-anchor="end">deviation of the output →</text>'
        f'<text x="{pad + 4}" y="12">↑ effect on the loss</text></svg>'
    )
