"""Why the projection head is dropped: probes before and after it (SimCLR).

Slides: "Explain in simple terms why we drop the projection head when moving to downstream tasks",
and "What did we learn from SimCLR?": a nonlinear head helps the model learn better representations.
Paper: Section 4.2, Figure 8: mlp > linear > none, and h is better than z = g(h) by over 10 points.

The loss asks z to be the same for both views, so z forgets what the augmentation changes (colour,
size, place), whether the downstream task needs it or not. With a head in between, only g has to
forget; h may keep it. Without a head z is h itself, and the loss works on all its d dimensions.

    python lessons/head.py --limit 2000
    python lessons/head.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to simclr.py. Writes lessons/head.csv, a line per run, and
lessons/head.png. All figures are of the validation images, never of the test set.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

HEADS = ["none", "linear", "mlp"]
TOP1 = {  # column: what it is
    "linear_top1": "h, linear",
    "head_linear_top1": "z, linear",
    "knn_top1": "h, k-NN",
    "head_knn_top1": "z, k-NN",
}
RANKS = {"rank_h": "rank of h", "rank_z": "rank of z"}


def draw(whole, means, epochs):
    """means: a row for each head."""
    for ax, columns in zip(whole.subplots(1, 2, width_ratios=[2, 1]), (TOP1, RANKS)):
        for i, (key, label) in enumerate(columns.items()):
            places = [x + (i - (len(columns) - 1) / 2) * 0.2 for x in range(len(HEADS))]
            heights = [row[key] for row in means]
            deviations = [row[f"{key}_sd"] for row in means]
            hatch = "//" if key in ("head_linear_top1", "head_knn_top1", "rank_z") else ""
            bars = ax.bar(places, heights, 0.18, yerr=deviations, label=label, hatch=hatch)
            ax.bar_label(bars, fmt="%.0f", fontsize=8)
        ax.set(xticks=range(len(HEADS)), xticklabels=HEADS, xlabel=f"head, after {epochs} epochs")
        ax.margins(y=0.25)
        ax.legend(fontsize=8, ncols=len(columns), loc="upper center")
    whole.axes[0].set(ylabel="validation top-1, %")
    whole.axes[1].set(ylabel="effective rank")


def main(argv=None):
    own, options = shared.parser(__doc__, "head", epochs=8).parse_known_args(argv)
    rows, keys = [], [*TOP1, *RANKS]
    for seed in range(own.seeds):
        for head in HEADS:
            _, data, run = shared.train(simclr, own, head, seed, [*options, "--head", head])
            if not data.labelled:
                common.fail("these images have no labels, there is nothing to probe for")
            rows.append(vars(run.args) | run.rows[-1])
    shared.write_csv(f"{own.out}/head.csv", rows, ["head", "seed", "epochs", *keys])
    means = shared.over_seeds(rows, ["head"], keys)
    shared.figure(f"{own.out}/head.png", (10, 4), draw, means, own.epochs)
    shared.show(means, ["head", *keys])


if __name__ == "__main__":
    main()
