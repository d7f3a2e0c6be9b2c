"""Weak supervision: labels that come from rules, belong to whole bags, are wrong, or are few
Data programming: Ratner, De Sa, Wu, Selsam, Re, NeurIPS 2016, https://arxiv.org/abs/1605.07723,
and others, named below
Slides: "Weak Supervised Learning (WSL)" and "How can we do Weak Supervised Learning?".

We want a classifier and have no good labels for it. Weaker labels are cheap, and a model of how
they arise tells us what to learn from them. In the words of the slides, rules and wrong labels are
inaccurate, labels of bags inexact, few labels incomplete.

    --task        what is known                   what is done with it
    labeling      rules, which vote or abstain    a label model weighs the votes by their agreement
    bags          a bag has a fish, or has none   attention finds the fish
    noisy         labels, half of them wrong      two networks, each picks images for the other
    pseudo        few labels, many images         predictions that are certain become labels

bags and noisy make these labels from true ones, also on a set of your own.
A run trains the method's network and, beside it, those of its floor and its ceiling, on the same
images in the same steps (pseudo's floor on the labelled ones only). For a batch of N:
    x = t(image)                        random augmentations              crops, augment
    h = f(x), s = head(h)               of each network                   Network.forward
    L(s, what the network is told)      of each network                   losses of the task
    update the networks                 AdamW                             train, lr_at

  labeling: Ratner 2016; Fu 2020 (2002.11955). The four steps of the slides:
    unlabelled data -> rules            votes, -1 abstains                measures, rules
    -> cleaned labels                   P(y | votes), by EM or triplets   label_model
    -> train model                      L = E_{y | votes} l(s, y)         noise_aware_loss
  bags: Ilse 2018 (1802.04712); the maximum as in Dietterich 1997 (Artificial Intelligence 89)
    z = sum_k a_k h_k                   a = softmax_k( w . tanh(V h_k) )  attention_pool
  noisy: Han 2018 (1804.06872), two networks f and g
    keep the R(T) N smallest losses     each network on its own           keep_rate, small_loss
    L_f = those that g keeps            and the other way round           coteaching_losses
  pseudo: FixMatch, Sohn 2020 (2001.07685); Lee 2013 (ICML workshop)
    y^ = argmax_y q                     q of a weak view, if certain      fixmatch_loss
    L = labelled + (-log p(y^))         p of a strong view                pseudo: losses

Symbols: x (n, 3, S, S) in [0, 1]; h (n, d); s (n, C) logits; y (n,) labels; votes (n, m) of m
sources, -1 abstains; posterior (n, C); mask (bags, k), true where a bag has an image; a (bags, k).

Where this file departs from the papers:
  - One setup for all tasks: the same networks and flips, AdamW (FixMatch: SGD), and a rate that
    rises linearly and falls as half a cosine.
  - labeling: the paper's model of independent sources, fitted by EM, for any number of classes
    (paper: by stochastic gradients, for two; also for sources that depend on each other). On the
    built-in set sources abstain more often for some classes than for others, so each has a
    probability for every pair of class and answer (Dawid & Skene 1979); --label-model em is the
    paper's, with one accuracy per source. triplets takes the median of all triplets, leaves out
    abstentions and finds sources below chance (released code: abstentions count as 0, and all
    sources as better than chance).
  - bags: L = 64 (paper: 128), attention without biases (released code: with), several bags per step
    (released code: one). Images are shuffled and cut into bags of half to the whole of --bag-size;
    each image is in exactly one (released code: 10 images on average, drawn with replacement). A
    step has room for the largest bags, so an epoch is about 0.7 of a pass.
  - noisy: at least R(T) N images are kept, as in the paper (released code: rounded down), and the
    loss is their mean (released code: divided by their number once more). T counts from 0, so R is
    1 in the first epoch (released code: already less). Images are flipped, and the rate falls from
    the start (released code: no augmentation, and from epoch 80 or 100). The last epoch is reported
    (paper: the mean of the last ten).
  - pseudo: strong views are smaller crops with jitter, without it on the built-in set (paper:
    RandAugment or CTAugment, then Cutout); weak ones are larger crops (paper: shifts). There is
    no average of network weights, and the rate falls to 0 (paper: to about 0.2 of its peak).
    --threshold 0 gives Lee's loss, but his has one view and a growing weight. For ImageNet the
    paper has --mu 5 --threshold 0.7 and a weight of 10 for the unlabelled term, which is 1 here.
  - With several GPUs each selects among its own images.
  - What is evaluated is the classifier itself; there is no linear probe.

    python weak.py --task ...    test accuracy in %, for bags AUC; mean of three seeds, on a CPU
                method   floor   ceiling
    labeling      92.5    85.7      99.2    labels, where a rule votes: 83.6 % right, majority 71.6
    bags         100.0    95.3     100.0    images by attention: 100.0
    noisy         96.2    67.7      99.9    half of the labels wrong
    pseudo        94.4    89.3      99.7    10 labels per class
"""

import csv
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import FROM_0, FROM_1, FROM_2, PIXELS, POSITIVE, SHARE, one_of

# ==================================================================================================
# Options
# ==================================================================================================

NETS = one_of(["convnet", "convnet_wide", "resnet18", "resnet34", "resnet50"])
NETWORKS = {  # task: the method's network, in noisy its peer, then those of floor and ceiling
    "labeling": ["label_model", "majority", "truth"],
    "bags": ["bags", "mean", "images"],  # the last one is told which images are positive
    "noisy": ["coteaching", "peer", "plain", "clean"],
    "pseudo": ["pseudo", "few", "all"],
}

# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones;
# the last two have not been measured. In the second column lr, batch and T_k are those of Han et
# al. 2018 for CIFAR-10, mu and the threshold those of FixMatch, which has a total batch of 512.
# common.py adds --dataset, --seed, --amp, --resume and so on.
OPTIONS = {  # fmt: skip
    # option         built-in     to 64 px     larger       allowed         meaning
    "task":         ("labeling",  "labeling",  "labeling",  one_of(NETWORKS), "what is known"),
    "votes":        ("rules",     "rules",     "rules",     {"metavar": "CSV"},
                     "labeling: lines of an image's name and its votes, -1 or empty: none"),
    "label_model":  ("by-class",  "em",        "em",        "em|by-class|triplets", "labeling"),
    "pool":         ("attention", "attention", "attention", "attention|gated|max|mean|noisy-or",
                     "bags: how images are pooled"),
    "positive":     (0,           0,           0,           FROM_0,         "bags: class to find"),
    "bag_size":     (10,          10,          10,          FROM_2,         "bags: maximum size"),
    "noise":        ("symmetric", "symmetric", "symmetric", "symmetric|pair", "noisy: which kind"),
    "rate":         (0.5,         0.5,         0.5,         SHARE,          "noisy: share wrong"),
    "keep_warmup":  (4,           10,          10,          FROM_1,         "noisy: T_k, epochs"),
    "labels":       (10,          25,          25,          FROM_1,         "pseudo: per class"),
    "mu":           (3,           7,           7,           FROM_1,         "pseudo: rest / few"),
    "threshold":    (0.8,         0.95,        0.95,        SHARE,          "pseudo: certainty"),
    "strength":     (0.0,         0.5,         0.5,         SHARE,          "pseudo: of jitter"),
    "arch":         ("convnet",   "resnet18",  "resnet50",  NETS,           "encoder f"),
    "stem":         ("7x7",       "3x3",       "7x7",       "3x3|7x7",      "3x3: no max-pool"),
    "image_size":   (32,          64,          224,         PIXELS,         "S, side of a view"),
    "min_scale":    (0.5,         0.5,         0.3,         SHARE,          "least area of a crop"),
    "epochs":       (12,          200,         60,          FROM_1,         "passes over the set"),
    "batch_size":   (64,          128,         128,         FROM_2,         "N"),
    "lr":           (4e-3,        2e-3,        1e-3,        POSITIVE,       "peak, times N / 256"),
    "weight_decay": (0.01,        0.01,        0.01,        SHARE,          "of AdamW"),
    "warmup":       (0.1,         0.1,         0.1,         SHARE,          "share of the steps"),
}
# Without a GPU, images up to 64 pixels use the first column, except for what was made for toys:
CPU = {"label_model": "em", "strength": 0.5}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """A random crop per image; pseudo: a larger and a smaller one; noisy: the central square."""
    if args.task == "noisy":
        return [common.Crop(args.image_size, 1.0)]
    crop = common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3))
    if args.task == "pseudo":
        return [crop._replace(scale=(max(args.min_scale, 0.75), 1.0)), crop]  # weak, strong
    return [crop]


def augment(views, args):
    """Flip, and colour jitter of pseudo's strong view, drawn separately for every image.

    views: list of (N, 3, S, S) in [0, 1] -> the same.
    """
    views = [common.flip(x, p=0.5) for x in views]
    if args.task == "pseudo" and args.strength:
        s = 0.8 * args.strength
        views[1] = common.color_jitter(views[1], s, s, s, s / 4, p=0.8)
    return views


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


class Network(nn.Module):
    """f and a head, and other such networks, by name, that share no weights with them.

    x (n, 3, S, S), and the others' inputs, if any -> h (n, d), s (n, C), and the s of the others.
    With a mask the n images form bags, and s is the output of Bag.
    """

    def __init__(self, args, name, others=()):
        super().__init__()
        self.backbone = encoder(args.arch, args.stem)
        d = self.backbone.dim
        if args.task == "bags":
            pool = {"bags": args.pool, "mean": "mean", "images": "max"}[name]
            self.head = Bag(d, pool)
        else:
            self.head = nn.Linear(d, args.classes)
        self.others = nn.ModuleDict({name: Network(args, name) for name in others})

    def forward(self, x, *more, mask=None):
        h = self.backbone(x.contiguous(memory_format=torch.channels_last))
        s = self.head(h) if mask is None else self.head(h, mask)
        return h, s, *[net(x, mask=mask)[1] for net, x in zip(self.others.values(), more)]


def build(args):
    """The untrained networks, determined by args.seed."""
    torch.manual_seed(args.seed)
    name, *others = NETWORKS[args.task]
    return Network(args, name, others)


# Bags ---------------------------------------------------------------------------------------------


def attention_pool(h, mask, V, w, U=None):
    """Attention over the images of a bag (Ilse et al. 2018; with U it is gated):

        z = sum_k a_k h_k,   a_k = exp(e_k) / sum_j exp(e_j),   over the images in the bag
        e_k = w . tanh(V h_k),   gated: w . ( tanh(V h_k) * sigmoid(U h_k) )

    h: (bags, k, d), mask: (bags, k), V, U: (L, d), w: (L,) -> z (bags, d), a (bags, k).
    Test: test_attention_pool_equation.
    """
    e = torch.tanh(h @ V.T)  # (bags, k, L)
    if U is not None:
        e = e * torch.sigmoid(h @ U.T)
    a = (e @ w).masked_fill(~mask, -math.inf).softmax(1)
    return torch.einsum("bk,bkd->bd", a, h), a


def noisy_or(s, mask):
    """A bag is negative if every image is, independently: the logit of p = 1 - prod_k (1 - p_k),
    with p_k = sigmoid(s_k). s, mask: (bags, k) -> (bags,). Test: test_pools."""
    none = (F.softplus(s) * mask).sum(1)  # -log(1 - p)
    return none + torch.log(-torch.expm1(-none))


POOLS = {  # s, mask (bags, k) -> (bags,)
    "max": lambda s, mask: s.masked_fill(~mask, -math.inf).amax(1),
    "mean": lambda s, mask: (s * mask).sum(1) / mask.sum(1),
    "noisy-or": noisy_or,
}


class Bag(nn.Module):
    """The head for bags: h (n, d) of all images, bag by bag, mask (bags, k) -> (bags, 1 + k): the
    bag's logit, then for every image its attention, or its logit if logits are pooled."""

    def __init__(self, d, pool, L=64):
        super().__init__()
        self.pooled = POOLS.get(pool)
        self.score = nn.Linear(d, 1)
        if not self.pooled:
            self.V = nn.Linear(d, L).weight
            self.w = nn.Linear(L, 1).weight
            self.U = nn.Linear(d, L).weight if pool == "gated" else None

    def forward(self, h, mask):
        rows = h.new_zeros(*mask.shape, h.shape[1])
        h = rows.masked_scatter(mask.unsqueeze(2), h)  # (bags, k, d)
        if self.pooled:
            images = self.score(h).squeeze(2)
            bag = self.pooled(images, mask).unsqueeze(1)
        else:
            z, images = attention_pool(h, mask, self.V, self.w[0], self.U)
            bag = self.score(z)  # (bags, 1)
        return torch.cat([bag, images], 1)


# Labelling: rules, for the built-in set -----------------------------------------------------------

# A source measures an image. From low to high values it votes for these things, at - for none; the
# numbers are the bounds, read off training images of every kind. Some rules are good, some poor,
# and the label model has to find out which without labels.
RULES = """
    tall     fish 0.65 car 0.80 - 0.90 cup 0.99 - 1.04 flower 1.12 house 1.25 tree 1.60 bottle
    hangs    boat -0.30 bag -0.12 - 0.35 tree
    widens   shirt -0.25 - -0.10 flower -0.03 - 0.14 car 0.25 boat
    sides    bag 1.93 fish 2.02 - 2.25 shirt
    stripes  shirt -1.00 bag -0.45 - 0.25 fish 0.80 bottle
"""


def measures(x):
    """The measures behind RULES: x (n, 3, S, S), a bright thing on a plain background -> name: n
    values. Moments of the thing's pixels, whatever its place and size, and its texture."""
    smooth = F.avg_pool2d(common.to_grey(x), 3, 1, 1)  # (n, 1, S, S)
    ground = smooth.flatten(1).median(1).values.view(-1, 1, 1, 1)
    thing = (smooth > ground + 0.1).float()
    share = thing / thing.sum((2, 3), keepdim=True)

    def mean(value):
        return (share * value).sum((2, 3), keepdim=True)

    line = torch.arange(x.shape[3])
    column = line - mean(line)
    row = line.view(-1, 1) - mean(line.view(-1, 1))
    width = mean(column**2).sqrt()
    height = mean(row**2).sqrt()
    column = column / width
    row = row / height
    inside = 1 - F.max_pool2d(1 - thing, 3, 1, 1)  # without most of its edge
    down, across = [mean(inside * slope**2) for slope in torch.gradient(smooth, dim=(2, 3))]
    return {
        "tall": height / width,
        "hangs": mean(row**3),  # a tail below
        "widens": mean(column**2 * row),  # towards its foot
        "sides": mean(column**4),  # far out
        "stripes": (across / down).log(),  # vertical if above 0
    }


def rules(x):
    """The votes (n, m) of RULES on images of the built-in set; its things are the classes."""
    measured = measures(x)
    number = {thing: c for c, thing in enumerate(common.THINGS)} | {"-": -1}
    votes = []
    for source in RULES.strip().splitlines():
        name, *line = source.split()  # thing, bound, thing, bound, ...
        things = torch.tensor([number[thing] for thing in line[::2]])
        bounds = torch.tensor([float(bound) for bound in line[1::2]])
        votes.append(things[torch.bucketize(measured[name].flatten(), bounds, right=True)])
    return torch.stack(votes, 1)


def read_votes(path, names):
    """Votes (n, m) of the images with these names, of files or numbers: each line of the file is a
    name and m votes."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = {os.path.abspath(line[0]): line[1:] for line in csv.reader(file) if line}
        places = [os.path.abspath(str(name)) for name in names]
        missing = [place for place in places if place not in lines]
        if missing:
            common.fail(f"--votes {path} has no line for {len(missing)} of {len(names)} training "
                        f"images: {common.shortened(missing)}; it has lines for "
                        f"{common.shortened([*lines])}")
        votes = torch.tensor([[int(vote or -1) for vote in lines[place]] for place in places])
    except (OSError, ValueError, csv.Error) as error:
        common.fail(f"--votes {path} cannot be read: {error}")
    if not votes.numel() or votes.min() < -1 or votes.max() > 999:
        common.fail(f"--votes {path}: votes are classes from 0 to 999, or -1 for none")
    return votes


# Labelling: the label model -----------------------------------------------------------------------


def majority(votes, classes):
    """The classes with the most votes, in equal shares: (n, m) -> (n, C)."""
    counts = F.one_hot(votes + 1, classes + 1)[:, :, 1:].sum(1)
    most = counts == counts.amax(1, keepdim=True)
    return most / most.sum(1, keepdim=True).double()


def answers(accuracies, classes):
    """P (m, C, 1 + C), probabilities of a source's answers, given the class (Ratner et al. 2016):

        P[i, y, 0] = 1 - beta_i,   it abstains
        P[i, y, 1 + v] = beta_i alpha_i   if v = y,   else beta_i (1 - alpha_i) / (C - 1)

    beta is set to 1/2, as it cancels in the posterior. Test: test_posterior_equation.
    """
    errors = (1 - accuracies).clamp(1e-4, 1 - 1e-4).view(-1, 1, 1)
    votes = transition("symmetric", errors, classes)
    return F.pad(votes / 2, (1, 0), value=0.5)


def share_right(P):
    """The share of each source's votes that are right, from its answers P (m, C, 1 + C) -> (m,)."""
    votes = P[:, :, 1:]
    return votes.diagonal(dim1=1, dim2=2).sum(1) / votes.sum((1, 2))


def posterior(votes, P):
    """P(y | votes) for sources that answer independently and classes that are equally frequent
    (Ratner et al. 2016):

        P(y | votes) = prod_i P[i, y, 1 + votes_i] / sum_y' prod_i P[i, y', 1 + votes_i]

    votes: (n, m), P: (m, C, 1 + C) -> (n, C). Test: test_posterior_equation.
    """
    logs = sum(p[:, 1 + vote].log() for p, vote in zip(P, votes.T))  # (C, n)
    return logs.T.softmax(1)


def triplets(votes):
    """Accuracies alpha (m,) for two classes in closed form (Fu et al. 2020). votes: (n, m) of 0 and
    1, -1 abstains. With v = 2 votes - 1 and a = 2 alpha - 1, E[v_i v_j] = a_i a_j, the mean where
    both vote, and so

        a_i^2 = E[v_i v_j] E[v_i v_k] / E[v_j v_k],   here the median over all j, k; i, j, k differ

    The sign of a_i is that of its agreement with all others. Test: test_triplets.
    """
    v = torch.where(votes < 0, 0, 2 * votes - 1).double()  # (n, m), 0 where it abstains
    E = (v.T @ v) / (v.T.abs() @ v.abs())
    E.fill_diagonal_(math.nan)  # i, j, k are three sources
    squares = E.unsqueeze(2) * E.unsqueeze(1) / E  # (m, m, m)
    size = squares.flatten(1).nanmedian(1).values.clamp(0, 1).sqrt()
    return (1 + size * E.nansum(1).sign()) / 2


def label_model(votes, classes, method="em", steps=100):
    """Infer how accurate m sources are, and the labels, from the agreement of their votes alone.

    votes: (n, m) int, -1 abstains -> accuracies (m,) of votes, posterior (n, C) double.
    method: "em", Ratner's model; "by-class", any P (Dawid & Skene 1979), with the counts under the
    majority vote as a prior; "triplets", for two classes.
    EM begins with the majority: from the opposite it would find the same likelihood, with two
    classes swapped. Tests: test_planted_accuracies, test_em_never_loses_likelihood.
    """
    if method == "triplets":
        P = answers(triplets(votes), classes)
        return share_right(P), posterior(votes, P)
    cast = F.one_hot(votes + 1, classes + 1).double()  # (n, m, 1 + C)
    q = majority(votes, classes)
    first = torch.einsum("nmv,ny->myv", cast, q)
    for _ in range(steps):
        counts = torch.einsum("nmv,ny->myv", cast, q)  # how often source m answered v to y
        if method == "em":
            P = answers(share_right(counts), classes)
        else:
            counts = counts + first + 1
            P = counts / counts.sum(2, keepdim=True)
        q = posterior(votes, P)
    return share_right(P), q


# ==================================================================================================
# Loss
# ==================================================================================================


def noise_aware_loss(s, target):
    """The expected loss over labels distributed as target (Ratner et al. 2016):

        L = -1/n sum_i sum_y target_iy log softmax(s_i)_y

    s, target: (n, C) -> scalar. Test: test_noise_aware_loss_equation.
    """
    return F.cross_entropy(s, target)


def bag_loss(s, y, mask):
    """Binary cross-entropy of labels (Ilse et al. 2018), p = sigmoid(s), where mask is true:

        L = -1/n sum_i [ y_i log p_i + (1 - y_i) log(1 - p_i) ]

    s, y, mask: of the same shape, s float or double, y and mask bool; mask has n true entries ->
    scalar.
    Test: test_bag_loss_equation.
    """
    losses = F.binary_cross_entropy_with_logits(s, y.to(s.dtype), reduction="none")
    return (losses * mask).sum() / mask.sum()


def small_loss(losses, keep):
    """The images with the smallest losses, ceil(keep n) of n, but at least one (Han et al. 2018,
    Algorithm 1). losses: (n,) -> index. Test: test_coteaching_is_algorithm_1."""
    n = max(1, math.ceil(keep * len(losses) - 1e-6))  # 0.55 * 20 is 11.000000000000002
    return losses.topk(n, largest=False).indices


def coteaching_losses(losses_f, losses_g, keep):
    """Each network learns from images that the other keeps (Han et al. 2018, Algorithm 1):

        L_f = mean of losses_f where losses_g are small,   L_g = the other way round

    losses_f, losses_g: (n,) of the same images -> two scalars.
    Test: test_coteaching_is_algorithm_1.
    """
    kept_by_f = small_loss(losses_f.detach(), keep)
    kept_by_g = small_loss(losses_g.detach(), keep)
    return losses_f[kept_by_g].mean(), losses_g[kept_by_f].mean()


def fixmatch_loss(weak_logits, strong_logits, threshold):
    """The loss on unlabelled images (Sohn et al. 2020), q = softmax(weak), p = softmax(strong):

        L = -1/n sum_i [ max_y q_iy >= threshold ] log p_i,y^   with   y^ = argmax_y q_iy

    Both (n, C) -> scalar, the mean over all n. No gradient to q. With the same logits twice and
    threshold 0 it is the loss of Lee 2013. Test: test_fixmatch_equation.
    """
    certainty, y = weak_logits.detach().softmax(1).max(1)
    losses = F.cross_entropy(strong_logits, y, reduction="none")
    return torch.where(certainty >= threshold, losses, 0.0).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================

# None: pseudo-labels are what the network itself predicts in the same step.

# ==================================================================================================
# Training
# ==================================================================================================


def lr_at(step, steps, warmup, peak):
    """Linear warm-up, (step + 1) / warmup of peak, then half a cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def keep_rate(epoch, tau, warmup):
    """R(T) = 1 - min( T / T_k tau, tau ), the share of images to keep: all at first, as wrong
    labels are learned last (Han et al. 2018, Algorithm 1). tau: share of wrong labels, warmup: T_k.
    Test: test_keep_rate."""
    return 1 - min(epoch / warmup * tau, tau)


def transition(kind, rate, classes):
    """P(label | class), (C, C) double: a share `rate` of the labels is wrong, for "symmetric" any
    of the other classes, for "pair" the next one (Han et al. 2018). Test: test_transition."""
    right = torch.eye(classes, dtype=torch.double)
    wrong = right.roll(1, 1) if kind == "pair" else (1 - right) / (classes - 1)
    return (1 - rate) * right + rate * wrong


def cut_bags(index, size, seed):
    """Shuffle images and cut them into bags of size / 2 to size, the last one from the rest ->
    (bags, k), -1: no image."""
    mix = torch.Generator().manual_seed(seed)
    cuts = torch.randint(size // 2, size + 1, (len(index),), generator=mix).cumsum(0)
    shuffled = index[torch.randperm(len(index), generator=mix)]
    bags = shuffled.tensor_split(cuts[cuts < len(index)])
    return nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=-1)


class Batches:
    """For run.batches: views of a task's images; the attribute `index` holds which ones they are.

    parts: pairs (rows, count). A step takes count rows of each, in an order that is drawn anew in
    every epoch, and whenever all are used up. A row is an image or a bag: (n, 1) or (n, k), -1
    where a bag has no image.
    """

    def __init__(self, data, parts):
        self.data, self.parts = data, parts
        self.per_epoch = data.per_epoch

    def epoch(self, number, first, batch_size, crops, run, seed):
        mix = torch.Generator().manual_seed(seed * 2**20 + number)
        columns = []
        for rows, count in self.parts:
            n = self.per_epoch * count
            order = torch.rand(n // len(rows) + 1, len(rows), generator=mix).argsort(1)
            order = order.flatten()[:n]
            columns.append(rows[order].view(self.per_epoch, run.world, -1))
        order = torch.cat(columns, 2)[first:, run.rank]  # (steps left, images of this process)
        there = order >= 0
        sizes = there.sum(1).tolist()
        items = common.batches(self.data.train, order[there], sizes, crops, run.device,
                               run.args.workers, (seed, number, run.rank), first)
        for (views, read), index in zip(items, order.to(run.device)):
            # those that were read: a broken file is replaced
            self.index = index.masked_scatter(index >= 0, common.to_device(read, run.device))
            yield views, self.index


# A task is what the networks are told:
#   parts     what a step is made of, for Batches
#   inputs    views, index -> the input of each network, and the mask of bags or None
#   losses    s of each network, index, step -> the loss of each, figures for the log


def same_for_all(views, index):
    """The same images for each network; zip in Network.forward drops the surplus copies."""
    return views * 4, None


def not_held_out(data):
    """Index of the training images that are not for validation, those without labels last."""
    known = data.train.labels >= 0
    unknown = (~known).nonzero().squeeze(1)
    return torch.cat([data.fit[1], unknown]) if known.any() else data.fit[1]


def labeling(args, data, run):
    """Labels of the label model, beside those of the majority and the true ones."""
    if args.votes == "rules":
        votes = rules(data.train.pixels.cpu() / 255)
    else:
        votes = read_votes(args.votes, data.train.names)
    C = args.classes = max(args.classes, 1 + int(votes.max()))
    if C < 2:
        common.fail("the sources vote for one class at most, so there is nothing to learn")
    if args.label_model == "triplets" and (C > 2 or votes.shape[1] < 3):
        common.fail(f"triplets need 3 or more sources and 2 classes, not {votes.shape[1]} and {C}")
    unused = sorted({*range(C)} - {*votes.flatten().tolist()})
    if unused:
        print(f"warning: no source votes for class {', '.join(map(str, unused))} (the first is 0)")
    accuracies, labels = label_model(votes, C, args.label_model)
    print("of the votes of each source, judged by their agreement, are right (%):",
          *(f"{100 * a:.0f}" for a in accuracies.tolist()))
    truth = F.one_hot(data.train.labels + 1, C + 1)[:, 1:]  # all 0, so no loss, if unknown
    targets = torch.stack([labels, majority(votes, C), truth]).float().to(run.device)
    voted = (votes >= 0).any(1)  # the other images are left out
    fit = not_held_out(data)
    fit = fit[voted[fit]]
    if not len(fit) or not torch.isfinite(targets).all():
        common.fail("the sources vote on no training image, or two of them never on the same one")
    known = voted & (data.train.labels >= 0)
    for name, guess in zip(NETWORKS["labeling"], targets[:2, known] if data.labelled else []):
        right = guess.argmax(1).cpu() == data.train.labels[known]
        print(f"{name}: {100 * right.double().mean():.1f} % of the labels are right")

    def losses(s, index, step):
        return [noise_aware_loss(*pair) for pair in zip(s, targets[:, index])], {}

    return [(fit.unsqueeze(1), args.batch_size)], same_for_all, losses


def bags(args, data, run):
    """Labels of bags: whether a bag has an image of the class. The last network is told which."""
    rows = cut_bags(data.fit[1], args.bag_size, args.seed)
    positive = (data.train.labels == args.positive).to(run.device)
    have = positive.cpu()[rows] & (rows >= 0)
    share = have.any(1).double().mean()
    print(f"{100 * share:.1f} % of the bags, drawn at random, have an image of class "
          f"{args.positive}")
    if share in (0, 1):
        common.fail("all bags are of one kind: choose another --positive or --bag-size")

    def inputs(views, index):
        return views * 3, (index >= 0).view(-1, rows.shape[1])

    def losses(s, index, step):
        mask = (index >= 0).view(-1, rows.shape[1])
        y = positive[index].view(mask.shape) & mask
        own, mean, images = s  # (bags, 1 + k) each
        bag, every = y.any(1), mask.any(1)
        terms = [
            bag_loss(own[:, 0], bag, every),
            bag_loss(mean[:, 0], bag, every),
            bag_loss(images[:, 1:], y, mask),
        ]
        return terms, {}

    return [(rows, args.batch_size // args.bag_size)], inputs, losses


def noisy(args, data, run):
    """Wrong labels: coteaching, beside plain training on the same labels and on the true ones."""
    mix = torch.Generator().manual_seed(args.seed)
    P = transition(args.noise, args.rate, args.classes)[data.train.labels]  # (n, C)
    given = torch.multinomial(P, 1, generator=mix).squeeze(1).to(run.device)
    true = data.train.labels.to(run.device)
    wrong = (given != true)[data.fit[1]]
    share = wrong.double().mean()
    print(f"{100 * share:.1f} % of the labels were made wrong")

    def losses(s, index, step):
        keep = keep_rate(step // data.per_epoch, args.rate, args.keep_warmup)
        y, truth = given[index], true[index]
        losses_f, losses_g, plain = [
            F.cross_entropy(each, y, reduction="none") for each in s[:3]]
        terms = [
            *coteaching_losses(losses_f, losses_g, keep),
            plain.mean(),
            F.cross_entropy(s[3], truth),
        ]
        right = (y == truth)[small_loss(losses_f.detach(), keep)]
        return terms, {"precision": right.float().mean()}

    return [(data.fit[1].unsqueeze(1), args.batch_size)], same_for_all, losses


def pseudo(args, data, run):
    """Few labels and many images, beside the few labels alone and the labels of all images."""
    mix = torch.Generator().manual_seed(args.seed)
    index = not_held_out(data)
    index = index[torch.randperm(len(index), generator=mix)]
    true = data.train.labels.to(run.device)
    y = data.train.labels[index]
    few = torch.cat([index[y == c][: args.labels] for c in range(args.classes)])
    print(f"labels used: {len(few):,} of {(y >= 0).sum():,} (--labels {args.labels} for each "
          f"class); images: {len(index):,}")
    count = args.batch_size // (1 + args.mu)  # B
    n = count // run.world  # in this process; they come first in its batch

    def inputs(views, index):
        weak, strong = views
        return [torch.cat([weak, strong[n:]]), weak[:n], weak], None

    def losses(s, index, step):
        own, of_few, of_all = s
        y = true[index]
        known = (y >= 0).sum().clamp(min=1)
        labelled, weak, strong = own.split([n, len(y) - n, len(y) - n])
        terms = [
            F.cross_entropy(labelled, y[:n]) + fixmatch_loss(weak, strong, args.threshold),
            F.cross_entropy(of_few, y[:n]),
            F.cross_entropy(of_all, y, ignore_index=-1, reduction="sum") / known,
        ]
        return terms, {}

    parts = [(few.unsqueeze(1), count), (index.unsqueeze(1), args.batch_size - count)]
    return parts, inputs, losses


TOLD = dict(zip(NETWORKS, [labeling, bags, noisy, pseudo]))


def check(args, data, run):
    """Reject options that cannot work and warn of bad ones, before hours are spent on them."""
    if args.labelled:
        common.fail("--labelled is for the probes of other files: weak labels belong to --dataset")
    if args.eval:
        return
    part = {"bags": args.bag_size, "pseudo": 1 + args.mu}.get(args.task, 1)
    if args.batch_size < part or args.batch_size // part % run.world:
        common.fail(f"--batch-size {args.batch_size} has to hold {part} images for each of "
                    f"{run.world} processes, or a multiple of that")
    if args.task == "labeling" and args.votes == "rules" and args.dataset != common.BUILT_IN:
        common.fail("the rules are for the built-in set only: --task labeling needs --votes FILE")
    if args.task == "labeling" and args.votes == "rules" and args.image_size != 32:
        print("warning: the rules are for images of 32 pixels; at other sizes more votes are wrong")
    if args.task != "labeling" and args.classes <= max(args.positive, 1):
        common.fail(f"--task {args.task} makes weak labels from true ones: it needs at least two "
                    "classes, and --positive has to be one of them")
    if args.task == "noisy":
        right, *wrong = transition(args.noise, args.rate, args.classes)[0].tolist()
        if right <= max(wrong):
            print("warning: a wrong label is at least as frequent as the right one: lower --rate")


def train(args, run):
    """-> the trained networks and the data."""
    data = common.load_data(args, OPTIONS, run, CPU)
    steps = args.epochs * data.per_epoch
    warmup, peak = round(args.warmup * steps), args.lr * args.batch_size / 256
    if not args.eval:
        print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g}")
    made = common.recall(args)
    args.classes = made.get("classes", 1 + int(data.train.labels.max()))
    args.names = data.classes
    check(args, data, run)
    if not args.eval:
        parts, inputs, losses = TOLD[args.task](args, data, run)
        batches = Batches(data, parts)
    common.show_views(run, data, crops(args), lambda views: augment(views, args))

    # -- model
    net = build(args)
    args.classifies = common.load_weights(net, args, mean=MEAN)  # from --init or --eval, if given
    for other in net.others.values() if not args.classifies else ():  # only a backbone was loaded
        other.backbone.load_state_dict(net.backbone.state_dict())
    theirs = made.get("names")  # none if its images had no labels
    same = theirs == args.names if theirs else len(args.names) == args.classes
    if args.eval and args.names and not same:
        print("the file was trained on other classes than these: no accuracies")
        args.classifies = False
    net = run.place(net)  # on the device; batch norm spans all GPUs
    model, aug = run.parallel(net), run.compiled(augment)

    # -- optimiser
    optimizer = torch.optim.AdamW(
        net.parameters(), peak, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "optimizer": optimizer, "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net)  # puts back batch norm's statistics after a skipped step
    run.chance = {"loss": math.log(2 if args.task == "bags" else args.classes)}
    _, *others = NETWORKS[args.task]

    for epoch in run.epochs(data):
        for step, views in run.batches(batches, epoch, crops(args)):
            # -- step
            lr = lr_at(step, steps, warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x, mask = inputs(aug(views, args), batches.index)  # a batch for each network
            with run.autocast():
                _, *s = model(*x, mask=mask)  # s (n, C) of each network
            terms, figures = losses([each.float() for each in s], batches.index, step)
            loss = sum(terms)  # the networks share no weights: each gets only its own gradient
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            undo(unless=ok)
            run.log(ok, **dict(zip(["loss", *others], terms)), **figures, lr=lr)
        # -- log and save
        if run.end_epoch(state):  # every --eval-every epochs
            evaluate(net, data, args, run)
        run.save(state)  # at most once a minute; after a signal the program ends here
    return net, data


# ==================================================================================================
# Evaluation
# ==================================================================================================


def auc(s, y, mask):
    """The share in % of pairs of a true and a false y in one row that s puts in the right order.
    Entries where mask is false are ignored. s, y, mask: (rows, k)."""
    pairs = (y & mask).unsqueeze(2) & (~y & mask).unsqueeze(1)  # (rows, k, k)
    return 100 * (s.unsqueeze(2) > s.unsqueeze(1))[pairs].cpu().double().mean().item()


def scores(net, part, args, run):
    """The accuracy in % of every network on part = (images, index); for bags the AUC in % of bags,
    and that of the images within positive bags, by attention or logit."""
    nets = [net, *net.others.values()]
    *hs, y = common.embed(
        lambda views: [each.backbone(*views) for each in nets],
        part,
        [common.Crop(args.image_size, 1.0)],
        run)
    rows = cut_bags(torch.arange(len(y)), args.bag_size, args.seed)
    mask = (rows >= 0).to(y.device)
    found = (y[rows] == args.positive) & mask
    has = found.any(1)
    results = {}
    for name, each, h in zip(NETWORKS[args.task], nets, hs):
        if args.task == "bags":
            s = each.head(h[rows][mask], mask)
            results[f"{name}_auc"] = auc(s[:, :1].T, has[None], mask.any(1)[None])
            results[f"{name}_image_auc"] = auc(s[has, 1:], found[has], mask[has])
        else:
            correct = each.head(h).argmax(1) == y
            results[f"{name}_accuracy"] = 100 * correct.cpu().double().mean().item()
    return results


def answer(net, x, args):
    """x (n, 3, S, S) -> h (n, d) and, of a trained classifier, p (n, C) of the classes."""
    h = net.backbone(x)
    if args.task == "bags" or (args.eval and args.random_head):
        return [h]
    return [h, net.head(h).softmax(1)]


def evaluate(net, data, args, run, test=False):
    """Is h healthy, and how well do the networks classify, the method's next to floor and ceiling?

    On validation images; with test on the test images. With wrong labels the last network need not
    be the best: for noisy, best_val_ is the best accuracy of any evaluation on validation images.
    """
    net.eval()
    run.broadcast(net)
    views = (crops(args) * 2)[:2]
    h1, h2, _ = common.embed(
        lambda views: map(net.backbone, augment(views, args)),
        data.val,
        views,
        run,
        limit=1024)
    results = common.health(h1, h1, h2, name="h", least=0.02)
    if data.labelled and (args.classifies or not args.eval):  # not by random heads
        kind = "test" if test else "validation"
        part = data.test if test else data.val
        found = scores(net, part, args, run)
        if args.task == "noisy" and test:
            for k in [*found]:
                best = [row[k] for row in run.rows if k in row]
                if best:
                    found[f"best_val_{k}"] = max(best)
        *_, floor, ceiling = NETWORKS[args.task]
        made = common.recall(args)  # {} without --eval
        if args.task == "labeling" and args.eval and not made.get("names"):
            del found["truth_accuracy"]  # it was not known when the networks were trained
            ceiling = "none"
        print(f"\n{len(part[1]):,} {kind} images, %; floor: {floor}, ceiling: {ceiling}")
        for k, v in found.items():
            print(f"  {k.replace('_', ' '):30} {v:6.1f}")
        results |= found
    if test:
        crop = [common.Crop(args.image_size, 1.0)]
        common.export(lambda x: answer(net, *x, args), data, crop, run, ["h", "p"])  # with --embed
    net.train()
    return run.report(results, test)


def loading(args):
    """Python that rebuilds the backbone with torchvision alone; printed at the end of a run."""
    return ("import torch, torchvision\nfrom torch import nn\n\n"
            f"{ENCODER}\nnet = encoder({args.arch!r}, {args.stem!r})")


def main(argv=None):
    args = common.options("weak", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()
