"""Which augmentations to compose: crop and colour together do best (SimCLR).

Slides: "What did we learn from SimCLR?": using strong data augmentations is really important for
learning good features. Paper: Section 3.1, Figures 5 and 6: no augmentation is enough on its own,
and crop and colour are the best pair, because crops of one image share their colours, a shortcut
that colour jitter closes.

Five augmentations, alone (the diagonal) and in pairs, for the same number of steps: crop and colour
jitter are simclr.py's own; blur, rotations by 90 degrees ("turn") and noise are added here. Flips
stay on. In the paper all images are cropped, and the rest is done to one view only, here to both.

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

CLAIM = "No augmentation is enough on its own; crop and colour are the best pair"
NAMES = ["crop", "colour", "blur", "turn", "noise"]
PAIRS = [*itertools.combinations_with_replacement(NAMES, 2)]  # two equal ones: alone
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


class AddedRun(common.Run):
    """A run whose views go through these functions before simclr.augment."""

    def __init__(self, functions, args):
        super().__init__(args)
        self.functions = functions

    def batches(self, data, epoch, crops):
        for step, views in super().batches(data, epoch, crops):
            for f in self.functions:
                views = [f(x) for x in views]
            yield step, views


def draw(whole, means):
    """means: a row for each pair."""
    ax = whole.subplots()
    cells = torch.full((len(NAMES), len(NAMES)), torch.nan)
    for row in means:
        i, j = NAMES.index(row["first"]), NAMES.index(row["second"])
        cells[i, j] = cells[j, i] = row["linear_top1"]
        spread = f"\n± {row['linear_top1_sd']:.1f}" if row["seeds"] > 1 else ""
        for x, y in {(i, j), (j, i)}:
            ax.text(x, y, f"{row['linear_top1']:.1f}{spread}", ha="center", va="center",
                    fontsize=9, bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1.5})
    floor = means[0]["untrained_linear_top1"]
    shown = ax.imshow(cells, vmin=floor, cmap="viridis")
    bar = whole.colorbar(shown, label="linear probe of h, %")
    bar.ax.set_title(f"untrained\n{floor:.1f}", y=-0.14, fontsize=8)
    ax.set_xticks(range(len(NAMES)), NAMES)
    ax.set_yticks(range(len(NAMES)), NAMES)
    ax.set(xlabel="on the diagonal: alone")


def answer(means):
    """Is crop + colour above every single augmentation, and the best pair?"""
    by_name = {(row["first"], row["second"]): row for row in means}
    ours = by_name["crop", "colour"]
    ranked = sorted(means, key=lambda row: -row["linear_top1"])
    second = next(row for row in ranked if row is not ours)
    single = next(row for row in ranked if row["first"] == row["second"])
    text = f"crop and colour {ours['linear_top1']:.1f} %"
    for row, kind in ((second, "the next best"), (single, "the best alone")):
        name = " and ".join(dict.fromkeys((row["first"], row["second"])))
        text += f", {kind} ({name}) {row['linear_top1']:.1f} %"
    above = [shared.compare(ours, row, "linear_top1") > 0 for row in (second, single)]
    return shared.answer(all(above), text + ".")


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
            if not data.labelled:
                common.fail("these images have no labels, so there is nothing to probe")
            floor = floor or shared.untrained(simclr, data, run)
            rows.append(vars(run.args) | run.rows[-1] | floor
                        | dict(zip(("first", "second"), pair)))
        report(own, rows)


if __name__ == "__main__":
    main()
