"""From MoCo v1 to v2, one change at a time (MoCo).

Slides: "MoCov2 vs. SimCLR": rows v1 and (a) to (d) switch the MLP head (MLP), v2's augmentation
(aug+) and the cosine schedule (cos) on. Paper: v2, Table 1.

tau goes with the head, as in v2: 0.07 with the linear one, 0.2 with the MLP. The paper's aug+ is an
added blur; the released code also has a weaker hue and a jitter of 80 % of the images. On images up
to 64 pixels the recipes do not blur, so that these two are all of it; --blur 0.5 adds the blur.

    python lessons/moco_steps.py
    python lessons/moco_steps.py --dataset cifar10 --epochs 200

Options that are not listed in --help go to moco.py. Writes lessons/moco_steps.csv, a line per run,
and lessons/moco_steps.png. Our figures are of validation images; those beside them are the paper's,
on ImageNet.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco
from lessons import shared

CLAIM = "MLP head, augmentation and cosine schedule of v2 improve MoCo v1"
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
TOP1 = {"linear_top1": "linear probe", "knn_top1": "k-NN"}
KEYS = [*TOP1, "spread", "rank_h", "loss", "untrained_linear_top1"]


def flags(on):
    """The options of a row that has these switches on."""
    chosen = [having if name in on.split() else without
              for name, (without, having) in SWITCHES.items()]
    return " ".join(chosen).split()


def draw(whole, means):
    """means: a row for each of the slide's."""
    left, right = whole.subplots(1, 2, width_ratios=[1.6, 1])
    shared.bars(left, means, "case", TOP1, fmt="%.1f")
    shared.floor(left, means[0]["untrained_linear_top1"])
    left.set(ylabel="top-1 of h, %", title="here")
    left.legend(fontsize=8, ncols=2, loc="upper center")
    places = range(len(means))
    bars = right.bar(places, [ROWS[row["row"]][1] for row in means], 0.6, color="grey")
    right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set_xticks(places, [row["case"] for row in means])
    right.set(ylim=(55, 70), ylabel="top-1, %", title="ImageNet, 200 epochs (paper)")


def answer(means):
    """Which changes are beyond the noise, and is v2 above v1?"""
    v1, *others = means
    gains = []
    for row in others:
        sure = "" if shared.compare(row, v1, "linear_top1") else " (within the noise)"
        gains.append(f"{row['row']} {row['linear_top1'] - v1['linear_top1']:+.1f}{sure}")
    return shared.answer(shared.compare(means[-1], v1, "linear_top1") > 0, (
        f"v1 has {v1['linear_top1']:.1f} %, the other rows {', '.join(gains)}."))


def report(own, rows):
    """The table and the figure of the runs until now."""
    shared.write_csv(f"{own.out}/moco_steps.csv", rows, [
        "row", "head", "aug", "schedule", "temperature", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["row", "case"], KEYS)
    shared.figure(f"{own.out}/moco_steps.png", (10, 4.3), draw, means, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["row", *KEYS])


def main(argv=None):
    own, options = shared.parser(__doc__, "moco_steps", epochs=8).parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for row, (on, _) in ROWS.items():
            _, data, run = shared.train(moco, own, row, seed, [*options, *flags(on)])
            if not data.labelled:
                common.fail("these images have no labels, there is nothing to probe for")
            floor = floor or shared.untrained(moco, data, run)
            case = f"{row} {on}".strip().replace(" ", "\n")
            rows.append(vars(run.args) | run.rows[-1] | floor | {"row": row, "case": case})
        report(own, rows)


if __name__ == "__main__":
    main()
