"""Charts as inline SVG: no script, no font, nothing to fetch; colours come from the page's style sheet.

They are drawn small, so that their text is still read on a phone; legends are HTML, which wraps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from compress.style import COLOURS

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 30, 48
MARKED_POINTS = 20
CHARACTER = 8.0
"""Width of a character of a label, generously"""
LINE_HEIGHT = 15


@dataclass(frozen=True)
class Line:
    """One curve of a line chart."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One bar; `low` and `high` draw an interval around its top."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    muted: bool = False


def short_number(value: float) -> str:
    """Return a number as people read it: `1.2M`, `340k`, `0.057`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, title: str) -> str:
    """Return curves over a shared linear scale, with a legend above when there is more than one."""
    points = [point for line in lines for point in line.points if all(map(math.isfinite, point))]
    if not points:
        return _empty(title)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = _padded(min(xs), max(xs), 0)
    y_low, y_high = _padded(min(ys), max(ys), 0.05)
    parts = _y_axis(y_low, y_high, y_label) + _x_axis(x_low, x_high, x_label)
    for number, line in enumerate(lines):
        path = " ".join(
            f"{_scale(x, x_low, x_high, LEFT, WIDTH - RIGHT):.1f},"
            f"{_scale(y, y_low, y_high, HEIGHT - BOTTOM, TOP):.1f}"
            for x, y in line.points
            if math.isfinite(x) and math.isfinite(y)
        )
        note = f"<title>{escape(line.name)}</title>"
        if len(line.points) <= MARKED_POINTS:
            for point in path.split():
                x, y = point.split(",")
                parts.append(f'<circle class="dot {_style(number)}" cx="{x}" cy="{y}" r="3"/>')
        parts.append(f'<polyline class="line {_style(number)}" points="{path}">{note}</polyline>')
    legend = _legend([line.name for line in lines]) if len(lines) > 1 else ""
    return legend + _svg(parts, title)


def bar_chart(bars: Sequence[Bar], *, y_label: str, title: str) -> str:
    """Return bars from zero, each with its value above and its interval drawn through its top."""
    if not bars:
        return _empty(title)
    top = max(bar.high if bar.high is not None else bar.value for bar in bars)
    high = _padded(0, top or 1, 0.1)[1]
    parts = _y_axis(0, high, y_label)
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    base = HEIGHT - BOTTOM
    names = [_wrapped(bar.name, step) for bar in bars]
    each = math.ceil(max(_width(line) for lines in names for line in lines) / step)
    numbered = max(_width(short_number(bar.value)) for bar in bars) <= step
    for place, bar in enumerate(bars):
        middle = LEFT + step * (place + 0.5)
        width = min(72.0, step * 0.6)
        y = _scale(bar.value, 0, high, base, TOP)
        label_y = y
        kind = "muted" if bar.muted else "bar"
        parts.append(
            f'<rect class="{kind}" x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{base - y:.1f}"><title>{escape(bar.name)}: {bar.value:g}</title></rect>'
        )
        if bar.low is not None and bar.high is not None:
            low_y, high_y = (_scale(v, 0, high, base, TOP) for v in (bar.low, bar.high))
            label_y = high_y
            parts.append(
                f'<path class="interval" d="M{middle:.1f} {low_y:.1f}V{high_y:.1f}'
                f'M{middle - 6:.1f} {low_y:.1f}h12M{middle - 6:.1f} {high_y:.1f}h12"/>'
            )
        if numbered:
            number_text = short_number(bar.value)
            parts.append(f'<text class="value" x="{middle:.1f}" y="{label_y - 5:.1f}">{number_text}</text>')
        for row, line in enumerate(names[place] if place % each == 0 else ()):
            y_name = base + 17 + LINE_HEIGHT * row
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{y_name}">{escape(line)}</text>')
    return _svg(parts, title, base + LINE_HEIGHT * max(map(len, names)) + 10)


def heat_map(
    rows: Sequence[Sequence[float]],
    *,
    row_label: str,
    column_label: str,
    title: str,
    kept: Sequence[set[int]] | None = None,
) -> str:
    """Return a grid of cells, darker for a larger share of the row's largest value.

    Args:
        kept: for each row the columns that were kept; the others are crossed out.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        return _empty(title)
    cell = (WIDTH - LEFT - RIGHT) / columns
    height = TOP + 22.0 * len(rows) + BOTTOM
    parts = []
    for i, row in enumerate(rows):
        largest = max((abs(v) for v in row if math.isfinite(v)), default=0) or 1
        y = TOP + 22.0 * i
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 15:.1f}">{i}</text>')
        for j, value in enumerate(row):
            x = LEFT + cell * j
            dropped = kept is not None and j not in kept[i]
            opacity = 0.08 + 0.92 * abs(value) / largest if math.isfinite(value) else 0
            note = f"{row_label} {i}, {column_label} {j}: {value:.4g}{' (removed)' if dropped else ''}"
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="21" '
                f'fill-opacity="{opacity:.3f}"><title>{escape(note)}</title></rect>'
            )
            if dropped:
                parts.append(
                    f'<path class="cross" d="M{x:.1f} {y:.1f}l{cell - 1:.1f} 21m0 -21l{1 - cell:.1f} 21"/>'
                )
    base = TOP + 22.0 * len(rows)
    x = LEFT + cell * columns / 2
    parts.append(f'<text class="label" x="{x:.1f}" y="{base + 20:.1f}">{escape(column_label)}</text>')
    parts.append(_y_label(row_label))
    return _svg(parts, title, height)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high <= low:
        return low - 0.5, low + 0.5
    pad = (high - low) * share
    return low - pad, high + pad


def _scale(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_axis(low: float, high: float, label: str) -> list[str]:
    parts = []
    for tick in _ticks(low, high):
        y = _scale(tick, low, high, HEIGHT - BOTTOM, TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short_number(tick)}</text>')
    parts.append(_y_label(label))
    return parts


def _y_label(text: str) -> str:
    """Above the axis: beside it, turned, it would take the room of the figures and be harder to read."""
    return f'<text class="label start" x="4" y="14">{escape(text)}</text>'


def _width(text: str) -> float:
    return CHARACTER * (len(text) + 1)


def _wrapped(name: str, width: float) -> list[str]:
    """Return a name in lines that fit, broken between words only."""
    lines = [""]
    for word in name.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _style(number: int) -> str:
    """Return the CSS classes of a series."""
    return f"s{number % COLOURS}" + (" dashed" if number // COLOURS % 2 else "")


def _x_axis(low: float, high: float, x_label: str) -> list[str]:
    parts = []
    for tick in _ticks(low, high):
        x = _scale(tick, low, high, LEFT, WIDTH - RIGHT)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{short_number(tick)}</text>')
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
    )
    return parts


def _legend(names: Sequence[str]) -> str:
    keys = "".join(f'<span><i class="{_style(n)}"></i>{escape(name)}</span>' for n, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def _empty(title: str) -> str:
    return f'<p class="note">{escape(title)}: nothing was measured.</p>'
