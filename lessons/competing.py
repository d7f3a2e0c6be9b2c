"""Features compete: if both views share a mark of a few bits, less of the class is learned.

Slides: "What did we learn from SimCLR?": using strong data augmentations is really important for
learning good features. Paper: Chen, Luo and Li 2021 (arXiv 2011.02803): a few bits of an easy
feature that two views share can suppress, and even prevent, the learning of other features.

Every image gets a random mark that has nothing to do with its class and that survives crops and
jitter (but one view in five is grey, and its hue is gone): the first bit inverts the image, so that
the object is dark on a bright ground; the second turns it to the opposite hue, and with the third
there are four hues. SimCLR and DINO are trained on such images for as long as on images without a
mark, and linear probes of h predict the class and the mark. The built-in set was made to have few
such features: each image has one object, bright on a plain ground, whose hue follows from its
lightness.

Marked images are harder, too. So with the most bits there are two more runs: one in which every
view draws a mark of its own, so that there is nothing to agree on, and one with labels, which tells
whether the class can still be learned.

    python lessons/competing.py
    python lessons/competing.py --dataset cifar10 --epochs 20

Options that are not listed in --help go to simclr.py and dino.py. Writes lessons/competing.csv, a
line per run, and lessons/competing.png. All results are on validation images, marked as well.
"""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dino
import simclr
from benchmarks import supervised
from lessons import shared

CLAIM = "Features compete: if both views share a mark, less of the class is learned"
KEYS = ["linear_top1", "knn_top1", "mark_top1", "untrained_linear_top1", "untrained_mark_top1"]
METHODS = {"DINO": dino, "SimCLR": simclr}
APART, LABELS = ", mark not shared", ", with labels"
LR = {dino: ["--lr", 4e-3], simclr: []}  # with labels; for the ViT as in the lesson on attention


def mark(x, marks, bits):
    """x (n, 3, H, W) in [0, 1] -> the same with these marks (n,), each from 0 to 2^bits - 1."""
    inverted, hue = marks % 2, marks // 2
    x = torch.where(inverted.view(-1, 1, 1, 1) == 1, 1 - x, x)
    return common.turn_hue(x, (hue / max(2 ** (bits - 1), 1)).view(-1, 1, 1, 1))


class MarkedRun(shared.LabelledRun):
    """A run on images that carry random marks of this many bits: marks (n,); if they are not
    shared, each view draws one of its own in training."""

    def __init__(self, bits, args, shared=True):
        super().__init__(args)
        self.bits, self.shared = bits, shared

    def epochs(self, data):
        images = data.train
        if images.files or data.val[0] is not images:
            common.fail("marks need a set that is held in memory and has no validation split")
        draw = torch.Generator().manual_seed(self.args.seed)
        self.marks = torch.randint(2**self.bits, (len(images.labels),), generator=draw)
        of_all = self.marks.to(self.device)
        for i in torch.arange(len(images.labels), device=self.device).split(1024):
            x = mark(images.pixels[i] / 255, of_all[i], self.bits)
            images.pixels[i] = (255 * x).round().byte()
        yield from super().epochs(data)

    def batches(self, data, epoch, crops):
        for step, views in super().batches(data, epoch, crops):
            if not self.shared:  # a mark on top of a random one is again a random one
                draws = torch.randint(2**self.bits, (len(views), len(views[0])))
                views = [mark(x, d.to(x.device), self.bits) for x, d in zip(views, draws)]
            yield step, views


def with_labels(method, own, name, seed, options, kind):
    """As shared.train, but the method's network is trained by benchmarks/supervised.py."""
    print(f"\n{name}, seed {seed}")
    argv = [*LR[method], "--epochs", own.epochs, "--seed", seed, *options,
            "--out", f"{own.runs}/{method.__name__}-with-labels-s{seed}"]
    rows = method.OPTIONS | supervised.OWN
    args = common.options(method.__name__, supervised.__doc__, rows, [*map(str, argv)])
    with kind(args) as run:
        net, data = supervised.train(method, args, run, hide=True)
        view, splits = method.central(args.image_size), data.splits(test=False)
        net.eval()
        run.rows[-1] |= method.accuracies(lambda x: net(*x)[:1], [""], view, splits, run)
    return net, data, run


def marks_from(net, method, data, run):
    """Top-1 in % of a linear probe of h for the mark."""
    net.eval()
    view = method.central(run.args.image_size)
    parts = []
    for images, index in data.splits(test=False):
        h, _ = common.embed(lambda x: net(*x)[:1], (images, index), view, run)
        parts.append((h, run.marks[index].to(h.device)))
    return method.linear_probe(*parts)


def draw(whole, means, x):
    """means: a row for each method or control and number of bits; x: an image with each of 8
    marks."""
    upper, lower = whole.subfigures(2, 1, height_ratios=[4, 1])
    left, right = upper.subplots(1, 2)
    lines = [row for row in means if row["method"] in METHODS]
    marked = [row for row in lines if row["bits"] > 0]
    for ax, rows, key in ((left, lines, "linear_top1"), (right, marked, "mark_top1")):
        shared.lines(ax, rows, "method", "bits", key)
        for i, name in enumerate(METHODS):
            line = [row for row in rows if row["method"] == name]
            ax.plot([row["bits"] for row in line], [row[f"untrained_{key}"] for row in line],
                    f"C{i}:", label=f"{name}, untrained")
    for i, name in enumerate(METHODS):
        for end, form in ((APART, "s"), (LABELS, "*")):
            for row in means:
                if row["method"] == name + end:
                    left.errorbar(row["bits"], row["linear_top1"], row["linear_top1_sd"], capsize=3,
                                  fmt=f"C{i}{form}", mfc="white", ms=8, label=row["method"])
    bits = sorted({row["bits"] for row in marked})
    right.plot(bits, [100 / 2**b for b in bits], "k:", lw=1, label="chance")
    left.set(ylabel="linear probe of h for the class, %")
    right.set(ylabel="linear probe of h for the mark, %")
    for ax in (left, right):
        ax.set(xlabel="bits of the mark", ylim=(0, 105), xticks=range(4))
    left.legend(fontsize=7, ncols=2, loc="lower left")
    right.legend(fontsize=8, loc="lower left")
    lower.suptitle("one image with each mark of three bits", fontsize=10)
    for number, (ax, image) in enumerate(zip(lower.subplots(1, len(x)), x)):
        ax.imshow(image.permute(1, 2, 0))
        ax.axis("off")
        ax.set_title(f"{number:03b}", fontsize=8)


def answer(means):
    """With the most bits, is the class read less well than without a mark, and less well than if
    the mark is not shared?"""
    parts, fallen = [], []
    for name in [name for name in METHODS if any(row["method"] == name for row in means)]:
        line = [row for row in means if row["method"] == name]
        controls = [row for row in means if row["method"] in (name + APART, name + LABELS)]
        figures = ", ".join(f"{row['linear_top1']:.0f}" for row in line)
        parts.append(f"{name} {figures} %" + "".join(
            f"{row['method'].removeprefix(name)} {row['linear_top1']:.0f} %" for row in controls))
        above = [line[0], *(row for row in controls if row["method"] == name + APART)]
        fallen.append(all(shared.compare(line[-1], row, "linear_top1") < 0 for row in above))
    bits = ", ".join(str(row["bits"]) for row in line)
    text = f"top-1 of the class from h, with {bits} bits: {'; '.join(parts)}."
    return shared.answer(fallen, text)


def report(own, rows):
    """The table and the figure of the runs so far."""
    shared.write_csv(f"{own.out}/competing.csv", rows, ["method", "bits", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["method", "bits"], KEYS)
    image = common.toys(1, 64, seed=1)[0] / 255
    x = mark(image.expand(8, -1, -1, -1), torch.arange(8), bits=3)
    shared.figure(f"{own.out}/competing.png", (9, 6), draw, means, x, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["method", "bits", *KEYS])


def main(argv=None):
    p = shared.parser(__doc__, "competing", epochs=6)
    p.add_argument("--bits", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3],
                   help="bits of the mark, two values or more (0 1 2 3)")
    own, options = p.parse_known_args(argv)
    shared.refuse(options, "--labelled")
    bits, rows = sorted({*own.bits}), []
    if len(bits) < 2:
        common.fail("--bits: give at least two values, which are compared")
    plan = [*(("", b) for b in bits), (APART, bits[-1]), (LABELS, bits[-1])]
    for seed in range(own.seeds):
        for name, method in METHODS.items():
            for control, b in plan:
                kind = functools.partial(MarkedRun, b, shared=control != APART)
                train = with_labels if control == LABELS else shared.train
                label = f"{name}{control}"
                net, data, run = train(method, own, f"{label} {b}", seed, options, kind)
                floor = method.build(run.args).to(run.device)
                rows.append({"method": label, "bits": b, "seed": seed, "epochs": own.epochs}
                            | run.rows[-1] | shared.untrained(method, data, run)
                            | {"mark_top1": marks_from(net, method, data, run),
                               "untrained_mark_top1": marks_from(floor, method, data, run)})
        report(own, rows)


if __name__ == "__main__":
    main()
