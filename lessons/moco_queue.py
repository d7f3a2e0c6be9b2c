"""How many keys the queue has to hold (MoCo).

Slides: "Dictionary queue". Paper: v1, Figure 3: top-1 rises with K, the number of negatives, up to
a point, whatever the batch; 65536 keys on ImageNet.

The queue needs no larger batch, which is its point. But in a run of few epochs a long one holds
random keys at first, and later keys of images that are in it twice: --limit and --epochs decide
where that point is.

    python lessons/moco_queue.py
    python lessons/moco_queue.py --dataset cifar10 --epochs 100 --queues 512 4096 16384

Options that are not listed in --help go to moco.py. Writes lessons/moco_queue.csv, a line per run,
and lessons/moco_queue.png. All figures are of validation images.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco
from lessons import shared

CLAIM = "More keys in the queue help, up to a point, at the same batch size"
KEYS = ["linear_top1", "knn_top1", "uniformity", "loss", "untrained_linear_top1",
        "untrained_knn_top1"]
TOP1 = {"linear_top1": "linear probe", "knn_top1": "k-NN"}


def draw(whole, means):
    """means: a row for each K."""
    ax, values = whole.subplots(), [row["queue"] for row in means]
    for key, label in TOP1.items():
        ax.errorbar(values, [row[key] for row in means], [row[f"{key}_sd"] for row in means],
                    fmt="o-", label=label, capsize=3)
        shared.floor(ax, means[0][f"untrained_{key}"], f"untrained, {label}")
    ax.set(xlabel="K, keys in the queue", ylabel="top-1 of h, %", xscale="log")
    ax.set_xticks(values, values)
    ax.minorticks_off()
    ax.legend(fontsize=8)


def answer(means):
    """Is the best K above the smallest?"""
    first, best = means[0], max(means, key=lambda row: row["linear_top1"])
    return shared.answer(shared.compare(best, first, "linear_top1") > 0, (
        f"with {first['queue']} keys {first['linear_top1']:.1f} %, with {best['queue']} keys, the "
        f"best number, {best['linear_top1']:.1f} %, with {means[-1]['queue']} keys "
        f"{means[-1]['linear_top1']:.1f} %."))


def report(own, rows):
    """The table and the figure of the runs until now."""
    shared.write_csv(f"{own.out}/moco_queue.csv", rows, ["queue", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["queue"], KEYS)
    shared.figure(f"{own.out}/moco_queue.png", (7, 4.3), draw, means, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["queue", *KEYS])


def main(argv=None):
    p = shared.parser(__doc__, "moco_queue", epochs=8)
    p.add_argument("--queues", type=int, nargs="+", default=[64, 256, 1024, 4096],
                   help="values of K (64 256 1024 4096)")
    own, options = p.parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for k in own.queues:
            _, data, run = shared.train(moco, own, f"K {k}", seed, [*options, "--queue", k])
            if not data.labelled:
                common.fail("these images have no labels, there is nothing to probe for")
            floor = floor or shared.untrained(moco, data, run)
            rows.append(vars(run.args) | run.rows[-1] | floor)
        report(own, rows)


if __name__ == "__main__":
    main()
