"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations
Chen, Kornblith, Norouzi, Hinton, ICML 2020, https://arxiv.org/abs/2002.05709
Slides: "Contrastive Learning: Simple Framework for Contrastive Learning (SimCLR)".

Two random views of one image should get similar embeddings; views of different images should not.
An encoder f and a small head g embed both views of every image in a batch, and each view has to
pick out its partner among the other 2N - 1. After training g is discarded and h = f(x) is kept.

Algorithm 1 of the paper, for a batch of N images:
    x1, x2 = t(x), t'(x)           two random augmentations              crops, augment
    h = f([x1, x2])                representations of the 2N views       SimCLR.forward
    z = g(h)                       projections                           SimCLR.forward
    s_ij = sim(z_i, z_j) / tau     similarities of all pairs             nt_xent
    L = mean_i -log( exp(s_ij) / sum_{k != i} exp(s_ik) )                nt_xent, j the partner of i
    update f and g                 SGD, or LARS for large batches        train, LARS, lr_at

Symbols: x1, x2 (N, 3, S, S) in [0, 1]; h (2N, d); z (2N, D), with halves z1 and z2; s (2N, 2N).
The paper numbers the two views of image k as 2k - 1 and 2k; here they are k and k + N.

Where this file departs from the paper and the released code (the code since SimCLR v2; as first
released, g had two layers, brightness was added, and weight decay was the paper's):
  - Crops are resized bilinearly, with antialiasing (released code: bicubic, without). Areas are
    drawn uniformly from 0.08 up, as in the paper, and aspects log-uniformly; if ten boxes do not
    fit, a central one is taken (released code: heights are uniform, so crops are smaller, though
    areas start at 0.1; aspects are uniform; the whole image if a hundred do not fit).
  - The colour jitter is that of the paper's PyTorch code: brightness is a factor (its TensorFlow
    code: added), contrast is scaled around the mean grey (around each channel's mean), saturation
    is a blend with grey (a factor in HSV), and the order is random (fixed). Every image has its
    own blur deviation, and edges are reflected (released code: one per batch, zeros).
  - g has two layers, as in the paper, batch norm after the first only, a bias in the second (paper:
    none) and PyTorch's initialisation (released code: three layers by default, batch norm after
    each, normal with deviation 0.01). A residual block's last batch norm starts with a scale of one
    (released code: zero), and convolutions start as in torchvision (released code: by fan-in).
  - LARS multiplies by the learning rate after the momentum (released code: before). The two are
    the same while the rate is constant. SGD decays all parameters and has no Nesterov momentum
    (released code: batch norm is not decayed, and Nesterov is on).
  - Weight decay of larger images is the paper's 1e-6 (released code: 1e-4).
  - Warm-up is a share of the run, and its rate starts above 0 (released code: at 0).
  - The loss is the mean over the 2N anchors, as in the paper (released code: twice that).
  - Small images use SGD, temperature 0.2 and 200 epochs (released command for CIFAR-10: LARS, 0.5,
    1,000). The 0.2 is from solo-learn's SimCLR, the rate and weight decay from its MoCo v2+, both
    for CIFAR-10. The recipe for a CPU uses temperature 0.1, chosen on validation images.
  - The linear probe is fitted by L-BFGS, with an L2 penalty, on standardised features of central
    crops (paper: by SGD on random crops).
  - On a GPU the networks run in half precision (with --amp off in float32).

    python simclr.py    34 s on 2 CPU cores; mean of three seeds: 99.0 % linear, 96.1 % k-NN; the
                        untrained network has 30.4 and 29.7 %, raw pixels have 27.0 and 38.2 %
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import FLAG, FROM_1, FROM_2, PIXELS, POSITIVE, SHARE, one_of

# ==================================================================================================
# Options
# ==================================================================================================

NETS = one_of(["convnet", "convnet_wide", "resnet18", "resnet34", "resnet50"])


def rate(args, n):
    """Default --lr for larger images: 0.3 for SGD; for LARS 0.075 sqrt(N) after the factor N / 256,
    better than a linear rate if N is small and epochs are few (paper, Appendix B.1)."""
    return 19.2 / math.sqrt(args.batch_size) if args.optimizer == "lars" else 0.3


# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones
# (the paper's ImageNet setting, except for N and, with it, the rate). Functions are called with
# (args, number of images). common.py adds --dataset, --seed, --amp and so on.
OPTIONS = {  # fmt: skip
    # option         built-in    to 64 px    larger      allowed            meaning
    "arch":         ("convnet",  "resnet18", "resnet50", NETS,              "encoder f"),
    "stem":         ("7x7",      "3x3",      "7x7",      "3x3|7x7",         "3x3: no max-pool"),
    "head":         ("mlp",      "mlp",      "mlp",      "none|linear|mlp", "projection head g"),
    "dim":          (128,        128,        128,        FROM_1,            "D, width of z"),
    "temperature":  (0.2,        0.2,        0.1,        POSITIVE,          "tau"),
    "image_size":   (32,         64,         224,        PIXELS,            "S, side of a view"),
    "min_scale":    (0.5,        0.08,       0.08,       SHARE,             "least area of a crop"),
    "strength":     (0.5,        0.5,        1.0,        SHARE,             "strength of jitter"),
    "blur":         (0.0,        0.0,        0.5,        SHARE,             "probability"),
    "no_color":     (False,      False,      False,      FLAG,              "no jitter, no grey"),
    "no_crop":      (False,      False,      False,      FLAG,              "no random crops"),
    "epochs":       (12,         200,        100,        FROM_1,            "passes over the set"),
    "batch_size":   (64,         512,        256,        FROM_2,            "N (paper: 4096)"),
    "optimizer":    ("sgd",      "sgd",      "lars",     "sgd|lars",        "(paper: lars)"),
    "lr":           (0.2,        0.3,        rate,       POSITIVE,          "peak, times N / 256"),
    "weight_decay": (1e-4,       1e-4,       1e-6,       SHARE,             "L2 penalty"),
    "warmup":       (0.1,        0.1,        0.1,        SHARE,             "share of the steps"),
}
# Without a GPU, images up to 64 pixels use the first column, except for:
CPU = {"arch": "convnet_wide", "temperature": 0.1, "min_scale": 0.2,
       "epochs": common.passes(1.2e6), "batch_size": 256, "lr": 0.4}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """Random crops, two of every image (paper, Appendix A)."""
    if args.no_crop:
        return [common.Crop(args.image_size, scale=1.0, count=2)]  # the central square
    return [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3), count=2)]


def augment(views, args):
    """Flip, colour jitter, grey, blur (paper, Appendix A), drawn separately for every image.

    views: list of (N, 3, S, S) in [0, 1] -> the same.
    """
    s, augmented = args.strength, []
    for x in views:
        x = common.flip(x, p=0.5)
        if not args.no_color:
            x = common.color_jitter(x, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
            x = common.grey(x, p=0.2)
        if args.blur:
            taps = args.image_size // 20 * 2 + 1  # odd, a tenth of the image
            x = common.blur(x, sigma=(0.1, 2.0), taps=taps, p=args.blur)
        augmented.append(x)
    return augmented


# ==================================================================================================
# Model
# ==================================================================================================

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # for backbone.pt: RGB in [0, 1], not normalised


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


class SimCLR(nn.Module):
    """f and g: x (N, 3, S, S) -> h (N, d), z (N, D)."""

    def __init__(self, arch="resnet50", stem="7x7", head="mlp", dim=128):
        super().__init__()
        self.backbone = encoder(arch, stem)
        d = self.backbone.dim
        if head == "mlp":
            self.head = nn.Sequential(
                nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, dim))
        else:
            self.head = nn.Linear(d, dim) if head == "linear" else nn.Identity()

    def forward(self, x):
        h = self.backbone(x.contiguous(memory_format=torch.channels_last))
        return h, self.head(h)


def build(args):
    """The untrained network, determined by args.seed."""
    torch.manual_seed(args.seed)
    return SimCLR(args.arch, args.stem, args.head, args.dim)


# ==================================================================================================
# Loss
# ==================================================================================================


def nt_xent(z1, z2, tau):
    """NT-Xent (paper, equation 1; slide "How does SimCLR work?"): the mean over all 2N anchors i of

        l_ij = -log( exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )

    z1, z2: (N, D), row n of both from image n -> scalar. Equal embeddings give ln(2N - 1).
    Test: test_nt_xent_equation.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D), so that sim is the dot product
    s = z @ z.T / tau  # (2N, 2N)
    s.fill_diagonal_(-math.inf)  # k != i
    j = torch.arange(len(s), device=s.device).roll(len(z1))  # (2N,) partner of i: i + N or i - N
    return F.cross_entropy(s, j)  # mean of -s_ij + log sum_k exp(s_ik)


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================

# SimCLR has none of these: the negatives are the other images of the batch.

# ==================================================================================================
# Training
# ==================================================================================================


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017), with r as in SimCLR's released code.

        r = eta |w| / |g + wd w|,   v <- mu v + r (g + wd w),   w <- w - lr v   for each tensor w

    Where w or g + wd w is 0, r is 1. Biases and batch norm (one dimension): v <- mu v + g.
    Test: test_lars_equation.
    """

    def __init__(self, params, lr, momentum, weight_decay, eta=0.001):
        super().__init__(params, lr, momentum, fused=True)
        self.decay, self.eta = weight_decay, eta

    @torch.no_grad()
    def step(self):
        w = [p for group in self.param_groups for p in group["params"] if p.ndim > 1]
        g = [p.grad for p in w]
        torch._foreach_add_(g, w, alpha=self.decay)  # g + wd w
        w_norm = torch.stack(torch._foreach_norm(w))
        g_norm = torch.stack(torch._foreach_norm(g))
        r = torch.where(w_norm * g_norm > 0, self.eta * w_norm / g_norm, 1.0)
        torch._foreach_mul_(g, list(r))
        super().step()


def lr_at(step, steps, warmup, peak):
    """Linear warm-up, (step + 1) / warmup of peak, then half a cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def check(args):
    """Warn of options that are known to work badly, before hours are spent on them."""
    if args.batch_size < 64 and not args.eval:
        print("warning: a batch of fewer than 64 images has few negatives, raise --batch-size")


def train(args, run):
    """-> the trained network (with --eval: the loaded one) and the data."""
    data = common.load_data(args, OPTIONS, run, CPU)
    N, steps = args.batch_size, args.epochs * data.per_epoch
    warmup, peak = round(args.warmup * steps), args.lr * N / 256
    if not args.eval:
        print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {N} / 256")
    check(args)
    common.show_views(run, data, crops(args), lambda views: augment(views, args))

    # -- model
    net = build(args)
    common.load_weights(net, args, mean=MEAN)  # from --init or --eval, if given
    net = run.place(net)  # on the device; batch norm spans all GPUs
    model, aug = run.parallel(net), run.compiled(augment)

    # -- optimiser
    rule = LARS if args.optimizer == "lars" else functools.partial(torch.optim.SGD, fused=True)
    optimizer = rule(net.parameters(), peak, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "optimizer": optimizer, "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net)  # puts back batch norm's statistics after a skipped step
    run.chance = {"loss": math.log(2 * N - 1)}  # with equal embeddings; for the log

    for epoch in run.epochs(data):
        for step, views in run.batches(data, epoch, crops(args)):
            # -- step
            lr = lr_at(step, steps, warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x1, x2 = aug(views, args)  # (n, 3, S, S) each, n images of this process
            with run.autocast():
                _, z = model(torch.cat([x1, x2]))  # (2n, D)
            z1, z2 = z.float().chunk(2)  # (n, D) each
            loss = nt_xent(run.gather(z1), run.gather(z2), args.temperature)  # over all GPUs
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            undo(unless=ok)
            run.log(ok, loss=loss, lr=lr)
        # -- log and save
        if run.end_epoch(state):  # every --eval-every epochs
            evaluate(net, data, args, run)
        run.save(state)  # at most once a minute; after a signal the program ends here
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
    baselines: h of the untrained network, and raw pixels.
    """
    net.eval()
    run.broadcast(net)

    def two_views(views):  # augmented as in training
        (h, z1), (_, z2) = map(net, augment(views, args))
        return h, z1, z2

    results = common.health(*common.embed(two_views, data.val, crops(args), run, limit=1024))
    view, small = central(args.image_size), central(min(args.image_size, 32))
    if data.labelled:
        splits = data.splits(test)
        results |= accuracies(lambda x: net(*x), ["", "head_"], view, splits, run)
    if data.labelled and test:
        floor = build(args).to(run.device).eval()
        results |= accuracies(lambda x: floor(*x)[:1], ["untrained_"], view, splits, run)
        results |= accuracies(lambda x: [x[0].flatten(1)], ["pixels_"], small, splits, run, 10_000)
    if test:
        common.export(lambda x: net(*x)[:1], data, view, run)  # with --embed
    net.train()
    return run.report(results, test)


def loading(args):
    """Python that rebuilds the backbone with torchvision alone; printed at the end of a run."""
    return ("import torch, torchvision\nfrom torch import nn\n\n"
            f"{ENCODER}\nnet = encoder({args.arch!r}, {args.stem!r})")


def main(argv=None):
    args = common.options("simclr", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()
