"""Which augmentations help: crop and colour together, and hardly anything else (SimCLR).

Slides: "What did we learn from SimCLR?": using strong data augmentations is really important for
learning good features. Paper: Section 3.1, Figures 5 and 6: no augmentation is enough on its own,
and crop and colour are the best pair, because crops of one image share their colours, a shortcut
that colour jitter closes.

Five augmentations, alone (the diagonal) and in pairs, and none, for the same number of steps: crop
and colour jitter are simclr.py's own; blur, rotations by 90 degrees ("turn") and noise are added
here. Flips stay on, with none, too: two views are then one image, half of the time mirrored. In the
paper all images are cropped, and the rest is done to one view only, here to both.

    python lessons/augmentations.py
    python lessons/augmentations.py --dataset cifar10 --epochs 50

Options that are not listed in --help go to simclr.py. Writes lessons/augmentations.csv, a line per
run, and lessons/augmentations.png: the linear probe's top-1 on validation images as a matrix.
"""

import functools
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

CLAIM = "Strong augmentations are important, above all crop with colour"
NAMES = ["crop", "colour", "blur", "turn", "noise"]
NONE = ("none", "none")
PAIRS = [NONE, *itertools.combinations_with_replacement(NAMES, 2)]  # two equal ones: alone
KEYS = ["linear_top1", "knn_top1", "untrained_linear_top1"]


def turn(x):
    """Rotate each image by 0, 90, 180 or 270 degrees, at random."""
    quarters = torch.randint(4, (len(x), 1, 1, 1), device=x.device)
    for k in (1, 2, 3):
        x = torch.where(quarters == k, x.rot90(k, (2, 3)), x)
    return x


def noise(x):
    """Gaussian noise, of a random standard deviation of up to 0.2 for each image."""
    deviation = common.uniform(0, 0.2, (len(x), 1, 1, 1), x.device)
    return (x + deviation * torch.randn_like(x)).clamp(0, 1)


ADDED = {
    "blur": lambda x: common.blur(x, sigma=(0.1, 2.0), taps=7, p=0.5),
    "turn": turn,
    "noise": noise,
}


class AddedRun(shared.LabelledRun):
    """A run whose views go through these functions before simclr.augment."""

    def __init__(self, functions, args):
        super().__init__(args)
        self.functions = functions

    def batches(self, data, epoch, crops):
        for step, views in super().batches(data, epoch, crops):
            for f in self.functions:
                views = [f(x) for x in views]
            yield step, views


def without(means):
    """The row without augmentation."""
    return next(row for row in means if (row["first"], row["second"]) == NONE)


def draw(whole, means):
    """means: a row for each pair."""
    ax = whole.subplots()
    cells, none = torch.full((len(NAMES), len(NAMES)), torch.nan), without(means)
    for row in means:
        if row is none:
            continue
        i, j = NAMES.index(row["first"]), NAMES.index(row["second"])
        cells[i, j] = cells[j, i] = row["linear_top1"]
        spread = f"\n± {row['linear_top1_sd']:.1f}" if row["seeds"] > 1 else ""
        weight = "bold" if shared.compare(row, none, "linear_top1") else "normal"
        for x, y in {(i, j), (j, i)}:
            ax.text(x, y, f"{row['linear_top1']:.1f}{spread}", ha="center", va="center",
                    fontsize=10, weight=weight,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1.5})
    level, floor = none["linear_top1"], none["untrained_linear_top1"]
    reach = max(abs(row["linear_top1"] - level) for row in means) + 1
    shown = ax.imshow(cells, vmin=level - reach, vmax=level + reach, cmap="PuOr_r")
    bar = whole.colorbar(shown, label="linear probe of h, %")
    bar.ax.set_ylim(top=100)
    bar.ax.axhline(level, c="black", ls=":")
    ax.set_title(f"dotted: no augmentation, {level:.1f} ± {none['linear_top1_sd']:.1f}; "
                 f"untrained network, {floor:.1f}", fontsize=10)
    ax.set_xticks(range(len(NAMES)), NAMES)
    ax.set_yticks(range(len(NAMES)), NAMES)
    ax.set(xlabel="on the diagonal: alone; bold: differs from none by more than the noise")


def answer(means):
    """Is crop + colour above all the others, and how many of those are above no augmentation?"""
    by_name = {(row["first"], row["second"]): row for row in means}
    ours, none = by_name["crop", "colour"], by_name[NONE]
    others = [row for row in means if row is not ours and row is not none]
    second = max(others, key=lambda row: row["linear_top1"])
    best = all(shared.compare(ours, row, "linear_top1") > 0 for row in (second, none))
    above, below = (sum(shared.compare(row, none, "linear_top1") == sign for row in others)
                    for sign in (1, -1))
    name = " and ".join(dict.fromkeys((second["first"], second["second"])))
    return shared.answer([best, best and above == len(others)], (
        f"crop and colour {ours['linear_top1']:.1f} %, the next best ({name}) "
        f"{second['linear_top1']:.1f} %, none {none['linear_top1']:.1f} %. By more than the noise, "
        f"above none: {above} of the other {len(others)}; below: {below}."))


def report(own, rows):
    """The table and the figure of the runs so far."""
    shared.write_csv(f"{own.out}/augmentations.csv", rows,
                     ["first", "second", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["first", "second"], KEYS)
    shared.figure(f"{own.out}/augmentations.png", (6.5, 6), draw, means, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["first", "second", *KEYS])


def main(argv=None):
    own, options = shared.parser(__doc__, "augmentations", epochs=4).parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for pair in PAIRS:
            flags = [] if "crop" in pair else ["--no-crop"]
            flags += [] if "colour" in pair else ["--no-color"]
            kind = functools.partial(AddedRun, [f for k, f in ADDED.items() if k in pair])
            name = " ".join(dict.fromkeys(pair))
            _, data, run = shared.train(simclr, own, name, seed, [*options, *flags], kind)
            floor = floor or shared.untrained(simclr, data, run)
            rows.append(vars(run.args) | run.rows[-1] | floor
                        | dict(zip(("first", "second"), pair)))
        report(own, rows)


if __name__ == "__main__":
    main()
