"""Why DINO centres and sharpens: the two collapses (DINO).

Slides: "How does DINO work?", "Avoiding Collapse": DINO centres and sharpens the teacher's outputs
so that not all images get the same answer. Paper: Section 5.3, Figure 7: the loss is the teacher's
entropy plus KL(teacher, student); without centring or without sharpening, KL goes to 0, and nothing
is learned. The entropy tells the two apart: without sharpening it goes to ln K (all classes alike,
"uniform teacher"), without centring to 0 (one class for all images, "one-hot teacher").

    python lessons/dino_collapse.py
    python lessons/dino_collapse.py --dataset cifar10 --epochs 50

Options that are not listed in --help go to dino.py. Writes lessons/dino_collapse.csv, a line for
every few steps of a run, with the verdict and the k-NN top-1 of h at the end of the run, and
lessons/dino_collapse.png. Verdict and top-1 are on validation images, never on the test set.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dino
from lessons import shared

CLAIM = "Without centring or without sharpening DINO's teacher gives every image the same answer"
RUNS = {
    "DINO": [],
    "no centring": ["--no-centering"],
    "no sharpening": ["--no-sharpening"],
}
COLLAPSES = {"no centring": "one-hot teacher", "no sharpening": "uniform teacher"}
TERMS = {"loss": "", "entropy": "entropy of the teacher, nats", "kl": "KL(teacher, student), nats"}
FLOOR = "untrained_knn_top1"


class StepRun(common.Run):
    """A run that keeps the terms of the loss of every step, not only their means over an epoch."""

    def __init__(self, args):
        super().__init__(args)
        self.kept = []

    def log(self, ok, **figures):
        super().log(ok, **figures)
        terms = torch.stack([figures[k].detach() for k in TERMS])
        self.kept.append(self.mean(terms))  # read at the end: reading from a GPU means waiting

    def means(self, every):
        """A row of means for each part of this many steps."""
        rows, step = [], 0
        for part in torch.stack(self.kept).cpu().split(every):
            step += len(part)
            rows.append({"step": step} | dict(zip(TERMS, part.nanmean(0).tolist())))
        return rows


def draw(whole, means, ends, K):
    """Figure 7 with a line for each run, and how the runs end; means: a row for each run and part
    of its steps, ends: a row for each run."""
    axes = whole.subplots(1, 3)
    for ax, key in zip(axes, ("entropy", "kl")):
        shared.lines(ax, means, "run", "step", key)
        ax.set(title=TERMS[key])
    axes[0].margins(y=0.15)
    axes[1].legend(fontsize=9)
    shared.floor(axes[0], math.log(K), "ln K: all classes alike")
    shared.floor(axes[0], 0, "one class for all images")
    shared.floor(axes[1], 0, "nothing left to learn")
    if "knn_top1" in ends[0]:
        shared.bars(axes[2], ends, "run", {"knn_top1": ""})
        shared.floor(axes[2], sum(row[FLOOR] for row in ends) / len(ends), side="left")
        axes[2].set(title="k-NN top-1 of h at the end, %")


def answer(ends, means):
    """ends: a row for each run and seed; means: a row for each run."""
    shares, parts, holds = [], [], True
    for name, verdict in COLLAPSES.items():
        found = [row["verdict"] == verdict for row in ends if row["run"] == name]
        holds = holds and all(found)
        shares.append(f"with {name} {sum(found)} of {len(found)} runs end with a {verdict}")
    if "knn_top1" in means[0]:
        full, *others = means
        holds = holds and all(shared.compare(full, row, "knn_top1") > 0 for row in others)
        top1 = ", ".join(f"{row['run']} {row['knn_top1']:.0f} %" for row in means)
        parts = [f"k-NN top-1 of h: {top1}"]
    return shared.answer([holds], "; ".join([*shares, *parts]) + ".")


def main(argv=None):
    p = shared.parser(__doc__, "dino_collapse", epochs=6)
    p.add_argument("--every", **common.FROM_1, default=31, help="steps per line of the CSV (31)")
    own, options = p.parse_known_args(argv)
    rows, ends = [], []
    for seed in range(own.seeds):
        for name, flags in RUNS.items():
            _, data, run = shared.train(dino, own, name, seed, [*options, *flags], StepRun)
            end = {"run": name, "seed": seed} | run.rows[-1] | shared.untrained(dino, data, run)
            end["verdict"] = end["verdict"].split(":")[0]
            kept = {k: end[k] for k in ("run", "seed", "verdict", "knn_top1", FLOOR) if k in end}
            rows += [row | kept for row in run.means(own.every)]
            ends.append(end)
    shared.write_csv(f"{own.out}/dino_collapse.csv", rows, ["step", *TERMS, *kept])
    means = shared.over_seeds(rows, ["run", "step"], TERMS)
    top1 = [k for k in ("linear_top1", "knn_top1", FLOOR) if k in ends[0]]
    shown = shared.over_seeds(ends, ["run"], [*TERMS, *top1])
    K = run.args.out_dim
    shared.figure(f"{own.out}/dino_collapse.png", (11, 4.3), draw, means, shown, K, claim=CLAIM,
                  answer=answer(ends, shown))
    shared.show(shown, ["run", *TERMS, *top1])


if __name__ == "__main__":
    main()
