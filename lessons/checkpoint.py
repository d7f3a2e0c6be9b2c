"""What several lessons do with a trained network: load it, find images for it, show them."""

import importlib
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from lessons import shared


class Fed(nn.Module):
    """A backbone behind its input normalisation: (N, 3, S, S) in [0, 1] -> h (N, d)."""

    def __init__(self, backbone, mean, std):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        h = self.backbone((x - self.mean) / self.std)
        return h[:, 0] if h.ndim == 3 else h  # for a ViT, the class token


def untrained(meta, seed):
    """The network of a backbone.pt before training; meta says which file made it, and how."""
    method = importlib.import_module(meta["method"])
    net = method.build(Namespace(**meta | {"seed": seed}))
    return Fed(net.backbone, meta["mean"], meta["std"])


def backbone(path):
    """backbone.pt of any method -> the network with its weights, and meta: how it was trained."""
    found = common.read_checkpoint(path)
    if "method" not in found.get("meta", {}):
        common.fail(f"{path} has to be the backbone.pt of a run")
    if found["meta"].get("task") in ("patch", "jigsaw", "colorization", "splitbrain", "cpc"):
        common.fail(f"{path} does not take RGB images but tiles, parts, or one channel")
    net = untrained(found["meta"], seed=0)
    net.backbone.load_state_dict(found["state_dict"])
    return net, found["meta"]


def parser(doc, images=400):
    """The options of a lesson; those it does not know are passed on to the method."""
    p = common.Parser(description=doc.split("\n")[0], allow_abbrev=False)
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                   help="last.pt or backbone.pt of the method, or a released file; or several")
    p.add_argument("--dataset", help="a name or a folder (that of the run)")
    p.add_argument("--images", **common.FROM_2, default=images, help=f"images, at most ({images})")
    p.add_argument("--size", **common.FROM_1, help="side of an image in pixels (as in training)")
    p.add_argument("--finer", **common.FROM_1, default=2,
                   help="times as many patches along a side, which then overlap (2)")
    p.add_argument("--seeds", **common.FROM_1, default=3,
                   help="number of seeds, of images and of random networks (3)")
    p.add_argument("--out", type=shared.folder, default=Path(__file__).parent,
                   help="folder for CSV and PNG")
    return p


def padded(x, margin):
    """Images (N, 3, H, W) with `margin` more rows and columns, copies of those at the edges."""
    before = margin // 2
    return F.pad(x, (before, margin - before) * 2, mode="replicate")


class Overlapping(nn.Module):
    """Embed overlapping patches, `times` as many along a side: (N, 3, H, W) -> (N, D, t H / P,
    t W / P), one centred on each square of P / t pixels. This gives a trained network a finer grid
    of tokens (Amir et al. 2021, arXiv 2112.05814). Images are padded with the pixels of their
    edges."""

    def __init__(self, embed, patch, times):
        super().__init__()
        self.embed, self.patch, self.step = embed, patch, patch // times

    def forward(self, x):
        height, width = x.shape[2:]
        x = padded(x, self.patch - self.step)
        rows = []
        for top in range(0, self.patch, self.step):
            row = [self.embed(x[:, :, top : top + height, left : left + width])
                   for left in range(0, self.patch, self.step)]
            rows.append(torch.stack(row, -1))  # (N, D, H / P, W / P, t)
        return torch.stack(rows, 3).flatten(4).flatten(2, 3)


def refine(net, times):
    """net with overlapping patches; its patch_size becomes the side of a token's square."""
    vit = net.backbone
    if vit.patch_size % times:
        common.fail(f"--finer {times} does not divide --patch-size {vit.patch_size}")
    vit.patch_embed = Overlapping(vit.patch_embed, vit.patch_size, times)
    vit.patch_size //= times
    return net.eval()


def load(method, own, options, path):
    """The network of a checkpoint, its data, and the run, whose folder is deleted at the end.

    Options that are not given are as in the run that made the checkpoint.
    """
    args = common.options(method.__name__, method.__doc__, method.OPTIONS,
                          [*options, "--eval", path])
    made = common.made_with(common.read_checkpoint(path))
    if made:  # by this project, not a released file
        given = {option.split("=")[0] for option in options}
        for name in ("dataset", "data_dir", "limit", "seed"):
            if f"--{name.replace('_', '-')}" not in given:
                setattr(args, name, made.get(name))
    args.dataset = own.dataset or args.dataset
    if args.arch and not args.arch.startswith("vit"):
        common.fail(f"{path} holds a {args.arch}, which has no patch tokens")
    with tempfile.TemporaryDirectory() as folder:
        args.out = folder
        with common.Run(args) as run:
            net, data = method.train(args, run)  # with --eval it trains nothing
    return refine(net, own.finer), data, run


def side(own, run):
    """Side in pixels, a multiple of the patch: --size, or as in training, at most 224."""
    patch = run.args.patch_size
    size = own.size or min(run.args.image_size, 224)
    if size < patch:
        common.fail(f"--size {size} is less than a patch of {patch} pixels")
    return size // patch * patch


def images(own, data, run, seed):
    """Images (n, 3, size, size), labels (n,), -1 if unknown, and, for the built-in set, the parts
    of the objects (n, size, size), 0 where there is none (other sets: None).

    For the built-in set, new images for every seed from 0 on; for other sets, validation images;
    for a folder without labels, all. If these are more than --images, every seed takes others, all
    of them new if there are at least --seeds times as many.
    """
    size = side(own, run)
    if run.args.dataset == common.BUILT_IN:
        x, labels, parts, *_ = common.toys(own.images, size, 2 + seed)  # training: 0, test: 1
        return x / 255, labels, parts
    data.read(size, *data.how[1:])
    part, index = data.val
    if not data.labelled:
        part, index = data.train, torch.arange(len(data.train.labels))
    part = part, index.roll(-seed)  # other images for every seed, if there are many
    crop = [common.Crop(size, scale=1.0)]
    x, labels = common.embed(lambda views: views, part, crop, run, own.images)
    return x.cpu(), labels.cpu(), None


@torch.no_grad()
def tokens(net, x, run):
    """After the final norm: (N, 3, S, S) in [0, 1] -> class tokens (N, D), patch tokens
    (N, S / P, S / P, D)."""
    net.eval().to(run.device)
    side = x.shape[-1] // net.backbone.patch_size
    h = []
    for part in x.split(64):
        part = (part.to(run.device) - net.mean) / net.std
        h.append(net.backbone(part).cpu())
    h = torch.cat(h)
    return h[:, 0], h[:, -(side**2) :].unflatten(1, (side, side))


def per_patch(maps, patch):
    """Means over squares: (N, S, S) -> (N, S / P, S / P)."""
    return F.avg_pool2d(maps.float().unsqueeze(1), patch).squeeze(1)


def pixels(x, patch, step):
    """The pixels of the patch that is centred on each square of `step` pixels: (N, 3, S, S) ->
    (N, S / step, S / step, 3 patch^2)."""
    side = x.shape[-1] // step
    x = padded(x, patch - step)
    return F.unfold(x, patch, stride=step).mT.unflatten(1, (side, side))


def kinds_of_features(method, name, net, seed, run):
    """What describes a patch: name -> f, images (N, 3, S, S) -> (N, h, w, D). The tokens of the
    network, called `name`, those of one with random weights, and the patches' pixels."""
    patch, step = run.args.patch_size, net.backbone.patch_size
    args = Namespace(**vars(run.args) | {"seed": seed})
    other = refine(method.build(args), patch // step)
    return {
        name: lambda x: tokens(net, x, run)[1],
        "random weights": lambda x: tokens(other, x, run)[1],
        "pixels": lambda x: pixels(x, patch, step),
    }


def most(parts, patch):
    """The largest part in a square, 0 for the background: (N, S, S) -> (N, S / P, S / P)."""
    numbers = range(int(parts.max()) + 1)
    return torch.stack([per_patch(parts == k, patch) for k in numbers]).argmax(0)


def grid(part, columns):
    """A row per image, on a part of a figure; columns: title -> (n, 3, S, S) or (n, S, S)."""
    most = max(len(pictures) for pictures in columns.values())
    axes = part.subplots(most, len(columns), squeeze=False)
    for column, (title, pictures) in zip(axes.T, columns.items()):
        column[0].set_title(title, fontsize=8)
        for ax, picture in zip(column, pictures):
            ax.imshow(picture.movedim(0, -1) if picture.ndim == 3 else picture)
    for ax in axes.flat:
        ax.axis("off")
