#!/usr/bin/env python
"""Draws .ci/align.svg and .ci/scale.svg from tables in .ci/results.md. Standard library only.

    python .ci/figures.py
"""
import math
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"naive": "naive", "rc": "RC", "proden": "PRODEN", "lws": "LWS",            # first row
         "crdpll": "CRDPLL", "pico": "PiCO", "cavl": "CAVL", "cc": "CC"}            # second row
QS, LOW, HIGH, ZERO_SHOT = (0.1, 0.3, 0.5, 0.7, 0.9), 35, 75, 58.1
WIDTH, HEIGHT, PANEL_W, PANEL_H = 900, 436, 178, 140                    # pixels
LEFT, TOP, STEP_X, STEP_Y = 56, 34, 195, 196
GREY, BLUE, INK = "#767676", "#0b5fc5", "#24292f"


def read_table(path):
    """-> {objective: (alone, aligned)}, each a list of (mean, std), one per q; std 0 of one run."""
    table = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in NAMES and len(cells) == len(QS) and name not in table:
            pairs = [[float(v) for v in re.findall(r"[\d.]+", cell)] for cell in cells]
            pairs = [p if len(p) == 4 else [p[0], 0.0, p[1], 0.0] for p in pairs]
            table[name] = [p[:2] for p in pairs], [p[2:] for p in pairs]
    assert set(table) == set(NAMES), f"objectives missing in {path}: {set(NAMES) - set(table)}"
    return table


def x_of(q):
    return 10 + (q - QS[0]) / (QS[-1] - QS[0]) * (PANEL_W - 20)


def y_of(accuracy):
    return PANEL_H * (HIGH - min(max(accuracy, LOW), HIGH)) / (HIGH - LOW)


def points(values):
    return " ".join(f"{x_of(q):.1f},{y_of(v):.1f}" for q, v in zip(QS, values))


def text(x, y, words, color=INK, anchor="middle", more=""):
    return (f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" {more}>'
            f"{words}</text>")


def curve(series, color, dash):
    """A line through the means, dots, and a band of +- std."""
    upper, lower = ([m + s for m, s in series], [m - s for m, s in series])
    band = points(upper) + " " + " ".join(reversed(points(lower).split()))
    line = points([m for m, _ in series])
    dots = "".join(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.4" fill="{color}"/>'
                   for p in line.split())
    return (f'<polygon points="{band}" fill="{color}" fill-opacity="0.15"/>'
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-linejoin="round" {dash}/>{dots}')


def panel(i, name, alone, aligned):
    column, row = i % 4, i // 4
    out = [f'<g transform="translate({LEFT + column * STEP_X},{TOP + row * STEP_Y})">',
           text(0, -9, NAMES[name], anchor="start", more='font-size="14" font-weight="600"')]
    for v in (40, 50, 60, 70):
        out.append(f'<path d="M0 {y_of(v):.1f}H{PANEL_W}" stroke="#e8eaed"/>')
        if column == 0:
            out.append(text(-8, y_of(v) + 4, v, "#57606a", "end"))
    for q in QS:
        out.append(f'<path d="M{x_of(q):.1f} {PANEL_H}v4" stroke="#8c959f"/>')
        out.append(text(x_of(q), PANEL_H + 17, q, "#57606a"))
    out += [f'<path d="M0 {PANEL_H}H{PANEL_W}" stroke="#8c959f"/>',
            f'<path d="M0 {y_of(ZERO_SHOT):.1f}H{PANEL_W}" stroke="{INK}" stroke-width="1.2" '
            'stroke-dasharray="1.2 3"/>',
            curve(alone, GREY, 'stroke-dasharray="6 4"'), curve(aligned, BLUE, "")]
    if i == 0:
        out += [text(PANEL_W, y_of(70), "aligned", BLUE, "end", 'font-weight="600"'),
                text(x_of(0.3) - 8, y_of(42), "without", "#57606a", "start", 'font-weight="600"')]
    if column == 3:
        out += [text(PANEL_W + 6, y_of(ZERO_SHOT) - 2, "zero-shot", anchor="start"),
                text(PANEL_W + 6, y_of(ZERO_SHOT) + 12, ZERO_SHOT, anchor="start")]
    return "\n".join(out + ["</g>"])


def scale(path):
    """Memory and seconds over the number of images, both logarithmic: .ci/bench.py --scale."""
    rows = [[float(cell.replace(",", "")) for cell in line.replace("coft |", "").split("|")[1:6]]
            for line in path.read_text(encoding="utf-8").splitlines()   # images, held, GB, GB,
            if re.match(r"\| [\d,]+ \| 1[06]0?0? \| coft \| ", line)]  # seconds
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {PANEL_H + 90}" width="640" '
           f'height="{PANEL_H + 90}" font-size="12" font-family="sans-serif" role="img">',
           "<title>Memory and time of the tables over the number of images</title>",
           '<rect width="640" height="100%" rx="6" fill="#ffffff"/>']
    for left, column, name, low, high in ((60, 2, "peak memory, GB", 0.5, 10),
                                          (380, 4, "seconds a round", 0.5, 100)):
        def place(row):
            x = left + 220 * (math.log10(row[0]) - 4) / 2.2
            return x, 40 + PANEL_H * math.log(high / row[column]) / math.log(high / low)
        out.append(text(left, 24, name, anchor="start", more='font-size="14" font-weight="600"'))
        for v in (1, 10, 100):
            y = place([1, 0, v, 0, v])[1]
            if y >= 40:
                out += [f'<path d="M{left} {y:.1f}h230" stroke="#e8eaed"/>',
                        text(left - 8, y + 4, v, "#57606a", "end")]
        for n, says in ((1e4, "10,000"), (1e5, "100,000"), (1e6, "1 million")):
            out.append(text(place([n, 0, 1, 0, 1])[0], PANEL_H + 62, says, "#57606a"))
        for held, color, says in ((16, BLUE, "16 classes held"), (1000, GREY, "all 1,000")):
            marks = [place(row) for row in rows if row[1] == held]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in marks)
            out += [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
                    *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
                      for x, y in marks),
                    text(marks[1][0] + (8 if held == 16 else 0),
                         marks[1][1] + (16 if held == 16 else -8), says, color,
                         "start" if held == 16 else "end", 'font-weight="600"')]
    out += [text(320, PANEL_H + 82, "training images"), "</svg>\n"]
    path.with_name("scale.svg").write_text("\n".join(out), encoding="utf-8")


def main():
    scale(HERE / "results.md")
    table = read_table(HERE / "results.md")
    middle = LEFT + (3 * STEP_X + PANEL_W) / 2
    turned = f'transform="rotate(-90 16 {TOP + (STEP_Y + PANEL_H) / 2:.1f})" font-size="13"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'width="{WIDTH}" height="{HEIGHT}" font-size="12" font-family="system-ui, '
           "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\" role=\"img\">",
           "<title>Accuracy over q, without and with alignment, for eight objectives</title>",
           f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
           *(panel(i, name, *table[name]) for i, name in enumerate(NAMES)),
           text(16, TOP + (STEP_Y + PANEL_H) / 2, "test accuracy, %", more=turned),
           text(middle, HEIGHT - 14, "q: chance of a wrong label to be among the candidates",
                more='font-size="13"'), "</svg>\n"]
    (HERE / "align.svg").write_text("\n".join(out), encoding="utf-8")


if __name__ == "__main__":
    main()
