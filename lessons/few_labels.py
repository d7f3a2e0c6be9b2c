"""What learning without labels is good for: fewer labels later, on the same images or on others.

Slides: "self-supervised learning lets us pre-train models to extract general, reusable
representations, reducing the need for labeled data later". Paper: SimCLR, Table 7 and Appendix B.5
(semi-supervised); BYOL, Table 2. Any backbone.pt of this project will do, except those of
pretext.py that do not take RGB images: patch, jigsaw, colorization, splitbrain and cpc. For a ViT
the class token is used.

Four ways to use the same labels, tested on the same images:
  frozen        logistic regression on h of the backbone, which stays as it is
  fine-tuned    the whole network, started from the backbone
  from scratch  the same network, updates and augmentation, started from random weights
  untrained     logistic regression on h of random weights: the floor

Photographs are needed: the objects in `toys` are so plain that ten labelled ones are enough.

    python simclr.py --dataset cifar10
    python lessons/few_labels.py runs/simclr-cifar10-s0/backbone.pt
    python lessons/few_labels.py BACKBONE.pt --dataset PATH              transfer to another set

Options that are not listed in --help (--limit, --device, ...) go to simclr.py, whose crops and
evaluation are used. Writes lessons/few_labels.csv, a line per network, and few_labels.png.

As in the paper: class-balanced draws of labels, Nesterov momentum 0.9, no weight decay, no warm-up,
crops and flips only. As in the released code: the rate falls to 0 by half a cosine, and the new
last layer starts at zero. Departures: every network takes --updates steps, or --passes passes over
the labels if that is more (paper: 60 epochs for 1 %, 30 for 10 %); the rate of each start (paper:
0.05 * batch / 256) and the penalty of each regression are chosen once, on the validation images,
with --choose-at labels per class. Test images are read once for each finished network.
"""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import checkpoint, shared

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
CLAIM = "What was learned without labels needs fewer of them later"


def subset(labels, pool, each, seed):
    """The first `each` of every class in a random order of pool: (n,) indices -> indices."""
    mix = torch.Generator().manual_seed(seed)
    pool = pool[torch.randperm(len(pool), generator=mix)]
    return torch.cat([pool[labels[pool] == c][:each] for c in labels[pool].unique()])


def finetune(net, images, index, lr, seed, run):
    """A copy of net with a new last layer, trained on images[index]."""
    args = run.args
    last = nn.Linear(net.backbone.dim, 1 + int(images.labels.max()))
    for w in last.parameters():
        nn.init.zeros_(w)
    net = nn.Sequential(copy.deepcopy(net), last).train().to(run.device)
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True)
    N = min(args.batch_size, len(index))
    mix = torch.Generator().manual_seed(seed)
    updates = max(args.updates, args.passes * len(index) // N)
    passes = math.ceil(updates * N / len(index))
    order = [index[torch.randperm(len(index), generator=mix)] for _ in range(passes)]
    order = torch.cat(order)[: updates * N]
    crop = [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3))]
    batches = common.batches(images, order, N, crop, run.device, args.workers, (seed, 0))
    for step, ((x,), i) in enumerate(batches):
        sgd.param_groups[0]["lr"] = simclr.lr_at(step, updates, 0, lr * N / 256)
        s = net(common.flip(x, p=0.5))  # (N, classes)
        loss = F.cross_entropy(s, images.labels[i].to(run.device))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return net.eval()


def outputs(net, part, run):
    """Outputs of net for the images of part, and their labels."""
    view = simclr.central(run.args.image_size)
    return common.embed(lambda x: [net(*x)], part, view, run)


def top1(net, part, run):
    s, y = outputs(net, part, run)
    return 100 * (s.argmax(1) == y).float().mean().item()


def regress(net, fit, part, penalties, run):
    """Top-1 on part of logistic regression on frozen features, for each L2 penalty."""
    return [*simclr.regression_path(*outputs(net, fit, run), *outputs(net, part, run), penalties)]


def choose(net, floor, data, run):
    """What is best on the validation images with --choose-at labels per class -> way: its rate, or
    for the regressions the penalties down to the best."""
    images, pool = data.fit
    index = subset(images.labels, pool, run.args.choose_at, seed=0)
    chosen = {}
    for name, net_ in (("frozen", net), ("untrained", floor)):
        scores = regress(net_, (images, index), data.val, PENALTIES, run)
        chosen[name] = PENALTIES[: scores.index(max(scores)) + 1]
    for name, start in (("fine-tuned", net), ("from scratch", floor)):
        tried = {lr: top1(finetune(start, images, index, lr, 0, run), data.val, run)
                 for lr in run.args.lrs}
        chosen[name] = max(tried, key=tried.get)
    print(f"chosen on validation images: {chosen}")
    return chosen


def measure(net, floor, chosen, data, each, seed, run):
    """Test top-1 with `each` labels per class, a row for each way."""
    images, pool = data.fit
    index = subset(images.labels, pool, each, seed)
    found = {}
    for name, start in (("frozen", net), ("fine-tuned", net), ("from scratch", floor),
                        ("untrained", floor)):
        if name in ("frozen", "untrained"):
            *_, found[name] = regress(start, (images, index), data.test, chosen[name], run)
        else:
            tuned = finetune(start, images, index, chosen[name], seed, run)
            found[name] = top1(tuned, data.test, run)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    print(f"{each} labels per class, seed {seed}: {shown} %")
    return [{"labels per class": each, "seed": seed, "how": name, "test_top1": value}
            for name, value in found.items()]


def draw(whole, means):
    """means: a row for each number of labels and way."""
    ax = whole.subplots()
    shared.lines(ax, means, "how", "labels per class", "test_top1")
    counts = sorted({row["labels per class"] for row in means})
    ax.set(xscale="log", ylabel="test top-1, %")
    ax.set_xticks(counts, map(str, counts))
    ax.minorticks_off()
    ax.legend()


def answer(means):
    """Do the frozen features beat learning from scratch, whatever the number of labels?"""
    ways = {}
    for row in means:
        ways.setdefault(row["how"], []).append(row)
    pairs = [*zip(ways["frozen"], ways["from scratch"])]
    ahead = [shared.compare(a, b, "test_top1") > 0 for a, b in pairs]
    counts = [str(a["labels per class"]) for (a, _), won in zip(pairs, ahead) if won]
    middle = len(pairs) // 2
    figures = ", ".join(f"{name} {rows[middle]['test_top1']:.0f} %" for name, rows in ways.items())
    return shared.answer(ahead, f"frozen features are ahead of training from scratch with "
                         f"{', '.join(counts) or 'no number of'} labels per class. With "
                         f"{pairs[middle][0]['labels per class']}: {figures}.")


def main(argv=None):
    p = shared.parser(__doc__, "few_labels")
    o = p.add_argument
    o("backbone", metavar="BACKBONE.pt")
    o("--dataset", help="toys, a torchvision set or a folder (that of the backbone)")
    o("--labels", **common.FROM_1, nargs="+", default=[1, 2, 5, 10, 50, 500],
      help="labels per class (1 2 5 10 50 500)")
    o("--choose-at", **common.FROM_1, default=50, help="labels per class for choosing rates (50)")
    o("--updates", **common.FROM_1, default=600, help="steps of a network, at least (600)")
    o("--passes", **common.FROM_1, default=30, help="passes over the labels, at least (30)")
    o("--batch-size", **common.FROM_1, default=64, help="at most (64)")
    o("--lrs", **common.POSITIVE, nargs="+", default=[0.05, 0.2, 0.8],
      help="peak rates, times N / 256, to choose from (0.05 0.2 0.8)")
    own, options = p.parse_known_args(argv)
    shared.refuse(options, "--labelled")
    net, meta = checkpoint.backbone(own.backbone)
    args = common.options("few_labels", __doc__, simclr.OPTIONS,
                          ["--image-size", str(meta["image_size"]),
                           "--data-dir", meta["data_dir"], *options])
    vars(args).update(vars(own) | {"out": own.runs})
    args.dataset = own.dataset or meta["dataset"]
    rows = []
    with common.Run(args) as run:
        data = common.load_data(args, simclr.OPTIONS, run)
        shared.need_labels(data)
        images, pool = data.fit
        least = images.labels[pool].unique(return_counts=True)[1].min().item()
        if max(*own.labels, own.choose_at) > least:
            common.fail(f"--labels and --choose-at: the smallest class has {least} images")
        net.eval().to(run.device)
        floor = checkpoint.untrained(meta, seed=0).eval().to(run.device)
        chosen = choose(net, floor, data, run)
        for each in own.labels:
            for seed in range(own.seeds):
                start = checkpoint.untrained(meta, seed).eval().to(run.device)
                rows += measure(net, start, chosen, data, each, seed, run)
    shared.write_csv(f"{own.out}/few_labels.csv", rows, [*rows[0]])
    means = shared.over_seeds(rows, ["labels per class", "how"], ["test_top1"])
    shared.figure(f"{own.out}/few_labels.png", (7, 5), draw, means, claim=CLAIM,
                  answer=answer(means))
    return rows


if __name__ == "__main__":
    main()
