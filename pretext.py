"""Pretext tasks: the questions asked about images before methods compared views
RotNet: Gidaris, Singh, Komodakis, ICLR 2018, https://arxiv.org/abs/1803.07728, and eight others
Slides: "SSL: Cognitive Principles" and "SSL: Pretext Task Taxonomy".

Something is hidden from a network, or done to its input, and the network has to predict what: the
image is its own label. An encoder f maps the input to h, and a small head, which is discarded after
training, answers from h alone. Every task has a shortcut, a way to the answer that needs no
understanding of the image, and a guard against it, which --without removes.

Each task is one class: a network with a question. For a batch of N images:
    x = [t(image), t'(image)]       two random views of every image     crops, augment
    input, target = ...             what goes in, what is asked         Rotation.input_and_target
    answer = head(f(input))         h is the output of f                Rotation.forward
    L(answer, target)               for rotation the cross-entropy      classification
    update f and the head           AdamW or SGD                        train, lr_at

    --task        asks for                      paper                         --without
  predictive: what was done to the image?
    rotation      how far was it turned?        Gidaris 2018, 1803.07728      exact
    patch         where is the second tile?     Doersch 2015, 1505.05192      gap jitter color norm
    jigsaw        how were the tiles shuffled?  Noroozi 2016, 1603.09246      gap jitter color norm
  reconstructive: what is missing or spoilt?
    denoising     the clean image               Vincent 2008 (ICML)           noise
    inpainting    what is in the hole           Pathak 2016, 1604.07379       place
    colorization  colours, from lightness       Zhang 2016, 1603.08511        rebalance
    splitbrain    that, and the reverse         Zhang 2017, 1611.09842        split
  contrastive, and on to BYOL: which one is it?
    cpc           the patches further down      van den Oord 2018, 1807.03748 gap color norm
    view          what a fixed random network   Grill 2020, 2006.07733        fixed
                  makes of the other view

Symbols: x (M, 3, S, S) in [0, 1], the M = 2N views of N images; h (n, d) representations of the n
pictures that go into f; p, z (n, D) vectors that cpc and view compare.

Where this file departs from the papers:
  - All tasks share ResNets (most papers: AlexNet), RGB in [0, 1] (most: less the mean), crops of at
    least 30 % of the area (RotNet on ImageNet: 8 %), flips (patch's and jigsaw's code: none), and
    one schedule of warm-up and cosine. SGD has no Nesterov momentum (RotNet: has it, and a rate
    that falls in steps).
  - Heads get only h, after pooling (papers: feature maps), so the answer has to be in what is
    evaluated. h is evaluated on whole views, even if the network was trained on tiles, and by
    logistic regression (papers: mostly by SGD on feature maps).
  - rotation: on the built-in set, light always comes from above, which gives the rotation away.
    There, --shade adds a random slope of light to every view (paper: as --shade 0). For larger
    images the rate is an eighth of mmselfsup's, for the same number of turned images.
  - patch: pairs of the centre and each of its eight neighbours, in both orders (released code: all
    neighbours in a grid over the image). patch and jigsaw: in two thirds of the tiles one channel
    is copied to all (patch's released code: every tile keeps one, with noise in the other two;
    jigsaw's second release: half of the images are grey, and the channels of all tiles shifted),
    each channel has mean 0 and deviation 1 (patch's released code: one deviation for all channels;
    jigsaw's: means alone, or neither), and no tile is shrunk.
    jigsaw: orders are chosen by their distance to the nearest, then by their mean distance.
  - colorization: our own list of 261 bins (released: 313), on a grid of at most 16 x 16, for the
    mean colour of each place (released code: the colour of one pixel in 4 x 4). Their frequencies
    are those of at most 512 views (released code: of ImageNet), and grey images count, too.
    splitbrain: soft bins for colours (paper: hard), hard ones for lightness; every convolution has
    two groups (released network: only conv2, conv4 and conv5).
  - inpainting: no adversarial loss and no overlap; the hole is one square anywhere (paper: a square
    in the middle, several squares, or a random shape), filled with the mean colour (123, 117, 104)
    in RGB (released code: the same three numbers in the order 117, 104, 123). denoising: one
    network trained end to end on the squared error, each pixel black with probability 1/4 (paper:
    layer by layer, fully connected, with tied weights, on the cross-entropy; a fixed number of
    inputs black).
  - cpc: layer norm, dropped colours (here one channel is copied to all, in 80 % of the patches) and
    predicting at least three rows ahead come from version 2 (Henaff 2019, 1905.09272). Ours has one
    direction, two distances, whole patches and a smaller context network; the negatives are the
    patches of the same rows in all views of the batch.
  - view: the fixed network starts as a copy of f and ends in a linear layer and batch norm (paper:
    BYOL's projector), the predictor is applied to h itself, and views have BYOL's colour jitter and
    grey, but no blur and no solarization.
  - On a GPU the networks run in half precision (with --amp off in float32).

    python pretext.py   43 s on 2 CPU cores; mean of three seeds: 93.9 % linear, 88.8 % k-NN; the
                        untrained network has 30.4 and 29.7 %, raw pixels have 27.0 and 38.2 %
"""

import copy
import functools
import itertools
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.utils import make_grid

import common
from common import FROM_1, FROM_2, PIXELS, POSITIVE, SHARE, number, one_of

# ==================================================================================================
# Options
# ==================================================================================================

NETS = one_of(["convnet", "convnet_wide", "resnet18", "resnet34", "resnet50"])
GUARDS = {  # task: its guards against shortcuts, which --without removes
    "rotation": "exact",
    "patch": "gap jitter color norm",
    "jigsaw": "gap jitter color norm",
    "denoising": "noise",
    "inpainting": "place",
    "colorization": "rebalance",
    "splitbrain": "split",
    "cpc": "gap color norm",
    "view": "fixed",
}


def by_task(other, **tasks):
    """A default that depends on --task, named for --help: "rotation 0.02, others 0.008"."""

    def default(args, n):
        return tasks.get(args.task, other)

    default.__name__ = ", ".join(f"{k} {v}" for k, v in (tasks | {"others": other}).items())
    return default


# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones.
# In the second column rate and weight decay are RotNet's for CIFAR-10, with as many turned images
# per step; an epoch has two views of every image (released code: one, for 200 epochs). In the
# third, the number of epochs and weight decay are mmselfsup's (epochs of one view there); for as
# many pictures per step, rotation has an eighth of mmselfsup's and VISSL's rate, and jigsaw half of
# VISSL's. For other tasks both columns are our own choice, not measured.
# common.py adds --dataset, --seed, --amp, --resume and so on.
OPTIONS = {  # fmt: skip
    # option         built-in    to 64 px    larger      allowed         meaning
    "task":         ("rotation", "rotation", "rotation", one_of(GUARDS), "what is asked"),
    "without":      ((),         (),         (),         {"nargs": "+"}, "guards to remove"),
    "shade":        (by_task(0.0, rotation=0.3), 0.0, 0.0, SHARE, "steepest slope of added light"),
    "permutations": (24,         100,        1000,       number(int, 2, 5040), "P of the jigsaw"),
    "arch":         ("convnet",  "resnet18", "resnet50", NETS,           "encoder f"),
    "stem":         ("7x7",      "3x3",      "7x7",      "3x3|7x7",      "3x3: no max-pool"),
    "image_size":   (32,         64,         224,        PIXELS,         "S, side of a view"),
    "min_scale":    (0.5,        0.5,        0.3,        SHARE,          "least area of a crop"),
    "epochs":       (6,          100,        70,         FROM_1,         "passes over the set"),
    "batch_size":   (by_task(32, rotation=16), by_task(128, rotation=64),
                     by_task(128, rotation=64, cpc=32), FROM_2, "N, two views of each"),
    "optimizer":    ("adamw", by_task("adamw", rotation="sgd"),
                     by_task("adamw", rotation="sgd", patch="sgd", jigsaw="sgd"), "sgd|adamw",
                     "(RotNet: sgd)"),
    "lr":           (by_task(8e-3, rotation=2e-2), by_task(2e-3, rotation=0.4),
                     by_task(1e-3, rotation=0.1, patch=0.1, jigsaw=0.1), POSITIVE,
                     "peak, times N / 256"),
    "weight_decay": (0.01,       5e-4,       1e-4,       SHARE,          "(RotNet: 5e-4)"),
    "warmup":       (0.1,        0.1,        0.1,        SHARE,          "share of the steps"),
}
# Without a GPU, images up to 64 pixels use the first column, except for (measured with rotation,
# where each is turned four ways):
CPU = {"shade": 0.0, "arch": "convnet_wide", "epochs": common.passes(1.5e5)}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """Random crops, two of every image."""
    return [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3), count=2)]


def augment(views, args):
    """Flip and shade; for --task view also colour jitter and grey as in BYOL. All are drawn
    separately for every image.

    views: list of (N, 3, S, S) in [0, 1] -> the same.
    """
    views = [shade(common.flip(x, p=0.5), args.shade) for x in views]
    if args.task == "view":
        views = [
            common.grey(common.color_jitter(x, 0.4, 0.4, 0.2, 0.1, p=0.8), p=0.2) for x in views]
    return views


def shade(x, most):
    """Add a slope of light, up to `most` from the middle to the edge, down and across, so that a
    rotation has to be predicted from the things in the image, not from light from above."""
    down, across = common.uniform(-most, most, (len(x), 2, 1, 1, 1), x.device).unbind(1)
    line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    return (x + down * line.unsqueeze(1) + across * line).clamp(0, 1)


# ==================================================================================================
# Model
# ==================================================================================================

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the network gets RGB in [0, 1], not normalised


def encoder(arch, stem, norm_layer=nn.BatchNorm2d):
    """(N, 3, S, S) -> (N, d): torchvision's ResNet without its classifier, or, for a CPU,
    four convolutions."""
    if arch.startswith("convnet"):
        widths, strides = (24, 48, 96, 96), (2, 2, 2, 1)
        if arch == "convnet_wide":
            widths, strides = (48, 96, 192, 384), (2, 2, 2, 2)
        layers, inputs = [], 3
        for outputs, stride in zip(widths, strides):
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            layers += [conv, norm_layer(outputs), nn.ReLU()]
            inputs = outputs
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.dim = outputs
        return net
    net = torchvision.models.get_model(arch, norm_layer=norm_layer)
    net.dim, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


ENCODER = common.source(encoder)  # printed at the end of a run


def two_layers(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


def decoder(d, outputs, side):
    """(n, d) -> (n, outputs, side, side): transposed convolutions, as in the context encoder."""
    doublings = max(math.ceil(math.log2(side / 4)), 0)
    shape = math.ceil(side / 2**doublings), 1, 0  # kernel, stride, padding
    layers = [nn.Unflatten(1, (d, 1, 1))]
    for i in range(doublings + 1):
        width = max(128 // 2**i, 32)
        up = nn.ConvTranspose2d(d, width, *shape, bias=False)
        layers += [up, nn.BatchNorm2d(width), nn.ReLU()]
        d = width
        shape = 4, 2, 1
    return nn.Sequential(*layers, nn.Conv2d(d, outputs, 3, 1, 1), nn.AdaptiveAvgPool2d(side))


# A task is a network with a question, and inherits from no other task. It has
#   backbone, head          f and the head; an nn.Sequential calls one after the other
#   input_and_target(x)     views (M, 3, S, S) in [0, 1] -> input, what its answer is compared to
#   forward(input)          -> answer, one tensor
#   loss(answer, target)    -> {"loss": ...}, perhaps with the accuracy
#   chance                  the same when nothing is learned, or
#   blind(target)           the best answer that does not look at the image


# Predictive: what was done to the image? ----------------------------------------------------------


def rotate(images, exact=True):
    """(N, 3, S, S) -> (4N, 3, S, S), labels (4N,): as they are, then turned by 1 to 3 quarters.

    Quarter turns only move pixels and leave no trace (RotNet, Section 2.2). If not exact, turned
    ones are interpolated half a pixel off, as at any other angle, and only upright ones are sharp.
    """
    turned = [images.rot90(r, (2, 3)) for r in range(4)]
    if not exact:
        turned[1:] = [F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1) for x in turned[1:]]
    return torch.cat(turned), torch.arange(4, device=images.device).repeat_interleave(len(images))


class Rotation(nn.Module):
    """RotNet (Gidaris et al. 2018): how far was a view turned? All four turns of it are used.

    Shortcuts: traces that turning leaves in an image, though quarter turns leave none; light that
    comes from above, see `shade`.
    """

    def __init__(self, f, args):
        super().__init__()
        self.backbone = f
        self.head = nn.Linear(f.dim, 4)
        self.exact = "exact" not in args.without
        self.loss = classification
        self.chance = {"loss": math.log(4), "accuracy": 0.25}

    def input_and_target(self, x):
        return rotate(x, self.exact)  # (4M, 3, S, S), (4M,)

    def forward(self, x):
        return self.head(self.backbone(x))  # (4M, 4)


def tiles(x, size, stride, jitter=0, rows=3):
    """(M, 3, S, S) -> (M, T, 3, size, size): a grid of T = rows^2 tiles about the centre, row by
    row. Every tile is moved by up to `jitter` pixels each way, but stays inside."""
    S = x.shape[-1]
    margin = (S - size - (rows - 1) * stride) // 2
    line = torch.arange(rows, device=x.device) * stride + margin
    moved = torch.randint(-jitter, jitter + 1, (len(x), rows**2, 2), device=x.device)
    corner = (torch.cartesian_prod(line, line) + moved).clamp(0, S - size)  # (M, T, 2)
    boxes = F.pad(corner, (0, 2), value=size).unbind(1)  # T times (M, 4): corner, height, width
    return torch.stack([common.crop_resize(x, box, size) for box in boxes], 1)


def guarded_tiles(x, gap, jitter, without):
    """Nine tiles of each view, for patch and jigsaw: (M, 3, S, S) -> (9M, 3, S / 4, S / 4)."""
    size = x.shape[-1] // 4
    if "gap" in without:
        gap = 0
    if "jitter" in without:
        jitter = 0
    t = tiles(x, size, size + gap, jitter).flatten(0, 1)
    if "color" not in without:
        t = drop_colors(t, 2 / 3)
    return t if "norm" in without else standardise(t)


def drop_colors(x, p):
    """With probability p, copy one channel of an image, drawn at random, to all: chromatic
    aberration shows only between channels (Doersch et al., on trivial solutions)."""
    channel = torch.randint(3, (len(x), 1, 1, 1), device=x.device)
    return torch.where(common.coin(x, p), x.take_along_dim(channel, 1), x)


def standardise(x):
    """Give each channel of an image mean 0, deviation 1: tiles cannot be matched by brightness."""
    std, mean = torch.std_mean(x, (2, 3), keepdim=True, correction=0)
    return (x - mean) / (std + 1e-3)


class Patch(nn.Module):
    """Context prediction (Doersch et al. 2015): which of a tile's eight neighbours is this?

    The label of a neighbour is its place in the grid, row by row without the centre; from neighbour
    j, the centre is at 7 - j. A tile is a quarter of the view wide, and a gap is half a tile, as in
    the paper. Shortcuts and guards: lines that continue from tile to tile (gap, jitter); chromatic
    aberration, which tells where in the photo a tile was (color); shading (norm).
    """

    def __init__(self, f, args):
        super().__init__()
        self.backbone = f
        self.head = two_layers(2 * f.dim, 512, 8)
        self.gap = args.image_size // 8
        self.without = args.without
        self.loss = classification
        self.chance = {"loss": math.log(8), "accuracy": 0.125}

    def input_and_target(self, x):
        t = guarded_tiles(x, self.gap, math.ceil(self.gap / 7), self.without)
        y = torch.arange(8, device=x.device).repeat(len(x))
        return t, torch.cat([y, 7 - y])  # (9M, 3, s, s), (16M,)

    def forward(self, t):
        h = self.backbone(t).unflatten(0, (-1, 9))  # (M, 9, d)
        others = torch.cat([h[:, :4], h[:, 5:]], 1)  # (M, 8, d)
        pairs = torch.stack([h[:, 4:5].expand_as(others), others])  # (2, M, 8, d)
        pairs = torch.cat([pairs, pairs.flip(0)], 3)  # from the centre, then to it
        return self.head(pairs.flatten(0, 2))  # (16M, 8)


@functools.cache
def jigsaw_permutations(n, seed):
    """(n, 9): permutations far from each other in Hamming distance (after Noroozi & Favaro).

    The first is random; each next one is furthest from the nearest chosen one and, among equals,
    furthest on average. With the average alone, as in the paper, the nearest two of 100 are 2 or 3
    apart, depending on how ties are broken, and 6 apart here; the mean is 8.08 for both.
    """
    every = torch.tensor([*itertools.permutations(range(9))], dtype=torch.int8)  # (9!, 9)
    i = torch.randint(len(every), (), generator=torch.Generator().manual_seed(seed))
    chosen = []
    total = 0  # summed distance to all chosen ones
    nearest = 9  # distance to the nearest one
    for _ in range(n):
        chosen.append(every[i])
        distance = (every != every[i]).sum(1)
        total = total + distance
        nearest = distance.clamp(max=nearest)
        i = (10**5 * nearest + total).argmax()
    return torch.stack(chosen).long()


class Jigsaw(nn.Sequential):
    """Jigsaw puzzles (Noroozi & Favaro 2016): in which of P orders are nine tiles?

    A tile is a quarter of the view wide and lies anywhere in its third. Shortcuts and guards: as in
    Patch.
    """

    def __init__(self, f, args):
        P = args.permutations
        head = nn.Sequential(
            two_layers(f.dim, 256, 64),  # (9M, d) -> (9M, 64)
            nn.Unflatten(0, (-1, 9)),
            nn.Flatten(),  # (M, 9 * 64)
            two_layers(9 * 64, 512, P))
        super().__init__(OrderedDict(backbone=f, head=head))
        self.register_buffer("orders", jigsaw_permutations(P, 0).clone())  # (P, 9)
        self.gap = args.image_size // 3 - args.image_size // 4
        self.without = args.without
        self.loss = classification
        self.chance = {"loss": math.log(P), "accuracy": 1 / P}

    def input_and_target(self, x):
        t = guarded_tiles(x, self.gap, self.gap // 2, self.without)
        y = torch.randint(len(self.orders), (len(x),), device=x.device)
        places = self.orders[y].view(-1, 9, 1, 1, 1)  # place i gets tile orders[y, i]
        return t.unflatten(0, (-1, 9)).take_along_dim(places, 1).flatten(0, 1), y


# Reconstructive: what is missing or spoilt? -------------------------------------------------------


class Denoising(nn.Sequential):
    """Denoising autoencoder (Vincent et al. 2008): a quarter of the pixels is made black
    (masking noise); what were they?

    Shortcut: without noise the network can copy the input, for which any code will do.
    """

    def __init__(self, f, args):
        super().__init__(OrderedDict(backbone=f, head=decoder(f.dim, 3, args.image_size)))
        self.black = 0.0 if "noise" in args.without else 0.25

    def input_and_target(self, x):
        kept = torch.rand_like(x[:, :1]) >= self.black
        return x * kept, (x, torch.ones_like(kept))  # the answer counts everywhere

    def loss(self, answer, target):
        return {"loss": masked_l2(answer, *target)}


def hole(x, anywhere=True):
    """(M, 1, S, S) bool, true in a square of half the side, a quarter of the image, anywhere or in
    the middle (Pathak et al., Section 3.3, "Region masks")."""
    S = x.shape[-1]
    start = torch.randint(S - S // 2 + 1, (len(x), 2, 1, 1), device=x.device)  # row, column
    if not anywhere:
        start.fill_(S // 4)
    line = torch.arange(S, device=x.device)
    row, column = ((line >= start) & (line < start + S // 2)).split(1, 1)  # (M, 1, 1, S) each
    return row.mT & column


class Inpainting(nn.Sequential):
    """Context encoder (Pathak et al. 2016): a square is cut out; what was there?

    Shortcut: a hole always in the middle can be filled from its border by features of one place.
    """

    def __init__(self, f, args):
        super().__init__(OrderedDict(backbone=f, head=decoder(f.dim, 3, args.image_size)))
        self.register_buffer("mean", torch.tensor([123, 117, 104]).view(3, 1, 1) / 255)
        self.anywhere = "place" not in args.without

    def input_and_target(self, x):
        missing = hole(x, self.anywhere)
        return torch.where(missing, self.mean, x), (x, missing)

    def loss(self, answer, target):
        return {"loss": masked_l2(answer, *target)}


# linear sRGB to XYZ divided by white's (D65), so that each row adds up to 1
XYZ = [[0.433953, 0.376219, 0.189828], [0.212671, 0.71516, 0.072169],
       [0.017758, 0.109477, 0.872765]]


def rgb_to_lab(x):
    """(N, 3, H, W), sRGB in [0, 1] -> CIE L*a*b*, D65: L in [0, 100], a, b about [-110, 110]."""
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = common.to_device(torch.tensor(XYZ, dtype=x.dtype), x.device)
    t = torch.einsum("cd,ndhw->nchw", xyz, linear)  # white is 1, 1, 1
    f = torch.where(t > 216 / 24389, t ** (1 / 3), t * 841 / 108 + 4 / 29)
    X, Y, Z = f.unbind(1)
    return torch.stack([116 * Y - 16, 500 * (X - Y), 200 * (Y - Z)], 1)


@functools.cache
def ab_bins():
    """(Q, 2): the centres, multiples of 10, of the cells of the ab plane that hold RGB colours."""
    level = torch.linspace(0, 1, 64, dtype=torch.float64)
    cube = torch.cartesian_prod(level, level, level).view(-1, 3, 1, 1)
    ab = rgb_to_lab(cube)[:, 1:].flatten(1)  # (64^3, 2)
    return (ab / 10).round().unique(dim=0).float() * 10


def soft_encode(ab, bins):
    """(M, 2, s, s) -> Z (M, Q, s, s): weights of the 5 nearest bins, Gaussian in their distance,
    of width 5, which add up to 1 (Zhang et al. 2016, Section 2.1; released code: of the 10)."""
    places = ab.flatten(2).mT  # (M, s s, 2)
    distance = torch.cdist(places, bins, compute_mode="donot_use_mm_for_euclid_dist")
    near, q = distance.topk(5, largest=False)  # (M, s s, 5) each
    Z = torch.zeros_like(distance).scatter(2, q, (-near.square() / 50).softmax(2))
    return Z.mT.unflatten(2, ab.shape[2:])


class Colorization(nn.Sequential):
    """Colorful image colorization (Zhang et al. 2016): from lightness, predict the colour at every
    place of a grid, one of Q bins.

    Shortcut: the dull colours that most places have. Rebalancing gives rare ones more weight.
    """

    def __init__(self, f, args):
        bins = ab_bins().clone()  # (Q, 2)
        side = min(args.image_size // 4, 16)
        super().__init__(OrderedDict(backbone=f, head=decoder(f.dim, len(bins), side)))
        self.register_buffer("bins", bins)
        self.register_buffer("weight", torch.ones(len(bins)))  # until rebalance_bins
        self.side = side

    def rebalance_bins(self, sample):  # before training, unless --without rebalance
        _, Z = self.input_and_target(sample)
        self.weight.copy_(rebalance(Z.mean((0, 2, 3))))

    def blind(self, Z):
        p = (self.weight[Z.argmax(1)].unsqueeze(1) * Z).mean((0, 2, 3), keepdim=True)
        return p.clamp(min=1e-12).log().expand_as(Z)

    def input_and_target(self, x):
        lab = rgb_to_lab(x)
        grid = F.adaptive_avg_pool2d(lab, self.side)  # (M, 3, s, s)
        return lab[:, :1].expand_as(x) / 100, soft_encode(grid[:, 1:], self.bins)

    def loss(self, logits, Z):
        return {"loss": soft_cross_entropy(logits, Z, self.weight)}


def halve(net):
    """Make net two networks of half the width side by side: every convolution has two groups. Each
    gets half of the input's channels and makes half of h."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.groups = 2
            if m.in_channels > 3:  # the first one has 3 channels for each half
                m.weight = nn.Parameter(m.weight[:, ::2].clone())


HALVE = common.source(halve)


class SplitBrain(nn.Module):
    """Split-brain autoencoder (Zhang et al. 2017): one half of f predicts colours from lightness,
    the other lightness from colours.

    Shortcut: with all channels, each half could copy what it is asked for.
    """

    def __init__(self, f, args):
        super().__init__()
        self.register_buffer("bins", ab_bins().clone())  # (Q, 2)
        self.backbone = f  # halved
        self.side = min(args.image_size // 4, 16)
        self.color_head = decoder(f.dim // 2, len(self.bins), self.side)
        self.light_head = decoder(f.dim // 2, 100, self.side)
        self.split = "split" not in args.without

    def input_and_target(self, x):
        lab = rgb_to_lab(x)
        L = lab[:, :1] / 100
        ab = lab[:, 1:] / 50
        halves = [L, L, L, ab, 0 * L] if self.split else [L, ab, L, ab]
        grid = F.adaptive_avg_pool2d(lab, self.side)  # (M, 3, s, s)
        light = grid[:, 0].long().clamp(0, 99)  # one of 100 bins
        return torch.cat(halves, 1), (soft_encode(grid[:, 1:], self.bins), light)

    def blind(self, target):
        Z, light = target
        lights = F.one_hot(light, 100).movedim(3, 1)
        both = torch.cat([Z, lights], 1)
        p = both.mean((0, 2, 3), keepdim=True)
        return p.clamp(min=1e-12).log().expand(len(Z), -1, *Z.shape[2:])

    def forward(self, x):
        h_light, h_color = self.backbone(x).chunk(2, 1)  # (M, d / 2) each
        return torch.cat([self.color_head(h_light), self.light_head(h_color)], 1)

    def loss(self, logits, target):
        Z, light = target  # (M, Q, s, s), (M, s, s)
        colors, lights = logits.split([len(self.bins), 100], 1)
        return {"loss": cross_entropy(colors, Z) + cross_entropy(lights, light)}


# Contrastive, and on to BYOL: which one is it? ----------------------------------------------------


class CPC(nn.Module):
    """Contrastive predictive coding (van den Oord et al. 2018): which patch of the whole batch is
    the one k rows below?

    7 x 7 patches, a quarter of the view wide, overlap by half. Shortcuts and guards: pixels and
    edges that patches share, so k starts at 3 (gap); an image's colours (color: dropped per patch);
    batch norm, through which a patch leaks into all others (norm: layer norm, see build).
    """

    def __init__(self, f, args):
        super().__init__()
        self.rows_below = (1, 2) if "gap" in args.without else (3, 4)  # k, two of them
        self.dropped = 0.0 if "color" in args.without else 0.8
        layers = []
        for width in (f.dim, 256, 256):
            layers += [nn.ZeroPad2d((1, 1, 1, 0)), nn.Conv2d(width, 256, (2, 3)), nn.ReLU()]
        self.backbone = f
        self.context = nn.Sequential(*layers)  # row r of c depends on the rows up to r
        self.to_z = nn.Linear(f.dim, 64)
        self.W = nn.ModuleList(nn.Conv2d(256, 64, 1, bias=False) for _ in self.rows_below)
        choices = [14 * args.batch_size * (7 - k) for k in self.rows_below]  # patches of these rows
        self.chance = {"loss": math.log(math.prod(choices)) / 2}

    def input_and_target(self, x):
        S = x.shape[-1]
        t = tiles(x, S // 4, S // 8, rows=7).flatten(0, 1)  # (49M, 3, s, s)
        return drop_colors(t, self.dropped), None  # the target is made from them, too

    def forward(self, t):
        h = self.backbone(t).unflatten(0, (-1, 7, 7))  # (M, 7, 7, d)
        c = self.context(h.movedim(3, 1))  # (M, 256, 7, 7)
        predictions = [0.1 * W(c).movedim(1, 3) for W in self.W]
        return torch.stack([self.to_z(h), *predictions], 1)  # (M, 3, 7, 7, 64)

    def loss(self, answer, _):
        z, *predictions = answer.unbind(1)
        loss = 0.0
        for k, pred in zip(self.rows_below, predictions):
            pred = pred[:, :-k].flatten(0, 2)  # (7 (7 - k) M, 64)
            below = z[:, k:].flatten(0, 2)
            loss = loss + cpc_loss(pred, below) / 2
        return {"loss": loss}


class View(nn.Module):
    """The step to BYOL (Grill et al. 2020, Section 3): predict what a fixed random network, f at
    initialisation, makes of the other view.

    It does not collapse, as the target differs between images and never moves: a constant answer
    has a loss of 2, which is chance. Without the guard the target is the answer for the other view,
    and the same vector for all images is a perfect solution.
    """

    def __init__(self, f, args):
        super().__init__()
        self.backbone = f
        self.to_z = two_layers(f.dim, 512, 128)
        self.random_net = nn.Sequential(
            copy.deepcopy(f), nn.Linear(f.dim, 128, bias=False), nn.BatchNorm1d(128, affine=False))
        self.random_net.requires_grad_(False)
        self.fixed = "fixed" not in args.without
        self.chance = {"loss": 2.0}

    def input_and_target(self, x):
        return x, None  # the target is made from x, too

    def forward(self, x):
        views = x.chunk(2)
        p = [self.to_z(self.backbone(v)) for v in views]
        z = [self.random_net(v) for v in views] if self.fixed else p
        return torch.stack([*p, *z])  # (4, N, 128)

    def loss(self, answer, _):
        p1, p2, z1, z2 = answer
        return {"loss": (byol_loss(p1, z2, self.fixed) + byol_loss(p2, z1, self.fixed)) / 2}


TASKS = dict(zip(GUARDS, [
    Rotation, Patch, Jigsaw, Denoising, Inpainting, Colorization, SplitBrain, CPC, View]))


def build(args):
    """The untrained network with its task, determined by args.seed."""
    torch.manual_seed(args.seed)
    norm = nn.BatchNorm2d
    if args.task == "cpc" and "norm" not in args.without:
        norm = functools.partial(nn.GroupNorm, 1)  # layer norm, over all channels of a patch
    f = encoder(args.arch, args.stem, norm)
    if args.task == "splitbrain":
        halve(f)
    return TASKS[args.task](f, args)


def features(net, x, args):
    """A whole view (N, 3, S, S), its channels as the task feeds them to f -> h (N, d), z (N, D).
    Only cpc and view have a z; in other tasks z is h."""
    if args.task in ("colorization", "splitbrain"):
        with torch.autocast(x.device.type, enabled=False):  # as in training
            x, _ = net.input_and_target(x)
    elif args.task in ("patch", "jigsaw") and "norm" not in args.without:
        x = standardise(x)
    h = net.backbone(x.contiguous(memory_format=torch.channels_last))
    z = net.to_z(h) if hasattr(net, "to_z") else h
    return h, z


# ==================================================================================================
# Loss
# ==================================================================================================


def cross_entropy(logits, y):
    """Cross-entropy (RotNet's paper, equation 3; also for patch and jigsaw), its mean over i:

        L = -1/n sum_i log( exp(l_i,y_i) / sum_c exp(l_ic) )

    logits: (n, C) or (n, C, s, s), y: (n,) or (n, s, s), or class probabilities like split-brain's
    Z, shaped as logits -> scalar. Equal logits give ln C. Test: test_cross_entropy_equation.
    """
    return F.cross_entropy(logits, y)


def classification(logits, y):
    """Cross-entropy and, for the log, the share of right answers (no equation of a paper).

    logits: (n, C), y: (n,) -> {"loss": scalar, "accuracy": scalar, 0 to 1}.
    Test: test_classification.
    """
    correct = (logits.argmax(1) == y).to(logits.dtype)
    return {"loss": cross_entropy(logits, y), "accuracy": correct.mean()}


def soft_cross_entropy(logits, Z, weight):
    """Colorization's loss (Zhang et al. 2016, equation 2), its mean over the places n, h, w:

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

    p comes from soft-encoded bins, which smooths it. -> (Q,). Test: test_rebalance_equation.
    """
    w = 1 / ((1 - mix) * p + mix / len(p))
    return w / (p * w).sum()


def masked_l2(answer, x, mask):
    """Squared error where mask is true (Pathak et al. 2016, the reconstruction loss), its mean:

        L = | mask * (x - answer) |^2 / (3 * number of masked pixels)

    answer, x: (n, 3, S, S), mask: (n, 1, S, S) bool, all true for denoising.
    -> scalar. Test: test_masked_l2_equation.
    """
    squares = (answer - x).square() * mask
    return squares.sum() / (x.shape[1] * mask.sum())


def cpc_loss(pred, z):
    """InfoNCE (van den Oord et al. 2018, equation 4), its mean over the rows i:

        L = -1/M sum_i log( exp(pred_i . z_i) / sum_j exp(pred_i . z_j) ),   pred = W_k c

    pred, z: (M, D), rows i of both belong together -> scalar. Equal rows give ln M.
    Test: test_cpc_equation.
    """
    s = pred @ z.T  # (M, M), log f_k
    return F.cross_entropy(s, torch.arange(len(s), device=s.device))


def byol_loss(p, z, stop_gradient=True):
    """Squared error of unit vectors (BYOL's paper, Grill et al. 2020, equation 2; slide "How does
    BYOL work?"), its mean over the N images:

        L = | p / |p| - z / |z| |^2 = 2 - 2 (p . z) / (|p| |z|)

    p, z: (N, D), row n of both from image n -> scalar. No gradient to z, unless stop_gradient is
    False. Orthogonal vectors give 2, equal ones 0. Test: test_byol_loss_equation.
    """
    z = z.detach() if stop_gradient else z
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================

# None: the network that `view` predicts never moves.

# ==================================================================================================
# Training
# ==================================================================================================


def lr_at(step, steps, warmup, peak):
    """Linear warm-up, (step + 1) / warmup of peak, then half a cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def check(args):
    """Reject options that cannot work and warn of bad ones, before hours are spent on them."""
    for guard in args.without:
        if guard not in GUARDS[args.task].split():
            common.fail(f"--without {guard}: the guards of {args.task} are {GUARDS[args.task]}")
    if args.task == "view" and args.batch_size < 32 and not args.eval:
        print("warning: fewer than 32 images are too few for batch norm, raise --batch-size")


@torch.no_grad()
def show_task(net, data, args, run):
    """views.png: views of eight training images, what goes into f, and the answer if it is an image
    or, for two tasks, colours."""

    def columns(views):
        x = torch.cat(augment(views, args))
        inputs, _ = net.input_and_target(x)
        answer = net(inputs)
        if inputs.shape[-1] < args.image_size:  # tiles: as one picture
            inputs = torch.stack([
                make_grid(t, math.isqrt(len(t)), padding=1, normalize=True, pad_value=1.0)
                for t in inputs.unflatten(0, (len(x), -1))])  # (T, 3, s, s) each
        pictures = [x, *inputs[:, :3].split(len(x))]
        if answer.shape == x.shape:
            pictures.append(answer)
        if hasattr(net, "bins"):
            p = answer[:, : len(net.bins)].softmax(1)
            a, b = torch.einsum("nqhw,qc->cnhw", p, net.bins) / 150
            pictures.append(torch.stack([a, -a, -b], 1) + 0.5)  # roughly these colours
        return [p[: len(views[0])] for p in pictures]

    net.eval()
    common.show_views(run, data, crops(args), columns)
    net.train()


def train(args, run):
    """-> the trained network and the data."""
    data = common.load_data(args, OPTIONS, run, CPU)
    N, steps = args.batch_size, args.epochs * data.per_epoch
    warmup, peak = round(args.warmup * steps), args.lr * N / 256
    if not args.eval:
        print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {N} / 256")
    check(args)

    # -- model
    net = build(args)
    common.load_weights(net, args, mean=MEAN)  # from --init or --eval, if given
    net = run.place(net)  # on the device; batch norm spans all GPUs
    every = torch.arange(0, args.images, math.ceil(args.images / 256))  # spread over the whole set
    *sample, _ = common.embed(lambda x: x, (data.train, every), crops(args), run)
    sample = torch.cat(sample)  # (512 at most, 3, S, S)
    grey = sample.std(1).amax().item() < 1e-3
    if hasattr(net, "bins") and grey and not args.eval:
        common.fail(f"--task {args.task}: these images are grey, there are no colours to predict")
    if args.task == "colorization" and "rebalance" not in args.without:
        net.rebalance_bins(sample)
    model, aug = run.parallel(net), run.compiled(augment)
    gather = run.gather if args.task == "cpc" else nn.Identity()  # negatives of all processes

    # -- optimiser
    rule = torch.optim.AdamW
    if args.optimizer == "sgd":
        rule = functools.partial(torch.optim.SGD, momentum=0.9)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = rule(trained, peak, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "optimizer": optimizer, "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net)  # puts back batch norm's statistics after a skipped step
    if args.task in ("denoising", "inpainting"):
        net.chance = {"loss": sample.var(0, correction=0).mean().item()}  # of the mean image
    if hasattr(net, "blind"):
        _, target = net.input_and_target(sample)
        net.chance = {"loss": net.loss(net.blind(target), target)["loss"].item()}
    run.chance = net.chance  # when nothing is learned
    show_task(net, data, args, run)

    for epoch in run.epochs(data):
        for step, views in run.batches(data, epoch, crops(args)):
            # -- step
            lr = lr_at(step, steps, warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = torch.cat(aug(views, args))  # (2N, 3, S, S), two views of every image
            inputs, target = net.input_and_target(x)
            with run.autocast():
                answer = model(inputs.contiguous(memory_format=torch.channels_last))
            figures = net.loss(gather(answer.float()), target)
            loss = figures["loss"]
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            undo(unless=ok)
            run.log(ok, **figures, lr=lr)
        # -- log and save
        if run.end_epoch(state):  # every --eval-every epochs
            evaluate(net, data, args, run)
        run.save(state)  # at most once a minute; after a signal the program ends here
        show_task(net, data, args, run)
    return net, data


# ==================================================================================================
# Evaluation
# ==================================================================================================


def linear_probe(fit, val, test=None, penalties=(1.0, 1e-1, 1e-2, 1e-3, 1e-4)):
    """Top-1 in % of logistic regression on frozen features; each part: (n, d), labels (n,).

    The L2 penalty is chosen on val. Without test: top-1 on val. With test: top-1 on test, after a
    refit with that penalty on fit and val. NaN if fit or val has features that are not finite.
    """
    if not common.finite(fit, val):
        return math.nan
    score, best = max(zip(regression_path(*fit, *val, penalties), penalties))
    if test is None:
        return score
    both = [torch.cat(pair) for pair in zip(fit, val)]
    return next(regression_path(*both, *test, [best]))


@torch.enable_grad()
def regression_path(x, y, x_test, y_test, penalties):
    """Fit x, y by L-BFGS and yield top-1 on x_test, y_test, for each penalty from strong to weak.

    x is standardised. Penalties are given for ten classes and rescaled for others. Each fit starts
    from the one before. L-BFGS solves for v, where w = v P: P, from the Cholesky factor of the
    Hessian at w = 0, is a preconditioner, which more than halves the number of steps.
    """
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    x, x_test = (x - mean).div_(std), (x_test - mean).div_(std)
    hessian = x.T @ x / len(x)  # about ten times the loss's, for ten classes
    hessian.diagonal().add_(0.3)  # and ten times a penalty of 0.03
    P = torch.linalg.inv(torch.linalg.cholesky(hessian))
    v = x.new_zeros(int(y.max()) + 1, len(P), requires_grad=True)
    b = x.new_zeros(len(v), requires_grad=True)
    for penalty in penalties:
        penalty *= 10 / len(v)  # with more classes the loss is flatter
        lbfgs = torch.optim.LBFGS(
            [v, b], max_iter=100, tolerance_change=1e-5, line_search_fn="strong_wolfe")

        def objective(penalty=penalty, lbfgs=lbfgs):
            lbfgs.zero_grad()
            w = v @ P
            loss = common.cross_entropy(x, w, b, y) + penalty / 2 * w.square().sum()
            loss.backward()
            return loss

        lbfgs.step(objective)
        correct = F.linear(x_test, v @ P, b).argmax(1) == y_test
        yield 100 * correct.float().mean().item()


def accuracies(f, names, crop, splits, run, limit=math.inf):
    """Linear and k-NN top-1 of each output of f, by name; splits: fit, val and perhaps test, of
    each of which at most `limit` images are used."""
    parts = [common.embed(f, part, crop, run, limit) for part in splits]
    results = {}
    for i, name in enumerate(names):
        labelled = [(part[i], part[-1]) for part in parts]
        results[f"{name}linear_top1"] = linear_probe(*labelled)
        results[f"{name}knn_top1"] = common.knn(*labelled, k=run.args.knn_k, tau=run.args.knn_tau)
    return results


def central(size):
    """The central square; above 64 pixels, 7/8 of its side (SimCLR's released code: above 32)."""
    return [common.Crop(size, scale=1.0 if size <= 64 else 0.875)]


def evaluate(net, data, args, run, test=False):
    """Is z healthy, and how well do h and z separate the classes?

    On validation images. With test, the accuracies are on the test images, next to those of two
    baselines: h of the untrained network, and raw pixels. Only cpc and view have vectors z. For the
    others z is h, which is never negative and fills only a corner of the sphere: a smaller spread
    is healthy. The same holds for cpc, whose loss does not change if a vector is added to all z.
    """
    net.eval()
    run.broadcast(net)

    def two_views(views):  # augmented as in training
        (h, z1), (_, z2) = [features(net, x, args) for x in augment(views, args)]
        return h, z1, z2

    has_z = hasattr(net, "to_z")
    results = common.health(
        *common.embed(two_views, data.val, crops(args), run, limit=1024),
        name="z" if has_z else "h",
        least=0.1 if args.task == "view" else 0.02)
    view, small = central(args.image_size), central(min(args.image_size, 32))
    if data.labelled:
        splits = data.splits(test)
        names = ["", "head_"] if has_z else [""]
        results |= accuracies(lambda x: features(net, *x, args), names, view, splits, run)
    if data.labelled and test:
        floor = build(args).to(run.device).eval()
        results |= accuracies(lambda x: features(floor, *x, args)[:1], ["untrained_"], view, splits,
                              run)
        results |= accuracies(lambda x: [x[0].flatten(1)], ["pixels_"], small, splits, run, 10_000)
    if test:
        common.export(lambda x: features(net, *x, args)[:1], data, view, run)  # with --embed
    net.train()
    return run.report(results, test)


def loading(args):
    """Python that rebuilds the backbone with torchvision alone; printed at the end of a run."""
    norm = ""
    if args.task == "cpc" and "norm" not in args.without:
        norm = ", lambda channels: nn.GroupNorm(1, channels)"
    lines = [
        "import torch, torchvision",
        "from torch import nn",
        "",
        ENCODER,
        f"net = encoder({args.arch!r}, {args.stem!r}{norm})",
    ]
    if args.task == "splitbrain":
        lines += ["", HALVE, "halve(net)"]
    if args.task in ("colorization", "splitbrain", "patch", "jigsaw"):
        lines += [f"# its input: see features of pretext.py for --task {args.task}"]
    return "\n".join(lines)


def main(argv=None):
    args = common.options("pretext", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()
