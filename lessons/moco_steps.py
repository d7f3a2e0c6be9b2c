"""From MoCo v1 to v2, one change at a time; and what the queue and the momentum do (MoCo).

Slides: "MoCov2 vs. SimCLR": rows v1 and (a) to (d) switch the MLP head (MLP), v2's augmentation
(aug+) and the cosine schedule (cos) on. Paper: v2, Table 1; v1, Figure 3 (K) and Section 4.1 (m).

tau goes with the head, as in v2: 0.07 with the linear one, 0.2 with the MLP. The paper's aug+ is an
added blur; the released code also has a weaker hue and a jitter of 80 % of the images. On images up
to 64 pixels the recipes do not blur, so that these two are all of it; --blur 0.5 adds the blur.

    python lessons/moco_steps.py --limit 2000
    python lessons/moco_steps.py --dataset cifar10 --epochs 200 --seeds 3

The two ablations, v2 with other lengths of the queue and with other momenta of the key encoder:

    python lessons/moco_steps.py --queues 64 128 256 512 1024
    python lessons/moco_steps.py --ms 0 0.9 0.99 0.999

Options that are not listed in --help go to moco.py. Writes lessons/moco_steps.csv, a line per run,
and lessons/moco_steps.png, the ablations with -queues or -ms in the name. Our figures are of the
validation images, never of the test set; those beside them are the papers', on ImageNet. A queue
that is long beside the run holds random keys for a good part of it.
"""

import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco
from lessons import shared

ROWS = {  # of the slide: what is on, its ImageNet top-1
    "v1": ("", 60.6),
    "(a)": ("MLP", 66.2),
    "(b)": ("aug+", 63.4),
    "(c)": ("MLP aug+", 67.3),
    "(d)": ("MLP aug+ cos", 67.5),
}
SWITCHES = {  # off, on
    "MLP": ("--head linear --temperature 0.07", "--head mlp --temperature 0.2"),
    "aug+": ("--aug v1", "--aug v2"),
    "cos": ("--schedule step", "--schedule cosine"),
}
OF_M = {0: math.nan, 0.9: 55.2, 0.99: 57.8, 0.999: 59.0}  # v1, K 4096; with 0 it "fails"
SHOWN = ["linear_top1", "knn_top1", "spread", "rank_h", "loss"]


def cases(own):
    """Case: the options that make it, the paper's top-1 on ImageNet or nan."""
    if own.queues:
        return {f"K {k}": (["--queue", k], math.nan) for k in own.queues}
    if own.ms:
        return {f"m {m:g}": (["--m", m], OF_M.get(m, math.nan)) for m in own.ms}
    made = {}
    for row, (on, top1) in ROWS.items():
        flags = []
        for name, (without, having) in SWITCHES.items():
            flags += (having if name in on.split() else without).split()
        made[f"{row} {on}".strip()] = flags, top1
    return made


def draw(whole, means, epochs):
    """means: a row for each case."""
    known = [row for row in means if not math.isnan(row["ImageNet"])]
    left, *others = whole.subplots(1, 2 if known else 1, squeeze=False)[0]
    for shift, key in ((-0.2, "linear_top1"), (0.2, "knn_top1")):
        heights = [row[key] for row in means]
        deviations = [row[f"{key}_sd"] for row in means]
        places = [x + shift for x in range(len(means))]
        bars = left.bar(places, heights, 0.38, yerr=deviations, label=f"h, {key[:-5]}")
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set(ylabel="validation top-1, %", title=f"here, after {epochs} epochs")
    left.margins(y=0.2)
    left.legend(fontsize=8, ncols=2, loc="upper center")
    for ax in others:
        bars = ax.bar(range(len(known)), [row["ImageNet"] for row in known], 0.6)
        ax.bar_label(bars, fmt="%.1f", fontsize=8)
        ax.set(title="ImageNet, after 200 epochs (papers)", ylabel="top-1, %")
    for ax, rows in zip((left, *others), (means, known)):
        ax.set_xticks(range(len(rows)), [row["case"].replace(" ", "\n") for row in rows])


def main(argv=None):
    p = shared.parser(__doc__, "moco_steps", epochs=8)
    sweep = p.add_mutually_exclusive_group()
    sweep.add_argument("--queues", type=int, nargs="+", help="in place of the rows: values of K")
    sweep.add_argument("--ms", type=float, nargs="+", help="in place of the rows: values of m")
    own, options = p.parse_known_args(argv)
    rows, todo = [], cases(own)
    for seed in range(own.seeds):
        for case, (flags, _) in todo.items():
            _, data, run = shared.train(moco, own, case, seed, [*options, *flags])
            if not data.labelled:
                common.fail("these images have no labels, there is nothing to probe for")
            rows.append(vars(run.args) | run.rows[-1]
                        | {"case": case, "tau": run.args.temperature})
    name = "moco_steps"
    if own.queues or own.ms:
        name += "-queues" if own.queues else "-ms"
    shared.write_csv(f"{own.out}/{name}.csv", rows, [
        "case", "head", "aug", "schedule", "tau", "queue", "m", "seed", "epochs", *SHOWN])
    means = shared.over_seeds(rows, ["case"], SHOWN)
    for row in means:
        row["ImageNet"] = todo[row["case"]][1]
    width = 6 if all(math.isnan(row["ImageNet"]) for row in means) else 11
    shared.figure(f"{own.out}/{name}.png", (width, 4), draw, means, own.epochs)
    shared.show(means, ["case", *SHOWN, "ImageNet"])


if __name__ == "__main__":
    main()
