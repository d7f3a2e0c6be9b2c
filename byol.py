"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning
Grill, Strub, Altche, Tallec, Richemond et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733
(sections and appendices are cited as numbered there).
Slides: "Contrastive Learning: Bootstrap Your Own Latent (BYOL)", "How does BYOL work?".

From one view of an image, an online network predicts what a target network makes of another view.
The target is a slow moving average of the online network and gets no gradient. There are no
negatives: one vector for all images would be a perfect solution, yet training does not find it.

One step (paper, Section 3.1, and Algorithm 1 in Appendix A), for a batch of N images:
    x1, x2 = t(x), t'(x)           two random augmentations              crops, augment
    h, z, p = f(x), g(h), q(z)     online network, both views            BYOL.forward
    z' = g'(f'(x))                 target network, both views            BYOL.forward
    L = mean ( |p1/|p1| - z2'/|z2'||^2 + |p2/|p2| - z1'/|z1'||^2 ) / 2   byol_loss
    update f, g and q              LARS, no gradient to f' and g'        train, LARS, lr_at
    xi = m xi + (1 - m) theta      the target follows, m rises to 1      ema_update, m_at

Symbols: x1, x2 (N, 3, S, S) in [0, 1]; h (2N, d) representations, the paper's y; z, p (2N, D)
projections and predictions, with halves z1, z2 and p1, p2; theta, xi parameters of the online and
the target network; m momentum, the paper's tau. net is the online network, which is kept; net_ema
is the target.

Where this file departs from the paper and the released code:
  - The loss is the mean of both directions (paper: their sum), so that chance is 2 as for one
    direction. With LARS the factor hardly matters, except for biases and batch norm.
  - The target starts as a copy, as on the slides (released code: another random draw).
  - m is smaller in short runs (m_start); in recipes for a CPU it is 0.9 and q has ten times the
    learning rate of the rest (Appendix I: if q learns faster, even m = 0 works).
  - A crop that does not fit is drawn again, as in torchvision (released code: cut off at the edge
    of the image, so crops are larger, and in long images some aspects are beyond 3/4 to 4/3).
  - Brightness is scaled (released code: shifted), contrast is scaled around the mean grey (around
    each channel's mean), saturation is a blend with grey (a factor in HSV), and crops are resized
    bilinearly with antialiasing (bicubic) and blurred with reflected edges (zero padding).
  - Initial weights and padding are PyTorch's (released code: Haiku's). The scale of a residual
    block's last batch norm starts at one, as in the paper (released code: at zero in a ResNet-50).
    No linear classifier is trained on the side (released code: one on h, without gradient to h).
  - SGD, unlike LARS, decays biases and batch norm as well.
  - Warm-up is a share of the run, and its rate starts above 0 (released code: at 0).
  - Larger images follow the released code's preset for 100 epochs with a batch for one GPU, 256
    (there: 4096 with the same m, so that, counted in images, its target is 16 times as slow). Its
    presets for longer runs: 300 epochs, lr 0.3; 1000, lr 0.2, weight decay 1.5e-6, m 0.996.
  - Images up to 64 pixels are trained by SGD without blur, as in lightly's CIFAR-10 benchmark of
    2022 (which has no warm-up and no solarization, and m stays 0.99).
  - The linear probe is fitted by L-BFGS, with an L2 penalty, on standardised features of central
    crops (paper: by SGD on random crops).
  - On a GPU the networks run in half precision (with --amp off in float32).
  - The built-in set has a recipe of its own, sized for a CPU.

    python byol.py      75 s on 2 CPU cores; mean of three seeds: 93.2 % linear, 76.7 % k-NN; the
                        untrained network has 38.2 and 31.3 %, raw pixels have 27.0 and 38.2 %
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
TWO_SHARES = SHARE | {"nargs": 2}


def m_start(args, n):
    """Initial m for n images: the half-life is a twentieth of the steps, with m at least 0.9 and at
    most 0.99, the released code's for 100 and 300 epochs (paper: 0.996 for 1000)."""
    return min(0.99, max(0.9, 0.5 ** (20 * args.batch_size / (args.epochs * n))))


# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones.
# Functions are called with (args, number of images). common.py adds --dataset, --seed and so on.
OPTIONS = {  # fmt: skip
    # option               built-in    to 64 px    larger      allowed     meaning
    "arch":               ("convnet",  "resnet18", "resnet50", NETS,          "encoder f"),
    "stem":               ("7x7",      "3x3",      "7x7",      "3x3|7x7",  "3x3: no max-pool"),
    "hidden":             (512,        1024,       4096,       FROM_1,     "width in g and q"),
    "dim":                (128,        256,        256,        FROM_1,     "D, width of z, p"),
    "no_predictor":       (False,      False,      False,      FLAG,       "q is the identity"),
    "no_stop_gradient":   (False,      False,      False,      FLAG,       "target = online net"),
    "predictor_lr_scale": (10.0,       1.0,        1.0,        POSITIVE,   "lr of q over lr"),
    "image_size":         (32,         64,         224,        PIXELS,     "S, side of a view"),
    "min_scale":          (0.5,        0.08,       0.08,       SHARE,      "least area of a crop"),
    "blur":               ((0.0, 0.0), (0.0, 0.0), (1.0, 0.1), TWO_SHARES, "probability in x1, x2"),
    "solarize":           (0.0,        0.2,        0.2,        SHARE,      "probability in x2"),
    "epochs":             (24,         200,        100,        FROM_1,     "(paper: 300, 1000)"),
    "batch_size":         (64,         512,        256,        FROM_2,     "N (paper: 4096)"),
    "optimizer":          ("sgd",      "sgd",      "lars",     "sgd|lars", "(paper: lars)"),
    "lr":                 (0.4,        0.12,       0.45,       POSITIVE,   "peak, times N / 256"),
    "weight_decay":       (1e-4,       5e-4,       1e-6,       SHARE,      "L2 penalty"),
    "warmup":             (0.1,        0.1,        0.1,        SHARE,      "share of the steps"),
    "m":                  (0.9,        m_start,    m_start,    SHARE,      "rises to 1; 0 stays 0"),
}
# Without a GPU, images up to 64 pixels use the first column, except for:
CPU = {"arch": "convnet_wide", "min_scale": 0.2, "epochs": common.passes(8e5), "batch_size": 128}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """Random crops, two of every image (paper, Appendix B)."""
    return [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3), count=2)]


def augment(views, args):
    """Flip, colour jitter, grey, blur, solarization (paper, Appendix B and Table 6), drawn
    separately for every image. Blur and solarization differ between the two views.

    views: list of x1 and x2 (N, 3, S, S) in [0, 1] -> the same.
    """
    augmented = []
    for x, blur, solarize in zip(views, args.blur, (0.0, args.solarize)):
        x = common.flip(x, p=0.5)
        x = common.color_jitter(x, 0.4, 0.4, 0.2, 0.1, p=0.8)
        x = common.grey(x, p=0.2)
        if blur:
            taps = args.image_size // 20 * 2 + 1  # odd, a tenth of the image
            x = common.blur(x, sigma=(0.1, 2.0), taps=taps, p=blur)
        augmented.append(common.solarize(x, p=solarize))
    return augmented


# ==================================================================================================
# Model
# ==================================================================================================

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for the input


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


def mlp(inputs, hidden, outputs):
    """g or q: the last layer has no batch norm (paper, Section 3.3) and no bias (released code)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, outputs, bias=False))


class BYOL(nn.Module):
    """f, g and q: V views (N, 3, S, S) in [0, 1] -> h (V N, d), z (V N, D), p (V N, D).

    Batch norm sees one view at a time. The target has a q as well, which is not used.
    """

    def __init__(self, arch="resnet50", stem="7x7", hidden=4096, dim=256, predictor=True):
        super().__init__()
        self.backbone = encoder(arch, stem)
        self.projector = mlp(self.backbone.dim, hidden, dim)
        self.predictor = mlp(dim, hidden, dim) if predictor else nn.Identity()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, *views):
        h = [self.encode(x) for x in views]
        z = [self.projector(y) for y in h]
        p = [self.predictor(y) for y in z]
        return torch.cat(h), torch.cat(z), torch.cat(p)

    def encode(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.backbone((x - self.mean) / self.std)


def build(args):
    """The untrained network, determined by args.seed."""
    torch.manual_seed(args.seed)
    return BYOL(args.arch, args.stem, args.hidden, args.dim, not args.no_predictor)


# ==================================================================================================
# Loss
# ==================================================================================================


def byol_loss(p, z, stop_gradient=True):
    """Squared error of unit vectors (paper, equation 2; slide "How does BYOL work?"), the mean over
    N images of

        L = | p / |p| - z / |z| |^2 = 2 - 2 (p . z) / (|p| |z|)

    p, z: (N, D), row n of both from image n -> scalar. No gradient to z, unless stop_gradient is
    False. Orthogonal vectors give 2, equal ones 0. Test: test_byol_loss_equation.
    """
    z = z.detach() if stop_gradient else z
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================


@torch.no_grad()
def ema_update(net_ema, net, m):
    """xi <- m xi + (1 - m) theta (paper, equation 1), for the parameters alone:
    batch norm in the target keeps statistics of its own.

    m: a float or a 0-dim tensor. Test: test_ema_update.
    """
    ema, new = list(net_ema.parameters()), list(net.parameters())
    weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)
    torch._foreach_lerp_(ema, new, [weight] * len(new))  # ema + (1 - m) (new - ema)


def m_at(step, steps, m):
    """From m at step 0 to 1 at step = steps by half a cosine (paper, Section 3.3); 0 stays 0.
    Test: test_m_at."""
    if m == 0:
        return 0.0
    return 1 - (1 - m) * (math.cos(math.pi * step / steps) + 1) / 2


# ==================================================================================================
# Training
# ==================================================================================================


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017). Test: test_lars_equation.

        v <- mu v + eta |w| / |g + wd w| (g + wd w),   w <- w - lr v      for each tensor w

    Biases and normalisation (one dimension): v <- mu v + g.
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


def check(args, per_epoch):
    """Warn of options that are known to work badly, before hours are spent on them."""
    if args.eval:
        return
    half_life = math.log(0.5) / math.log(min(max(args.m, 1e-9), 1 - 1e-9)) / per_epoch
    print(f"half-life of the target: {half_life:.2g} epochs at first")
    if args.batch_size < 32:
        print("warning: fewer than 32 images are too few for batch norm, raise --batch-size")
    if half_life > args.epochs / 10 and not args.no_stop_gradient:
        print("warning: the target's half-life is over a tenth of the run, lower --m")


def train(args, run):
    """-> the trained online network and the data."""
    data = common.load_data(args, OPTIONS, run, CPU)
    N, steps = args.batch_size, args.epochs * data.per_epoch
    warmup, peak = round(args.warmup * steps), args.lr * N / 256
    if not args.eval:
        print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {N} / 256")
    check(args, data.per_epoch)
    common.show_views(run, data, crops(args), lambda views: augment(views, args))

    # -- model: net is the online network, which is evaluated and kept; net_ema is the target
    net, net_ema = build(args), build(args)
    common.load_weights(net, args, mean=MEAN)  # from --init or --eval, if given
    net_ema.load_state_dict(net.state_dict())
    net, net_ema = run.place(net), run.place(net_ema)  # batch norm spans all GPUs
    net_ema.requires_grad_(False)  # stop-gradient: the target is only a moving average
    online, target, aug = run.parallel(net), run.compiled(net_ema), run.compiled(augment)

    # -- optimiser
    of_f_g = [*net.backbone.parameters(), *net.projector.parameters()]
    groups = [{"params": of_f_g, "scale": 1.0},
              {"params": net.predictor.parameters(), "scale": args.predictor_lr_scale}]
    rule = LARS if args.optimizer == "lars" else functools.partial(torch.optim.SGD, fused=True)
    optimizer = rule(groups, peak, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "net_ema": net_ema, "optimizer": optimizer, "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net, net_ema)  # puts back batch norm's statistics after a skipped step
    run.chance = {"loss": 2.0}  # when nothing is learned, p and z are orthogonal
    stop_gradient = not args.no_stop_gradient

    for epoch in run.epochs(data):
        for step, views in run.batches(data, epoch, crops(args)):
            # -- step
            lr = lr_at(step, steps, warmup, peak)
            m = m_at(step, steps, args.m)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            x1, x2 = aug(views, args)  # (N, 3, S, S) each
            with run.autocast():
                _, z, p = online(x1, x2)  # (2N, D) each
                if stop_gradient:  # else the online network is its own target
                    _, z, _ = target(x1, x2)  # (2N, D)
            p1, p2 = p.float().chunk(2)  # predictions, (N, D) each
            z1, z2 = z.float().chunk(2)  # their targets, (N, D) each
            loss = (byol_loss(p1, z2, stop_gradient)
                    + byol_loss(p2, z1, stop_gradient)) / 2
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            ema_update(net_ema, net, torch.where(ok, m, 1.0))  # EMA: xi = m xi + (1 - m) theta
            undo(unless=ok)
            run.log(ok, loss=loss, lr=lr, m=m)
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
        (h, z1, _), (_, z2, _) = map(net, augment(views, args))
        return h, z1, z2

    results = common.health(*common.embed(two_views, data.val, crops(args), run, limit=1024))
    view, small = central(args.image_size), central(min(args.image_size, 32))
    if data.labelled:
        splits = data.splits(test)
        results |= accuracies(lambda x: net(*x)[:2], ["", "head_"], view, splits, run)
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
    args = common.options("byol", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()
