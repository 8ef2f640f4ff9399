"""Figures as HTML fragments that scale with the page: pictures of one pixel per cell, bars and lines as SVG, text as text."""

import base64
import html
import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

DIVERGING, RISING = "RdBu_r", "YlOrBr"
INKS = ("var(--ink1)", "var(--ink2)", "var(--ink3)")


def hint(text: str) -> str:
    """The sentence that says how to read a figure."""
    return f'<p class="read">{html.escape(text)}</p>'


def picture(png: bytes, label: str, kind: str = "photo", ratio: float | None = None) -> str:
    style = f' style="aspect-ratio:{ratio:.4f}"' if ratio else ""
    return f'<img class="{kind}" alt="{html.escape(label)}"{style} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def heat(values: Tensor, low: float, high: float, label: str, colors: str = DIVERGING, ratio: float | None = None) -> str:
    """(rows, columns) as colours from ``low`` to ``high``, NaN as grey; ``ratio``: width over height, by default of square cells."""
    share = np.ma.masked_invalid((values.double().numpy() - low) / (high - low))
    map_ = matplotlib.colormaps[colors].with_extremes(bad=(0.5, 0.5, 0.5, 0.15))
    file = io.BytesIO()
    Image.fromarray(map_(share.clip(0, 1), bytes=True)).save(file, format="png", optimize=True)
    return picture(file.getvalue(), label, "heat", ratio or values.shape[1] / values.shape[0])


def scale(low: str, middle: str, high: str, colors: str = DIVERGING) -> str:
    """The legend of ``heat``."""
    stops = [matplotlib.colors.to_hex(matplotlib.colormaps[colors](i / 8)) for i in range(9)]
    words = "".join(f"<span>{html.escape(word)}</span>" for word in (low, middle, high))
    return f'<div class="scale"><div style="background:linear-gradient(90deg,{",".join(stops)})"></div><p>{words}</p></div>'


def panels(content: Sequence[tuple[str, str]], width: int) -> str:
    """Titled figures beside each other, as many as fit."""
    items = "".join(f"<div><h4>{html.escape(title)}</h4>{figure}</div>" for title, figure in content)
    return f'<div class="panels" style="--panel:{width}px">{items}</div>'


def columns(parts: Sequence[str]) -> str:
    return f'<div class="columns">{"".join(parts)}</div>'


def _frame(svg: str, low: str, high: str, left: str, right: str, label: str) -> str:
    """A stretched SVG of 100 x 100 units in a frame with words, which do not stretch."""
    words = [html.escape(word) for word in (high, low, left, right)]
    return (
        f'<div class="chart"><p class="y"><span>{words[0]}</span><span>{words[1]}</span></p>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{html.escape(label)}">{svg}</svg>'
        f'<p class="x"><span>{words[2]}</span><span>{words[3]}</span></p></div>'
    )


def number(value: float) -> str:
    """Three significant digits, short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "none"
    return f"{value:.1e}" if abs(value) < 1e-4 else f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def bars(values: Sequence[float], marks: Sequence[float], names: Sequence[str], ends: tuple[str, str], label: str, unit: str) -> str:
    """One bar per name from 0, each with a mark to compare it with."""
    top = max(*values, *marks, 1e-12) * 1.08
    width, parts = 100 / len(values), []
    for i, (value, mark, name) in enumerate(zip(values, marks, names, strict=True)):
        tooltip = html.escape(f"{name}: {number(value)} {unit} (mark: {number(mark)})")
        x, wide = (i + 0.15) * width, 0.7 * width
        parts.append(f'<rect x="{x:.2f}" y="{100 - 100 * value / top:.2f}" width="{wide:.2f}" height="{100 * value / top:.2f}">')
        parts.append(f"<title>{tooltip}</title></rect>")
        y = 100 - 100 * mark / top
        parts.append(f'<path class="mark" d="M{x - 0.1 * width:.2f} {y:.2f}h{0.9 * width:.2f}"/>')
    return _frame("".join(parts), "0", f"{number(top / 1.08)} {unit}", *ends, label)


def lines(series: dict[str, Sequence[float]], ends: tuple[str, str], label: str) -> str:
    """Up to three curves over equidistant places."""
    most = max(max(values) for values in series.values())
    least = min(min(values) for values in series.values())
    least, most = (least, most) if most > least else (least - 0.5, most + 0.5)
    parts, legend = [], []
    for (name, values), ink in zip(series.items(), INKS, strict=False):
        spots = [(100 * i / max(len(values) - 1, 1), 96 - 92 * (value - least) / (most - least)) for i, value in enumerate(values)]
        parts.append(f'<polyline style="stroke:{ink}" points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in spots)}"/>')
        legend.append(f'<span><i style="background:{ink}"></i>{html.escape(name)}</span>')
    head = f'<p class="legend">{"".join(legend)}</p>' if len(series) > 1 else ""
    return head + _frame("".join(parts), number(least), number(most), *ends, label)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In a box that scrolls where the page is narrow."""
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'
