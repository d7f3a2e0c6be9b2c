"""Few labels: fine-tuning a self-supervised backbone with all, 10 % and 1 % of the labels.

Slides: "self-supervised learning lets us pre-train models to extract general, reusable
representations, reducing the need for labeled data later". Paper: SimCLR, Table 7 and B.5 (semi-
supervised); BYOL, Table 2. Any backbone.pt of this project will do, but for the halves and tiles of
pretext.py's splitbrain and cpc. Of a ViT the class token is used.

Three columns, from the same labels and tested on the same images:
  fine-tuned   the whole network, started from the backbone
  from random  the same network, steps and choice of learning rates, started from random weights
  frozen       logistic regression on the features of the backbone, which stays as it is

    python lessons/finetune.py runs/simclr-shapes-s0/backbone.pt
    python lessons/finetune.py BACKBONE.pt --dataset PATH --epochs 30        transfer to another set

Options that are not listed in --help (--limit, --device, ...) go to simclr.py, whose data and
evaluation are used. Writes lessons/finetune.csv, a line per trained network, and finetune.png.

As in the paper: class-balanced subsets, Nesterov momentum 0.9, no weight decay, no warm-up, crops
and flips only, rate 0.05 * batch / 256 (here: among the choices). Departures, for small sets:
 1. The rate is chosen among --lrs, for each start, share and seed, with a fifth of the very labels
    that the share allows held out; then all of them train. So 1 % means that nothing else is known.
 2. Steps: --epochs passes, but not fewer than --min-steps; the paper has 60 epochs for 1 %, 30 for
    10 %. From random weights more steps would help more; the budget is the same on purpose.
 3. At least two labels of each class, one to train on and one to choose with.
 4. The rate falls to 0 as a half cosine. The new last layer starts at zero.
The test images are read once for each finished network, and nothing is chosen on them.
"""

import argparse
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dino
import dinov2
import simclr

SHARES = (1.0, 0.1, 0.01)
STARTS = ("fine-tuned", "from random", "frozen")


class Fed(nn.Module):
    """A backbone with the input it was trained on: (N, 3, S, S) in [0, 1] -> h (N, d)."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.dim = net, net.dim
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        h = self.net((x - self.mean) / self.std)
        return h[:, 0] if h.ndim == 3 else h  # of a ViT the class token


def build(meta):
    """The untrained network of a backbone.pt. Older files of simclr.py do not name the input."""
    if meta["arch"] in simclr.ARCHS:
        net = simclr.resnet(meta["arch"], meta.get("stem", "7x7"))
    else:  # registers are what only dinov2.py has; ibot.py has dino.py's ViT
        file = dinov2 if "registers" in meta else dino
        net = file.build(SimpleNamespace(**meta | {"seed": torch.initial_seed()})).backbone
    return Fed(net, meta.get("mean", simclr.MEAN), meta.get("std", simclr.STD))


def rebuild(path):
    """backbone.pt -> the network with its weights, strictly, and meta, how it was trained."""
    found = common.read_checkpoint(path)
    meta = found.get("meta", {})
    known = simclr.ARCHS.keys() | dinov2.VITS.keys()
    if meta.get("arch") not in known or "state_dict" not in found:
        common.fail(f"{path} has to be a backbone.pt with one of {', '.join(sorted(known))}")
    backbone = build(meta)
    common.load_into(backbone.net, found["state_dict"], path)
    return backbone, meta


def subset(labels, pool, share, seed):
    """Class-balanced part of pool, (n,) indices -> two of those: to train on, to choose with."""
    mix, y = torch.Generator().manual_seed(seed), labels[pool]
    kinds, parts = y.unique(), ([], [])
    most = len(pool) if share == 1 else max(2, round(share * len(pool) / len(kinds)))
    for kind in kinds:
        own = pool[y == kind]
        own = own[torch.randperm(len(own), generator=mix)][:most]
        held = -(-len(own) // 5) if len(own) > 1 else 0
        parts[0].append(own[held:])
        parts[1].append(own[:held])
    return [torch.cat(part) for part in parts]


def finetune(backbone, classes, images, index, lr, args, run, seed):
    """A copy of the backbone with a new last layer, trained on images[index] -> the network."""
    last = nn.Linear(backbone.dim, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(copy.deepcopy(backbone), last).train().to(run.device)
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    batch = min(args.batch_size, len(index))
    steps = max(args.epochs * len(index) // batch, args.min_steps)
    mix, passes = torch.Generator().manual_seed(seed), -(-steps * batch // len(index))
    order = [index[torch.randperm(len(index), generator=mix)] for _ in range(passes)]
    order = torch.cat(order)[: steps * batch]
    crop = [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3))]
    read = common.batches(images, order, batch, crop, run.device, args.workers, (seed, 0))
    for step, ((x,), i) in enumerate(read):
        sgd.param_groups[0]["lr"] = simclr.lr_at(step, steps, 0, lr * batch / 256)
        with run.autocast():
            s = net(common.flip(x, p=0.5))  # (N, classes)
        loss = F.cross_entropy(s.float(), images.labels[i].to(run.device))
        sgd.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
    return net.eval()


def score(net, part, args, run):
    """Top-1 in %, and minus the loss, which decides between equal top-1."""
    s, y = simclr.embed(lambda x: [net(x[0])], simclr.central(args), part, args, run)
    return 100 * (s.argmax(1) == y).float().mean().item(), -F.cross_entropy(s, y).item()


def compare(backbone, meta, data, share, args, run, seed):
    """The rows of the three starts for one share of the labels and one seed."""
    images = data.train
    own_val = data.val[0] is images  # then it is a tenth of the training images, and theirs again
    pool = torch.cat([data.fit[1], data.val[1]]) if own_val else data.fit[1]
    fit, held = subset(images.labels, pool, share, seed)
    both, classes = torch.cat([fit, held]), int(images.labels.max()) + 1
    torch.manual_seed(seed)
    random = build(meta)
    rows = []
    for start, begin in zip(STARTS, (backbone, random)):
        tried = {}
        for lr in args.lrs:
            net = finetune(begin, classes, images, fit, lr, args, run, seed)
            tried[lr] = score(net, (images, held), args, run)
        lr = max(tried, key=tried.get)
        net = finetune(begin, classes, images, both, lr, args, run, seed)
        rows.append({"start": start, "lr": lr, "test_top1": score(net, data.test, args, run)[0]})
    frozen = backbone.eval().to(run.device)
    parts = [simclr.embed(lambda x: [frozen(x[0])], simclr.central(args), part, args, run)
             for part in ((images, fit), (images, held), data.test)]
    linear, _ = simclr.probes(parts, args)
    rows.append({"start": "frozen", "lr": "", "test_top1": linear})
    for row in rows:
        print(f"{share:.0%}, {len(both)} labels, seed {seed}: {row['start']:12}"
              f"{row['test_top1']:6.1f} %{row['lr'] and ' at lr ' + str(row['lr'])}")
    return [{"share": share, "labels": len(both), "seed": seed} | row for row in rows]


def summary(rows):
    """(share, start) -> number of labels, mean and standard deviation of top-1 over seeds."""
    table = {}
    for key in dict.fromkeys((row["share"], row["start"]) for row in rows):
        own = [row for row in rows if (row["share"], row["start"]) == key]
        top1 = torch.tensor([row["test_top1"] for row in own])
        deviation = top1.std().item() if len(top1) > 1 else 0.0
        table[key] = own[0]["labels"], top1.mean().item(), deviation
    return table


def figure(path, table, title):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(5, 4), layout="constrained")
    ax = whole.subplots()
    for start in STARTS:
        n, top1, deviation = zip(*(v for (_, s), v in table.items() if s == start))
        ax.errorbar(n, top1, deviation, fmt="o-", capsize=3, label=start)
    ax.set(xscale="log", xticks=n, xticklabels=n, xlabel="labels", ylabel="test top-1, %",
           title=title)
    ax.minorticks_off()
    ax.legend()
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("backbone", metavar="BACKBONE.pt")
    p.add_argument("--dataset", help="shapes, a torchvision set or a folder (that of the backbone)")
    p.add_argument("--epochs", type=int, default=4, help="passes over the labels (4)")
    p.add_argument("--min-steps", type=int, default=120, help="but at least so many steps (120)")
    p.add_argument("--batch-size", type=int, default=64, help="at most (64)")
    p.add_argument("--lrs", type=float, nargs="+", default=[0.05, 0.2, 0.8],
                   help="rates for a batch of 256 to choose from (0.05 0.2 0.8)")
    p.add_argument("--seeds", type=int, default=2, help="of subset, order and random weights (2)")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    own, others = p.parse_known_args(argv)
    backbone, meta = rebuild(own.backbone)
    own.dataset = own.dataset or meta["dataset"]
    args = simclr.options(["--image-size", str(meta["image_size"]), *others])
    vars(args).update(vars(own))  # what both have, such as --epochs, is the lesson's
    run = common.setup(args.device, args.amp)
    data = common.Data(args.dataset, args.data_dir, args.limit)
    simclr.complete(args, data.side, len(data))
    data.read(args.image_size, run.device, args.memory_limit, args.workers)
    if not data.labelled:
        common.fail(f"{args.dataset} has no labels to fine-tune with")
    rows = [row for share in SHARES for seed in range(args.seeds)
            for row in compare(backbone, meta, data, share, args, run, seed)]
    lines = [list(rows[0])] + [[str(v) for v in row.values()] for row in rows]
    common.write(f"{args.out}/finetune.csv", "".join(",".join(line) + "\n" for line in lines))
    table = summary(rows)
    figure(f"{args.out}/finetune.png", table, f"{args.dataset}, backbone of {meta['dataset']}")
    print(f"\ntest top-1 in %, mean of {args.seeds} seeds" + "".join(f"{s:>18}" for s in STARTS))
    for share in SHARES:
        cells = [table[share, start] for start in STARTS]
        name = f"{share:.0%} of the labels, {cells[0][0]}"
        print(f"{name:33}" + "".join(f"{mean:10.1f} ± {sd:5.1f}" for _, mean, sd in cells))
    return rows


if __name__ == "__main__":
    main()
