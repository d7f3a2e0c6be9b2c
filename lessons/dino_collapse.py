"""Why DINO centres and sharpens: the two collapses (DINO).

Slides: "How does DINO work?", "Avoiding Collapse": DINO centres and sharpens the teacher's outputs
so that it does not say the same of every image. Paper: Section 5.3, Figure 7: the loss is the
teacher's entropy plus KL(teacher, student); without one of the two KL goes to 0, and nothing is
learned. The entropy tells the two ways apart: without sharpening it goes to ln K (all classes
alike, "uniform teacher"), without centring to 0 (one class for all images, "one-hot teacher").

    python lessons/dino_collapse.py
    python lessons/dino_collapse.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to dino.py. The head has no batch norm here, as in the
paper: batch norm centres, too (--head-bn shows it). Writes lessons/dino_collapse.csv, a line for
every few steps of a run, and lessons/dino_collapse.png. Top-1 and verdict are of validation images,
never of the test set.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dino
from lessons import shared

RUNS = {
    "DINO": [],
    "no centring": ["--no-centering"],
    "no sharpening": ["--no-sharpening"],
    "neither of the two": ["--no-centering", "--no-sharpening"],
}
TERMS = {"loss": "", "entropy": "entropy of the teacher", "kl": "KL(teacher, student)"}


class StepRun(common.Run):
    """A run that keeps the terms of the loss of every step, not only their means over an epoch."""

    def __init__(self, args):
        super().__init__(args)
        self.kept = []

    def log(self, ok, **figures):
        super().log(ok, **figures)
        terms = torch.stack([figures[k].detach() for k in TERMS])
        self.kept.append(self.mean(terms))  # read at the end: to read from a GPU is to wait for it

    def means(self, every):
        """A row for every so many steps."""
        rows, step = [], 0
        for part in torch.stack(self.kept).cpu().split(every):
            step += len(part)
            rows.append({"step": step} | dict(zip(TERMS, part.nanmean(0).tolist())))
        return rows


def draw(whole, means, K):
    """Figure 7: a line for each run; means: a row for each run and so many steps."""
    left, right = whole.subplots(1, 2)
    for ax, key in ((left, "entropy"), (right, "kl")):
        shared.lines(ax, means, "run", "step", key)
        ax.lines[-1].set_linestyle("--")  # it may lie on the line before
        ax.set(title=TERMS[key])
    left.margins(y=0.1)
    right.legend(fontsize=8)
    for ax, level, text in ((left, math.log(K), "ln K: all classes alike"),
                            (left, 0, "one class for all images"),
                            (right, 0, "nothing left to learn")):
        ax.axhline(level, ls=":", c="grey")
        ax.annotate(text, (0, level), fontsize=8, color="grey", va="bottom")


def main(argv=None):
    p = shared.parser(__doc__, "dino_collapse", epochs=6)
    p.add_argument("--limit", type=int, default=2000, help="training images (2000)")
    p.add_argument("--every", **common.FROM_1, default=5, help="steps in a line of the CSV (5)")
    own, options = p.parse_known_args(argv)
    options = ["--limit", own.limit, "--no-head-bn", *options]
    rows, ends = [], []
    for seed in range(own.seeds):
        for name, flags in RUNS.items():
            _, _, run = shared.train(dino, own, name, seed, [*options, *flags], StepRun)
            last = run.rows[-1]
            same = {"run": name, "seed": seed, "verdict": last["verdict"].split(":")[0]}
            rows += [row | same for row in run.means(own.every)]
            ends.append(last | rows[-1])
    shared.write_csv(f"{own.out}/dino_collapse.csv", rows,
                     ["run", "seed", "step", *TERMS, "verdict"])
    means = shared.over_seeds(rows, ["run", "step"], TERMS)
    shared.figure(f"{own.out}/dino_collapse.png", (10, 4), draw, means, run.args.out_dim)
    print(f"\nthe last {own.every} steps; ln K is {math.log(run.args.out_dim):.3f}")
    shown = ["run", "seed", *TERMS, "linear_top1", "knn_top1", "verdict"]
    shared.show(ends, [k for k in shown if k in ends[0]])


if __name__ == "__main__":
    main()
