"""DINO: Emerging Properties in Self-Supervised Vision Transformers
Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, 2021, https://arxiv.org/abs/2104.14294
Slides: "Contrastive Learning: Distillation with No Labels (DINO)", "How does DINO work?".

A student network has to predict, from any crop of an image, what a teacher network makes of
another, global crop: a distribution over K classes that nobody defined. The teacher is a slow
moving average of the student. Centring its outputs keeps one class from winning for every image,
and sharpening them keeps all classes from being equally likely.

Algorithm 1 of the paper with multi-crop, for a batch of N images:
    x1, x2, ... = augment(x)        2 global and L smaller local views      crops, augment
    s = g_s(x1, x2, ...)            student, all views                      DINO.forward
    t = g_t(x1, x2)                 teacher, the global views only          DINO.forward
    loss = mean of H(t_i, s_j)      over all pairs of different views       dino_loss
        H(t, s) = -sum softmax((t - C) / tau_t) log softmax(s / tau_s)      (H, inside dino_loss)
    update g_s                      AdamW, gradients clipped                train, clip_each
    g_t = m g_t + (1 - m) g_s       m rises to 1                            ema_update, cosine
    C = m_C C + (1 - m_C) mean(t)   after the loss                          update_center

Symbols: x_i (N, 3, S, S) views in [0, 1]; h (V N, d) class tokens of V views; z (V N, 256) unit
vectors before the last layer; s, t (N, K) raw outputs of student and teacher for a view; C (1, K)
centre; tau_s, tau_t temperatures; m, m_C momenta (slide: l, m). net is g_s, net_ema is g_t, the one
that is kept. In a ViT: P side of a patch, T patches per view, width D = d.

Where this file departs from the paper and the released code:
  - tau_t is set every step (released code: every epoch). Warm-ups are shares of the run (released
    code: 10 epochs for the rate and, in the longer runs, 30 for tau_t), and the rate starts above 0
    and ends at 0 (released code: 0 and 1e-6). m starts lower on short runs.
  - Crops are resized bilinearly, with antialiasing (released code: bicubic). The blur kernel is
    a tenth of the view wide (released code: Pillow's three box blurs, not cut off).
  - Small images are not blurred. ViTs narrower than 384 (vit_tiny, too) start with sinusoidal
    positions, and the linear layers of their blocks by Xavier's rule (start_with_sines).
  - The recipe for the built-in set is sized for a CPU: a small ViT that begins with convolutions
    (Xiao et al. 2021), batch norm in the head (an option of the released code), few classes K, a
    colder teacher, and, because short runs learn more that way, a faster centre, a constant m, and
    no local views (benchmarks/LOG.md).
  - The linear probe is fitted by L-BFGS, with an L2 penalty, on standardised class tokens of
    central crops (paper, Appendix F.2, and released code: by SGD, on random crops and on the class
    tokens of a ViT-S's last four blocks).
  - The last column of OPTIONS follows the released command for a ViT-S and 100 epochs, with half
    its batch (its help then advises an m of 0.9995, here 0.996), except for tau_t, which is the
    paper's (there: 0.04 throughout), and norm_last_layer (there: true). The released command for
    300 epochs sets both as here. That for a ResNet-50 is --optimizer sgd --lr 0.03 --weight-decay
    1e-4 --weight-decay-end 1e-4 --global-scale 0.14 --tau-t 0.04 --norm-last-layer.

    python dino.py      83 s on 2 CPU cores; mean of three seeds: 92.8 % linear, 82.5 % k-NN; the
                        untrained network has 32.1 and 20.9 %, raw pixels have 27.0 and 38.2 %
"""

import functools
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import FLAG, FROM_0, FROM_1, FROM_2, PIXELS, POSITIVE, SHARE, SWITCH, number, one_of

# ==================================================================================================
# Options
# ==================================================================================================

VITS = {  # width, depth, heads
    "vit_conv": (96, 2, 3),  # after a stem of convolutions
    "vit_nano": (128, 3, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}
NETS, DROP = one_of([*VITS, "resnet18", "resnet50"]), number(float, 0, 0.99)
NO_BLUR, BLUR = (0.0, 0.0, 0.0), (1.0, 0.1, 0.5)  # probabilities in x1, x2 and local views
SHARES = SHARE | {"nargs": 3}


def momentum(args, n):
    """Initial m: 0.996 (paper), or a half-life of steps / 20 in short runs, but at least 0.9."""
    return min(0.996, max(0.9, 0.5 ** (20 * args.batch_size / (args.epochs * n))))


def constant(args, n):
    """m at the end: as at the start, because an m that rises to 1 makes a short run learn less."""
    return args.m


def local_side(args, n):
    """Side of a local view: 96 pixels if a global one has 224, rounded to whole patches."""
    return args.patch_size * max(1, round(args.image_size * 3 / 7 / args.patch_size))


# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones.
# Functions are called with (args, number of images). common.py adds --dataset, --seed and so on.
OPTIONS = {  # fmt: skip
    # option              built-in    to 64 px    larger       allowed     meaning
    "arch":              ("vit_conv", "vit_tiny", "vit_small", NETS,       "backbone"),
    "stem":              ("7x7",      "3x3",      "7x7",       "3x3|7x7",  "3x3: no max-pool"),
    "patch_size":        (8,          4,          16,          FROM_1,     "P, side in pixels"),
    "drop_path":         (0.0,        0.1,        0.1,         DROP,       "stochastic depth"),
    "out_dim":           (128,        4096,       65536,       FROM_2,     "K, classes"),
    "hidden":            (512,        2048,       2048,        FROM_1,     "width of the head"),
    "head_bn":           (True,       False,      False,       SWITCH,     "batch norm in head"),
    "norm_last_layer":   (False,      False,      False,       FLAG,       "weight_g stays 1"),
    "tau_s":             (0.1,        0.1,        0.1,         POSITIVE,   "student temperature"),
    "tau_t":             (0.02,       0.07,       0.07,        POSITIVE,   "teacher temperature"),
    "tau_t_warmup":      (0.3,        0.3,        0.3,         SHARE,      "rise from 0.04: share"),
    "center_m":          (0.5,        0.9,        0.9,         SHARE,      "m_C, of the centre"),
    "no_centering":      (False,      False,      False,       FLAG,       "C stays 0"),
    "no_sharpening":     (False,      False,      False,       FLAG,       "tau_t is 1"),
    "image_size":        (32,         32,         224,         PIXELS,     "side of global view"),
    "local_size":        (16,         16,         local_side,  PIXELS,     "side of local view"),
    "local_crops":       (0,          6,          8,           FROM_0,     "L, per image"),
    "global_scale":      (0.5,        0.4,        0.4,         SHARE,      "least area, global"),
    "local_scale":       (0.2,        0.1,        0.05,        SHARE,      "least area, local"),
    "blur":              (NO_BLUR,    NO_BLUR,    BLUR,        SHARES,     "p in x1, x2, local"),
    "solarize":          (0.0,        0.2,        0.2,         SHARE,      "probability in x2"),
    "epochs":            (16,         200,        100,         FROM_1,     "passes over the set"),
    "batch_size":        (64,         512,        256,         FROM_2,     "N (paper: 1024)"),
    "optimizer":         ("adamw",    "adamw",    "adamw",     "adamw|sgd",
                          "released ResNet-50: sgd, see the docstring"),
    "lr":                (6e-3,       5e-4,       5e-4,        POSITIVE,   "peak, times N / 256"),
    "warmup":            (0.1,        0.1,        0.1,         SHARE,      "share of steps"),
    "weight_decay":      (0.04,       0.04,       0.04,        SHARE,      "at the start"),
    "weight_decay_end":  (0.04,       0.4,        0.4,         SHARE,      "at the end"),
    "clip":              (3.0,        3.0,        3.0,         POSITIVE,   "max norm per tensor"),
    "freeze_last_layer": (1,          1,          1,           FROM_0,     "epochs at the start"),
    "m":                 (momentum,   momentum,   momentum,    SHARE,      "momentum at the start"),
    "m_end":             (constant,   1.0,        1.0,         SHARE,      "momentum at the end"),
    "branch":            ("teacher",  "teacher",  "teacher",   "teacher|student", "of --init"),
}
# Without a GPU, images up to 64 pixels use the first column, except for:
CPU = {"out_dim": 1024, "tau_t": 0.04, "local_size": local_side, "local_crops": 4,
       "epochs": common.passes(6e5), "batch_size": 128, "lr": 3e-3, "warmup": 0.2}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """Multi-crop: two global and L local crops of every image (paper, Section 3.1)."""
    ratio = (3 / 4, 4 / 3)
    s = args.global_scale
    views = [common.Crop(args.image_size, (s, 1.0), ratio, count=2)]
    if args.local_crops:
        views.append(common.Crop(args.local_size, (args.local_scale, s), ratio, args.local_crops))
    return views


def augment(views, args):
    """Flip, colour jitter, grey, blur, solarization as in BYOL, drawn separately for every image.

    views: list of (N, 3, S, S) in [0, 1], two global ones, then the local ones -> the same.
    """
    x1, x2, *local = views
    parts = [x1, x2]
    if local:
        parts.append(torch.cat(local))
    augmented = []
    for x, blur, solarize in zip(parts, args.blur, (0.0, args.solarize, 0.0)):
        x = common.flip(x, p=0.5)
        x = common.color_jitter(x, 0.4, 0.4, 0.2, 0.1, p=0.8)
        x = common.grey(x, p=0.2)
        if blur:
            taps = max(3, x.shape[-1] // 20 * 2 + 1)  # odd, a tenth of the view
            x = common.blur(x, sigma=(0.1, 2.0), taps=taps, p=blur)
        augmented += common.solarize(x, p=solarize).split(len(x1))
    return augmented


# ==================================================================================================
# Model
# ==================================================================================================

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for the input


class WeightNorm(nn.Module):
    """A linear layer without bias whose rows have length weight_g: (N, 256) -> (N, K)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1))
        self.weight_v = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach())

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class Head(nn.Module):
    """Projection head (DINO, Section 3.1): (N, d) -> z (N, 256) of length 1, s (N, K)."""

    def __init__(self, inputs, outputs, hidden=2048, batch_norm=False, bottleneck=256):
        super().__init__()
        layers = []
        for width in (inputs, hidden):
            layers.append(nn.Linear(width, hidden))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.mlp.apply(init_linear)
        self.last_layer = WeightNorm(bottleneck, outputs)

    def forward(self, x):
        z = F.normalize(self.mlp(x), dim=1)
        return z, self.last_layer(z)


class DINO(nn.Module):
    """Backbone and head: V views (N, 3, S, S) in [0, 1] -> h (V N, d), z (V N, 256), s (V N, K).

    Views of one size must be adjacent: they go through the backbone together.
    """

    def __init__(self, backbone, out_dim=65536, hidden=2048, head_bn=False):
        super().__init__()
        self.backbone, self.head = backbone, Head(backbone.dim, out_dim, hidden, head_bn)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, *views):
        h = []
        for size in dict.fromkeys(x.shape[-1] for x in views):
            x = torch.cat([view for view in views if view.shape[-1] == size])
            x = self.backbone((x - self.mean) / self.std)
            h.append(x[:, 0] if x.ndim == 3 else x)  # a ViT's class token
        h = torch.cat(h)
        return h, *self.head(h)


def build(args, drop_path=0.0):
    """The untrained network, determined by args.seed."""
    torch.manual_seed(args.seed)
    if args.arch in VITS:
        backbone = ViT(*VITS[args.arch], args.patch_size, args.image_size, drop_path)
        if backbone.dim < 384:
            start_with_sines(backbone)
        if args.arch == "vit_conv":
            backbone.patch_embed.proj = conv_stem(backbone.dim, args.patch_size)
    else:
        backbone = torchvision.models.get_model(args.arch)
        backbone.dim, backbone.fc = backbone.fc.in_features, nn.Identity()
        if args.stem == "3x3":
            backbone.conv1, backbone.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return DINO(backbone, args.out_dim, args.hidden, args.head_bn)


# ==================================================================================================
# Loss
# ==================================================================================================


def H(t, s, center, tau_s, tau_t):
    """Mean cross-entropy of teacher and student (H in slide Algorithm 1; paper, equation 2), with

        H(t, s) = -sum_k softmax((t - C) / tau_t)_k log softmax(s / tau_s)_k

    t, s: (N, K) raw outputs, center: (1, K) -> scalar. No gradient to t. For reading and tests
    only: train calls dino_loss, which computes each softmax once. Test: test_h_equation.
    """
    t = F.softmax((t.detach() - center) / tau_t, dim=1)  # centre and sharpen
    return -(t * F.log_softmax(s / tau_s, dim=1)).sum(1).mean()


def dino_loss(student, teacher, center, tau_s, tau_t):
    """Mean of H(t_i, s_j) over all pairs of different views (slide Algorithm 1; paper, equation 3,
    which has the sum).

    student, teacher: lists of (N, K), one for each view; the teacher's views are the first of the
    student's -> scalar. H is linear in t, so for each s_j the t_i with i != j are summed first.
    No gradient to the teacher. Test: test_dino_loss_equation.
    """
    t = [F.softmax((view.detach() - center) / tau_t, dim=1) for view in teacher]
    t_sum, pairs, loss = sum(t), len(teacher) * (len(student) - 1), 0.0
    for j, s in enumerate(student):
        others = t_sum - t[j] if j < len(t) else t_sum  # sum of t_i over i != j
        loss = loss - (others * F.log_softmax(s / tau_s, dim=1)).sum(1).mean() / pairs
    return loss


def entropy(teacher, center, tau_t):
    """Mean entropy of the teacher's n distributions (paper, Figure 7): (n, K) -> scalar.

    0 log 0 is 0. No gradient to the teacher. Test: test_entropy.
    """
    return torch.special.entr(F.softmax((teacher.detach() - center) / tau_t, dim=1)).sum(1).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================


@torch.no_grad()
def ema_update(net_ema, net, m):
    """theta_t <- m theta_t + (1 - m) theta_s (slide Algorithm 1), for the parameters alone:
    batch norm in the teacher keeps statistics of its own.

    m: a float or a 0-dim tensor. Test: test_ema_update.
    """
    ema, new = list(net_ema.parameters()), list(net.parameters())
    weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)
    torch._foreach_lerp_(ema, new, [weight] * len(new))  # ema + (1 - m) (new - ema)


def update_center(center, teacher, m):
    """C <- m C + (1 - m) mean of t (slide Algorithm 1; paper, equation 4); m is the header's m_C.

    center: (1, K), teacher: raw outputs t (n, K), or their mean over all processes -> (1, K).
    Test: test_center.
    """
    return m * center + (1 - m) * teacher.mean(0, keepdim=True)


# ==================================================================================================
# Training
# ==================================================================================================


def lr_at(step, steps, warmup, peak):
    """Linear warm-up, (step + 1) / warmup of peak, then half a cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def cosine(step, steps, start, end):
    """From start at step 0 to end at step = steps by half a cosine, for m and the weight decay.
    Test: test_cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def tau_at(step, steps, tau_t, warmup):
    """The teacher's temperature: it rises linearly from 0.04 to tau_t over the first `warmup` (a
    share) of the run. A tau_t below 0.04 is used throughout. Test: test_tau_at.
    """
    share = min(1.0, step / (warmup * steps)) if warmup else 1.0
    return tau_t + (1 - share) * min(0.04 - tau_t, 0.0)


@torch.no_grad()
def clip_each(net, length):
    """Clip the gradient of each tensor separately to this norm, as the released code does, not all
    of them together. Test: test_clip_each."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, [(length / (n + 1e-6)).clamp(max=1.0) for n in norms])


def check(args, steps):
    """Reject options that cannot work and warn of bad ones, before hours are spent on them."""
    least = min(args.image_size, args.local_size) if args.local_crops else args.image_size
    if args.arch in VITS and least < args.patch_size:
        common.fail("--patch-size is over --image-size or --local-size, the side of a view")
    if args.arch == "vit_conv" and (
            args.image_size % args.patch_size or args.patch_size not in (2, 4, 8, 16, 32)):
        common.fail("--patch-size of vit_conv has to be 2, 4, 8, 16 or 32 and divide --image-size")
    if args.eval:
        return
    if args.local_crops and args.local_scale > args.global_scale:
        common.fail("--local-scale is over --global-scale, the largest area of a local crop")
    if args.m ** (steps / 10) > 0.5:
        print("warning: the teacher's half-life is over a tenth of the run, lower --m")
    if args.arch in VITS and args.image_size % args.patch_size:
        print("warning: --image-size is not a multiple of --patch-size, the remainder is cut off")
    if args.local_crops and args.local_size >= args.image_size:
        print("warning: local views are not smaller than global ones, lower --local-size")


def train(args, run):
    """-> the trained teacher (with --eval: the loaded one) and the data."""
    data = common.load_data(args, OPTIONS, run, CPU)
    N = args.batch_size
    K = args.out_dim
    steps = args.epochs * data.per_epoch
    warmup = round(args.warmup * steps)
    peak = args.lr * N / 256
    if not args.eval:
        print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {N} / 256")
    check(args, steps)
    common.show_views(run, data, crops(args), lambda views: augment(views, args))

    # -- model: net is g_s, the student; net_ema is g_t, the teacher, which is evaluated and kept
    net = build(args, args.drop_path)
    net_ema = build(args)
    common.load_weights(net, args, "net_ema", args.branch, adapt=fit_positions, mean=MEAN)
    net_ema.load_state_dict(net.state_dict())  # g_t = g_s
    net = run.place(net)
    net_ema = run.place(net_ema)
    net_ema.requires_grad_(False)  # stop-gradient: the teacher is only a moving average
    net.head.last_layer.weight_g.requires_grad_(not args.norm_last_layer)
    center = torch.zeros(1, K, device=run.device)
    student = run.parallel(net)
    teacher = run.compiled(net_ema)
    aug = run.compiled(augment)

    # -- optimiser
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim <= 1]}]  # biases and norms: no decay
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, peak, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, peak, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "net_ema": net_ema, "center": center, "optimizer": optimizer,
             "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net, net_ema, center)  # puts back C and batch norm after a skipped step
    run.chance = {"loss": math.log(K), "entropy": math.log(K), "kl": 0.0}  # of a uniform teacher
    center_m = 1.0 if args.no_centering else args.center_m  # with 1 the centre stays 0

    for epoch in run.epochs(data):
        for step, views in run.batches(data, epoch, crops(args)):
            # -- step
            lr = lr_at(step, steps, warmup, peak)
            m = cosine(step, steps, args.m, args.m_end)
            wd = cosine(step, steps, args.weight_decay, args.weight_decay_end)
            tau_t = tau_at(step, steps, args.tau_t, args.tau_t_warmup)
            if args.no_sharpening:
                tau_t = 1.0
            for group, decay in zip(optimizer.param_groups, (wd, 0.0)):
                group["lr"], group["weight_decay"] = lr, decay
            x = aug(views, args)  # 2 global views, then L local ones, (N, 3, S, S) each
            with run.autocast():
                _, _, s = student(*x)  # ((2 + L) N, K), all views
                _, _, t = teacher(*x[:2])  # (2N, K), the global ones
            s, t = s.float(), t.float()
            loss = dino_loss(s.chunk(len(x)), t.chunk(2), center, args.tau_s, tau_t)
            t_entropy = entropy(t, center, tau_t)  # loss = entropy of t + KL(t, s)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_each(net, args.clip)
            if epoch < args.freeze_last_layer:
                net.head.last_layer.zero_grad()  # grad is None: AdamW skips it
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            ema_update(net_ema, net, torch.where(ok, m, 1.0))  # EMA; a skipped step: m = 1
            center.copy_(update_center(center, run.mean(t.mean(0, keepdim=True)), center_m))
            undo(unless=ok)
            run.log(ok, loss=loss, entropy=t_entropy, kl=loss - t_entropy, lr=lr, m=m, wd=wd,
                    tau_t=tau_t)
        # -- log and save
        if run.end_epoch(state):  # every --eval-every epochs
            evaluate(net_ema, data, args, run)
        run.save(state)  # at most once a minute; after a signal the program ends here
    return net_ema, data


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


def teacher_verdict(verdict, run, K):
    """The verdict on z, with the teacher's entropy and KL in the last epoch: if KL is 0, nothing
    is learned, and the entropy shows which of two collapses it is (paper, Section 5.3)."""
    if not run.rows or ":" not in verdict:
        return verdict
    entropy, kl = (run.rows[-1][k] / math.log(K) for k in ("entropy", "kl"))
    word, _, figures = verdict.partition(":")
    if kl < 0.01 and entropy > 0.95:
        word = "uniform teacher"
    elif kl < 0.01 and entropy < 0.05:
        word = "one-hot teacher"
    return f"{word}:{figures}, teacher's entropy {entropy:.2f} of ln K, KL {kl:.3f}"


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

    results = common.health(*common.embed(two_views, data.val, crops(args)[:1], run,
                                            limit=1024))
    results["verdict"] = teacher_verdict(results["verdict"], run, args.out_dim)
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
    """Python that rebuilds the backbone with timm or torchvision; printed at the end of a run."""
    if args.arch in VITS:
        dim, depth, heads = VITS[args.arch]
        stem = ""
        if args.arch == "vit_conv":
            stem = (f"\n\n{CONV_STEM}\n"
                    f"net.patch_embed.proj = conv_stem({dim}, {args.patch_size})")
        return ("import torch, timm\nfrom torch import nn\n\nnet = timm.models.VisionTransformer(\n"
                f"    img_size={args.image_size}, patch_size={args.patch_size}, embed_dim={dim}, "
                f"depth={depth}, num_heads={heads},\n    num_classes=0)  # {args.arch}{stem}")
    stem = ""
    if args.stem == "3x3":
        stem = "net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()\n"
    return ("import torch, torchvision\nfrom torch import nn\n"
            f"net = torchvision.models.{args.arch}()\n{stem}net.fc = nn.Identity()")


# ==================================================================================================
# Backbone
# ==================================================================================================


class Attention(nn.Module):
    """Multi-head self-attention: (N, 1 + T, D) -> same shape."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (N, 1 + T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, 1 + T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: (N, 1 + T, D) -> same. In training each residual branch is
    dropped with probability drop_path (stochastic depth, Huang et al. 2016)."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop = torchvision.ops.StochasticDepth(drop_path, "row")  # of whole images

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


def resample(pos_embed, height, width):
    """Resize position embeddings (1, 1 + T, D) of a square grid to height x width patches.

    The released code's formula: bicubic, with 0.1 added to height and width. Embeddings of a grid
    that is not square are returned unchanged.
    """
    patches = pos_embed.shape[1] - 1
    side = math.isqrt(patches)
    if (height, width) == (side, side) or side**2 != patches:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), scale_factor=((height + 0.1) / side, (width + 0.1) / side),
                         mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT.to(pos_embed.dtype)], 1)


class ViT(nn.Module):
    """Vision transformer: (N, 3, H, W) -> (N, 1 + T, D) after the final norm, class token first.

    Parameters are named and shaped as in timm and the released weights. H, W: any multiples of P.
    """

    def __init__(self, dim, depth, heads, patch_size=16, image_size=224, drop_path=0.0):
        super().__init__()
        self.dim, self.patch_size = dim, patch_size
        proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for w in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(w, std=0.02)
        self.apply(init_linear)

    def tokens(self, patches):
        """Embedded patches (N, D, H / P, W / P) -> (N, 1 + T, D), class token first, positions
        added."""
        positions = resample(self.pos_embed, *patches.shape[2:])
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT], 1)
        return x + positions

    def encode(self, patches):
        x = self.tokens(patches)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return self.encode(self.patch_embed(x))


def conv_stem(dim, patch_size):
    """(N, 3, H, W) -> (N, dim, H / P, W / P): 3x3 convolutions of stride 2, each twice as wide as
    the one before, and a 1x1 convolution, in place of a ViT's one linear layer (Xiao et al. 2021).
    P: a power of 2."""
    layers, inputs = [], 3
    while patch_size > 1:
        patch_size //= 2
        width = dim // patch_size
        conv = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


CONV_STEM = common.source(conv_stem)  # printed at the end of a run


def init_linear(m):
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        nn.init.zeros_(m.bias)


@torch.no_grad()
def start_with_sines(vit):
    """Initialise position embeddings as sines and cosines of row and column, with wavelengths from
    two grids to two patches, and the linear layers of the blocks by Xavier's rule.

    Our own choice, after MoCo v3, whose sines are fixed and have other wavelengths: with the
    released initialisation (deviation 0.02) the patches of a narrow ViT drown their positions.
    Test: test_start_with_sines.
    """
    side = math.isqrt(vit.pos_embed.shape[1] - 1)
    waves = math.pi / side * side ** torch.linspace(0, 1, vit.dim // 4)  # radians per patch
    angles = torch.arange(side).outer(waves)
    line = torch.cat([angles.sin(), angles.cos()], 1)  # (side, dim / 2)
    vit.pos_embed[0, 1:] = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1)
    for m in vit.blocks.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)


vit_tiny = functools.partial(ViT, *VITS["vit_tiny"])  # (patch_size=16, image_size=224)
vit_small = functools.partial(ViT, *VITS["vit_small"])
vit_base = functools.partial(ViT, *VITS["vit_base"])


def fit_positions(weights, net):
    """Resample the position embeddings in weights, in place, to the grid of net."""
    name = "backbone.pos_embed"
    if name in weights and name in net.state_dict():
        side = math.isqrt(net.backbone.pos_embed.shape[1] - 1)
        weights[name] = resample(weights[name], side, side)
    return weights


def main(argv=None):
    args = common.options("dino", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()
