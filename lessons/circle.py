"""The two forces of a contrastive loss, on a circle (SimCLR with D = 2).

Slides: "How does SimCLR work?". Paper: Wang & Isola 2020 (arXiv 2005.10242): the loss pulls views
of one image together (alignment) and spreads the images over the sphere (uniformity).

If z has two dimensions, the sphere is a circle and can be drawn. Alignment is the mean squared
distance of two views, 0 if they are equal and 2 for random points on the circle; uniformity is the
log of the mean of exp(-2 squared distance) of two images, 0 if all are at one point and log exp(-4)
I0(4) = -1.575 if they are spread evenly over the circle.

    python lessons/circle.py
    python lessons/circle.py --epochs 50 --temperature 0.5

Options that are not listed in --help go to simclr.py. Writes lessons/circle.csv, both measures of
some steps of every seed, as the loss gets z, and lessons/circle.png: these, and training images of
the first seed on the circle, before and after, each class on a ring of its own.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

CLAIM = "Two forces: views of one image are pulled together, images are pushed apart"
TERMS = ["alignment", "uniformity"]
UNIFORM = math.log(torch.special.i0e(torch.tensor(4.0)).item())
STEPS = {round(1.2**k) for k in range(100)}


class StepRun(common.Run):
    """A run that keeps both measures of some steps."""

    def __init__(self, args):
        super().__init__(args)
        self.kept, self.z = [], []

    def gather(self, x):
        self.z.append(super().gather(x))  # in a step z1, then z2
        return self.z[-1]

    def log(self, ok, **figures):
        super().log(ok, **figures)
        z1, z2 = (z.detach() for z in self.z[-2:])
        self.z.clear()
        if self.step in STEPS or self.step == self.steps:
            found = common.health(z1, z1, z2)
            self.kept.append({"step": self.step} | {k: found[k] for k in TERMS})


def untrained(data, run):
    """The network before training, but with batch norm's statistics of training images, as in a
    step: with the initial ones, 0 and 1, z would be nearly the same for all images."""
    net = simclr.build(run.args).to(run.device)
    for layer in net.modules():
        layer.momentum = None  # batch norm's statistics become means over all batches

    def two_views(views):
        return [net(x)[1] for x in simclr.augment(views, run.args)]

    common.embed(two_views, data.fit, simclr.crops(run.args), run)
    return net.eval()


def angles(net, data, run):
    """Angles of z in radians, for every second training image, and the labels of these."""
    net.eval()
    (images, index), view = data.fit, simclr.central(run.args.image_size)
    z, labels = common.embed(lambda x: net(*x)[1:], (images, index[::2]), view, run)
    return torch.atan2(z[:, 1], z[:, 0]).cpu(), labels.cpu()


def knn_top1(net, data, run):
    """k-NN of z, in %."""
    view, splits = simclr.central(run.args.image_size), data.splits(test=False)
    return simclr.accuracies(lambda x: net(*x)[1:], [""], view, splits, run)["knn_top1"]


def draw(whole, means, circles):
    """means: a row for each step that was kept; circles: title -> angles and labels."""
    left, right = whole.subfigures(1, 2, width_ratios=[2, 1])
    axes = left.subplots(1, 2, subplot_kw={"projection": "polar"})
    for ax, (title, (angle, labels)) in zip(axes, circles.items()):
        for c in labels.unique().tolist():
            here = angle[labels == c]
            ax.plot(here, torch.full_like(here, 6 + c), ".", ms=3, alpha=0.4)
        ax.set(title=title, xticks=[], yticks=[], ylim=(0, 7 + labels.max().item()))
        ax.grid(False)
    floors = {"alignment": (2, "two random points"), "uniformity": (UNIFORM, "spread evenly")}
    for ax, (key, floor) in zip(right.subplots(2, 1, sharex=True), floors.items()):
        ax.errorbar([row["step"] for row in means], [row[key] for row in means],
                    [row[f"{key}_sd"] for row in means], fmt=".-", capsize=2)
        shared.floor(ax, *floor)
        shared.floor(ax, 0, "all at one point", "left")
        ax.set(ylabel=key, xscale="log")
        ax.margins(y=0.2)
    ax.set(xlabel="step")


def answer(means, top1):
    """Do views come together, and do images spread again after they have? means: a row for each
    step that was kept; top1: title -> k-NN from the angle, mean over the seeds."""
    first, last = means[0], means[-1]
    closest = max(means, key=lambda row: row["uniformity"])
    held = [shared.compare(last, first, "alignment") < 0,
            shared.compare(last, closest, "uniformity") < 0]
    text = (f"alignment is {first['alignment']:.2f} in the first step and {last['alignment']:.2f} "
            f"in the last; uniformity {first['uniformity']:.2f}, {closest['uniformity']:.2f} in "
            f"step {closest['step']}, {last['uniformity']:.2f} in the last (spread evenly "
            f"{UNIFORM:.2f})")
    if top1:
        before, after = top1.values()
        text += f"; the angle alone tells k-NN the class of {after:.0f} % ({before:.0f} before)"
    return shared.answer(held, text + ".")


def main(argv=None):
    own, options = shared.parser(__doc__, "circle", epochs=12).parse_known_args(argv)
    shared.refuse(options, "--dim")
    rows, circles, top1 = [], {}, {}
    options = ["--dim", 2, "--eval-every", 0, *options]
    for seed in range(own.seeds):
        net, data, run = shared.train(simclr, own, "circle", seed, options, StepRun)
        rows += [row | {"seed": seed} for row in run.kept]
        for title, each in (("before training", untrained(data, run)),
                            ("after, each class on a ring", net.eval())):
            if seed == 0:
                circles[title] = angles(each, data, run)
            if data.labelled:
                top1[title] = top1.get(title, 0) + knn_top1(each, data, run) / own.seeds
    shared.write_csv(f"{own.out}/circle.csv", rows, ["seed", "step", *TERMS])
    means = shared.over_seeds(rows, ["step"], TERMS)
    shared.figure(f"{own.out}/circle.png", (11, 4.5), draw, means, circles, claim=CLAIM,
                  answer=answer(means, top1))
    shared.show(means, ["step", *TERMS])


if __name__ == "__main__":
    main()
