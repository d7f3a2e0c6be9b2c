"""Composition of augmentations: neither crop nor colour alone does it (SimCLR).

Slides: "What did we learn from SimCLR?": using strong data augmentations is really important for
learning good features. Paper: Section 3.1, Figures 5 and 6: crop and colour together beat either
by far, because crops of one image share their colour histogram, and the loss takes that shortcut.

Crop and colour are switched on and off, for the same number of steps; flips stay on.

    python lessons/augmentations.py --limit 2000
    python lessons/augmentations.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to simclr.py. Writes lessons/augmentations.csv, a line per
run, and lessons/augmentations.png: for each composition an image (left) and what the network sees
of it, with the top-1. All figures are of the validation images, never of the test set.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import simclr
from lessons import shared

COMPOSITIONS = {
    "crop + colour": [],
    "crop": ["--no-color"],
    "colour": ["--no-crop"],
    "neither": ["--no-color", "--no-crop"],
}
SHOWN = ("loss linear_top1 knn_top1 head_linear_top1 alignment uniformity spread rank_h").split()


def draw(whole, means, folders):
    """means: a row for each composition; folders: of a run of each, whose views.png is shown."""
    from matplotlib.image import imread

    for ax, row in zip(whole.subplots(2, 2).flat, means):
        views = imread(folders[row["composition"]] / "views.png")
        ax.imshow(views[: views.shape[0] // 2])  # four of the eight images
        title = f"{row['composition']}: loss {row['loss']:.2f}"
        if "linear_top1" in row:
            title += f", linear {row['linear_top1']:.1f} %, k-NN {row['knn_top1']:.1f} %"
        ax.set(title=title)
        ax.axis("off")


def main(argv=None):
    own, options = shared.parser(__doc__, "augmentations", epochs=8).parse_known_args(argv)
    rows, folders = [], {}
    for seed in range(own.seeds):
        for name, flags in COMPOSITIONS.items():
            _, _, run = shared.train(simclr, own, name, seed, [*options, *flags])
            rows.append(vars(run.args) | run.rows[-1] | {"composition": name})
            folders.setdefault(name, run.folder)
    shown = [k for k in SHOWN if k in rows[0]]  # no top-1 without labels
    shared.write_csv(f"{own.out}/augmentations.csv", rows,
                     ["composition", "seed", "epochs", *shown])
    means = shared.over_seeds(rows, ["composition"], shown)
    shared.figure(f"{own.out}/augmentations.png", (11, 7.5), draw, means, folders)
    shared.show(means, ["composition", *shown])


if __name__ == "__main__":
    main()
