"""Accuracy against minutes of training, from a CSV of table.py.

    python benchmarks/figure.py --csv benchmarks/cifar10.csv --name '*-cifar10-e*' --peers \\
        --out benchmarks/cifar10.png

A colour per method, a line through its epoch budgets, error bars of one standard deviation over
seeds. Horizontal lines: floors, and the same networks with labels (supervised.py), means over the
experiments. With --peers also the results of other code, in the colour of the method; k-NN is then
that of the -k200 evaluations, with as many neighbours as theirs (ceilings: with 20).
"""

import argparse
import csv
import re
from fnmatch import fnmatch

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

PANELS = {"linear_top1": "linear probe", "knn_top1": "k-NN"}
PEERS = {  # CIFAR-10, ResNet-18: method, whose result, minutes, top-1
    "linear_top1": [  # solo-learn's README, classifier trained alongside
        ("simclr", "solo-learn, 1000 epochs", None, 90.74),
        ("moco", "solo-learn, v2+, 1000 epochs", None, 92.94),
        ("byol", "solo-learn, 1000 epochs", None, 92.58),
        ("dino-resnet18", "solo-learn, 1000 epochs", None, 89.52),
    ],
    "knn_top1": [  # https://docs.lightly.ai, benchmarks: batch 512, k 200, best of all epochs
        ("simclr", "lightly, 200 epochs", None, 84.8),
        ("moco", "lightly, 200 epochs", None, 84.7),
        ("byol", "lightly, 200 epochs", None, 86.8),
        ("dino-resnet18", "lightly, 200 epochs", None, 81.3),
        # its script on images re-encoded as JPEG, one H100, 870 s
        ("simclr", "lightly, 80 epochs, JPEG", 14.5, 74.97),
    ],
}
NAMES = "simclr moco byol dino-resnet18 dino ibot pretext dinov2".split()
COLOURS = dict(zip(NAMES, colormaps["tab10"].colors))


def method_of(name):
    """supervised-dino-cifar10-e200 -> dino; dino-resnet18-cifar10-e200 -> dino-resnet18."""
    return re.match(r"(supervised-)?([a-z0-9]+(-resnet18)?)", name)[2]


def network_of(row):
    method = method_of(row["experiment"])
    return "ViT" if method in ("dino", "ibot", "dinov2") else "ResNet"


def points(rows, key, suffix=""):
    """method -> [(epochs, minutes, top-1, deviation)]. suffix: of the runs whose top-1
    counts; the minutes are from the training, whose name has none, unless one run did both."""
    table, found = {row["experiment"]: row for row in rows}, {}
    for name, row in table.items():
        seconds = float(row["train_seconds"])
        judged = table.get(name + suffix, row if name.endswith(suffix) else None)
        if seconds and judged and judged[key] and not row["supervised_top1"]:
            point = int(row["epochs"]), seconds / 60, float(judged[key]), judged[f"{key}_sd"]
            found.setdefault(method_of(name), []).append(point)
    return {method: sorted(found[method]) for method in sorted(found)}


def levels(rows, key):
    """[(label, height, line style, colour)] of floors and ceilings, means over the experiments."""
    supervised = "supervised_top1" if key == "linear_top1" else key
    ceilings = [row for row in rows if row["supervised_top1"]]
    lines = [("pixels", f"pixels_{key}", rows, "-.", "black")]
    for kind, colour in (("ResNet", "black"), ("ViT", "tab:olive")):
        own, trained = ([row for row in some if network_of(row) == kind]
                        for some in (rows, ceilings))
        lines += [(f"{kind}, untrained", f"untrained_{key}", own, ":", colour),
                  (f"{kind}, supervised", supervised, trained, "--", colour)]
    found = []
    for label, column, some, style, colour in lines:
        values = [float(row[column]) for row in some if row[column]]
        if values:
            height = sum(values) / len(values)
            found.append((f"{label} {height:.1f}", height, style, colour))
    return found


def panel(ax, key, rows, peers):
    suffix = "-k200" if peers and key == "knn_top1" else ""
    for method, series in points(rows, key, suffix).items():
        epochs, minutes, top1, deviations = zip(*series)
        bars = [float(d or 0) for d in deviations]
        ax.errorbar(minutes, top1, bars, fmt="o-", ms=5, color=COLOURS[method], label=method)
        for e, *place in zip(epochs, minutes, top1):
            ax.annotate(f"e{e}", place, (4, 4), textcoords="offset points", fontsize=7)
    for method, whose, minutes, top1 in PEERS[key] if peers else []:
        label, colour = f"{method}, {whose} {top1:.1f}", COLOURS[method]
        if minutes:
            ax.plot(minutes, top1, "D", ms=5, color=colour, label=label)
        else:
            ax.axhline(top1, color=colour, ls=(0, (1, 3)), label=label)
    judged = [row for row in rows if row["supervised_top1"]
              or (row["experiment"].endswith("-k200") if suffix else float(row["train_seconds"]))]
    for label, height, style, colour in levels(judged, key):
        ax.axhline(height, color=colour, ls=style, lw=0.9, zorder=0, label=label)
    ax.set(xscale="log", xlabel="minutes of training", ylabel="top-1, %", title=PANELS[key])
    ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--csv", required=True, help="CSV of table.py")
    p.add_argument("--name", default="*", help="which experiments, a pattern (*)")
    p.add_argument("--peers", action="store_true", help="also CIFAR-10 results of other code")
    p.add_argument("--out", required=True, help="PNG to write")
    args = p.parse_args(argv)
    with open(args.csv) as file:
        rows = [{"supervised_top1": ""} | row  # older tables have no such column
                for row in csv.DictReader(file) if fnmatch(row["experiment"], args.name)]
    if not rows:
        raise SystemExit(f"error: no experiment in {args.csv} is called {args.name}")
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    for ax, key in zip(figure.subplots(1, 2), PANELS):
        panel(ax, key, rows, args.peers)
    what = [" or ".join(sorted({row[k] for row in rows})) for k in ("dataset", "device", "seeds")]
    figure.suptitle("{}, {}, seeds: {}".format(*what))
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
