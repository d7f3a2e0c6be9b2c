"""Why the projection head is dropped: probes before and after it (SimCLR).

Slides: "Explain in simple terms why we drop the projection head when moving to downstream tasks",
and "What did we learn from SimCLR?": a nonlinear head helps the model learn better representations.
Paper: Section 4.2, Figure 8: mlp > linear > none, and h is better than z = g(h) by over 10 points.

The loss asks z to be the same for both views, so z forgets what the augmentation changes (colour,
size, place), whether the downstream task needs it or not. With a head in between, only g has to
forget; h may keep it. Without a head z is h itself, and the loss works on all its d dimensions.

    python lessons/head.py                                 3 short runs on `shapes`, 2 CPU cores
    python lessons/head.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to simclr.py. Writes lessons/head.csv, a line per run, and
lessons/head.png. All figures are of the validation images, never of the test set. What a few
epochs show is the start of training: the gap between h and z grows with it.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr

HEADS = ("none", "linear", "mlp")
TOP1 = {  # column -> what it is
    "linear_top1": "h, linear", "head_linear_top1": "z, linear",
    "knn_top1": "h, k-NN", "head_knn_top1": "z, k-NN",
}
RANKS = {"rank_h": "rank of h", "rank_z": "rank of z"}


def summary(rows):
    """head -> {column: (mean, standard deviation over seeds)}."""
    table = {}
    for head in HEADS:
        for key in TOP1 | RANKS:
            values = torch.tensor([row[key] for row in rows if row["head"] == head])
            deviation = values.std().item() if len(values) > 1 else 0.0
            table.setdefault(head, {})[key] = values.mean().item(), deviation
    return table


def figure(path, table, epochs):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(10, 4), layout="constrained")
    for ax, columns in zip(whole.subplots(1, 2, width_ratios=[2, 1]), (TOP1, RANKS)):
        for i, (key, label) in enumerate(columns.items()):
            place = [x + (i - (len(columns) - 1) / 2) * 0.2 for x in range(len(HEADS))]
            means, deviations = zip(*(table[head][key] for head in HEADS))
            hatch = "" if "h" in label.split(",")[0].split() else "//"  # z is hatched
            bars = ax.bar(place, means, 0.18, yerr=deviations, label=label, hatch=hatch)
            ax.bar_label(bars, fmt="%.0f", fontsize=8)
        ax.set(xticks=range(len(HEADS)), xticklabels=HEADS, xlabel=f"head, after {epochs} epochs")
        ax.margins(y=0.25)
        ax.legend(fontsize=8, ncols=len(columns), loc="upper center")
    whole.axes[0].set(ylabel="validation top-1, %")
    whole.axes[1].set(ylabel="effective rank")
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--epochs", type=int, default=8, help="of each run (8)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    p.add_argument("--runs", default="runs/lessons/head", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows = []
    for seed in range(args.seeds):
        for head in HEADS:
            own = ["--epochs", str(args.epochs), "--seed", str(seed), "--eval-every", "0"]
            out = ["--head", head, "--out", f"{args.runs}/{head}-s{seed}"]
            # In place of the report on test images: the evaluation on validation images.
            with mock.patch.object(simclr, "report", simclr.evaluate):
                rows.append(simclr.main([*own, *others, *out]) | {"head": head})
    if "linear_top1" not in rows[0]:
        common.fail("these images have no labels, there is nothing to probe for")
    keys = ["head", "seed", "epochs", *TOP1, *RANKS]
    lines = [keys] + [[f"{v:.5g}" if isinstance(v := row[k], float) else str(v) for k in keys]
                      for row in rows]
    common.write(f"{args.out}/head.csv", "".join(",".join(line) + "\n" for line in lines))
    table = summary(rows)
    figure(f"{args.out}/head.png", table, args.epochs)
    print("\nvalidation" + "".join(f"{label:>14}" for label in (TOP1 | RANKS).values()))
    for head, columns in table.items():
        print(f"{head:10}" + "".join(f"{m:8.1f} ±{d:4.1f}" for m, d in columns.values()))


if __name__ == "__main__":
    main()
