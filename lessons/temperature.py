"""How batch size and temperature shape the spread of learned embeddings (SimCLR).

Slides: "you will be able to: derive and visualize how batch size and temperature (tau) shape the
spread of learned embeddings", and "What did we learn from SimCLR?": it needs large batches. Paper:
Table 5 (temperature), Figure 9 (batch size); Wang & Isola 2020 (alignment and uniformity).

A small tau makes the softmax look at the hardest negatives only and magnifies small differences.
Trained to the end it is known to spread z over the sphere (Wang & Isola), while a large tau weighs
all negatives alike. The figure here shows the start of training, where it is the other way round:
with tau 0.05 small distances are enough for the loss, so z spreads least (0.43 of 1; 0.94 at 0.5).

    python lessons/temperature.py                          7 short runs on `shapes`, 2 CPU cores
    python lessons/temperature.py --dataset cifar10 --epochs 50 --seeds 3 --batch-sizes 128 2048

Options that are not listed in --help go to simclr.py. Writes lessons/temperature.csv, a line per
run, and lessons/temperature.png: cosine similarities of positive and negative pairs for each tau,
the alignment-uniformity plane, top-1 against tau and against batch size.

All figures are of the validation images, never of the test set. With the epochs fixed a larger
batch means fewer steps with a larger rate (simclr.py scales it), as in the paper's Figure 9.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr

BINS = 100  # of cosine similarity, from -1 to 1
COLUMNS = ("tau batch_size seed epochs alignment uniformity spread rank_z rank_h linear_top1 "
           "knn_top1 head_linear_top1 head_knn_top1").split()


@torch.no_grad()
def measure(state, data, args, run):
    """In place of simclr.report: validation images only, and the similarities of pairs of views."""
    results, net = simclr.evaluate(state, data, args, run), state["net"]
    results |= {"tau": args.tau, "batch_size": args.batch_size}

    def project(x):
        return [F.normalize(net(v)[1].float()) for v in simclr.augment(x, args)]

    net.eval()
    part = data.val[0], data.val[1][:1024]
    seed = (args.seed, 2**31)
    z1, z2, _ = simclr.embed(project, simclr.crops(args), part, args, run, seed)
    s = (z1 @ z2.T).cpu().clamp(-1, 1)  # (n, n): on the diagonal two views of the same image
    same = torch.eye(len(s), dtype=torch.bool)
    for name, values in (("positive", s[same]), ("negative", s[~same])):
        density = torch.histc(values, BINS, -1, 1) * BINS / 2 / len(values)
        results[name] = density.tolist()
    return results


def mean(rows, key):
    """The mean of a figure, or of a histogram bin by bin, over seeds."""
    return torch.tensor([row[key] for row in rows]).mean(0)


def figure(path, by_tau, by_batch, batch):
    """by_tau, by_batch: value -> rows of all seeds; batch: that of the recipe."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(14, 6), layout="constrained")
    left, middle, right = whole.subfigures(1, 3, width_ratios=[1.1, 1, 0.9])
    centres = (torch.arange(BINS) + 0.5) * 2 / BINS - 1
    axes = left.subplots(len(by_tau), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (tau, rows) in zip(axes, by_tau.items()):
        for name in ("negative", "positive"):
            ax.fill_between(centres, mean(rows, name), alpha=0.5, label=f"{name} pairs")
        ax.set(ylabel=f"tau {tau:g}", yticks=[])
    axes[0].legend(fontsize=8)
    axes[-1].set(xlabel="cosine similarity of two views", xlim=(-1, 1))
    ax = middle.subplots()
    for name, marker, groups in (("tau", "o-", by_tau), ("batch", "s--", by_batch)):
        x, y = ([mean(rows, k) for rows in groups.values()] for k in ("uniformity", "alignment"))
        ax.plot(x, y, marker, label=name, alpha=0.7)
        for value, *at in zip(groups, x, y):
            if name == "batch" and value == batch:
                continue  # the recipe, named with its tau
            ax.annotate(f" {name} {value:g}", at, fontsize=8)
    ax.set(xlabel="uniformity (low: spread out)", ylabel="alignment (low: views agree)")
    ax.legend(fontsize=8)
    sweeps = ("tau", by_tau), ("batch size", by_batch)
    for ax, (name, groups) in zip(right.subplots(2, 1), sweeps):
        for key in ("linear_top1", "knn_top1"):
            if all(key in row for rows in groups.values() for row in rows):
                ax.plot(list(groups), [mean(r, key) for r in groups.values()], "o-", label=key[:-5])
        ax.set(xlabel=name, ylabel="validation top-1, %", xscale="log", xticks=list(groups),
               xticklabels=[f"{value:g}" for value in groups])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    whole.savefig(path)


def group(rows, key):
    return {v: [r for r in rows if r[key] == v] for v in sorted({r[key] for r in rows})}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--taus", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    p.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 128],
                   help="at the recipe's tau, beside the recipe's batch size (32 128)")
    p.add_argument("--epochs", type=int, default=4, help="of each run (4)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds; the figure has means (1)")
    p.add_argument("--runs", default="runs/lessons/temperature", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows = []

    def run(seed, *change):
        name = "".join(change).strip("-") or "recipe"
        own = ["--epochs", str(args.epochs), "--seed", str(seed), "--eval-every", "0"]
        out = ["--out", f"{args.runs}/{name}-s{seed}"]
        with mock.patch.object(simclr, "report", measure):
            rows.append(simclr.main([*own, *others, *change, *out]))
        return rows[-1]["tau"], rows[-1]["batch_size"]

    for seed in range(args.seeds):
        tau, batch = run(seed)  # those of the recipe, the centre of both sweeps
        for other in args.taus:
            if other != tau:
                run(seed, "--temperature", str(other))
        for other in args.batch_sizes:
            if other != batch:
                run(seed, "--batch-size", str(other))
    keys = [k for k in COLUMNS if k in rows[0]]  # no top-1 without labels
    lines = [keys] + [[f"{row[k]:.5g}" for k in keys] for row in rows]
    common.write(f"{args.out}/temperature.csv", "".join(",".join(line) + "\n" for line in lines))
    by_tau = group([row for row in rows if row["batch_size"] == batch], "tau")
    by_batch = group([row for row in rows if row["tau"] == tau], "batch_size")
    figure(f"{args.out}/temperature.png", by_tau, by_batch, batch)
    print("\n".join("".join(f"{cell:>17}" for cell in line) for line in lines))


if __name__ == "__main__":
    main()
