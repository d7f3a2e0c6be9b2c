"""The two forces of a contrastive loss, on a circle (SimCLR with D = 2).

Slides: "How does SimCLR work?". Paper: Wang & Isola 2020 (arXiv 2005.10242): the loss pulls views
of one image together (alignment) and spreads the images over the sphere (uniformity).

If z has two dimensions, the sphere is a circle and can be drawn. Alignment is the mean squared
distance of two views, 0 if they are equal and 2 for random points on the circle; uniformity is the
log of the mean of exp(-2 squared distance) of two images, 0 if all are at one point and log exp(-4)
I0(4) = -1.575 if they are spread evenly over the circle.

    python lessons/circle.py
    python lessons/circle.py --epochs 50 --temperature 0.5

Options that are not listed in --help go to simclr.py. Writes lessons/circle.csv, a line per seed
and evaluation, on validation images, and lessons/circle.png: training images of the first seed
on the circle, before and after, each class on a ring of its own, and both measures over training.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

CLAIM = "Two forces: images spread over the circle, views of one image stay together"
KEYS = ["alignment", "uniformity", "spread", "head_knn_top1"]
UNIFORM = math.log(torch.special.i0e(torch.tensor(4.0)).item())


def angles(net, data, run):
    """Angles of z in radians, for every second training image, and the labels of these."""
    net.eval()
    (images, index), view = data.fit, simclr.central(run.args.image_size)
    z, labels = common.embed(lambda x: net(*x)[1:], (images, index[::2]), view, run)
    return torch.atan2(z[:, 1], z[:, 0]).cpu(), labels.cpu()


def untrained(data, run):
    """The network before training, but with batch norm's statistics of training images, as in a
    step: with the initial ones, 0 and 1, z would be nearly the same for all images."""
    net = simclr.build(run.args).to(run.device)
    for layer in net.modules():
        layer.momentum = None  # batch norm's statistics become means over all batches

    def two_views(views):
        return [net(x)[1] for x in simclr.augment(views, run.args)]

    common.embed(two_views, data.fit, simclr.crops(run.args), run)
    return net


def evaluated(net, data, run):
    """What simclr.evaluate reports on a network, as the row of epoch 0."""
    held, run.rows = run.rows, [{"epoch": 0}]
    simclr.evaluate(net, data, run.args, run)
    [row], run.rows = run.rows, held
    return row


def draw(whole, means, circles):
    """means: a row for each evaluated epoch; circles: title -> angles and labels."""
    left, right = whole.subfigures(1, 2, width_ratios=[2.2, 1])
    axes = left.subplots(1, 2, subplot_kw={"projection": "polar"})
    for ax, (title, (angle, labels)) in zip(axes, circles.items()):
        for c in labels.unique().tolist():
            here = angle[labels == c]
            ax.plot(here, torch.full_like(here, 6 + c), ".", ms=3, alpha=0.4)
        ax.set(title=title, xticks=[], yticks=[], ylim=(0, 7 + labels.max().item()))
        ax.grid(False)
    floors = {"alignment": (2, "anywhere on the circle"), "uniformity": (UNIFORM, "uniform")}
    for ax, (key, floor) in zip(right.subplots(2, 1, sharex=True), floors.items()):
        ax.errorbar([row["epoch"] for row in means], [row[key] for row in means],
                    [row[f"{key}_sd"] for row in means], fmt="o-", capsize=3)
        shared.floor(ax, *floor)
        ax.set(ylabel=key)
        ax.margins(y=0.25)
    ax.set(xlabel="epoch", xticks=[row["epoch"] for row in means])


def answer(means):
    """Is uniformity over half of the best possible, and alignment under half of that before?"""
    first, last = means[0], means[-1]
    holds = last["uniformity"] < UNIFORM / 2 and last["alignment"] < first["alignment"] / 2
    text = (f"uniformity {first['uniformity']:.2f} before, {last['uniformity']:.2f} after (at best "
            f"{UNIFORM:.2f}); alignment {first['alignment']:.2f} before, {last['alignment']:.2f} "
            "after")
    if "head_knn_top1" in last:
        text += (f"; from the angle alone k-NN tells the class of {last['head_knn_top1']:.0f} % "
                 f"({first['head_knn_top1']:.0f} before)")
    return shared.answer(holds, text + ".")


def main(argv=None):
    own, options = shared.parser(__doc__, "circle", epochs=12).parse_known_args(argv)
    rows, circles = [], {}
    options = ["--dim", 2, "--eval-every", max(own.epochs // 4, 1), *options]
    for seed in range(own.seeds):
        net, data, run = shared.train(simclr, own, "circle", seed, options)
        before = untrained(data, run)
        for row in [evaluated(before, data, run), *run.rows]:
            if "spread" in row:
                rows.append(row | {"seed": seed})
        if seed == 0:
            circles = {"before training": angles(before, data, run),
                       "after, each class on a ring": angles(net, data, run)}
    keys = [k for k in KEYS if k in rows[0]]
    shared.write_csv(f"{own.out}/circle.csv", rows, ["seed", "epoch", *keys])
    means = shared.over_seeds(rows, ["epoch"], keys)
    shared.figure(f"{own.out}/circle.png", (11, 4.5), draw, means, circles, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["epoch", *keys])


if __name__ == "__main__":
    main()
