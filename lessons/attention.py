"""What the class token looks at: self-attention, and objects cut out by it (DINO).

Slides: Figure 1 (self-attention of the class token on the heads of the last layer), Figure 4 with
its table: the patches that hold 60 % of a head's attention, against the object's true mask. Paper:
Jaccard similarity on PASCAL VOC12, ViT-S/16: random weights 22.0, supervised 27.3, DINO 45.9.

The token is never told where anything is. It has to say the same of every crop of an image, and
what the crops share is, as a rule, the object; a supervised token needs only as much of the object
as tells its class.

On `shapes` (400 new images, 4 x 4 patches, one seed) the best head has a Jaccard similarity of 24.1
with random weights, 33.9 supervised (64.5 % top-1) and 36.8 with dino.py: the paper's order, though
dino.py has hardly learned the classes. One of its four heads has most of it (28.4).

    python dino.py
    python lessons/attention.py runs/dino-shapes-s0/last.pt
    python lessons/attention.py runs/dino-shapes-s0/last.pt --size 96
    python lessons/attention.py runs/dino-cifar10-s0/backbone.pt --dataset PATH --size 128
    python lessons/attention.py dino_deitsmall8_pretrain.pth --patch-size 8 --image dog.jpg

CHECKPOINT: last.pt or backbone.pt of dino.py, or a released file (--arch, --patch-size). Options
that are not listed in --help go to dino.py (--device, --branch, --data-dir). On `shapes` the
objects are known: there the table is made, with the same network untrained and trained with labels,
on the images that dino.py had. Writes lessons/attention.csv, a line for each head, and
lessons/attention.png: image, attention of every head, and what holds 60 % of it. Images are whole
central squares: of `shapes` new ones, of other sets validation images, never of the test set.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dino

OURS = "without labels"


def network(path, args, others):
    """The teacher of a checkpoint and the options that it was made with."""
    found = common.read_checkpoint(path)
    known = found.get("meta", found.get("args"))
    options = dino.options(others)
    if isinstance(known, dict):  # ours
        vars(options).update({k: known.get(k, v) for k, v in vars(options).items() if k not in (
            "device", "branch", "data_dir", "workers", "memory_limit")})
    else:
        options.arch, options.patch_size, options.image_size = args.arch, args.patch_size, 224
        options.out_dim, options.hidden = 2, 2
        if not (args.image or args.dataset):
            common.fail(f"{path} does not say which images it is for: name --image or --dataset")
    if options.arch not in dino.VITS:
        common.fail(f"{path} holds a {options.arch}: attention takes one of {', '.join(dino.VITS)}")
    net = dino.build(options)
    dino.load_weights(net, path, options)
    return net, options


def holding(attention, mass):
    """(..., T) -> bool: the smallest set of patches that holds this share of the attention (the
    released visualize_attention.py)."""
    value, index = attention.sort(dim=-1)
    share = value.cumsum(-1) / value.sum(-1, keepdim=True)
    return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, index, share > 1 - mass)


def jaccard(found, truth):
    """(..., H, W) bool -> (...): intersection over union."""
    return (found & truth).sum((-2, -1)) / (found | truth).sum((-2, -1)).clamp(min=1)


@torch.no_grad()
def maps(net, images, run):
    """images (N, 3, S, S) in [0, 1] -> attention of the class token to the patches, (N, heads,
    S / P, S / P)."""
    net, side, parts = net.eval().to(run.device), images.shape[-1] // net.backbone.patch_size, []
    for x in images.split(256):
        w = net.backbone.attention((x.to(run.device) - net.mean) / net.std)  # (n, heads, T, T)
        parts.append(w[:, :, 0, 1:].unflatten(2, (side, side)).float().cpu())
    return torch.cat(parts)


def masks(attention, mass, size):
    """Maps (N, heads, h, w) -> what holds this share, in pixels (N, heads, size, size)."""
    kept = holding(attention.flatten(2), mass).view_as(attention)
    return F.interpolate(kept.float(), size=(size, size)) > 0.5  # nearest


def supervised(data, options, epochs, run):
    """The same backbone trained with labels on the images that dino.py had but for those of the
    validation: crops and flips, AdamW, half a cosine -> network, top-1 on those in %."""
    net = copy.deepcopy(dino.build(options)).to(run.device)
    net.classifier = nn.Linear(net.backbone.dim, 1 + int(data.train.labels.max())).to(run.device)
    images, index = data.fit
    size, batch = options.image_size, min(64, len(index))
    weights = [*net.backbone.parameters(), *net.classifier.parameters()]
    optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.05)
    steps = epochs * (len(index) // batch)
    crop = [common.Crop(size, (0.5, 1.0), (3 / 4, 4 / 3))]
    for epoch in range(epochs):
        shuffle = torch.Generator().manual_seed(options.seed * 2**20 + epoch)
        order = index[torch.randperm(len(index), generator=shuffle)][: steps // epochs * batch]
        for i, (views, at) in enumerate(common.batches(images, order, batch, crop, run.device,
                                                       seed=(options.seed, epoch))):
            step = epoch * (steps // epochs) + i
            rate = 1e-3 * min(1, (step + 1) / max(steps // 10, 1))  # a tenth of warm-up
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            h = net(common.flip(views[0], p=0.5))[0]
            optimizer.zero_grad()
            F.cross_entropy(net.classifier(h), images.labels[at].to(run.device)).backward()
            optimizer.step()
    right, (images, index) = 0, data.val
    with torch.no_grad():
        net.eval()
        for (x,), at in common.batches(images, index, 256, [common.Crop(size, 1.0)], run.device):
            right += (net.classifier(net(x)[0]).argmax(1).cpu() == images.labels[at]).sum().item()
    return net, 100 * right / len(index)


def load_images(args, options, size, run):
    """Images (n, 3, size, size), and of `shapes` their masks (n, size, size), else None."""
    if args.image:
        try:
            image = common.rgb(Image.open(args.image))
        except Exception as error:  # whatever its decoder likes
            common.fail(f"--image {args.image} cannot be read ({type(error).__name__})")
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        box = common.central_boxes(torch.tensor([x.shape[2:]]), 1.0)
        return common.crop_resize(x, box, size), None
    if options.dataset == "shapes":  # neither training (seed 0) nor test images (1)
        x, _, truth, _ = common.shapes(args.images, size, seed=2)
        return x / 255, truth
    data = common.Data(options.dataset, options.data_dir, options.limit)
    data.read(size, run.device, options.memory_limit, options.workers)
    images, index = data.val
    crop = [common.Crop(size, 1.0)]
    views = common.batches(images, index[: args.images], 256, crop, run.device, options.workers)
    return torch.cat([v[0].cpu() for v, _ in views]), None


def figure(path, x, shown, best, mass):
    """A row per image. shown: maps of the checkpoint; best: title -> masks (n, S, S)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    heads, size = shown.shape[1], x.shape[-1]
    columns = {"image": x.permute(0, 2, 3, 1)}
    columns |= {f"head {i + 1}": shown[:, i] for i in range(heads)}
    columns |= {title: x.permute(0, 2, 3, 1) * (0.15 + 0.85 * m.unsqueeze(-1))
                for title, m in best.items()}
    whole = Figure(figsize=(1.4 * len(columns), 1.4 * len(x) + 0.5), layout="constrained")
    for row, axes in enumerate(whole.subplots(len(x), len(columns), squeeze=False)):
        for ax, (title, pictures) in zip(axes, columns.items()):
            ax.imshow(pictures[row].numpy(), extent=(0, size, size, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(title, fontsize=8)
    whole.suptitle(f"Self-attention of the class token, last block; masks hold {mass:.0%} of it",
                   fontsize=9)
    whole.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("checkpoint", help="last.pt or backbone.pt of dino.py, or a released file")
    p.add_argument("--image", metavar="FILE", help="one image, in place of a set")
    p.add_argument("--dataset", help="shapes, a torchvision set or a folder (that of the run)")
    p.add_argument("--images", type=int, default=400, help="of the set (400)")
    p.add_argument("--shown", type=int, default=6, help="of them in the picture (6)")
    p.add_argument("--size", type=int, help="side in pixels (as in training)")
    p.add_argument("--mass", type=float, default=0.6, help="share of attention in a mask (0.6)")
    p.add_argument("--supervised-epochs", type=int, default=12, help="with labels; 0: not (12)")
    p.add_argument("--arch", default="vit_small", help="of a released file (vit_small)")
    p.add_argument("--patch-size", type=int, default=16, help="of a released file (16)")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    net, options = network(args.checkpoint, args, others)
    run, patch = common.setup(options.device), options.patch_size
    options.dataset = args.dataset or options.dataset
    size = (args.size or options.image_size) // patch * patch
    if not size:
        common.fail(f"--size {args.size} is less than a patch of {patch} pixels")
    x, truth = load_images(args, options, size, run)
    nets, top1 = {OURS: net}, {}
    if truth is not None:
        nets["random weights"] = dino.build(options)
        if args.supervised_epochs:
            data = common.Data("shapes", limit=options.limit)
            data.read(options.image_size, run.device, 8, 0)
            nets["supervised"], top1["supervised"] = supervised(
                data, options, args.supervised_epochs, run)
    rows, best, shown = [], {}, maps(net, x[: args.shown], run)
    for name, f in nets.items():
        found = masks(maps(f, x, run), args.mass, size)  # (N, heads, S, S)
        area = found.float().mean((0, 2, 3))
        scores = jaccard(found, truth[:, None]) if truth is not None else None  # (N, heads)
        for i in range(found.shape[1]):
            score = "" if scores is None else f"{100 * scores[:, i].mean():.1f}"
            rows.append([name, str(i + 1), score, f"{100 * area[i]:.1f}"])
        if scores is None:
            best |= {f"mask {i + 1}": found[: args.shown, i] for i in range(found.shape[1])}
            continue
        top, head = scores.max(1)  # of every image, as the paper
        chosen = found[torch.arange(len(x)), head]
        rows.append([name, "best", f"{100 * top.mean():.1f}",
                     f"{100 * chosen.float().mean():.1f}"])
        best[name] = chosen[: args.shown]
    if truth is not None:
        best["the object"] = truth[: args.shown]
        whole = jaccard(torch.ones_like(truth), truth).mean()  # what needs no attention
        rows.append(["whole image", "", f"{100 * whole:.1f}", "100.0"])
    keys = ["network", "head", "jaccard", "share_of_image"]
    common.write(f"{args.out}/attention.csv", "".join(",".join(r) + "\n" for r in [keys, *rows]))
    figure(f"{args.out}/attention.png", x[: args.shown], shown, best, args.mass)
    print(f"\n{len(x)} images of {size} x {size} pixels, {args.mass:.0%} of the attention, in %")
    print(f"{'':20}{'head':>6}{'Jaccard':>10}{'share of image':>17}")
    for name, head, score, area in rows:
        print(f"{name:20}{head:>6}{score:>10}{area:>17}")
    for name, value in top1.items():
        print(f"{name}: top-1 {value:.1f} % on validation images")
    return rows


if __name__ == "__main__":
    main()
