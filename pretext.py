"""Pretext tasks: what was asked of images before views were compared
RotNet: Gidaris, Singh, Komodakis, ICLR 2018, https://arxiv.org/abs/1803.07728, and eight others
Slides: "SSL: Cognitive Principles" and "SSL: Pretext Task Taxonomy".

A part or a property of the image is hidden and has to be told from the rest: the image is its own
label. A network f makes h of what is left, a head answers from h alone and is thrown away after
training. The head finds the cheapest way to the answer: every task has a shortcut that needs no
understanding of the image, and a guard against it, which --without takes away.

 1. x = t(image)                two views of every image              `crops`, `augment`
 2. input, asked = make(x)      the task hides something              `make` of the task
 3. h = f(input)                representations                       `resnet`
 4. answer = head(h)                                                  `forward` of the task
 5. L(answer, asked)                                                  `loss` of the task
 6. update f and head                                                 `update`, `lr_at`

  --task        asks for                       paper                          --without
 reconstructive: what is missing or spoilt?
  denoising     the clean image                Vincent et al. 2008 (ICML)     noise
  inpainting    what is in the hole            Pathak 2016, 1604.07379        place
  colorization  colours, from lightness        Zhang 2016, 1603.08511         rebalance
  splitbrain    and lightness, from colours    Zhang 2017, 1611.09842         split
 predictive: what was done to it?
  rotation      how far was it turned?         Gidaris 2018, 1803.07728       exact
  patch         where is the second tile?      Doersch 2015, 1505.05192       gap jitter color norm
  jigsaw        in which order are the tiles?  Noroozi 2016, 1603.09246       gap jitter color norm
 contrastive and on to BYOL: which one is it?
  cpc           the patches further down       van den Oord 2018, 1807.03748  gap color norm
  view          what a fixed random network    Grill 2020, 2006.07733         fixed
                makes of the other view

Symbols: x (M, 3, S, S) in [0, 1], the M = 2N views of N images; h (n, d) representations of the n
pictures that go in; z what the loss compares, for `cpc` and `view`, otherwise h again.

Departures from the papers:
 1. One frame for all: ResNets (papers: AlexNet), the same crops and flips, one schedule.
 2. The heads see h, after pooling, and nothing else (papers: feature maps), so that the answer has
    to be in what is evaluated. h is always made of a whole view, also by a network that has been
    trained on tiles; `see` gives it the view as the task does.
 3. rotation: on `shapes` light always comes from above, and a slope of light is all that it takes
    to tell the turns. There --shade adds a random one to every view; --shade 0 is the paper.
 4. patch and jigsaw: in two thirds of the tiles one channel is copied to all (papers: noise in the
    other two, or grey and shifted channels); no changes of resolution. patch: both directions of
    all eight pairs. jigsaw: orders are chosen by their nearest, then by their mean distance.
 5. colorization: an own list of 261 bins (released list: 313) on a grid of at most 16 x 16.
    splitbrain: soft bins for colours, hard ones for lightness.
 6. inpainting: no adversarial term, no overlap; the hole is anywhere (paper: in the middle, or of
    random shape). denoising: one network at once (paper: layer by layer, with tied weights).
 7. cpc: layer norm, dropped colours and steps of at least three rows are version 2's (Henaff 2019,
    1905.09272), in one direction, with a smaller context network; the negatives are the patches
    of the same rows in all views of the batch.

    python pretext.py   75 s on 2 CPU cores (rotation); top-1 of h: 51.4 +- 5.8 % linear, 40.3 +-
                        3.1 % k-NN, 3 seeds (untrained 27.4 and 29.9, pixels 29.6 and 48.5)
"""

import argparse
import copy
import functools
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import common

# ==================================================================================================
# Options
# ==================================================================================================

def by_task(other, **tasks):
    """A value of RECIPES that depends on the task."""
    return lambda args, n: tasks.get(args.task, other)


RECIPES = {  # by data, an option overrides an entry; lr is for a batch of 256 and grows with it
    # the built-in set, on a CPU
    "shapes": dict(arch="resnet10", stem="7x7", image_size=32, min_scale=0.5, permutations=24,
                   shade=by_task(0.0, rotation=0.3), epochs=2, batch_size=by_task(32, rotation=16),
                   optimizer="adamw", lr=by_task(8e-3, rotation=2e-2), weight_decay=0.01),
    # images up to 64 pixels: RotNet's for CIFAR-10 (its batch of 512 turned images is 64 here); the
    # other tasks have not been measured, here and below
    "small": dict(arch="resnet18", stem="3x3", image_size=64, min_scale=0.5, permutations=100,
                  shade=0.0, epochs=100, batch_size=by_task(128, rotation=64),
                  optimizer=by_task("adamw", rotation="sgd"), lr=by_task(2e-3, rotation=0.4),
                  weight_decay=5e-4),
    # larger ones: as the predictive tasks have been run with ResNet-50 (mmselfsup, VISSL)
    "large": dict(arch="resnet50", stem="7x7", image_size=224, min_scale=0.3, permutations=1000,
                  shade=0.0, epochs=70, batch_size=by_task(128, rotation=64, cpc=32),
                  optimizer=by_task("adamw", rotation="sgd", patch="sgd", jigsaw="sgd"),
                  lr=by_task(1e-3, rotation=0.1, patch=0.1, jigsaw=0.1), weight_decay=1e-4),
}
ARCHS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
         "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3])}


def options(argv=None):
    """The command line. What has no default here comes from the row of RECIPES for the data."""
    whole, share = functools.partial(common.number, int), common.number(float, 0, 1)
    positive = common.number(float, 1e-9)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = common.fail
    o = p.add_argument_group("run").add_argument
    o("--seed", type=whole(0, 2**31), default=0, help="of weights, order and random draws (0)")
    o("--device", help="cuda, mps or cpu (the first there is)")
    o("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="autocast (auto)")
    o("--compile", action="store_true", help="compile network and augmentation")
    o("--out", help="output folder (runs/pretext-<dataset>-s<seed>)")
    o("--resume", action="store_true", help="go on with the interrupted run in --out")
    o = p.add_argument_group("data").add_argument
    o("--dataset", default="shapes", help="shapes, a torchvision set or a folder (shapes)")
    o("--data-dir", default="data", help="where downloaded sets are kept (data)")
    o("--limit", type=whole(1), help="use only so many training images (all)")
    o("--image-size", type=whole(8), help="side of a view in pixels")
    o("--workers", type=whole(0), default=common.cores(), help="readers of files (a core each)")
    o("--memory-limit", type=common.number(float, 0), default=8, help="GB, more is streamed (8)")
    o = p.add_argument_group("method").add_argument
    o("--task", choices=TASKS, default="rotation", help="what is asked (rotation)")
    o("--without", nargs="+", metavar="GUARD", default=[], help="take away guards (docstring)")
    o("--shade", type=share, help="largest slope of light that is added to a view (papers: 0)")
    o("--permutations", type=whole(2, 5040), help="of the jigsaw (paper: 1000)")
    o("--arch", choices=ARCHS, help="f (papers: AlexNet)")
    o("--stem", choices=["3x3", "7x7"], help="of f; 3x3 has no max-pooling, for small images")
    o("--min-scale", type=share, help="smallest share of the image's area in a crop")
    o = p.add_argument_group("optimiser").add_argument
    o("--epochs", type=whole(1), help="passes over the training images, two views of each")
    o("--batch-size", type=whole(2), help="N, images in a step of all processes")
    o("--optimizer", choices=["sgd", "adamw"], help="(RotNet: sgd)")
    o("--lr", type=positive, help="peak for a batch of 256, others in proportion")
    o("--weight-decay", type=share, help="(RotNet: 5e-4)")
    o("--warmup", type=share, default=0.1, help="share of the run (0.1)")
    o = p.add_argument_group("evaluation").add_argument
    o("--eval-every", type=whole(0), help="epochs (a quarter of the run; 0: never)")
    o("--knn-k", type=whole(1), default=20, help="neighbours (20)")
    o("--knn-tau", type=positive, default=0.07, help="temperature of their votes (0.07)")
    o("--init", metavar="FILE", help="start from a backbone.pt, a last.pt or torchvision's weights")
    o("--eval", metavar="FILE", help="evaluate such a file, train nothing")
    args = p.parse_args(argv)
    for guard in set(args.without) - {*TASKS[args.task].guards}:
        common.fail(f"--without {guard}: {args.task} has {', '.join(TASKS[args.task].guards)}")
    return args


def complete(args, side, n):
    """Fill what is left open from RECIPES, for n images with this shorter side, and print it."""
    row = "shapes" if side is None else "small" if side <= 64 else "large"
    defaults = RECIPES[row] | {"image_size": min(RECIPES[row]["image_size"], side or math.inf)}
    defaults["eval_every"] = -(-(args.epochs or defaults["epochs"]) // 4)
    for k, value in defaults.items():
        if getattr(args, k) is None:
            setattr(args, k, value(args, n) if callable(value) else value)
    print(f"recipe {row}:", *(f"{k}={v:.6g}" if isinstance(v := getattr(args, k), float)
                              else f"{k}={v}" for k in defaults))


# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """Random crops, two of every image."""
    return [common.Crop(args.image_size, (args.min_scale, 1.0), (3 / 4, 4 / 3), count=2)]


def augment(views, args):
    """Views (N, 3, S, S) in [0, 1] -> same, an own draw for every image. For `view` as in BYOL."""
    seen = [shade(common.flip(x, p=0.5), args.shade) for x in views]
    if args.task == "view":
        seen = [common.grey(common.color_jitter(x, 0.4, 0.4, 0.2, 0.1, p=0.8), p=0.2) for x in seen]
    return seen


def shade(x, most):
    """A slope of light, both ways up to `most` from the middle to the edge: which way up an
    image is has to be told from the things in it, not from the light that comes from above."""
    slope = common.uniform(-most, most, (len(x), 2, 1, 1, 1), x.device)
    line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    return (x + slope[:, 0] * line.unsqueeze(1) + slope[:, 1] * line).clamp(0, 1)


def rotate(images, exact=True):
    """(N, 3, S, S) -> (4N, 3, S, S), labels (4N,): first as they are, then turned 1 to 3 times.

    Exact turns move pixels and leave no trace (RotNet, Section 2.1). Without, the turned ones are
    interpolated, half a pixel off, as by a rotation through any angle: only upright ones are sharp.
    """
    turned = [images.rot90(r, (2, 3)) for r in range(4)]
    if not exact:
        turned[1:] = [F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1) for x in turned[1:]]
    return torch.cat(turned), torch.arange(4, device=images.device).repeat_interleave(len(images))


def tiles(x, size, stride, jitter=0, rows=3):
    """(M, 3, S, S) -> (M, T, 3, size, size): a grid of T = rows^2 tiles about the centre, row by
    row. Every tile is moved by up to `jitter` pixels each way, but stays inside."""
    S, device = x.shape[-1], x.device
    start = torch.arange(rows, device=device) * stride + (S - size - (rows - 1) * stride) // 2
    moved = torch.randint(-jitter, jitter + 1, (len(x), rows**2, 2), device=device)
    corner = (torch.cartesian_prod(start, start) + moved).clamp(0, S - size)  # (M, T, 2)
    row, column = (corner.unsqueeze(3) + torch.arange(size, device=device)).unbind(2)
    m = torch.arange(len(x), device=device).view(-1, 1, 1, 1)
    return x[m, :, row.unsqueeze(3), column.unsqueeze(2)].movedim(4, 2)


def permute(t, orders):
    """Tiles (M, T, 3, s, s), orders (M, T) -> same: place i gets tile orders[m, i]."""
    return t[torch.arange(len(t), device=t.device).unsqueeze(1), orders]


def mosaic(t, standardised=False):
    """Tiles (M, T, 3, s, s) -> one picture with gaps."""
    t = F.pad(t * 0.2 + 0.5 if standardised else t, (0, 1, 0, 1), value=1.0)
    t = t.unflatten(1, (math.isqrt(t.shape[1]), -1)).permute(0, 3, 1, 4, 2, 5)
    return t.flatten(4, 5).flatten(2, 3)


def drop_colors(x, p):
    """Of an image, with probability p, one channel drawn at random is all there is: chromatic
    aberration shows between two channels only (Doersch et al., Section 3.1)."""
    channel = torch.randint(3, (len(x), 1, 1, 1), device=x.device).expand(-1, 1, *x.shape[2:])
    return torch.where(common.chance(x, p), x.gather(1, channel), x)


def standardise(x):
    """Each channel of each image to mean 0 and deviation 1: no brightness to match tiles by."""
    std, mean = torch.std_mean(x, (2, 3), keepdim=True, correction=0)
    return (x - mean) / (std + 1e-3)


@functools.cache
def jigsaw_permutations(n, seed):
    """(n, 9): permutations far from each other in Hamming distance (Noroozi & Favaro, Algorithm 1).

    After a random one always that whose nearest is furthest, and of those the one furthest on
    average. By the mean alone, as in the paper, two of 100 have a distance of 3, here 6, while the
    mean is 8.08 for both.
    """
    every = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.int8)  # (9!, 9)
    chosen = [int(torch.randint(len(every), (), generator=torch.Generator().manual_seed(seed)))]
    total, nearest = torch.zeros(len(every), dtype=torch.int32), torch.full((len(every),), 9)
    while len(chosen) < n:
        distance = (every != every[chosen[-1]]).sum(1)
        total, nearest = total + distance, nearest.minimum(distance)
        chosen.append(int((10**5 * nearest + total).argmax()))
    return every[chosen].long()


# linear sRGB to XYZ over that of white (D65), so that each row adds up to 1
XYZ = ((0.433953, 0.376219, 0.189828), (0.212671, 0.71516, 0.072169),
       (0.017758, 0.109477, 0.872765))


def constant(values, x):
    """values beside x, in its type: as x.new_tensor(values), which waits for a GPU."""
    return torch.tensor(values, dtype=x.dtype).to(x.device, non_blocking=True)


def rgb_to_lab(x):
    """(N, 3, H, W), sRGB in [0, 1] -> CIE L*a*b*, D65: L in [0, 100], a, b about [-110, 110]."""
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055).clamp(min=0) ** 2.4, x / 12.92)
    t = torch.einsum("cd,ndhw->nchw", constant(XYZ, x), linear)  # white is 1, 1, 1
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-9) ** (1 / 3), t * 841 / 108 + 4 / 29)
    X, Y, Z = f.unbind(1)
    return torch.stack([116 * Y - 16, 500 * (X - Y), 200 * (Y - Z)], 1)


def lab_to_rgb(lab):
    """The way back; colours that sRGB has not are clipped."""
    L, a, b = lab.unbind(1)
    Y = (L + 16) / 116
    f = torch.stack([Y + a / 500, Y, Y - b / 200], 1)
    t = torch.where(f > 6 / 29, f**3, (f - 4 / 29) * 108 / 841)
    back = torch.linalg.inv(lab.new_tensor(XYZ))
    linear = torch.einsum("cd,ndhw->nchw", back, t).clamp(0, 1)
    curve = 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curve, 12.92 * linear)


@functools.cache
def ab_bins():
    """(Q, 2): the centres, multiples of 10, of those cells of the ab plane that hold colours."""
    level = torch.linspace(0, 1, 64, dtype=torch.float64)
    cube = torch.cartesian_prod(level, level, level).T.reshape(1, 3, -1, 1)
    return (rgb_to_lab(cube)[0, 1:, :, 0].T / 10).round().unique(dim=0) * 10


def soft_encode(ab, bins):
    """(M, 2, s, s) -> Z (M, Q, s, s): weights of the 5 nearest bins, a Gaussian of width 5 of their
    distance, which add up to 1 (Zhang et al. 2016, Section 2.1)."""
    apart = torch.cdist(ab.movedim(1, 3).flatten(1, 2), bins.expand(len(ab), -1, -1),
                        compute_mode="donot_use_mm_for_euclid_dist")  # (M, s s, Q)
    near, q = apart.topk(5, largest=False)
    Z = torch.zeros_like(apart).scatter(2, q, (-near.square() / 50).softmax(2))
    return Z.mT.unflatten(2, ab.shape[2:])


def hole(x, anywhere=True):
    """(M, 1, S, S) bool, true in a square of half the side, a quarter of the image, anywhere or in
    the middle (Pathak et al., Section 3.3)."""
    M, S, device = len(x), x.shape[-1], x.device
    corner = torch.randint(S - S // 2 + 1, (M, 2, 1), device=device) if anywhere else S // 4
    line = torch.arange(S, device=device).expand(M, 2, S)
    row, column = ((line >= corner) & (line < corner + S // 2)).unbind(1)
    return (row.unsqueeze(2) & column.unsqueeze(1)).unsqueeze(1)


# ==================================================================================================
# Model
# ==================================================================================================


MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # of the input: RGB in [0, 1] as it is


def resnet(arch, stem, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier: (N, 3, S, S) -> (N, d)."""
    net = ResNet(*ARCHS[arch], norm_layer=norm_layer)
    net.dim, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def decoder(d, outputs, side, width=128):
    """(n, d) -> (n, outputs, side, side): transposed convolutions, as in the context encoder."""
    doublings = max(math.ceil(math.log2(side / 4)), 0)
    kernel, layers = -(-side // 2**doublings), [nn.Unflatten(1, (d, 1, 1))]
    for i in range(doublings + 1):
        new, how = max(width >> i, 32), (4, 2, 1) if i else (kernel,)
        layers += [nn.ConvTranspose2d(d, new, *how, bias=False), nn.BatchNorm2d(new), nn.ReLU()]
        d = new
    return nn.Sequential(*layers, nn.Conv2d(d, outputs, 3, 1, 1), nn.AdaptiveAvgPool2d(side))


def halve(net):
    """Two networks of half the width side by side, h and input are halves of both: every
    convolution in two groups, as in the released code of the split-brain autoencoder."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.groups = 2
            if m.in_channels > 3:  # the first one sees 3 channels in each half
                m.weight = nn.Parameter(m.weight[:, ::2].clone())


def two_layers(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


class Task(nn.Module):
    """A head, and what the tasks have in common.

    make: views (M, 3, S, S) -> [what goes into f], [what is asked]; forward: f and that -> answers;
    loss: -> its terms (T,), of which the first is trained; chance: what they are when nothing is
    learned; see: a whole view as f gets it; project: h -> z; measure: what the task has to know of
    the data; show: columns of views.png. guards: what --without can take away; on: those there are.
    """

    def __init__(self, f, args):
        super().__init__()
        self.d, self.size, self.project = f.dim, args.image_size, nn.Identity()
        self.on = [guard for guard in self.guards if guard not in args.without]

    def see(self, x):
        return x

    def measure(self, x):
        pass


# Reconstructive ----------------------------------------------------------------------------------


class Denoising(Task):
    """Vincent et al. 2008: a quarter of the pixels is black (masking noise), tell what they were.

    Shortcut: without noise, to copy the input, for which any code will do.
    """

    guards = ("noise",)

    def __init__(self, f, args):
        super().__init__(f, args)
        self.answer = decoder(self.d, 3, self.size)

    def measure(self, x):
        self.chance = {"loss": (x - x.mean(0)).square().mean().item()}  # of the mean image

    def make(self, x):
        kept = torch.rand_like(x[:, :1]) >= (0.25 if "noise" in self.on else 0.0)
        return [x * kept], [x, torch.ones_like(kept)]  # the answer counts everywhere

    def forward(self, f, seen):
        return [self.answer(f(seen))]

    def loss(self, answer, asked, gathered):
        return masked_l2(*answer, *asked).view(1)

    def show(self, f, x):
        (seen,), (_, counts) = self.make(x)
        return [x, seen, torch.where(counts, *self(f, seen), x)]


class Inpainting(Denoising):
    """Context encoder, Pathak et al. 2016: a square is cut out, what was there?

    Shortcut: always in the middle, it is filled from its border, by features of that one place.
    """

    guards = ("place",)

    def make(self, x):
        missing, mean = hole(x, "place" in self.on), constant([123, 117, 104], x).view(3, 1, 1)
        return [torch.where(missing, mean / 255, x)], [x, missing]


class Colorization(Task):
    """Zhang et al. 2016: the colour of every place of a grid, one of Q bins, from lightness.

    Shortcut: to answer the dull colours that most places have. Rebalanced, rare ones weigh more.
    """

    guards = ("rebalance",)

    def __init__(self, f, args):
        super().__init__(f, args)
        self.grid = min(self.size // 4, 16)
        self.register_buffer("bins", ab_bins().float())
        self.register_buffer("weight", torch.ones(len(self.bins)))
        self.answer = decoder(self.d, len(self.bins), self.grid)
        self.chance = {"loss": math.log(len(self.bins))}

    def measure(self, x):
        if "rebalance" in self.on:
            self.weight.copy_(rebalance(self.make(x)[1][0].mean((0, 2, 3))))

    def see(self, x):
        return rgb_to_lab(x)[:, :1].expand(-1, 3, -1, -1) / 100

    def make(self, x):
        ab = F.adaptive_avg_pool2d(rgb_to_lab(x)[:, 1:], self.grid)
        return [self.see(x)], [soft_encode(ab, self.bins)]

    def forward(self, f, seen):
        return [self.answer(f(seen))]  # (M, Q, s, s)

    def loss(self, answer, asked, gathered):
        return soft_cross_entropy(*answer, *asked, self.weight).view(1)

    def show(self, f, x):
        (seen,), (Z, *_) = self.make(x)
        both = Z, (self(f, seen)[0] / 0.38).softmax(1)  # annealed mean, Section 2.3
        ab = [F.interpolate(torch.einsum("nqhw,qc->nchw", p, self.bins), self.size) for p in both]
        L = rgb_to_lab(x)[:, :1]
        return [x, seen[:, :3], *(lab_to_rgb(torch.cat([L, c], 1)) for c in ab)]


class SplitBrain(Colorization):
    """Zhang et al. 2017: one half of f tells colours from lightness, the other the reverse.

    Shortcut: were both halves to see all channels, each could copy what it is asked for.
    """

    guards = ("split",)

    def __init__(self, f, args):
        super().__init__(f, args)
        self.answer = decoder(self.d // 2, len(self.bins), self.grid)
        self.answer_light = decoder(self.d // 2, 100, self.grid)
        self.chance = {"loss": math.log(len(self.bins)) + math.log(100)}

    def see(self, x):
        L, a, b = (rgb_to_lab(x) / constant([100, 50, 50], x).view(3, 1, 1)).split(1, 1)
        return torch.cat([L, L, L, a, b, 0 * a] if "split" in self.on else [L, a, b] * 2, 1)

    def make(self, x):
        light = F.adaptive_avg_pool2d(rgb_to_lab(x)[:, 0], self.grid).long().clamp(0, 99)
        return [self.see(x)], [*super().make(x)[1], light]

    def forward(self, f, seen):
        of_light, of_color = f(seen).chunk(2, 1)
        return [self.answer(of_light), self.answer_light(of_color)]

    def loss(self, answer, asked, gathered):
        color = super().loss(answer[:1], asked[:1], gathered)
        return color + cross_entropy(answer[1], asked[1])

    def show(self, f, x):
        (seen,), (_, light) = self.make(x)
        grey = [t.unsqueeze(1).expand(-1, 3, -1, -1) / 100
                for t in (light, self(f, seen)[1].argmax(1))]
        return super().show(f, x) + grey


# Predictive --------------------------------------------------------------------------------------


class Rotation(Task):
    """Gidaris et al. 2018: turned by how many quarters? All four of every view are in the batch.

    Shortcut: traces of how the image was turned. Quarter turns can be made without any. Another is
    the light, see `shade`: in one run on `shapes` without it 92 % of the answers were right in the
    first epoch already, and after two the linear probe of h was at 26 % (validation); with it 45 %.
    """

    guards, kinds = ("exact",), 4

    def __init__(self, f, args):
        super().__init__(f, args)
        self.answer = nn.Linear(self.d, self.kinds)
        self.chance = {"loss": math.log(self.kinds), "accuracy": 1 / self.kinds}

    def make(self, x):
        turned, y = rotate(x, "exact" in self.on)
        return [turned], [y]

    def forward(self, f, turned):
        return [self.answer(f(turned))]

    def loss(self, answer, asked, gathered):
        return torch.stack([cross_entropy(*answer, *asked), accuracy(*answer, *asked)])

    def show(self, f, x):
        return [x, *self.make(x)[0][0].chunk(4)]


class Patch(Rotation):
    """Doersch et al. 2015: a tile and one of its eight neighbours, which one?

    The label of neighbour j is its place in the grid, row by row without the centre; the centre
    seen from there is 7 - j. As in the paper a tile is a quarter of the view and a gap half of it.
    Shortcuts and guards: lines that go on from tile to tile (gap, jitter); chromatic aberration,
    which tells where in the lens a tile has been (color); shading that fits (norm).
    """

    guards, kinds = ("gap", "jitter", "color", "norm"), 8

    def __init__(self, f, args):
        super().__init__(f, args)
        self.answer = two_layers(2 * self.d, 512, self.kinds)

    def see(self, x):
        return standardise(x) if "norm" in self.on else x

    def cut(self, x, size, stride, jitter):
        """-> tiles (M, 9, 3, size, size)."""
        stride = stride if "gap" in self.on else size
        t = tiles(x, size, stride, jitter if "jitter" in self.on else 0).flatten(0, 1)
        return self.see(drop_colors(t, 2 / 3 if "color" in self.on else 0.0)).unflatten(0, (-1, 9))

    def make(self, x):
        y = torch.arange(8, device=x.device).expand(len(x), 8)
        size, gap = self.size // 4, self.size // 8
        t = self.cut(x, size, size + gap, jitter=-(-gap // 7))
        return [t.flatten(0, 1)], [torch.cat([y, 7 - y]).flatten()]

    def forward(self, f, t):
        h = f(t).unflatten(0, (-1, 9))  # (M, 9, d)
        centre, others = h[:, 4:5].expand(-1, 8, -1), torch.cat([h[:, :4], h[:, 5:]], 1)
        pairs = torch.cat([torch.cat([centre, others], 2), torch.cat([others, centre], 2)])
        return [self.answer(pairs.flatten(0, 1))]  # (16M, 8)

    def show(self, f, x):
        t = self.make(x)[0][0].unflatten(0, (-1, 9))
        return [x] + [mosaic(t[:, i], "norm" in self.on) for i in ([4], [2], range(9))]


class Jigsaw(Patch):
    """Noroozi & Favaro 2016: nine tiles in one of P orders, which? Shortcuts and guards as above.

    A tile, a quarter of the view wide, lies anywhere in its third.
    """

    def __init__(self, f, args):
        self.kinds = P = args.permutations
        super().__init__(f, args)
        self.register_buffer("orders", jigsaw_permutations(P, 0).clone())  # (P, 9)
        self.reduce, self.answer = two_layers(self.d, 256, 64), two_layers(9 * 64, 512, P)

    def make(self, x):
        size, third = self.size // 4, self.size // 3
        t = self.cut(x, size, third, jitter=(third - size) // 2)
        y = torch.randint(self.kinds, (len(x),), device=x.device)
        return [permute(t, self.orders[y]).flatten(0, 1)], [y]

    def forward(self, f, t):
        return [self.answer(self.reduce(f(t)).unflatten(0, (-1, 9)).flatten(1))]

    def show(self, f, x):
        (t,), (y,) = self.make(x)
        both = t.unflatten(0, (-1, 9)), permute(t.unflatten(0, (-1, 9)), self.orders[y].argsort(1))
        return [x, *(mosaic(t, "norm" in self.on) for t in both)]


# Contrastive, and on to BYOL ---------------------------------------------------------------------


class CPC(Task):
    """van den Oord et al. 2018: which patch is k rows below, out of those of the whole batch?

    7 x 7 patches, a quarter of the view, overlap by half. Shortcuts and guards: pixels and edges
    that patches share, so k starts at 3 (gap); the colours of an image (color: dropped by patch);
    batch norm, which mixes what one patch sees into all others (norm: layer norm instead).
    """

    guards = ("gap", "color", "norm")

    def __init__(self, f, args):
        super().__init__(f, args)
        self.below = (3, 4) if "gap" in self.on else (1, 2)
        layers = [[nn.ZeroPad2d((1, 1, 1, 0)), nn.Conv2d(i, o, (2, 3)), nn.ReLU()] for i, o in (
            (self.d, 256), (256, 256), (256, 256))]
        self.context = nn.Sequential(*sum(layers, []))  # row r of c has seen the rows up to r
        self.project = nn.Linear(self.d, 64)
        self.W = nn.ModuleList(nn.Conv2d(256, 64, 1, bias=False) for _ in self.below)
        n = [2 * args.batch_size * 7 * (7 - k) for k in self.below]
        self.chance = {"loss": sum(map(math.log, n)) / 2, "accuracy": (1 / n[0] + 1 / n[1]) / 2}

    def make(self, x):
        t = tiles(x, self.size // 4, self.size // 8, rows=7).flatten(0, 1)
        return [drop_colors(t, 0.8 if "color" in self.on else 0.0)], []

    def forward(self, f, t):
        h = f(t).unflatten(0, (-1, 7, 7))
        z, c = self.project(h), self.context(h.movedim(3, 1))  # (M, 7, 7, 64), (M, 256, 7, 7)
        pairs = [(0.1 * W(c).movedim(1, 3)[:, :-k], z[:, k:]) for W, k in zip(self.W, self.below)]
        return [t.flatten(0, 2) for pair in pairs for t in pair]  # (7 (7 - k) M, 64)

    def loss(self, answer, asked, gathered):
        answer = [gathered(t) for t in answer]
        terms = [(cpc_loss(p, z), accuracy(p @ z.T, torch.arange(len(z), device=z.device)))
                 for p, z in zip(answer[::2], answer[1::2])]
        return torch.stack([sum(t) / 2 for t in zip(*terms)])

    def show(self, f, x):
        t = self.make(x)[0][0].unflatten(0, (-1, 49))
        row = (torch.arange(49, device=x.device) // 7).view(49, 1, 1, 1)
        return [x, *(mosaic(t.where(part, 1.0)) for part in (row < 3, row == 2 + self.below[0]))]


class View(Task):
    """The step to BYOL (Grill et al. 2020, Section 3): predict what a fixed random network, f as it
    was at first, makes of the other view.

    It does not collapse, as the target differs between images and never moves: a constant answer
    has the loss 2 of chance. Without the guard the target is the answer for the other view, and
    the same vector for all images is a perfect solution.
    """

    guards = ("fixed",)

    def __init__(self, f, args):
        super().__init__(f, args)
        self.project, self.fixed = two_layers(self.d, 512, 128), "fixed" in self.on
        self.target = nn.Sequential(copy.deepcopy(f), nn.Linear(self.d, 128, bias=False),
                                    nn.BatchNorm1d(128, affine=False)).requires_grad_(False)
        self.chance = {"loss": 2.0}

    def make(self, x):
        return list(x.chunk(2)), []

    def forward(self, f, *views):
        p = [self.project(f(x)) for x in views]
        return p + ([self.target(x) for x in views] if self.fixed else p)

    def loss(self, answer, asked, gathered):
        p1, p2, z1, z2 = answer
        return (byol_loss(p1, z2, self.fixed) + byol_loss(p2, z1, self.fixed)).view(1) / 2

    def show(self, f, x):
        return list(x.chunk(2))


TASKS = {kind.__name__.lower(): kind for kind in (
    Denoising, Inpainting, Colorization, SplitBrain, Rotation, Patch, Jigsaw, CPC, View)}


class Pretext(nn.Module):
    """f and the head of a task. A view (N, 3, S, S) in [0, 1] -> h (N, d), z (N, D); with ask, what
    the task has made of views -> its answers."""

    def __init__(self, args):
        super().__init__()
        layer_norm = args.task == "cpc" and "norm" not in args.without  # over a patch's channels
        norm = functools.partial(nn.GroupNorm, 1) if layer_norm else nn.BatchNorm2d
        self.backbone = resnet(args.arch, args.stem, norm)
        if args.task == "splitbrain":
            halve(self.backbone)
        self.head = TASKS[args.task](self.backbone, args)

    def forward(self, *x, ask=False):
        if ask:
            return self.head(self.backbone, *x)
        h = self.backbone(self.head.see(*x))
        return h, self.head.project(h)


def build(args):
    """The untrained network: the same weights for the same seed whenever it is called."""
    torch.manual_seed(args.seed)
    return Pretext(args)


# ==================================================================================================
# Loss
# ==================================================================================================


def cross_entropy(logits, y):
    """Of the true class (RotNet, equation 3; the same in patch and jigsaw), its mean over i:

        L = -1/n sum_i log( exp(l_i,y_i) / sum_c exp(l_ic) )

    logits: (n, C) or (n, C, s, s), y: (n,) or (n, s, s) -> scalar. Equal logits give ln C.
    Test: test_cross_entropy_equation.
    """
    return F.cross_entropy(logits, y)


def accuracy(logits, y):
    """Share of answers that are right, told beside the loss; no equation of a paper.
    Test: test_cross_entropy_equation."""
    return (logits.detach().argmax(1) == y).to(logits.dtype).mean()


def soft_cross_entropy(logits, Z, weight):
    """Colorization's (Zhang et al. 2016, equation 2), its mean over the places n, h, w:

        L = -sum_nhw v(Z_nhw) sum_q Z_nqhw log Y_nqhw,   Y = softmax of the logits
        v(Z_nhw) = weight_q*,  q* = argmax_q Z_nqhw      (equation 3)

    logits, Z: (n, Q, s, s), weight: (Q,) -> scalar. Equal logits and weights of 1 give ln Q.
    Test: test_soft_cross_entropy_equation.
    """
    v = weight[Z.argmax(1)]  # (n, s, s)
    return -(v * (Z * logits.log_softmax(1)).sum(1)).mean()


def rebalance(p, mix=0.5):
    """Weights of the bins (Zhang et al. 2016, equation 4), from their frequencies p (Q,):

        w_q ~ 1 / ( (1 - mix) p_q + mix / Q ),  with sum_q p_q w_q = 1

    p: of soft-encoded bins, which smooths it. -> (Q,). Test: test_rebalance_equation.
    """
    w = 1 / ((1 - mix) * p + mix / len(p))
    return w / (p * w).sum()


def masked_l2(answer, x, mask):
    """Squared error where mask is true (Pathak et al. 2016, equation 1), its mean:

        L = | mask * (x - answer) |^2 / (3 * number of masked pixels)

    answer, x: (n, 3, S, S), mask: (n, 1, S, S) bool; all true is Vincent et al.'s squared error.
    -> scalar. Test: test_masked_l2_equation.
    """
    return ((answer - x).square() * mask).sum() / (x.shape[1] * mask.sum())


def cpc_loss(pred, z):
    """InfoNCE (van den Oord et al. 2018, equation 4), its mean over the rows i:

        L = -1/M sum_i log( exp(pred_i . z_i) / sum_j exp(pred_i . z_j) ),   pred = W_k c

    pred, z: (M, D), row i of both belong together -> scalar. Equal rows give ln M.
    Test: test_cpc_equation.
    """
    s = pred @ z.T  # (M, M), f_k before the exponential
    return F.cross_entropy(s, torch.arange(len(s), device=s.device))


def byol_loss(p, z, stop_gradient=True):
    """Squared error of unit vectors (paper, equation 2; slide "How does BYOL work?"), its mean over
    the N images:

        L = | p / |p| - z / |z| |^2 = 2 - 2 (p . z) / (|p| |z|)

    p, z: (N, D), row n of both from image n -> scalar. No gradient to z, unless that is switched
    off. Orthogonal vectors give 2, equal ones 0. Test: test_byol_loss_equation.
    """
    z = z.detach() if stop_gradient else z
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================

# None: what `view` predicts is a network that never moves.

# ==================================================================================================
# Training
# ==================================================================================================


class Gather(torch.autograd.Function):
    """(n, ...) of every process -> (world n, ...), with gradient.

    Each process computes the loss of the whole batch. Backward adds what all of them say of a row,
    DistributedDataParallel averages over processes: together the gradient of one process.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone(memory_format=torch.contiguous_format))
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def lr_at(step, steps, warmup, peak):
    """Linear to peak in `warmup` steps, then a half cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def update(loss, net, optimizer, scaler, buffers):
    """The optimiser's step -> loss, averaged over processes, and finite (0-dim bool). Where loss or
    gradient of any process are not, weights and momentum stay and buffers, a list of (b, b before
    the forward pass), go back. loss: 0-dim, or (T,) with its parts -> (T,).

    Decided on the device: the fused optimisers do nothing where found_inf is 1.
    """
    scaler.unscale_(optimizer)
    norms = torch._foreach_norm([p.grad for p in net.parameters() if p.grad is not None])
    loss = loss.detach().reshape(-1)
    said = torch.cat([~torch.isfinite(torch.stack(norms).sum() + loss.sum()).view(1), loss])
    if dist.is_initialized():
        dist.all_reduce(said)
        said[1:] /= dist.get_world_size()
    failed = (said[0] > 0).float()
    optimizer.grad_scale, optimizer.found_inf = None, failed
    optimizer.step()
    scaler.update()
    for b, before in buffers:
        b.copy_(torch.where(failed > 0, before, b))
    return said[1:], failed == 0


def load_weights(net, path):
    """Load last.pt (all of net), or the backbone from a backbone.pt or torchvision's weights."""
    found, method = common.read_checkpoint(path), Path(__file__).stem
    if "state" not in found:
        found = found.get("state_dict", found)
        backbone = {k: v for k, v in found.items() if not k.startswith("fc.")}  # fc: classifier
        common.load_into(net.backbone, backbone, path)
        print("the head stays random: what is said of z means nothing before training")
    elif found["method"] == method:
        common.load_into(net, found["state"]["net"], path)
    else:
        common.fail(f"{path} is a run of {found['method']}, not of {method}; give its backbone.pt")


def picturing(epochs, folder, data, net, args, run):
    """Pass the epochs on; before each and after the last one draw views.png: eight training images,
    what goes in, what is asked, and what the network answers where that is a picture."""
    eight = torch.arange(min(8, len(data.train.labels)))
    for epoch in [*epochs, None]:
        views, _ = next(common.batches(data.train, eight, 8, crops(args), run.device, seed=(0,)))
        net.eval()
        with torch.no_grad():
            columns = net.head.show(net.backbone, torch.cat(augment(views, args)))
        common.picture(folder / "views.png", [c[: len(eight)] for c in columns])
        net.train()
        if epoch is not None:
            yield epoch


def train(args, stop):
    # -- setup
    begun, method = time.perf_counter(), Path(__file__).stem
    run = common.setup(args.device, args.amp)
    name = f"runs/{method}-{Path(args.dataset).name}-s{args.seed}" + "-eval" * bool(args.eval)
    folder = common.run_folder(args.out or name, args.resume)
    print(f"{method} on {args.dataset}, {run.world} x {run.name}, {run.dtype}, to {folder}")

    # -- data
    data = common.Data(args.dataset, args.data_dir, args.limit)
    complete(args, data.side, len(data))
    common.write(folder / "args.json", json.dumps(vars(args), indent=1))
    data.read(args.image_size, run.device, args.memory_limit, args.workers)
    n, batch = len(data.train.labels), args.batch_size
    per_epoch = max(n // batch, 1)
    steps = args.epochs * per_epoch
    print(f"{n:,} training images, {len(data.val[1]):,} validation images")
    if not args.eval and (n < batch or batch % run.world):
        common.fail(f"--batch-size {batch} has to be at most the number of training images, {n}, "
                    f"and a multiple of that of processes, {run.world}")

    # -- model
    net = build(args)
    if args.init or args.eval:
        load_weights(net, args.init or args.eval)
    if run.world > 1 and run.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif run.world > 1:
        print("note: no synchronised batch norm on CPUs, each process has its own statistics")
    net = net.to(run.device, memory_format=torch.channels_last)
    some = torch.arange(0, n, -(-n // 256))  # spread over the set, the same in all processes
    views, _ = next(common.batches(data.train, some, 256, central(args), run.device, args.workers))
    net.head.measure(*views)
    compiled = torch.compile if args.compile else lambda f: f
    augmented, model = compiled(augment), compiled(net)  # net stays as it is, for evaluation
    model = nn.parallel.DistributedDataParallel(model) if run.world > 1 else model
    gathered = Gather.apply if run.world > 1 else nn.Identity()
    state = {"net": net}

    # -- optimiser
    peak, warmup = args.lr * batch / 256, round(args.warmup * steps)
    kind = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9)}
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = kind[args.optimizer](trained, peak, weight_decay=args.weight_decay, fused=True)
    for p in trained if args.optimizer == "sgd" else ():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)  # unset if a first step fails
    chance = net.head.chance  # when nothing is learned
    print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {batch} / 256")
    if batch < 16:
        print("warning: a batch under 16 is too few for batch norm, raise --batch-size")
    if args.warmup > 1 / 3:
        print("warning: over a third of the run is warm-up, lower --warmup")

    # -- resume
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    tally = torch.zeros(len(chance) + 2, device=run.device)  # sums, their number; failures in a row
    state |= {"optimizer": optimizer, "scaler": scaler, "tally": tally}
    start = {"step": 0, "seconds": 0.0, "rows": []}
    progress = common.restore(folder / "last.pt", method, args, state) if args.resume else start
    step, rows, saved = progress["step"], progress["rows"], time.perf_counter()
    look, caught = 10 if run.device.type == "cuda" else 1, 0  # to look at a GPU is to wait for it
    epochs = range(step // per_epoch, 0 if args.eval else args.epochs)
    for epoch in picturing(epochs, folder, data, net, args, run):
        first = step % per_epoch
        batches = data.epoch(epoch, first, batch, crops(args), run, args.seed)
        bar = common.Bar(batches, per_epoch, first, f"epoch {epoch + 1}/{args.epochs}")
        for views, _ in bar:
            # -- step
            rates = {"lr": lr_at(step, steps, warmup, peak)}
            for group in optimizer.param_groups:
                group["lr"] = rates["lr"]
            buffers = [(b, b.clone()) for b in net.buffers() if b.is_floating_point()]
            x = torch.cat(augmented(views, args))  # (2N, 3, S, S)
            seen, asked = net.head.make(x)  # what goes in, what is asked
            seen = [v.contiguous(memory_format=torch.channels_last) for v in seen]
            with run.autocast():
                answer = model(*seen, ask=True)
            terms = net.head.loss([a.float() for a in answer], asked, gathered)  # (T,)
            optimizer.zero_grad()
            scaler.scale(terms[0]).backward()
            losses, finite = update(terms, net, optimizer, scaler, buffers)
            step += 1
            # -- log
            good, failures = finite.view(1), torch.where(finite, -tally[-1:], 1)
            tally += torch.cat([torch.where(finite, losses, 0), good, failures])
            if step % look == 0:
                *sums, good, failures = tally.tolist()
                said = "".join(f", {k} {v:.3g}" for k, v in rates.items())
                bar.say(f"loss {sums[0] / max(good, 1):.3f} (chance {chance['loss']:.3f}){said}")
                if failures >= 50 and scaler.get_scale() <= 1:
                    common.fail(f"no finite loss and gradient in 50 steps up to step {step}: lower "
                                "--lr or turn --amp off; nothing was saved since")
                if caught := stop.agreed(run.device):
                    break
        (*sums, good, _), seconds = tally.tolist(), bar.seconds  # in this order: a GPU ends first
        progress |= {"step": step, "seconds": progress["seconds"] + seconds}
        if step % per_epoch == 0:
            tally[:-1] = 0
            means = {k: total / good if good else None for k, total in zip(chance, sums)}
            row = {"epoch": epoch + 1, **means, **rates, "skipped": per_epoch - int(good),
                   "waiting": bar.waiting / seconds,
                   "images_per_second": (per_epoch - first) * batch / seconds}
            rows.append(row)
            said = [f"{k} {math.nan if means[k] is None else means[k]:.3f} (chance {c:.3f})"
                    for k, c in chance.items()]
            left = common.duration(progress["seconds"] / step * (steps - step))
            print(f"epoch {epoch + 1}: {', '.join(said)}, {row['skipped']} steps skipped, "
                  f"{row['images_per_second']:,.0f} images/s, {row['waiting']:.0%} waiting for "
                  f"data, {left} left")
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                row |= evaluate(state, data, args, run)
        # -- save
        common.write_rows(folder / "metrics.jsonl", rows)
        if caught or step == steps or time.perf_counter() - saved > 60:
            common.save(folder / "last.pt", method, args, state, progress)
            saved = time.perf_counter()
        if caught:
            print(f"stopped after step {step:,} of {steps:,}, --resume goes on from here")
            raise SystemExit(128 + caught)
    results = {"method": method} | vars(args) | {
        "device": run.name, "versions": {"torch": torch.__version__},
        "train_seconds": progress["seconds"],
        "images_per_second": step * batch / max(progress["seconds"], 1e-9)}
    results |= report(state, data, args, run)
    results["peak_memory_mb"] = common.peak_memory_mb(run.device)
    results["total_seconds"] = time.perf_counter() - begun
    finish(folder, state[KEPT], args, rows, results, [*chance])
    return results


def finish(folder, net, args, rows, results, terms):
    """Write backbone.pt, curves, options and results, and print how to load the backbone."""
    weights = {k: v.cpu().contiguous() for k, v in net.backbone.state_dict().items()}
    meta = vars(args) | {"mean": MEAN, "std": STD}
    common.write(folder / "backbone.pt", {"state_dict": weights, "meta": meta})
    common.curves(folder / "curves.png", rows, {
        "loss": terms, "validation, %": ["linear_top1", "knn_top1", "head_linear_top1"],
        "z": ["spread", "alignment", "uniformity"], "effective rank": ["rank_h", "rank_z"]})
    common.write(folder / "results.json", json.dumps(results, indent=1))
    print(f"{results['total_seconds']:.0f} s in all, {results['train_seconds']:.0f} s of training, "
          f"{results['images_per_second']:,.0f} images/s, {results['peak_memory_mb']:,.0f} MB peak")
    print(f"\nThe backbone, for (RGB in [0, 1] - {MEAN}) / {STD}:\n\n"
          f"{loading(args, folder / 'backbone.pt')}")


def loading(args, path):
    """Python that rebuilds the backbone with torchvision alone and loads the file strictly."""
    block, layers = ARCHS[args.arch]
    stem = "net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()\n"
    layer_norm = args.task == "cpc" and "norm" not in args.without
    norm = ", norm_layer=lambda c: nn.GroupNorm(1, c)" * layer_norm
    halves = ("for m in net.modules():\n    if isinstance(m, nn.Conv2d):\n        m.groups = 2\n"
              "        if m.in_channels > 3:\n"
              "            m.weight = nn.Parameter(m.weight[:, ::2].clone())\n")
    note = f"# its input is what `see` of --task {args.task} makes of that\n"
    return (f"import torch\nfrom torch import nn\nfrom torchvision.models import resnet\n"
            f"net = resnet.ResNet(resnet.{block.__name__}, {layers}{norm})  # {args.arch}\n"
            f"{stem * (args.stem == '3x3')}net.fc = nn.Identity()\n"
            f"{halves * (args.task == 'splitbrain')}{note * (TASKS[args.task].see is not Task.see)}"
            f"net.load_state_dict(torch.load({str(path)!r}, weights_only=True)['state_dict'])\n")


# ==================================================================================================
# Evaluation
# ==================================================================================================

KEPT = "net"  # of state: the network that is evaluated and written


def central(args, size=None):
    """The view for evaluation: a central square, of 7/8 of a larger image (released code)."""
    return [common.Crop(size or args.image_size, 1.0 if args.image_size <= 64 else 0.875)]


@torch.no_grad()
def embed(f, crops, part, args, run, seed=None):
    """f: views -> tensors (B, ...); over part = (images, index) -> [tensors (n, ...), labels].

    Each process takes every world-th image, all get everything, in the order of index.
    """
    (images, index), rows = part, []
    n, most = len(index), -(-len(index) // run.world)
    share = index[torch.arange(run.rank, most * run.world, run.world) % n]  # equally many for each
    for x, i in common.batches(images, share, 512, crops, run.device, args.workers, seed):
        with run.autocast():
            out = f([v.contiguous(memory_format=torch.channels_last) for v in x])
        rows.append([*(t.float() for t in out), images.labels[i].to(run.device)])
    columns = [torch.cat(c) for c in zip(*rows)]
    if run.world > 1:
        columns = [torch.stack(Gather.apply(c).chunk(run.world), 1) for c in columns]
    return [c.flatten(0, 1)[:n] if run.world > 1 else c for c in columns]


def knn(x, y, x_test, y_test, k, tau):
    """Top-1 in % of the k nearest by cosine, with votes exp(cosine / tau) (Wu et al. 2018)."""
    x, right = F.normalize(x), 0
    for q, target in zip(x_test.split(1024), y_test.split(1024)):
        cosine, i = (F.normalize(q) @ x.T).topk(min(k, len(x)))  # (n, k)
        votes = q.new_zeros(len(q), int(y.max()) + 1).scatter_add_(1, y[i], (cosine / tau).exp())
        right += (votes.argmax(1) == target).sum().item()
    return 100 * right / len(x_test)


@torch.enable_grad()
def linear_probe(x, y, x_test, y_test, decay):
    """Top-1 in % of multinomial logistic regression on standardised features with an L2 penalty."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    w = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, device=x.device, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ w[1:] + w[0], y) + decay / 2 * w[1:].square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return 100 * ((x_test @ w[1:] + w[0]).argmax(1) == y_test).float().mean().item()


def probes(parts, args):
    """parts: (features, labels) of fit, val and perhaps test -> linear and k-NN top-1 on the last.

    The penalty is the best on val; for test the classifiers are then made from fit and val.
    """
    score = {d: linear_probe(*parts[0], *parts[1], d) for d in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)}
    best = max(score, key=score.get)
    bank = [torch.cat(t) for t in zip(*parts[:-1])]
    linear = linear_probe(*bank, *parts[2], best) if len(parts) > 2 else score[best]
    return linear, knn(*bank, *parts[-1], args.knn_k, args.knn_tau)


@torch.no_grad()
def health(state, data, args, run):
    """z of two views of up to 1024 validation images, in eval mode: figures and a verdict.

    spread: standard deviation of the unit vectors z / |z|, times sqrt(D): 1 all over the sphere, 0
    at a point. alignment: mean squared distance of two views; uniformity: log mean exp(-2 squared
    distance) of two images (Wang & Isola 2020). rank: exponential of the entropy of the singular
    values (RankMe, Garrido et al. 2023).
    """
    def both(x):
        return [t for v in augment(x, args)[:2] for t in state[KEPT](v)[:2]]

    part = data.val[0], data.val[1][:1024]
    out = embed(both, crops(args), part, args, run, seed=(args.seed, 2**31))
    h, z1, _, z2, _ = (t.nan_to_num(0, 0, 0) for t in out)
    z1, z2 = F.normalize(z1), F.normalize(z2)
    apart = torch.pdist(z1.cpu()).square()
    rank = {k: torch.linalg.svdvals(x.cpu()) for k, x in (("h", h), ("z", z1))}
    rank = {k: torch.special.entr(p / p.sum()).sum().exp().item() for k, p in rank.items()}
    figures = {"spread": z1.std(0).mean().item() * z1.shape[1] ** 0.5,
               "alignment": (z1 - z2).square().sum(1).mean().item(),
               "uniformity": (-2 * apart).exp().mean().log().item(),
               "rank_h": rank["h"], "rank_z": rank["z"]}
    return figures | {"verdict": verdict(figures, z1.shape, args, state)}


def verdict(figures, shape, args, state):
    """The figures of z, which has this shape, in words.

    Only `cpc` and `view` compare vectors z. Elsewhere z is h, and as no value of h is negative it
    fills a corner of the sphere: a smaller spread is healthy. So it is for `cpc`, whose loss does
    not see what all z have in common.
    """
    spread, rank, D = figures["spread"], figures["rank_z"], shape[1]
    name, least = "z" if args.task in ("cpc", "view") else "h", 0.1 if args.task == "view" else 0.02
    flat = rank < 0.05 * min(shape)
    word = "collapsed to a point" if spread < least else "dimensional collapse" * flat or "healthy"
    return f"{word}: {name} has spread {spread:.2f} of 1, rank {rank:.0f} of {D}"


def evaluate(state, data, args, run, test=False):
    """Health and, where there are labels, top-1 of h and z, on validation or test images."""
    net = state[KEPT].eval()
    for b in net.buffers() if run.world > 1 else ():  # batch norm of CPU processes differs
        dist.broadcast(b, 0)
    results = health(state, data, args, run)
    if data.labelled:
        parts = [data.fit, data.val] + ([data.test] if test else [])
        parts = [embed(lambda x: net(x[0])[:2], central(args), p, args, run) for p in parts]
        results["linear_top1"], results["knn_top1"] = probes([(h, y) for h, _, y in parts], args)
        results["head_linear_top1"], results["head_knn_top1"] = probes([p[1:] for p in parts], args)
    top1 = [f"{k[:-5].replace('_', ' ')} {v:.1f}" for k, v in results.items() if k.endswith("top1")]
    print(f"{'test' if test else 'validation'}: {', '.join(top1 + [results['verdict']])}")
    net.train()
    return results


def report(state, data, args, run):
    """On the test set, read once: h and z beside the untrained network and raw pixels, a table."""
    results = evaluate(state, data, args, run, test=True)
    if data.labelled:
        untrained, few = build(args).to(run.device).eval(), central(args, min(args.image_size, 32))
        for name, f, view in (("untrained", lambda x: untrained(x[0])[:1], central(args)),
                              ("pixels", lambda x: [x[0].flatten(1)], few)):
            parts = [embed(f, view, p, args, run) for p in (data.fit, data.val, data.test)]
            results[f"{name}_linear_top1"], results[f"{name}_knn_top1"] = probes(parts, args)
        print(f"\ntop-1 in % on {len(data.test[1]):,} test images    linear   k-NN")
        for label, k in (("h, before the head", ""), ("z, after the head", "head_"),
                         ("h of the untrained network", "untrained_"),
                         ("raw pixels, at most 32 x 32", "pixels_")):
            print(f"{label:36} {results[k + 'linear_top1']:8.1f} {results[k + 'knn_top1']:6.1f}")
    return results


def main(argv=None):
    with common.Stop() as stop:
        return train(options(argv), stop)


if __name__ == "__main__":
    main()
