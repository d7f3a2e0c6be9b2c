"""What temperature and batch size do to the spread of learned embeddings (SimCLR).

Slides: "derive and visualize how batch size and temperature (tau) shape the spread of learned
embeddings", and "What did we learn from SimCLR?": it needs large batches. Paper: Table 5
(temperature), Figure 9 (batch size); Wang & Isola 2020 (alignment and uniformity); Wang & Liu 2021
(the smaller tau, the more uniform z).

With a small tau only the nearest negatives count in the softmax, and are pushed apart. With a large
tau all negatives weigh the same, and similar images stay together. But a small tau needs longer to
spread z: that it is behind in a short run says little of the end. So some values are trained for
longer, too.

    python lessons/temperature.py
    python lessons/temperature.py --dataset cifar10 --epochs 50 --longer 4 --batch-sizes 128 2048

Options that are not listed in --help go to simclr.py. Writes lessons/temperature.csv, a line per
run, and lessons/temperature.png: for each tau the cosine similarities of views of one image and of
two images, alignment and uniformity; top-1 against tau and, after the shorter runs alone, against
batch size. All results are on validation images. With the epochs fixed, a larger batch means fewer
steps with a larger rate (simclr.py scales it), as in the paper's Figure 9.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

BINS = 100  # of cosine similarity, from -1 to 1
CLAIM = "Temperature decides how far z spreads, and how long that takes"
TOP1 = {"linear_top1": "linear, ", "knn_top1": "k-NN, "}
STYLES = ["o:", "s-"]  # of the shorter and the longer runs
COLUMNS = ("tau batch_size seed epochs alignment uniformity spread rank_z rank_h linear_top1 "
           "knn_top1 head_linear_top1 head_knn_top1 untrained_linear_top1").split()


@torch.no_grad()
def similarities(net, data, run):
    """Histograms of the cosine similarity of two views: of one image, and of two images."""
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
    return row | shared.untrained(simclr, data, run) | similarities(net, data, run)


def draw(whole, by_tau, by_batch):
    """by_tau: a row for each duration and tau; by_batch: for each batch size."""
    left, middle, right = whole.subfigures(1, 3, width_ratios=[1.6, 1, 1])
    draw_similarities(left, by_tau)
    upper, lower = middle.subplots(2, 1, sharex=True)
    for ax, key, meaning in ((upper, "uniformity", "low: spread out"),
                             (lower, "alignment", "low: views agree")):
        draw_sweep(ax, by_tau, "tau", {key: ""})
        ax.set(ylabel=f"{key}\n({meaning})")
    lower.set(xlabel="tau")
    upper.legend(fontsize=9)
    for ax, rows, key in zip(right.subplots(2, 1), (by_tau, by_batch), ("tau", "batch_size")):
        ax.set(xlabel=key.replace("_", " "), ylabel="top-1 of h, %")
        if "linear_top1" in rows[0]:
            draw_sweep(ax, rows, key, TOP1)
            shared.floor(ax, rows[0]["untrained_linear_top1"], "untrained network, linear probe")
            ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.1))


def draw_similarities(whole, rows):
    """Histograms of both kinds of pairs, in a column for each duration and a row for each tau."""
    durations, taus = ([*dict.fromkeys(row[k] for row in rows)] for k in ("epochs", "tau"))
    axes = whole.subplots(len(taus), len(durations), sharex=True, squeeze=False)
    centres = (torch.arange(BINS) + 0.5) * 2 / BINS - 1
    for row in rows:
        ax = axes[taus.index(row["tau"]), durations.index(row["epochs"])]
        for kind, label in (("negative", "two images"), ("positive", "one image")):
            ax.fill_between(centres, row[kind], alpha=0.5, label=label)
    for ax in axes.flat:
        ax.set(yticks=[], xlim=(-1, 1), xticks=[-1, 0, 1])
        ax.set_visible(bool(ax.collections))
    for ax, tau in zip(axes[:, 0], taus):
        ax.set(ylabel=f"tau {tau:g}")
    for ax, epochs in zip(axes[0], durations):
        ax.set(title=f"{epochs} epochs")
    axes[0, 0].legend(fontsize=8, title="views of")
    whole.supxlabel("cosine similarity of two views", fontsize=10)


def draw_sweep(ax, rows, x, columns):
    """Columns, key -> label, over x, which has a logarithmic scale; a line for each duration."""
    for style, epochs in zip(STYLES, dict.fromkeys(row["epochs"] for row in rows)):
        line = [row for row in rows if row["epochs"] == epochs]
        for i, (key, label) in enumerate(columns.items()):
            ax.errorbar([row[x] for row in line], [row[key] for row in line],
                        [row[f"{key}_sd"] for row in line], fmt=style, color=f"C{i}", capsize=3,
                        label=f"{label}{epochs} epochs")
    values = sorted({row[x] for row in rows})
    ax.set_xscale("log")
    ax.set_xticks(values, values)
    ax.minorticks_off()


def answer(by_tau):
    """Is z less spread out with the smallest tau than with the largest, and more in longer runs?"""
    signs, text = [], []
    for epochs in dict.fromkeys(row["epochs"] for row in by_tau):
        rows = [row for row in by_tau if row["epochs"] == epochs]
        first, last = rows[0], rows[-1]
        signs.append(shared.compare(first, last, "uniformity"))
        text.append(f"after {epochs} epochs uniformity is {first['uniformity']:.1f} with tau "
                    f"{first['tau']:g} and {last['uniformity']:.1f} with {last['tau']:g}")
        if "linear_top1" in first:
            text[-1] += (f" (linear probe {first['linear_top1']:.1f} and "
                         f"{last['linear_top1']:.1f} %)")
    return shared.answer([signs == [1, -1]], "; ".join(text) + ".")


def report(own, rows, keys, recipe):
    """The table and the figure of the runs so far; recipe: the row that both sweeps share."""
    shared.write_csv(f"{own.out}/temperature.csv", rows, keys)
    by = ["epochs", "tau", "batch_size"]
    means = shared.over_seeds(rows, by, [*keys[4:], "positive", "negative"])
    means.sort(key=lambda row: [row[k] for k in by])
    by_tau = [row for row in means if row["batch_size"] == recipe["batch_size"]]
    by_batch = [row for row in means if all(row[k] == recipe[k] for k in ("tau", "epochs"))]
    shared.figure(f"{own.out}/temperature.png", (15, 6), draw, by_tau, by_batch, claim=CLAIM,
                  answer=answer(by_tau))
    shared.show(means, [*by, *keys[4:]])


def main(argv=None):
    p = shared.parser(__doc__, "temperature", epochs=4)
    p.add_argument("--taus", **common.POSITIVE, nargs="*", default=[0.05, 0.1, 0.2, 0.5, 2.0],
                   help="values of tau (0.05 0.1 0.2 0.5 2)")
    p.add_argument("--longer", **common.FROM_2, default=6,
                   help="how many times as many epochs the longer runs have (6)")
    p.add_argument("--longer-taus", **common.POSITIVE, nargs="*", default=[0.05, 0.2, 2.0],
                   help="values of tau for longer runs (0.05 0.2 2)")
    p.add_argument("--batch-sizes", **common.FROM_2, nargs="*", default=[16, 256],
                   help="at the recipe's tau, in addition to its batch size (16 256)")
    own, options = p.parse_known_args(argv)
    epochs = own.epochs * own.longer
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
        for tau in own.longer_taus:
            flags = ["--temperature", tau, "--epochs", epochs]
            rows.append(measure(own, f"tau {tau:g} longer", seed, [*options, *flags]))
        keys = [k for k in COLUMNS if k in rows[0]]  # no top-1 without labels
        report(own, rows, keys, recipe)


if __name__ == "__main__":
    main()
