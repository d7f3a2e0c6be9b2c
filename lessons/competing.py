"""Features compete: a few bits that both views share keep the rest from being learned.

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
from lessons import shared

CLAIM = "Features compete: a mark of a few bits keeps the class from being learned"
KEYS = ["linear_top1", "knn_top1", "mark_top1", "untrained_linear_top1"]


def mark(x, marks, bits):
    """x (n, 3, H, W) in [0, 1] -> the same with these marks (n,), each from 0 to 2^bits - 1."""
    inverted, hue = marks % 2, marks // 2
    x = torch.where(inverted.view(-1, 1, 1, 1) == 1, 1 - x, x)
    return common.turn_hue(x, (hue / max(2 ** (bits - 1), 1)).view(-1, 1, 1, 1))


class MarkedRun(common.Run):
    """A run on images that carry random marks of this many bits: marks (n,)."""

    def __init__(self, bits, args):
        super().__init__(args)
        self.bits = bits

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
    """means: a row for each method and number of bits; x: an image with each of 8 marks."""
    upper, lower = whole.subfigures(2, 1, height_ratios=[4, 1])
    left, right = upper.subplots(1, 2)
    shared.lines(left, means, "method", "bits", "linear_top1")
    for i, name in enumerate(dict.fromkeys(row["method"] for row in means)):
        line = [row for row in means if row["method"] == name]
        left.plot([row["bits"] for row in line], [row["untrained_linear_top1"] for row in line],
                  f"C{i}:", label=f"{name}, untrained")
    left.set(ylabel="linear probe of h for the class, %")
    left.legend(fontsize=8, ncols=2, loc="upper right")
    marked = [row for row in means if row["bits"] > 0]
    shared.lines(right, marked, "method", "bits", "mark_top1")
    bits = sorted({row["bits"] for row in marked})
    right.plot(bits, [100 / 2**b for b in bits], "k:", lw=1, label="chance")
    right.set(ylabel="linear probe of h for the mark, %")
    right.legend()
    for ax in (left, right):
        ax.set(xlabel="bits of the mark", ylim=(0, 103), xticks=range(4))
    lower.suptitle("one image with each mark of three bits", fontsize=10)
    for number, (ax, image) in enumerate(zip(lower.subplots(1, len(x)), x)):
        ax.imshow(image.permute(1, 2, 0))
        ax.axis("off")
        ax.set_title(f"{number:03b}", fontsize=8)


def answer(means):
    """With the most bits, is the class read less well, in at least one of the methods?"""
    parts, fallen = [], []
    for name in dict.fromkeys(row["method"] for row in means):
        line = [row for row in means if row["method"] == name]
        figures = ", ".join(f"{row['linear_top1']:.0f}" for row in line)
        parts.append(f"{name} {figures} %")
        fallen.append(shared.compare(line[-1], line[0], "linear_top1") < 0)
    bits = ", ".join(str(row["bits"]) for row in line)
    return shared.answer(any(fallen), f"top-1 of the class from h, with {bits} bits: "
                         f"{'; '.join(parts)}.")


def report(own, rows):
    """The table and the figure of the runs so far."""
    shared.write_csv(f"{own.out}/competing.csv", rows, ["method", "bits", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["method", "bits"], KEYS)
    image = common.toys(1, 64, seed=1)[0] / 255
    x = mark(image.expand(8, -1, -1, -1), torch.arange(8), bits=3)
    shared.figure(f"{own.out}/competing.png", (9, 5.5), draw, means, x, claim=CLAIM,
                  answer=answer(means))
    shared.show(means, ["method", "bits", *KEYS])


def main(argv=None):
    p = shared.parser(__doc__, "competing", epochs=6)
    p.add_argument("--bits", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3],
                   help="bits of the mark, one or more (0 1 2 3)")
    own, options = p.parse_known_args(argv)
    shared.refuse(options, {"--labelled"})
    rows = []
    for seed in range(own.seeds):
        for method, name in ((dino, "DINO"), (simclr, "SimCLR")):
            for bits in sorted(own.bits):
                kind = functools.partial(MarkedRun, bits)
                net, data, run = shared.train(method, own, f"{name} {bits}", seed, options, kind)
                if not data.labelled:
                    common.fail("these images have no labels, so there is nothing to probe")
                rows.append({"method": name, "bits": bits, "seed": seed, "epochs": own.epochs}
                            | run.rows[-1] | shared.untrained(method, data, run)
                            | {"mark_top1": marks_from(net, method, data, run)})
        report(own, rows)


if __name__ == "__main__":
    main()
