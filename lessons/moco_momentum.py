"""How slowly the key encoder has to follow (MoCo).

Slides: "Momentum Contrast (MoCo)": the keys are encoded by a moving average of the query encoder.
Paper: v1, Section 4.1: training fails with m = 0, where keys of different ages do not fit together,
and is better the slower f_k follows, from 0.9 (55.2 % on ImageNet) to 0.999 (59.0 %).

A run on the built-in set has a few hundred steps, not a million: what counts is the half-life of
f_k compared with the run and with the time that a key spends in the queue. So the best m is smaller
here, and a value as large as the paper's is no better.

    python lessons/moco_momentum.py
    python lessons/moco_momentum.py --dataset cifar10 --epochs 100 --ms 0 0.9 0.99 0.999

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
    """means: a row for each m."""
    ax = whole.subplots()
    shared.bars(ax, [row | {"m": f"{row['m']:g}"} for row in means], "m", TOP1)
    shared.floor(ax, means[0]["untrained_linear_top1"], "untrained network, linear probe")
    ax.set(xlabel="m, momentum of the key encoder", ylabel="top-1 of h, %")
    ax.legend(fontsize=8, ncols=2, loc="upper left")


def answer(means):
    """Is the best m above the smallest one, in both probes?"""
    first, best = means[0], max(means, key=lambda row: row["knn_top1"])
    holds = all(shared.compare(best, first, key) > 0 for key in TOP1)
    return shared.answer(holds, (
        f"m = {first['m']:g} ends at {first['linear_top1']:.1f} % (k-NN {first['knn_top1']:.1f}), "
        f"m = {best['m']:g} at {best['linear_top1']:.1f} % ({best['knn_top1']:.1f})."))


def report(own, rows):
    """The table and the figure of the runs so far."""
    shared.write_csv(f"{own.out}/moco_momentum.csv", rows, ["m", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["m"], KEYS)
    shared.figure(f"{own.out}/moco_momentum.png", (7, 4.3), draw, means, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["m", *KEYS])


def main(argv=None):
    p = shared.parser(__doc__, "moco_momentum", epochs=8)
    p.add_argument("--ms", type=float, nargs="+", default=[0, 0.5, 0.9, 0.99, 0.999],
                   help="values of m (0 0.5 0.9 0.99 0.999)")
    own, options = p.parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for m in sorted(own.ms):
            _, data, run = shared.train(moco, own, f"m {m:g}", seed, [*options, "--m", m])
            if not data.labelled:
                common.fail("these images have no labels, so there is nothing to probe")
            floor = floor or shared.untrained(moco, data, run)
            rows.append(vars(run.args) | run.rows[-1] | floor)
        report(own, rows)


if __name__ == "__main__":
    main()
