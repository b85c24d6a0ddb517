"""The report's figures: as SVG for the page and, if matplotlib is installed, as PNG for a paper.

The sunburst is Self-Instruct's figure 3 (Wang et al. 2022, https://arxiv.org/abs/2212.10560): the most frequent verbs
in the inner ring, their most frequent nouns in the outer ring. The SVGs get their colours from the page's CSS, and so
follow its light or dark theme.
"""

import colorsys
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.files import whole_file


class Ring(NamedTuple):
    """A verb of the sunburst, the number of tasks that have it with any noun, and its most frequent nouns."""

    verb: str
    tasks: int
    nouns: list[tuple[str, int]]

    @property
    def shown(self) -> int:
        return sum(count for _, count in self.nouns)


class Histogram(NamedTuple):
    """Counts in bins of equal width from `start`; with `open_end` the last bin has no upper bound."""

    title: str
    x: str
    y: str
    start: float
    width: float
    bars: list[float]
    name: str
    open_end: bool = False
    above: Sequence[float] = ()  # second series, stacked on the bars
    outline: Sequence[float] = ()  # second series, drawn as a line
    second: str = ""  # name of the second series

    def label(self, index: int) -> str:
        """The label of a bin: "10-14", "0.65-0.70", "200 or more"."""
        low, high = self.start + index * self.width, self.start + (index + 1) * self.width
        if self.width < 1:
            return f"{low:.2f}-{high:.2f}"
        if self.open_end and index == len(self.bars) - 1:
            return f"{low:,.0f} or more"
        return f"{low:,.0f}" if self.width == 1 else f"{low:,.0f}-{high - 1:,.0f}"

    @property
    def axis(self) -> str:
        """The label of the x axis."""
        return f"{self.x} (last: {self.label(len(self.bars) - 1)})" if self.open_end else self.x


class Bars(NamedTuple):
    """Counts by name; the kept tasks are first."""

    title: str
    counts: list[tuple[str, int]]

    def share(self, count: int) -> float:
        return count / max(1, sum(count for _, count in self.counts))


DPI = 200  # of the PNGs
SIZES = {"verbs_nouns.png": (7, 7), "lengths.png": (11, 3), "similarity.png": (6, 3.5), "filters.png": (6, 3)}
INNER, MIDDLE, OUTER = 68, 190, 315  # radii of the sunburst
LETTER_WIDTH = 0.56  # mean width of a letter, as a fraction of the font size


class Sector(NamedTuple):
    """A segment of a ring; angles in radians, clockwise from the top."""

    label: str
    title: str
    verb: str
    noun: str
    hue: float
    begin: float
    end: float
    inner: float
    outer: float

    @property
    def middle(self) -> float:
        return (self.begin + self.end) / 2

    def fitted_label(self, size: float) -> str:
        """The label, truncated to the segment at this font size; empty if no line fits."""
        letters = int((self.outer - self.inner - 12) / (size * LETTER_WIDTH))
        if (self.end - self.begin) * (self.inner + self.outer) / 2 < size * 1.05:
            return ""
        return self.label if len(self.label) <= letters else self.label[: letters - 1] + "…"


def sectors(rings: Sequence[Ring]) -> Iterator[Sector]:
    """The segments of the sunburst: each verb, followed by its nouns."""
    total = max(1, sum(ring.shown for ring in rings))
    offset = 0
    for index, ring in enumerate(rings):
        hue = (index / len(rings) + 0.58) % 1
        title = f"{ring.verb}: {ring.tasks:,} tasks, {ring.shown:,} of them with the nouns shown"
        begin, end = (2 * math.pi * edge / total for edge in (offset, offset + ring.shown))
        yield Sector(ring.verb, title, ring.verb, "", hue, begin, end, INNER, MIDDLE)
        for noun, count in ring.nouns:
            begin, end = (2 * math.pi * edge / total for edge in (offset, offset + count))
            yield Sector(noun, f"{ring.verb} {noun}: {count:,} tasks", ring.verb, noun, hue, begin, end, MIDDLE, OUTER)
            offset += count


# ---- SVG


def svg_sunburst(rings: Sequence[Ring], href: Callable[[str, str], str]) -> str:
    """The sunburst; each segment links to `href(verb, noun)`."""
    parts = []
    for sector in sectors(rings):
        kind = "noun" if sector.noun else "verb"
        link = href(sector.verb, sector.noun)
        parts.append(
            f'<a href="{escape(link)}" tabindex="-1"><title>{escape(sector.title)}</title>'
            f'<path class="{kind}" style="--hue:{sector.hue * 360:.0f}" d="{_arc(sector)}"/></a>'
        )
    for sector in sectors(rings):
        size, kind = (11.5, "noun") if sector.noun else (14, "verb")
        if text := sector.fitted_label(size):
            degrees = math.degrees(sector.middle) - 90
            radius = (sector.inner + sector.outer) / 2
            transform = f"rotate({degrees:.2f}) translate({radius:.1f})" + " rotate(180)" * (90 < degrees < 270)
            big = " big" if not sector.noun and sector.fitted_label(24) else ""
            parts.append(f'<text class="{kind}{big}" transform="{transform}">{escape(text)}</text>')
    shown = sum(ring.shown for ring in rings)
    parts.append(f'<text class="centre" y="-8">{shown:,}</text><text class="unit" y="16">tasks</text>')
    return _svg("sunburst", "-320 -320 640 640", "Sunburst of verbs and their nouns", "".join(parts))


def _arc(sector: Sector) -> str:
    end = min(sector.end, sector.begin + 2 * math.pi - 1e-4)  # an arc whose end equals its start is not drawn

    def point(angle: float, radius: float) -> str:
        return f"{radius * math.sin(angle):.2f} {-radius * math.cos(angle):.2f}"

    large = int(end - sector.begin > math.pi)
    return (
        f"M{point(sector.begin, sector.inner)}L{point(sector.begin, sector.outer)}"
        f"A{sector.outer} {sector.outer} 0 {large} 1 {point(end, sector.outer)}"
        f"L{point(end, sector.inner)}A{sector.inner} {sector.inner} 0 {large} 0 {point(sector.begin, sector.inner)}Z"
    )


def svg_histogram(chart: Histogram, width: int = 520, height: int = 250) -> str:
    left, right, top, bottom = 52, 12, 12, 44
    ticks = _ticks(_highest(chart))
    bin_width, y_scale = (width - left - right) / len(chart.bars), (height - top - bottom) / ticks[-1]
    floor = height - bottom
    parts = []
    for tick in ticks:
        y = floor - tick * y_scale
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{y:.1f}">{tick:,g}</text>')
    for index, value in enumerate(chart.bars):
        x, stacked = left + index * bin_width, chart.above[index] if chart.above else 0
        title = f"{chart.label(index)} {chart.x}: {_format_count(value)} {chart.name}" + (
            f", {_format_count(stacked)} {chart.second}" if chart.above else ""
        )
        for kind, y, h in (("bar", value, value), ("bar above", value + stacked, stacked)):
            if h:
                parts.append(
                    f'<rect class="{kind}" x="{x + 0.7:.1f}" y="{floor - y * y_scale:.1f}" '
                    f'width="{bin_width - 1.4:.1f}" height="{h * y_scale:.1f}"><title>{escape(title)}</title></rect>'
                )
    if chart.outline:
        steps = [f"H{left + i * bin_width:.1f}V{floor - v * y_scale:.1f}" for i, v in enumerate(chart.outline)]
        parts.append(f'<path class="outline" d="M{left} {floor}{"".join(steps)}H{width - right}V{floor}"/>')
    every = next(step for step in (1, 2, 4, 5, 10) if len(chart.bars) <= 8 * step)
    for index in range(0, len(chart.bars), every):
        label = f"{chart.start + index * chart.width:,g}"
        parts.append(f'<text class="tick mid" x="{left + index * bin_width:.1f}" y="{floor + 14}">{label}</text>')
    parts.append(
        f'<text class="axis mid" x="{(left + width - right) / 2}" y="{height - 8}">{escape(chart.axis)}</text>'
    )
    parts.append(
        f'<text class="axis mid side" transform="translate(11 {(top + floor) / 2}) rotate(-90)">{chart.y}</text>'
    )
    return _svg("histogram", f"0 0 {width} {height}", chart.title, "".join(parts))


def svg_bars(chart: Bars, width: int = 520) -> str:
    row, left, right = 30, 120, 118
    most = max(1, max(count for _, count in chart.counts))
    parts = []
    for index, (name, count) in enumerate(chart.counts):
        y, length = index * row + 4, (width - left - right) * count / most
        parts.append(f'<text class="name end" x="{left - 8}" y="{y + 11}">{escape(name)}</text>')
        kind = "bar" if index == 0 else "bar above"
        parts.append(f'<rect class="{kind}" x="{left}" y="{y}" width="{max(1.0, length):.1f}" height="22"/>')
        label = f"{count:,} ({chart.share(count):.1%})"
        parts.append(f'<text class="tick" x="{left + length + 6:.1f}" y="{y + 11}">{label}</text>')
    return _svg("bars", f"0 0 {width} {row * len(chart.counts)}", chart.title, "".join(parts))


def _svg(kind: str, box: str, title: str, content: str) -> str:
    return f'<svg class="{kind}" viewBox="{box}" role="img" aria-label="{escape(title)}">{content}</svg>'


def _highest(chart: Histogram) -> float:
    stacks = [value + (chart.above[index] if chart.above else 0) for index, value in enumerate(chart.bars)]
    return max(*stacks, *chart.outline, 0)


def _ticks(highest: float) -> list[float]:
    """Tick values at a round step (1, 2, 2.5, 5, 10 times a power of ten) from 0 to at least the highest value."""
    step = 10.0 ** math.floor(math.log10(max(highest, 1) / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if step * factor * 5 >= highest)
    step = max(step, 1) if highest > 4 else step
    return [step * index for index in range(max(1, math.ceil(highest / step)) + 1)]


def _format_count(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}% of"


# ---- PNG


def draw_pngs(
    folder: Path, rings: Sequence[Ring], lengths: Sequence[Histogram], similarity: Histogram, verdicts: Bars
) -> bool:
    """Writes the four PNGs to `folder`. Returns False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False

    @contextmanager
    def png(name: str) -> Iterator[Figure]:
        figure = Figure(figsize=SIZES[name], layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with whole_file(folder / name) as path:
            figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})

    with png("verbs_nouns.png") as figure:
        _draw_sunburst(figure.subplots(), rings)
    with png("lengths.png") as figure:
        for axes, chart in zip(figure.subplots(1, len(lengths)), lengths, strict=True):
            _draw_histogram(axes, chart)
            axes.set_title(chart.title)
    with png("similarity.png") as figure:
        _draw_histogram(figure.subplots(), similarity)
    with png("filters.png") as figure:
        _draw_bars(figure.subplots(), verdicts)
    return True


def _draw_sunburst(axes: Any, rings: Sequence[Ring]) -> None:
    from matplotlib.patches import Wedge

    for sector in sectors(rings):
        begin, end = (90 - math.degrees(angle) for angle in (sector.end, sector.begin))
        colour = colorsys.hls_to_rgb(sector.hue, 0.84 if sector.noun else 0.72, 0.6)
        thickness = sector.outer - sector.inner
        axes.add_patch(Wedge((0, 0), sector.outer, begin, end, width=thickness, facecolor=colour, edgecolor="white"))
        if text := sector.fitted_label(10 if sector.noun else 12):
            angle = (begin + end) / 2
            radius = (sector.inner + sector.outer) / 2
            axes.text(
                radius * math.cos(math.radians(angle)),
                radius * math.sin(math.radians(angle)),
                text.replace("$", r"\$"),
                rotation=angle + 180 * (90 < angle % 360 < 270),
                rotation_mode="anchor",
                ha="center",
                va="center",
                size=7.5 if sector.noun else 9,
            )
    axes.set(xlim=(-OUTER - 3, OUTER + 3), ylim=(-OUTER - 3, OUTER + 3), aspect="equal")
    axes.axis("off")


def _draw_histogram(axes: Any, chart: Histogram) -> None:
    edges = [chart.start + index * chart.width for index in range(len(chart.bars) + 1)]
    widths = [chart.width] * len(chart.bars)
    axes.bar(edges[:-1], chart.bars, widths, align="edge", color="tab:blue", edgecolor="white", label=chart.name)
    if chart.above:
        style = {"bottom": chart.bars, "align": "edge", "color": "tab:orange", "edgecolor": "white"}
        axes.bar(edges[:-1], chart.above, widths, label=chart.second, **style)
    if chart.outline:
        axes.stairs(chart.outline, edges, color="tab:orange", linewidth=1.5, label=chart.second)
    if chart.second:
        axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=chart.width >= 1)
    axes.set(xlabel=chart.axis, ylabel=chart.y)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Any, chart: Bars) -> None:
    names, counts = zip(*chart.counts, strict=True)
    bars = axes.barh(names, counts, color=["tab:blue", *["tab:orange"] * (len(names) - 1)])
    axes.bar_label(bars, [f" {count:,} ({chart.share(count):.1%})" for count in counts])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("tasks")
    axes.spines[["top", "right"]].set_visible(False)
