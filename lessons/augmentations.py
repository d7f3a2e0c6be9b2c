"""Composition of augmentations: neither crop nor colour alone does it (SimCLR).

Slides: "What did we learn from SimCLR?": using strong data augmentations is really important for
learning good features. Paper: Section 3.1, Figures 5 and 6: crop and colour together beat either
by far, because crops of one image share their colour histogram, and the loss takes that shortcut.

The four rows {crop, colour} on and off train for the same number of steps; flips stay on.

    python lessons/augmentations.py                        4 short runs on `shapes`, 2 CPU cores
    python lessons/augmentations.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to simclr.py. Writes lessons/augmentations.csv, a line per
run, and lessons/augmentations.png: for each composition an image (left) and what the network sees
of it, with the top-1. All figures are of the validation images, never of the test set.

The column `loss` shows the shortcut: the easier the pairs, the lower the loss, while the top-1 is
no better for it (without colour, crops lose 11 points). On `shapes`, after 250 steps, colour alone
is ahead of both together: the figure is of the start of training on generated images; for the
paper's effect take photographs and more epochs.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr

COMPOSITIONS = {"crop + colour": [], "crop": ["--no-color"], "colour": ["--no-crop"],
                "neither": ["--no-color", "--no-crop"]}
KEYS = ("composition seed epochs loss linear_top1 knn_top1 head_linear_top1 alignment uniformity "
        "spread rank_h").split()


def figure(path, table, folders):
    """table: composition -> its means; folders: composition -> a run, whose views.png is shown."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.image import imread
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(11, 7.5), layout="constrained")
    for ax, (name, means) in zip(whole.subplots(2, 2).flat, table.items()):
        views = imread(folders[name] / "views.png")
        ax.imshow(views[: views.shape[0] // 2])  # four of the eight images
        top1 = "linear {linear_top1:.1f} %, k-NN {knn_top1:.1f} %, ".format(**means)
        ax.set(title=f"{name}: {top1 * ('linear_top1' in means)}loss {means['loss']:.2f}")
        ax.axis("off")
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--epochs", type=int, default=8, help="of each run (8)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    p.add_argument("--runs", default="runs/lessons/augmentations", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows, folders = [], {}
    for seed in range(args.seeds):
        for name, change in COMPOSITIONS.items():
            short = name.replace(" + ", "-")
            folder = common.run_folder(f"{args.runs}/{short}-s{seed}", False)  # a free name
            own = ["--epochs", str(args.epochs), "--seed", str(seed), "--eval-every", "0"]
            # In place of the report on test images: the evaluation on validation images.
            with mock.patch.object(simclr, "report", simclr.evaluate):
                results = simclr.main([*own, *others, *change, "--out", str(folder)])
            last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
            rows.append(results | {"composition": name, "loss": json.loads(last)["loss"]})
            folders.setdefault(name, folder)
    keys = [k for k in KEYS if k in rows[0]]  # no top-1 without labels
    lines = [keys] + [[f"{v:.5g}" if isinstance(v := row[k], float) else str(v) for k in keys]
                      for row in rows]
    common.write(f"{args.out}/augmentations.csv", "".join(",".join(line) + "\n" for line in lines))
    table = {}
    for name in COMPOSITIONS:
        own = [row for row in rows if row["composition"] == name]
        table[name] = {k: sum(row[k] for row in own) / len(own) for k in keys[3:]}
    figure(f"{args.out}/augmentations.png", table, folders)
    print(f"\nvalidation, mean of {args.seeds}" + "".join(f"{k:>18}" for k in keys[3:]))
    for name, means in table.items():
        print(f"{name:20}" + "".join(f"{v:18.2f}" for v in means.values()))


if __name__ == "__main__":
    main()
