"""Accuracy against minutes of training, from a CSV of table.py.

    python benchmarks/figure.py --csv benchmarks/results.csv --name '*-shapes' \\
        --out benchmarks/shapes.png
    python benchmarks/figure.py --csv benchmarks/cifar10.csv --name '*-cifar10-e*' --peers \\
        --out benchmarks/cifar10.png

A colour per method, a line through its budgets of epochs, bars of a standard deviation over seeds.
Dashed: floors, and the same networks with labels (supervised.py), means over the experiments. With
--peers also figures of other code, and k-NN is that of the -k200 evaluations, with as many
neighbours as theirs.
"""

import argparse
import csv
import math
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = {"linear_top1": "linear probe", "knn_top1": "k-NN"}
PEERS = {  # CIFAR-10, ResNet-18: what, minutes, top-1
    "linear_top1": [  # solo-learn's README, classifier trained along
        ("solo-learn SimCLR e1000", None, 90.74), ("solo-learn MoCo v2+ e1000", None, 92.94),
        ("solo-learn BYOL e1000", None, 92.58), ("solo-learn DINO e1000", None, 89.52)],
    "knn_top1": [  # https://docs.lightly.ai, benchmarks: batch 512, k 200, best of all epochs
        ("lightly SimCLR e200", None, 84.8), ("lightly MoCo e200", None, 84.7),
        ("lightly BYOL e200", None, 86.8), ("lightly DINO e200", None, 81.3),
        # its script on images re-encoded as JPEG, one H100, 870 s
        ("lightly SimCLR e80, JPEG", 14.5, 74.97)],
}
COLOURS = dict(zip("simclr moco byol dino-resnet18 dino ibot pretext _ dinov2".split(),
                   colormaps["tab10"].colors))  # of methods; _ is grey
PEER, LEVEL = "black", "0.45"


def network(row):
    """Of an experiment, by its name."""
    vit = re.search("dino|ibot", row["experiment"]) and "resnet" not in row["experiment"]
    return "ViT" if vit else "ResNet"


def points(rows, key, suffix=""):
    """Method -> [(epochs, minutes, top-1, deviation)]. suffix: of the evaluations that top-1 is
    from, the minutes are those of the training, whose name has none."""
    table, found = {row["experiment"]: row for row in rows}, {}
    for name, row in table.items():
        judged = table.get(name + suffix)
        if judged and judged[key] and float(row["train_seconds"]) and not row["supervised_top1"]:
            dataset = re.match(r"\w+", Path(row["dataset"]).name)[0]
            method = name.split(f"-{dataset}")[0]  # simclr, dino-resnet18, ...
            found.setdefault(method, []).append((
                int(row["epochs"]), float(row["train_seconds"]) / 60, float(judged[key]),
                float(judged[f"{key}_sd"] or 0)))
    return {method: sorted(found[method]) for method in sorted(found)}


def levels(rows, key):
    """[(label, height)] of the dashed lines."""
    lines = [("pixels", f"pixels_{key}", rows)]
    for kind in ("ResNet", "ViT"):
        own = [row for row in rows if network(row) == kind]
        lines += [(f"{kind}, untrained", f"untrained_{key}", own),
                  (f"{kind}, supervised", "supervised_top1" if key == "linear_top1" else key,
                   [row for row in own if row["supervised_top1"]])]
    values = [(label, [float(row[k]) for row in some if row[k]]) for label, k, some in lines]
    return [(label, sum(v) / len(v)) for label, v in values if v]


def spread(heights, gap):
    """The same order, at least a gap apart, clusters where they were on average."""
    clusters = []  # [indices, centre]
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        clusters.append(([i], heights[i]))
        while len(clusters) > 1:
            (a, low), (b, high) = clusters[-2:]
            if high - low >= gap * (len(a) + len(b)) / 2:
                break
            centre = (low * len(a) + high * len(b)) / len(a + b)
            clusters[-2:] = [(a + b, centre)]
    placed = {i: centre + gap * (n - (len(members) - 1) / 2)
              for members, centre in clusters for n, i in enumerate(members)}
    return [placed[i] for i in range(len(heights))]


def margin(ax, entries):
    """(text, height, colour) at the right edge, with a tick to where the text had to go."""
    low, high = ax.get_ylim()
    places = spread([height for _, height, _ in entries], (high - low) / 28)
    for (text, height, colour), place in zip(entries, places):
        ax.annotate(f"{text} {height:.1f}", (1, height), (1.06, place), xycoords=("axes fraction",
                    "data"), textcoords=("axes fraction", "data"), color=colour, fontsize=8,
                    va="center", arrowprops=dict(arrowstyle="-", color=colour, lw=0.7))


def beside(ax, texts):
    """(text, x, y, deviation, colour) next to their points, where no point, line or other text is,
    if there is such a place. The axes have their final size."""
    draw = ax.figure.canvas.get_renderer()
    taken = [ax.transData.transform([(x, y - sd), (x, y + sd)]) + [[-5, -5], [5, 5]]
             for _, x, y, sd, _ in texts]
    for line in (line for line in ax.lines if line.get_linestyle() != "None"):
        path = line.get_transform().transform(line.get_xydata())  # a point every pixel or two
        for a, b in zip(path[:-1], path[1:]):
            taken += [[place, place] for place in np.linspace(a, b, 300)]
    taken = np.array(taken)  # (n, 2, 2): low x, y, high x, y
    sides = [(dx, dy) for far in (7, 14, 24) for dx, dy in (
        (far, 0), (-far, 0), (0, far), (0, -far), (far, far), (far, -far), (-far, far),
        (-far, -far))]

    def covered(box):
        low, high = taken[:, 0], taken[:, 1]
        inside = (box.min > ax.bbox.min).all() and (box.max < ax.bbox.max).all()
        return ((low < box.max) & (high > box.min)).all(1).sum() + 1000 * (not inside)

    for text, x, y, _, colour in texts:
        tried = []
        for dx, dy in sides:
            note = ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=colour,
                               ha=("center", "left", "right")[(dx > 0) - (dx < 0)],
                               va=("center", "bottom", "top")[(dy > 0) - (dy < 0)], fontsize=8)
            note.set_in_layout(False)
            tried.append((covered(box := note.get_window_extent(draw)), len(tried), note, box))
        best = min(tried)
        for other in tried:
            if other is not best:
                other[2].remove()
        taken = np.concatenate([taken, best[3].get_points()[None]])


def panel(ax, key, rows, peers):
    """-> the texts that go beside its points."""
    suffix = "-k200" * (peers and key == "knn_top1")
    series = points(rows, key, suffix)
    published, texts = PEERS[key] if peers else [], []
    for method in series:
        colour = COLOURS.get(method, colormaps["tab10"].colors[-1])
        epochs, minutes, top1, sd = zip(*series[method])
        ax.errorbar(minutes, top1, [s or math.nan for s in sd], fmt="o-", ms=5, capsize=3,
                    color=colour)
        texts += [(f"{method} e{e}" if len(epochs) > 1 else method, *place, colour)
                  for e, *place in series[method]]
    for text, x, y in published:
        if x:
            ax.plot(x, y, "D", ms=5, color=PEER)
            texts.append((text, x, y, 0, PEER))
    lines = levels([row for row in rows if row["supervised_top1"] or
                    row["experiment"].endswith("-k200") == bool(suffix)], key)
    for _, height in lines:
        ax.axhline(height, color=LEVEL, ls="--", lw=0.8, zorder=0)
    ax.set(xscale="log", xlabel="minutes of training", ylabel="top-1, %",
           title=PANELS[key] + ", k = 200" * bool(suffix))
    ax.margins(y=0.08)
    heights = [*ax.get_ylim(), *(y for _, _, y in published)]
    ax.set_ylim(min(heights), max(heights))
    low, high = ax.get_xlim()
    low, high = low / 1.2, high * 1.2
    ticks = [t for b in range(-3, 5) for a in (1, 2, 5) if low <= (t := a * 10**b) <= high]
    ax.set(xlim=(low, high))
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xticks([], minor=True)
    margin(ax, [(*line, LEVEL) for line in lines] +
           [(text, y, PEER) for text, x, y in published if not x])
    return texts


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--csv", required=True, help="of table.py")
    p.add_argument("--name", default="*", help="which experiments, a pattern (*)")
    p.add_argument("--peers", action="store_true", help="also CIFAR-10 figures of other code")
    p.add_argument("--out", required=True, help="PNG to write")
    args = p.parse_args(argv)
    with open(args.csv) as file:
        rows = [row for row in csv.DictReader(file) if fnmatch(row["experiment"], args.name)]
    if not rows:
        raise SystemExit(f"error: no experiment in {args.csv} is called {args.name}")
    for row in rows:
        row.setdefault("supervised_top1", "")  # in older tables
    figure = Figure(figsize=(12, 6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2)
    texts = [panel(ax, key, rows, args.peers) for ax, key in zip(axes, PANELS)]
    data, device, seeds = (" or ".join(sorted({row[k] for row in rows}))
                           for k in ("dataset", "device", "seeds"))
    figure.suptitle(f"{data}, {device}, {seeds} seed{'s' * (seeds != '1')}")
    FigureCanvasAgg(figure).draw()  # now the axes have their size
    for ax, some in zip(axes, texts):
        beside(ax, some)
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
