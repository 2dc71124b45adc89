"""The report as one HTML file: no script, no font, no picture from elsewhere; charts are SVG drawn here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

WIDTH: Final = 440  # of a chart, in SVG units
HEIGHT: Final = 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 40  # margins of the plot inside a chart

Report = Mapping[str, Any]
Point = tuple[float, float]

COLOURS: Final = """
:root { color-scheme: light dark; --text: #1c2330; --dim: #667085; --line: #e4e7ec; --card: #fff; --ground: #f6f7f9;
  --model: #2f6fde; --rival: #a3adbd; --second: #d9822b; --third: #2e9e6b; --fourth: #8e5bd0; --fifth: #c8475d; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ef; --dim: #98a2b3; --line: #333a47; --card: #1b202a;
  --ground: #12151c; --model: #6ea2ff; --rival: #667085; --second: #f0a355; --third: #5cc796; --fourth: #b18be8;
  --fifth: #ee7f92; } }
"""
CHART: Final = """
svg { font: 11px system-ui, sans-serif; }
svg text { fill: var(--dim); } svg text.value { fill: var(--text); }
.grid { stroke: var(--line); } .axis { stroke: var(--dim); } .whisker { stroke: var(--text); stroke-width: 1.3; }
.model-fill { fill: var(--model); } .rival-fill { fill: var(--rival); }
.curve { fill: none; stroke-width: 2; }
.c0 { stroke: var(--model); } .c1 { stroke: var(--second); } .c2 { stroke: var(--rival); }
.c3 { stroke: var(--third); } .c4 { stroke: var(--fourth); } .c5 { stroke: var(--fifth); }
.d0 { fill: var(--model); } .d1 { fill: var(--second); } .d2 { fill: var(--rival); }
.d3 { fill: var(--third); } .d4 { fill: var(--fourth); } .d5 { fill: var(--fifth); }
.best { stroke: var(--dim); stroke-dasharray: 3 3; }
"""
PAGE: Final = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { font-size: 28px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 4px 0 10px; } .dim, small, caption { color: var(--dim); }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  overflow-x: auto; }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile small, h3 small { display: block; font-weight: 400; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: 500; }
tr:last-child td { border-bottom: 0; } tr.model td { font-weight: 600; color: var(--model); }
td.text { text-align: left; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
"""


def page(report: Report) -> str:
    """The whole document for the numbers of `trainer.report.report`."""
    parts = [_head(report), _against(report), _curves(report), _gates(report), _groups(report), _lists(report)]
    body = "\n".join([*parts, _rule(report), _data(report), _settings(report)])
    title = f"{report['name']}: {report['data']['source']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{COLOURS}{PAGE}{CHART}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


# --- sections -----------------------------------------------------------------------------------------


def _head(report: Report) -> str:
    found, best = report["metrics"], _best_rival(report)
    tiles = [
        _tile("NDCG@10", f"{found['ndcg@10']:.4f}", _range(found, "ndcg@10")),
        _tile("HR@10", f"{found['hr@10']:.4f}", _range(found, "hr@10")),
    ]
    if best is not None:
        name, value = best
        lift = f"{found['ndcg@10'] / value - 1:+.0%}" if value > 0 else "–"
        tiles.append(_tile("over the best baseline", lift, f"{name}, NDCG@10 {value:.4f}"))
    tiles.append(_tile("epochs", str(report["epochs_trained"]), _validated(report)))
    tiles.append(_tile("test cases", f"{found['cases']:,}", f"of {found['users']:,} users"))
    return (
        f"<h1>{escape(report['name'])}</h1>"
        f'<p class="dim">{escape(report["data"]["source"])} · {escape(report["protocol"])} · measured through the '
        f'exported bundle</p><div class="tiles">{"".join(tiles)}</div>'
    )


def _tile(label: str, value: str, below: str) -> str:
    inside = f"<small>{escape(label)}</small><b>{escape(value)}</b><small>{escape(below)}</small>"
    return f'<div class="card tile">{inside}</div>'


def _range(found: Mapping[str, Any], name: str) -> str:
    low, high = found["intervals"][name]
    return f"95 %: {low:.4f} – {high:.4f}"


def _validated(report: Report) -> str:
    score = report["validation_ndcg@10"]
    return "without validation" if score is None else f"validation NDCG@10 {score:.4f}"


def _best_rival(report: Report) -> tuple[str, float] | None:
    rivals = {name: float(found["ndcg@10"]) for name, found in report["baselines"].items() if found}
    return max(rivals.items(), key=lambda pair: pair[1], default=None)


def _against(report: Report) -> str:
    rows = [(report["name"], report["metrics"], True)]
    rows += [(name, found, False) for name, found in report["baselines"].items()]
    charts = [_card(_label(name), bars([(r, f[name], f["intervals"][name], own) for r, f, own in rows]))
              for name in ("ndcg@10", "hr@10")]  # fmt: skip
    names = [n for n in report["metrics"] if n.startswith(("hr@", "ndcg@", "mrr@"))]
    head = "".join(f"<th>{_label(n)}</th>" for n in names)
    lines = [
        f"<tr{' class=model' if own else ''}><td>{escape(name)}</td>"
        + "".join(f"<td>{found[n]:.4f}</td>" for n in names)
        + "</tr>"
        for name, found, own in rows
    ]
    lines.insert(1, "<tr><td>by torch, no retrieval</td>" + "".join(
        f"<td>{report['torch'].get(n, math.nan):.4f}</td>" for n in names) + "</tr>")  # fmt: skip
    table = f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"
    note = "Whiskers: 95 % bootstrap intervals over users. Popularity counts training events before each target alone."
    return (
        f'<h2>Against baselines</h2><p class="dim">{note}</p><div class="row">{"".join(charts)}</div>'
        f'<div class="card" style="margin-top:14px">{table}</div>'
    )


def _curves(report: Report) -> str:
    rows = report["epochs"]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    losses = [n for n in names if n.endswith("loss")]
    scores = [n for n in ("val_ndcg@10", "val_hr@10", "val_mrr") if n in names]
    gates = [n for n in names if n.startswith("val_gate/")]
    charts = [
        _card(title, curves({n: _series(rows, n) for n in chosen}, report["epochs_trained"]))
        for title, chosen in (("Loss", losses), ("Validation", scores), ("Gates", gates))
        if chosen
    ]
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    note = f"{len(rows)} epochs in {_duration(seconds)}; the dashed line is the epoch that was kept."
    return f'<h2>Training</h2><p class="dim">{note}</p><div class="row">{"".join(charts)}</div>'


def _series(rows: Sequence[Mapping[str, float]], name: str) -> list[Point]:
    return [(row["epoch"], row[name]) for row in rows if name in row and math.isfinite(row[name])]


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _gates(report: Report) -> str:
    """What item vectors are made of; nothing unless the fusion is a gate."""
    rows = [(name, g["mean"], (g["low"], g["high"]), True) for name, g in report["gates"].items()]
    if not rows:
        return ""
    note = (
        "Share of an item's vector that its id and each field contribute: the mean over items with training events; "
        "whiskers are the 10th and 90th percentile of items."
    )
    return (
        f'<h2>What item vectors are made of</h2><p class="dim">{note}</p>'
        f'<div class="row">{_card("Gates", bars(rows))}</div>'
    )


GROUPS: Final = {
    "history_length": ("By length of the history", "events before the target"),
    "item_popularity": ("By popularity of the target", "training events of the item"),
    "item_age_days": ("By age of the target", "days since the item exists"),
}


def _groups(report: Report) -> str:
    charts = [
        _card(f"{title}<small>{unit}</small>", columns(report["groups"][name]))
        for name, (title, unit) in GROUPS.items()
        if report["groups"][name]
    ]
    note = "NDCG@10 with 95 % intervals; below each group, its number of test cases."
    return f'<h2>Where it is good</h2><p class="dim">{note}</p><div class="row">{"".join(charts)}</div>'


def _lists(report: Report) -> str:
    found = report["metrics"]["lists"]
    meaning = {
        "coverage@10": ("Catalogue coverage", "share of all items that stand in any top 10", "{:.1%}"),
        "novelty@10": ("Novelty", "mean self-information of recommended items, in bits", "{:.2f}"),
        "popularity_percentile@10": (
            "Popularity of recommendations",
            "mean percentile, 1 is the top",
            "{:.3f}",
        ),
        "popularity_percentile_of_targets": ("Popularity of targets", "the same of what users chose", "{:.3f}"),
        "popularity_bias@10": ("Popularity bias", "the difference; 0 is as popular as people's own choices", "{:+.3f}"),
    }
    return "<h2>What it recommends</h2>" + _table(
        [(label, form.format(found[name]), text) for name, (label, text, form) in meaning.items() if name in found]
    )


def _rule(report: Report) -> str:
    found, rule = report["metrics"], report["metrics"]["availability_rule"]
    rows = [
        (_label(name), f"{found[name]:.4f} → {rule[name]:.4f}", "without the rule → with it")
        for name in ("ndcg@10", "hr@10")
    ]
    rows += [
        ("Targets hidden", f"{rule['targets_hidden']:,}", "by what was known without held-out events"),
        ("Users touched", f"{rule['users_touched']:,}", "for whom at least one item did not exist"),
        ("Items hidden", f"{rule['items_hidden_mean']:,.1f}", "of the catalogue, mean over test cases"),
        ("New targets", f"{found['targets_without_training_event']:,}", "items without a training event"),
    ]
    return "<h2>Availability rule</h2>" + _table(rows)


def _data(report: Report) -> str:
    data = report["data"]
    first, last = data["first_event"], data["last_event"]
    rows = [
        ("Events", f"{data['events']:,}", "times: none" if first is None else f"{first} to {last}"),
        ("Users, items", f"{data['users']:,}, {data['items']:,}", f"fingerprint {data['fingerprint']}"),
        ("Training", f"{data['training_events']:,} events",
         f"of {data['training_users']:,} users on {data['training_items']:,} items; "
         f"median history {data['history_length_median']:g}"),
        ("Validation, test", f"{data['validation_cases']:,}, {data['test_cases']:,}", "cases"),
    ]  # fmt: skip
    return "<h2>Data</h2>" + _table(rows + [("Note", "", note) for note in data["notes"]])


def _settings(report: Report) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="text">{escape(str(value))}</td></tr>'
        for name, value in report["settings"].items()
        if value is not None
    )
    return f'<h2>Settings</h2><details class="card"><summary>All settings</summary><table>{rows}</table></details>'


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = "".join(
        f'<tr><td>{escape(a)}</td><td>{escape(b)}</td><td class="text dim">{escape(c)}</td></tr>' for a, b, c in rows
    )
    return f'<div class="card"><table>{lines}</table></div>'


def _card(title: str, inside: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{inside}</div>'


def _label(name: str) -> str:
    kind, _, cutoff = name.partition("@")
    return f"{kind.upper()}@{cutoff}" if cutoff else kind.upper()


# --- charts -------------------------------------------------------------------------------------------


def bars(rows: Sequence[tuple[str, float, Sequence[float], bool]]) -> str:
    """Horizontal bars: (name, value, interval, whether it is the model)."""
    line, left = 30, 20 + 7 * max(len(name) for name, *_ in rows)
    marks = ticks(max(high for *_, (_, high), _ in rows))
    height = line * len(rows) + 26
    x = _scale(0, marks[-1], left, WIDTH - 52)
    parts = [
        f'<line class="grid" x1="{x(m):.1f}" x2="{x(m):.1f}" y1="0" y2="{height - 22}"/>'
        f'<text x="{x(m):.1f}" y="{height - 6}" text-anchor="middle">{_number(m)}</text>'
        for m in marks
    ]
    for place, (name, value, (low, high), own) in enumerate(rows):
        y = line * place + 4
        parts.append(
            f'<text class="value" x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="{"model" if own else "rival"}-fill" x="{left}" y="{y}" rx="2" height="22" '
            f'width="{x(value) - left:.1f}"/>'
            f'<path class="whisker" d="M{x(low):.1f} {y + 11}H{x(high):.1f}'
            f'M{x(low):.1f} {y + 7}v8M{x(high):.1f} {y + 7}v8"/>'
            f'<text class="value" x="{x(max(value, high)) + 6:.1f}" y="{y + 15}">{value:.4f}</text>'
        )
    return _svg(parts, height)


def columns(rows: Sequence[Mapping[str, Any]], name: str = "ndcg@10") -> str:
    """Vertical bars of groups, with their intervals and sizes."""
    marks = ticks(max(row["intervals"][name][1] for row in rows))
    y = _scale(0, marks[-1], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(rows)
    wide = min(44.0, step * 0.62)
    parts = _levels(marks, y)
    for place, row in enumerate(rows):
        middle, (low, high) = LEFT + step * (place + 0.5), row["intervals"][name]
        parts.append(
            f'<rect class="model-fill" x="{middle - wide / 2:.1f}" y="{y(row[name]):.1f}" width="{wide:.1f}" rx="2" '
            f'height="{y(0) - y(row[name]):.1f}"><title>{row[name]:.4f}</title></rect>'
            f'<path class="whisker" d="M{middle:.1f} {y(low):.1f}V{y(high):.1f}M{middle - 4:.1f} {y(low):.1f}h8'
            f'M{middle - 4:.1f} {y(high):.1f}h8"/>'
            f'<text class="value" x="{middle:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{_span(row)}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{row["cases"]:,}</text>'
        )
    return _svg(parts, HEIGHT)


def _span(row: Mapping[str, Any]) -> str:
    low, high = row["from"], row["to"]
    if high is None:
        return f"≥{_short(low)}"
    return _short(low) if low == high else f"{_short(low)}–{_short(high)}"


def _short(number: int) -> str:
    return str(number) if number < 1000 else f"{number / 1000:.3g}k"


def curves(series: Mapping[str, Sequence[Point]], kept: int) -> str:
    """Lines over epochs, with a legend below and a dashed line at the epoch that was kept."""
    points = [p for line in series.values() for p in line]
    if not points:
        return ""
    last = max(e for e, _ in points)
    low, high = min(v for _, v in points), max(v for _, v in points)
    marks = ticks(high) if low < high / 2 or high <= 0 else ticks(high, low)
    x, y = _scale(1, max(last, 2), LEFT, WIDTH - RIGHT), _scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    parts = _levels(marks, y)
    parts += [
        f'<text x="{x(e):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{e:g}</text>' for e in _epoch_marks(int(last))
    ]
    if 1 <= kept <= last:
        parts.append(f'<line class="best" x1="{x(kept):.1f}" x2="{x(kept):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    at = float(LEFT)
    for place, (name, line) in enumerate(series.items()):
        style = place % 6
        path = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in line)
        dots = "".join(f'<circle class="d{style}" r="2" cx="{x(e):.1f}" cy="{y(v):.1f}"/>' for e, v in line)
        parts.append(f'<polyline class="curve c{style}" points="{path}"/>{dots if len(line) <= 40 else ""}')
        parts.append(f'<rect class="d{style}" x="{at:.0f}" y="{HEIGHT - 13}" width="10" height="10" rx="2"/>'
                     f'<text class="value" x="{at + 14:.0f}" y="{HEIGHT - 4}">{escape(name)}</text>')  # fmt: skip
        at += 34 + 6.2 * len(name)
    return _svg(parts, HEIGHT)


def _epoch_marks(last: int) -> list[int]:
    step = max(1, next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10_000) if last / s <= 10))
    return sorted({1, *range(step, last + 1, step)} - ({step} if 1 < step <= 2 and last > 12 else set()))


def _levels(marks: Sequence[float], y: Any) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(m):.1f}" y2="{y(m):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(m) + 4:.1f}" text-anchor="end">{_number(m)}</text>'
        for m in marks
    ]


def ticks(high: float, low: float = 0.0, about: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]: ticks(0.184) -> 0, 0.05, 0.1, 0.15, 0.2."""
    span = high - low if high > low else abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= about)
    first, end = math.floor(low / step + 1e-9), math.ceil(max(high, low + span) / step - 1e-9)
    return [round(step * n, 10) for n in range(first, end + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Any:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    return f"{value:g}"


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img">{"".join(parts)}</svg>'
