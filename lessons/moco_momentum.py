"""How slowly the key encoder has to follow (MoCo).

Slides: "Momentum Contrast (MoCo)": the keys are encoded by a moving average of the query encoder.
Paper: v1, Section 4.1: training fails with m = 0, where keys of different ages do not fit together,
and is better the slower f_k follows, from 0.9 (55.2 % on ImageNet) to 0.999 (59.0 %).

What may count is how far f_k moves while a key waits in the queue. So there are two queues: the
recipe's, where a key waits for about eight steps, and one of a single batch, where it waits for
one. With m = 1 f_k stays the random network of the start: what is learned without any following. A
run on the built-in set has a few hundred steps, not a million, so at 0.999 f_k hardly moves either.

    python lessons/moco_momentum.py
    python lessons/moco_momentum.py --dataset cifar10 --epochs 100 --short 512

Options that are not listed in --help go to moco.py. Writes lessons/moco_momentum.csv, a line per
run, and lessons/moco_momentum.png. All results are on validation images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import moco
from lessons import shared

CLAIM = "MoCo's keys need a slow encoder: m = 0 fails"
KEYS = ["linear_top1", "knn_top1", "spread", "rank_z", "loss", "untrained_linear_top1"]
TOP1 = {"linear_top1": "linear probe", "knn_top1": "k-NN"}


def draw(whole, means):
    """means: a row for each size of the queue and each m."""
    sizes = [*dict.fromkeys(row["queue"] for row in means)]
    counts = [sum(row["queue"] == size for row in means) for size in sizes]
    axes = whole.subplots(1, len(sizes), sharey=True, squeeze=False, width_ratios=counts)[0]
    for ax, size in zip(axes, sizes):
        rows = [row | {"m": f"{row['m']:g}"} for row in means if row["queue"] == size]
        shared.bars(ax, rows, "m", TOP1)
        shared.floor(ax, rows[0]["untrained_linear_top1"], "untrained network, linear probe")
        ax.set(title=f"{size} keys", xlabel="m, momentum of the key encoder")
    axes[0].set(ylabel="top-1 of h, %")
    axes[0].legend(fontsize=9, ncols=2, loc="upper left")


def answer(means):
    """For each queue: is the smallest m no better than untrained, and the best m above it, in both
    probes?"""
    held, text = [], []
    for size in dict.fromkeys(row["queue"] for row in means):
        rows = [row for row in means if row["queue"] == size]
        first, best = rows[0], max(rows, key=lambda row: row["knn_top1"])
        fails = first["linear_top1"] <= first["untrained_linear_top1"]
        held.append(fails and all(shared.compare(best, first, key) > 0 for key in TOP1))
        ends = " and ".join(f"m = {row['m']:g} ends at {row['linear_top1']:.0f} ± "
                            f"{row['linear_top1_sd']:.0f} %" for row in (first, best))
        text.append(f"with {size} keys {ends}")
    return shared.answer(held, f"{'; '.join(text)}.")


def report(own, rows):
    """The table and the figure of the runs so far."""
    shared.write_csv(f"{own.out}/moco_momentum.csv", rows, ["queue", "m", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["queue", "m"], KEYS)
    shared.figure(f"{own.out}/moco_momentum.png", (11, 4.8), draw, means, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["queue", "m", *KEYS])


def main(argv=None):
    p = shared.parser(__doc__, "moco_momentum", epochs=8)
    p.add_argument("--ms", **common.SHARE, nargs="+", default=[0, 0.5, 0.9, 0.99, 0.999, 1],
                   help="values of m (0 0.5 0.9 0.99 0.999 1)")
    p.add_argument("--short", **common.FROM_1, default=64, help="keys of the short queue (64)")
    p.add_argument("--short-ms", **common.SHARE, nargs="*", default=[0, 0.9, 0.99],
                   help="values of m with the short queue (0 0.9 0.99)")
    own, options = p.parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for name, ms, queue in (("m", own.ms, []),
                                ("short m", own.short_ms, ["--queue", own.short])):
            if queue and rows[0]["queue"] == own.short:
                continue  # on a small set it is the recipe's
            for m in sorted(ms):
                flags = [*options, *queue, "--m", m]
                _, data, run = shared.train(moco, own, f"{name} {m:g}", seed, flags,
                                            shared.LabelledRun)
                floor = floor or shared.untrained(moco, data, run)
                rows.append(vars(run.args) | run.rows[-1] | floor)
        report(own, rows)


if __name__ == "__main__":
    main()
