"""Few labels: fine-tuning a self-supervised backbone with all, 10 % and 1 % of the labels.

Slides: "self-supervised learning lets us pre-train models to extract general, reusable
representations, reducing the need for labeled data later". Paper: SimCLR, Table 7 and Appendix B.5
(semi-supervised); BYOL, Table 2. Any backbone.pt of this project will do, but for the halves and
tiles of pretext.py's splitbrain and cpc. Of a ViT the class token is used.

Three columns, from the same labels and tested on the same images:
  fine-tuned   the whole network, started from the backbone
  from random  the same network, steps and choice of learning rates, started from random weights
  frozen       logistic regression on the features of the backbone, which stays as it is

    python lessons/finetune.py runs/simclr-toys-s0/backbone.pt
    python lessons/finetune.py BACKBONE.pt --dataset PATH --epochs 30        transfer to another set

Options that are not listed in --help (--limit, --device, ...) go to simclr.py, whose crops and
evaluation are used. Writes lessons/finetune.csv, a line per trained network, and finetune.png.

As in the paper: class-balanced subsets, Nesterov momentum 0.9, no weight decay, no warm-up, crops
and flips only, rate 0.05 * batch / 256 (here: among the choices). As in the released code: the rate
falls to 0 as a half cosine, and the new last layer starts at zero. Departures, for small sets:
 1. The rate is chosen among --lrs, for each start, share and seed, with a fifth of the very labels
    that the share allows held out; then all of them train. So 1 % means that nothing else is known.
 2. Steps: --epochs passes, but not fewer than --min-steps; the paper has 60 epochs for 1 %, 30 for
    10 %. From random weights more steps would help more; the budget is the same on purpose.
 3. At least two labels of each class, one to train on and one to choose with.
The test images are read once for each finished network, and nothing is chosen on them.
"""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import checkpoint, shared

SHARES = (1.0, 0.1, 0.01)
STARTS = ("fine-tuned", "from random", "frozen")
CLAIM = "A backbone that was learned without labels needs fewer of them later"


def subset(labels, pool, share, seed):
    """Class-balanced part of pool, (n,) indices -> two of those: to train on, to choose with."""
    mix = torch.Generator().manual_seed(seed)
    y = labels[pool]
    classes = y.unique()
    each = round(share * len(pool) / len(classes))
    most = max(2, each) if share < 1 else len(pool)
    fit, held = [], []
    for c in classes:
        own = pool[y == c]
        own = own[torch.randperm(len(own), generator=mix)][:most]
        cut = math.ceil(len(own) / 5) if len(own) > 1 else 0
        fit.append(own[cut:])
        held.append(own[:cut])
    return torch.cat(fit), torch.cat(held)


def finetune(net, images, index, lr, seed, run):
    """A copy of net with a new last layer, trained on images[index]."""
    args = run.args
    last = nn.Linear(net.backbone.dim, 1 + int(images.labels.max()))
    for w in last.parameters():
        nn.init.zeros_(w)
    net = nn.Sequential(copy.deepcopy(net), last).train().to(run.device)
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True)
    N = min(args.batch_size, len(index))
    steps = max(args.epochs * len(index) // N, args.min_steps)
    mix = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * N / len(index))
    order = [index[torch.randperm(len(index), generator=mix)] for _ in range(passes)]
    order = torch.cat(order)[: steps * N]
    crop = [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3))]
    batches = common.batches(images, order, N, crop, run.device, args.workers, (seed, 0))
    for step, ((x,), i) in enumerate(batches):
        sgd.param_groups[0]["lr"] = simclr.lr_at(step, steps, 0, lr * N / 256)
        s = net(common.flip(x, p=0.5))  # (N, classes)
        loss = F.cross_entropy(s, images.labels[i].to(run.device))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return net.eval()


def outputs(net, part, run):
    """Of net for the images of part, and their labels."""
    return common.embed(lambda x: [net(*x)], part, simclr.central(run.args.image_size), run)


def score(net, part, run):
    """Top-1 in %, and minus the loss, which decides between equal top-1."""
    s, y = outputs(net, part, run)
    return 100 * (s.argmax(1) == y).float().mean().item(), -F.cross_entropy(s, y).item()


def compare(net, meta, data, share, seed, run):
    """Test top-1 of the three starts for one share of the labels and one seed -> rows."""
    images, pool = data.train, data.fit[1]
    if data.val[0] is images:  # a tenth of the training images: theirs again
        pool = torch.cat([pool, data.val[1]])
    fit, held = subset(images.labels, pool, share, seed)
    both = torch.cat([fit, held])
    row = {"share": share, "labels": len(both), "seed": seed}
    rows = []
    for start, begin in zip(STARTS, (net, checkpoint.untrained(meta, seed))):
        tried = {}
        for lr in run.args.lrs:
            tuned = finetune(begin, images, fit, lr, seed, run)
            tried[lr] = score(tuned, (images, held), run)
        lr = max(tried, key=tried.get)
        tuned = finetune(begin, images, both, lr, seed, run)
        top1, _ = score(tuned, data.test, run)
        rows.append(row | {"start": start, "lr": lr, "test_top1": top1})
    net.eval().to(run.device)
    parts = [outputs(net, part, run) for part in ((images, fit), (images, held), data.test)]
    rows.append(row | {"start": "frozen", "lr": "", "test_top1": simclr.linear_probe(*parts)})
    print(f"{len(both)} labels, seed {seed}: {[round(row['test_top1'], 1) for row in rows]} %")
    return rows


def draw(whole, means, chance):
    """means: a row for each share and start, the fewest labels last."""
    ax = whole.subplots()
    shared.lines(ax, means[::-1], "start", "labels", "test_top1")
    shared.floor(ax, chance, "chance")
    ax.set(xscale="log", ylabel="test top-1, %")
    ax.legend()


def answer(tuned, scratch, frozen):
    """Rows of the fewest labels."""
    best = max(tuned, frozen, key=lambda row: row["test_top1"])
    parts = [f"{row['start']} {row['test_top1']:.0f} %" for row in (tuned, scratch, frozen)]
    return shared.answer(shared.compare(best, scratch, "test_top1") > 0,
                         f"with {best['labels']} labels {', '.join(parts)}.")


def main(argv=None):
    p = shared.parser(__doc__, "finetune", epochs=4)
    o = p.add_argument
    o("backbone", metavar="BACKBONE.pt")
    o("--dataset", help="toys, a torchvision set or a folder (that of the backbone)")
    o("--min-steps", **common.FROM_1, default=120, help="but at least so many steps (120)")
    o("--batch-size", **common.FROM_1, default=64, help="at most (64)")
    o("--lrs", **common.POSITIVE, nargs="+", default=[0.05, 0.2, 0.8], help="rates to choose from")
    own, options = p.parse_known_args(argv)
    net, meta = checkpoint.backbone(own.backbone)
    args = common.options("finetune", __doc__, simclr.OPTIONS,
                          ["--image-size", str(meta["image_size"]), *options])
    vars(args).update(vars(own) | {"out": own.runs})
    args.dataset = own.dataset or meta["dataset"]
    Path(own.out).mkdir(parents=True, exist_ok=True)
    rows = []
    with common.Run(args) as run:
        data = common.load_data(args, simclr.OPTIONS, run)
        if not data.labelled:
            common.fail(f"{args.dataset} has no labels to fine-tune with")
        for share in SHARES:
            for seed in range(own.seeds):
                rows += compare(net, meta, data, share, seed, run)
    shared.write_csv(f"{own.out}/finetune.csv", rows, [*rows[0]])
    means = shared.over_seeds(rows, ["share", "labels", "start"], ["test_top1"])
    chance = 100 / (1 + int(data.train.labels.max()))
    shared.figure(f"{own.out}/finetune.png", (7, 5), draw, means, chance, claim=CLAIM,
                  answer=answer(*means[-3:]))
    return rows


if __name__ == "__main__":
    main()
