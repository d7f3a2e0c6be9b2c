"""How batch size and temperature shape the spread of learned embeddings (SimCLR).

Slides: "derive and visualize how batch size and temperature (tau) shape the spread of learned
embeddings", and "What did we learn from SimCLR?": it needs large batches. Paper:
Table 5 (temperature), Figure 9 (batch size); Wang & Isola 2020 (alignment and uniformity).

With a small tau the softmax is over the hardest negatives, and small differences count. Trained to
the end it is known to spread z over the sphere (Wang & Isola), while a large tau weighs all
negatives alike.

    python lessons/temperature.py --limit 2000
    python lessons/temperature.py --dataset cifar10 --epochs 50 --seeds 3 --batch-sizes 128 2048

Options that are not listed in --help go to simclr.py. Writes lessons/temperature.csv, a line per
run, and lessons/temperature.png: cosine similarities of positive and negative pairs for each tau,
the alignment-uniformity plane, top-1 against tau and against batch size.

All figures are of the validation images, never of the test set. With the epochs fixed a larger
batch means fewer steps with a larger rate (simclr.py scales it), as in the paper's Figure 9.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

BINS = 100  # of cosine similarity, from -1 to 1
COLUMNS = ("tau batch_size seed epochs alignment uniformity spread rank_z rank_h linear_top1 "
           "knn_top1 head_linear_top1 head_knn_top1").split()


@torch.no_grad()
def similarities(net, data, run):
    """Histograms of the cosine similarity of two views, of one image and of two."""
    net.eval()

    def two_views(views):
        return [F.normalize(net(x)[1].float()) for x in simclr.augment(views, run.args)]

    z1, z2, _ = common.embed(two_views, data.val, simclr.crops(run.args), run, limit=1024)
    s = (z1 @ z2.T).cpu().clamp(-1, 1)  # (n, n), on the diagonal two views of one image
    same = torch.eye(len(s), dtype=torch.bool)
    shares = {}
    for kind, values in (("positive", s[same]), ("negative", s[~same])):
        counts = torch.histc(values, BINS, -1, 1)
        shares[kind] = (counts / len(values)).tolist()
    return shares


def measure(own, name, seed, options):
    """One run -> its row."""
    net, data, run = shared.train(simclr, own, name, seed, options)
    row = vars(run.args) | run.rows[-1]
    row["tau"] = run.args.temperature
    return row | similarities(net, data, run)


def draw(whole, means, recipe):
    """means: a row for each tau and batch size; recipe: the row in the middle of both sweeps."""
    means = sorted(means, key=lambda row: (row["tau"], row["batch_size"]))
    by_tau = [row for row in means if row["batch_size"] == recipe["batch_size"]]
    by_batch = [row for row in means if row["tau"] == recipe["tau"]]
    left, middle, right = whole.subfigures(1, 3, width_ratios=[1.1, 1, 0.9])
    draw_similarities(left.subplots(len(by_tau), 1, sharex=True, squeeze=False)[:, 0], by_tau)
    plane = middle.subplots()
    plane.set(xlabel="uniformity (low: spread out)", ylabel="alignment (low: views agree)")
    draw_plane(plane, "tau", by_tau, "bottom")
    draw_plane(plane, "batch_size", by_batch, "top")
    upper, lower = right.subplots(2, 1)
    draw_top1(upper, "tau", by_tau)
    draw_top1(lower, "batch_size", by_batch)


def draw_similarities(axes, rows):
    """Histograms of both kinds of pairs, in a panel for each tau."""
    centres = (torch.arange(BINS) + 0.5) * 2 / BINS - 1
    for ax, row in zip(axes, rows):
        for kind in ("negative", "positive"):
            ax.fill_between(centres, row[kind], alpha=0.5, label=f"{kind} pairs")
        ax.set(ylabel=f"tau {row['tau']:g}", yticks=[])
    axes[0].legend(fontsize=8)
    axes[-1].set(xlabel="cosine similarity of two views", xlim=(-1, 1))


def draw_plane(ax, key, rows, side):
    """Alignment over uniformity along a sweep of key, which is written at this side of a point."""
    x = [row["uniformity"] for row in rows]
    y = [row["alignment"] for row in rows]
    ax.plot(x, y, "o-", label=key.replace("_", " "), alpha=0.7)
    for row, *place in zip(rows, x, y):
        ax.annotate(f" {row[key]:g}", place, fontsize=8, va=side)
    ax.legend(fontsize=8)


def draw_top1(ax, key, rows):
    values = [row[key] for row in rows]
    for top1 in ("linear_top1", "knn_top1"):
        if top1 in rows[0]:
            ax.plot(values, [row[top1] for row in rows], "o-", label=top1[:-5])
    ax.set(xlabel=key.replace("_", " "), ylabel="validation top-1, %", xscale="log")
    ax.set_xticks(values, values)
    ax.minorticks_off()
    ax.legend(fontsize=8)


def main(argv=None):
    p = shared.parser(__doc__, "temperature", epochs=4)
    p.add_argument("--taus", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    p.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 128],
                   help="at the recipe's tau, beside the recipe's batch size (32 128)")
    own, options = p.parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        recipe = measure(own, "recipe", seed, options)  # the middle of both sweeps
        rows.append(recipe)
        for tau in own.taus:
            if tau != recipe["tau"]:
                rows.append(measure(own, f"tau {tau:g}", seed, [*options, "--temperature", tau]))
        for size in own.batch_sizes:
            if size != recipe["batch_size"]:
                rows.append(measure(own, f"batch {size}", seed, [*options, "--batch-size", size]))
    keys = [k for k in COLUMNS if k in rows[0]]  # no top-1 without labels
    shared.write_csv(f"{own.out}/temperature.csv", rows, keys)
    means = shared.over_seeds(rows, ["tau", "batch_size"], [*keys[4:], "positive", "negative"])
    shared.figure(f"{own.out}/temperature.png", (14, 6), draw, means, recipe)
    shared.show(means, ["tau", "batch_size", *keys[4:]])


if __name__ == "__main__":
    main()
