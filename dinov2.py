"""DINOv2: Learning Robust Visual Features without Supervision
Oquab, Darcet, Moutakanni, Vo, ..., Joulin, Bojanowski, 2023, https://arxiv.org/abs/2304.07193
Slides: "Contrastive Learning: DINOv2: Learning Robust Visual Features without Supervision".

iBOT, made to scale: the table of the slides goes from a reproduction of iBOT to DINOv2 in ten
steps, and each is an option here. The teacher's outputs are balanced over the K prototypes by
Sinkhorn-Knopp instead of a centre, class tokens of a batch are pushed apart (KoLeo), and class and
patch tokens have separate heads.

    row of the table                  option
    LayerScale, stochastic depth      --layer-scale 1e-5 --drop-path 0.4
    128k prototypes                   --out-dim 131072
    KoLeo                             --koleo 0.1
    SwiGLU FFN                        --ffn swiglu
    patch size 14                     --patch-size 14
    teacher momentum 0.994            --m 0.994
    tweak warm-up schedules           --warmup, --tau-t-warmup
    batch size 3k                     --batch-size 3072
    Sinkhorn-Knopp                    --centering sinkhorn (before: ema)
    untying heads = DINOv2            --no-tied-heads

One step for a batch of N images:
    u, v, ... = augment(x)          2 global and L smaller local views      crops, augment
    u^, v^ = mask(u, v)             half of the global views                stratified_masks
    h, s, s' = g_s(u^, v^, ...)     student: class tokens, hidden patches   DINOv2.forward
    t, t' = g_t(u, v)               teacher: whole global views             DINOv2.forward
    q, q' = targets of t, t'        balanced, rows sum to 1                 sinkhorn_knopp
    L_DINO                          class tokens, pairs of different views  class_loss
    L_iBOT                          hidden patches, of the same view        masked_loss
    L_KoLeo                         of the global views' h                  koleo
    update g_s                      by L_DINO + L_iBOT + w L_KoLeo          train
    g_t = m g_t + (1 - m) g_s       m rises to 1                            ema_update, cosine

Symbols: u, v (N, 3, S, S) views in [0, 1]; masks (2N, S / P, S / P) bool, true is hidden, M patches
in all; h (V N, d) class tokens of V views; z (V N, 256) unit vectors before the last layer; s, t
(N, K) raw outputs for a view; s', t' (M, K) for hidden patches; q, q' the targets; m momentum;
tau_s, tau_t temperatures. net is g_s, net_ema is g_t, which is kept.

Where this file departs from the paper and the released code:
  - Blur: the released code asks for DINO's probabilities (1, 0.1, 0.5 in u, v, local views) but
    then applies 1 - p, so its networks were trained with 0, 0.9, 0.5 (the paper names none). So
    are ours; --blur can set DINO's.
  - KoLeo is computed for both global views, separately, as in the released code (paper: for the
    first). None of the three compares images on different GPUs.
  - A hidden patch has the weight 1 / (hidden patches of its view), divided by 2N, the number of
    global views, masked or not, as in the released code (paper: the sum). The masks are
    stratified over the batch of all GPUs (released code: per GPU, with whole numbers of patches).
  - Gradients are clipped to norm 3, separately for backbone and heads, as in the released code.
  - Warm-ups are shares of the run, and the rate starts above 0 and ends at 0 (released code: 0 and
    1e-6). In short runs m starts lower.
  - Both heads have a bottleneck of 256 (released ViT-L: 384 for class tokens). Without local views
    the class term is the mean over two pairs (released code: 2/3 of it). With --centering ema the
    patches' centre follows their mean over all GPUs (released code: the mean of the GPUs' means).
  - The last --hires-epochs continue the schedules, and positions are resampled in every step
    (paper: 10k more iterations, with the schedules compressed into them, at a lower rate; no code
    is released). Images from files are kept at up to three times --image-size, built-in ones are
    made at --image-size.
  - Crops are resized bilinearly, with antialiasing (released code: bicubic). The blur kernel is
    a tenth of the view wide (released code: 9 pixels).
  - Small images are not blurred. ViTs narrower than 384 (vit_tiny, too) start with sinusoidal
    positions, and the linear layers of their blocks by Xavier's rule (start_with_sines).
  - The linear probe is fitted by L-BFGS, with an L2 penalty, on standardised class tokens of
    central crops (paper: by SGD, on a grid of rates and layers).
  - All networks are trained from scratch, on your images (paper: ViT-S, B and L are distilled from
    a ViT-g, on 142 million curated ones). SwiGLU is the default for a ViT-g alone (paper: for all
    that are trained from scratch).
  - The defaults for larger images, not measured, follow the released recipe of 100 epochs (a
    ViT-L/16 with one head and a centre), for a ViT-S/14 with Sinkhorn and two heads. N is 256 and
    an epoch a pass over the set (released code: 2048, and 1,250 steps). All layers have the same
    rate, at this N 5e-4, which is DINO's for a ViT-S (released code: 4e-3 with a decay of 0.9 per
    layer and 0.2 of it for patch_embed, or 2e-4 without this decay; both for N = 1024).
  - The second column is our own. So is the recipe for the built-in set, sized for a CPU: no local
    views, no stochastic depth, no solarization, larger crops, few prototypes K, a colder teacher,
    constant m and weight decay, LayerScale from 1, and a small ViT that begins with convolutions
    (Xiao et al. 2021). These see 7 pixels left of a patch and above it, so a hidden patch leaks
    into three neighbours.

    python dinov2.py    75 s on 2 CPU cores; mean of three seeds: 86.8 % linear, 81.3 % k-NN; the
                        untrained network has 32.1 and 21.5 %, raw pixels have 27.0 and 38.2 %
"""

import functools
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import FLAG, FROM_0, FROM_1, FROM_2, PIXELS, POSITIVE, SHARE, SWITCH, number, one_of

# ==================================================================================================
# Options
# ==================================================================================================

VITS = {  # width, depth, heads, feed-forward network of the released ones
    "vit_conv": (96, 2, 3, "mlp"),  # after a stem of convolutions
    "vit_nano": (128, 3, 4, "mlp"),
    "vit_tiny": (192, 12, 3, "mlp"),
    "vit_small": (384, 12, 6, "mlp"),
    "vit_base": (768, 12, 12, "mlp"),
    "vit_large": (1024, 24, 16, "mlp"),
    "vit_giant": (1536, 40, 24, "swiglu"),
}
DROP = number(float, 0, 0.99)
WEIGHT = number(float, 0)
PAIR = SHARE | {"nargs": 2}
SHARES = SHARE | {"nargs": 3}
NO_BLUR = (0.0, 0.0, 0.0)  # probabilities in u, v and local views


def released(args, n):
    """The feed-forward network of the released model of this size."""
    return VITS[args.arch][3]


def local_side(args, n):
    """Side of a local view: 98 pixels if a global one has 224, rounded to whole patches."""
    return args.patch_size * max(1, round(args.image_size * 3 / 7 / args.patch_size))


def m_to_994(args, n):
    """Initial m for n images: a half-life of a twentieth of the steps, with m from 0.9 to 0.994."""
    return min(0.994, max(0.9, 0.5 ** (20 * args.batch_size / (args.epochs * n))))


def m_to_992(args, n):
    """The same, but at most 0.992, the m of the released recipe of 100 epochs."""
    return min(0.992, m_to_994(args, n))


def constant(args, n):
    """m at the end: as at the start, because an m that rises to 1 makes a short run learn less."""
    return args.m


# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones.
# Functions are called with (args, number of images). common.py adds --dataset, --seed and so on.
OPTIONS = {  # fmt: skip
    # option                   built-in    to 64 px    larger      allowed   meaning
    "arch":                   ("vit_conv", "vit_tiny", "vit_small", one_of(VITS), "backbone"),
    "patch_size":             (8,          4,          14,         FROM_1,   "P, side in pixels"),
    "ffn":                    (released,   released,   released,   "mlp|swiglu", "feed-forward"),
    "layer_scale":            (1.0,        1e-5,       1e-5,       POSITIVE, "gamma at the start"),
    "drop_path":              (0.0,        0.1,        0.3,        DROP,     "stochastic depth"),
    "registers":              (0,          0,          0,          FROM_0,   "R (Darcet 2023: 4)"),
    "checkpoint_activations": (False,      False,      False,      FLAG,     "saves memory"),
    "out_dim":                (128,        4096,       65536,      FROM_2,   "K, prototypes"),
    "hidden":                 (512,        2048,       2048,       FROM_1,   "width of a head"),
    "tied_heads":             (False,      False,      False,      SWITCH,   "one head for both"),
    "centering":              ("sinkhorn", "sinkhorn", "sinkhorn", "sinkhorn|ema", "of targets"),
    "koleo":                  (0.1,        0.1,        0.1,        WEIGHT,   "weight of L_KoLeo"),
    "tau_s":                  (0.1,        0.1,        0.1,        POSITIVE, "student temperature"),
    "tau_t":                  (0.01,       0.07,       0.07,       POSITIVE, "teacher temperature"),
    "tau_t_warmup":           (0.3,        0.3,        0.3,        SHARE,    "rise from 0.04"),
    "center_m":               (0.9,        0.9,        0.9,        SHARE,    "for --centering ema"),
    "mask_ratio":             ((0.1, 0.5), (0.1, 0.5), (0.1, 0.5), PAIR,     "share hidden: range"),
    "mask_crops":             (0.5,        0.5,        0.5,        SHARE,    "share with a mask"),
    "random_masks":           (False,      False,      False,      FLAG,     "patches, not blocks"),
    "no_token_loss":          (False,      False,      False,      FLAG,     "no L_iBOT"),
    "no_class_loss":          (False,      False,      False,      FLAG,     "no L_DINO"),
    "image_size":             (32,         32,         224,        PIXELS,   "side of global view"),
    "local_size":             (16,         16,         local_side, PIXELS,   "side of local view"),
    "local_crops":            (0,          6,          8,          FROM_0,   "L, per image"),
    "global_scale":           (0.5,        0.4,        0.32,       SHARE,    "least area, global"),
    "local_scale":            (0.2,        0.1,        0.05,       SHARE,    "least area, local"),
    "blur":                   (NO_BLUR,    NO_BLUR,    (0.0, 0.9, 0.5), SHARES, "p in u, v, local"),
    "solarize":               (0.0,        0.2,        0.2,        SHARE,    "probability in v"),
    "epochs":                 (12,         200,        100,        FROM_1,   "passes over the set"),
    "batch_size":             (64,         512,        256,        FROM_2,   "N (paper: 3072)"),
    "hires_epochs":           (0,          0,          0,          FROM_0,   "with larger views"),
    "hires_size":             (48,         48,         518,        PIXELS,   "side of those views"),
    "lr":                     (6e-3,       1e-3,       1e-3,       POSITIVE, "x sqrt(N / 1024)"),
    "warmup":                 (0.1,        0.1,        0.1,        SHARE,    "share of steps"),
    "weight_decay":           (0.04,       0.04,       0.04,       SHARE,    "at the start"),
    "weight_decay_end":       (0.04,       0.4,        0.4,        SHARE,    "at the end"),
    "clip":                   (3.0,        3.0,        3.0,        POSITIVE, "max gradient norm"),
    "freeze_last_layer":      (1,          1,          1,          FROM_0,   "epochs at the start"),
    "m":                      (m_to_994,   m_to_994,   m_to_992,   SHARE,    "EMA, at the start"),
    "m_end":                  (constant,   1.0,        1.0,        SHARE,    "EMA, at the end"),
    "branch":                 ("teacher",  "teacher",  "teacher",  "teacher|student", "of --init"),
}
# Without a GPU, images up to 64 pixels use the first column, except for:
CPU = {"out_dim": 1024, "tau_t": 0.04, "local_size": local_side, "local_crops": 4, "koleo": 0.02,
       "epochs": common.passes(6e5), "batch_size": 128, "lr": 3e-3, "warmup": 0.2}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args, size=None):
    """Multi-crop: two global and L local crops of every image. size: side of a global one."""
    ratio, s = (3 / 4, 4 / 3), args.global_scale
    views = [common.Crop(size or args.image_size, (s, 1.0), ratio, count=2)]
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


def block_mask(height, width, ratio, generator, least=None):
    """Hide rectangles that cover at most a share `ratio` of the patches -> (height, width) bool.

    The area of each is uniform between `least` and the number that may still be hidden, its aspect
    log-uniform. Hiding ends when ten in a row do not fit (released code, after BEiT's Algorithm 1,
    whose aspect is uniform). least: 4 in the released code and in stratified_masks; by default, as
    in iBOT, a third of the shorter side, squared. ratio: a number, or a tensor (...) with one for
    each mask -> (..., height, width). Test: test_block_mask.
    """
    third = min(height, width) // 3
    least = least or third**2
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    left = ratio.reshape(-1, 1, 1) * height * width  # patches that may still be hidden
    failed = torch.zeros_like(left)  # failed attempts in a row
    mask = torch.zeros(len(left), height, width, dtype=torch.bool)
    rows = torch.arange(height).unsqueeze(1)
    columns = torch.arange(width)
    while len(i := torch.where((left >= 1) & (failed < 10))[0]):  # masks not yet complete
        numbers = torch.rand(len(mask), 4, 1, 1, generator=generator)
        a, b, c, d = numbers[i].double().unbind(1)  # (n, 1, 1) each
        area = least + (left[i] - least) * a
        aspect = 0.3 ** (1 - 2 * b)  # from 0.3 to 1 / 0.3
        h = (area * aspect).sqrt().round()
        w = (area / aspect).sqrt().round()
        y = (c * (height - h + 1)).floor()
        x = (d * (width - w + 1)).floor()
        in_rows = (rows >= y) & (rows < y + h)
        in_columns = (columns >= x) & (columns < x + w)
        block = in_rows & in_columns
        new = block & ~mask[i]
        new = new.sum((1, 2), keepdim=True)
        fits = h < height
        fits &= w < width
        fits &= new > 0
        fits &= new <= left[i]
        mask[i] |= block & fits
        left[i] -= fits * new
        failed[i] += 1
        failed[i] *= ~fits
    return mask.view(*ratio.shape, height, width)


def random_mask(height, width, ratio, generator):
    """Hide the same share of patches at random, not in blocks ("rand" in iBOT's released code)."""
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    patches = height * width
    order = torch.rand(*ratio.shape, patches, generator=generator).argsort()
    hidden = (patches * ratio).floor()
    mask = order < hidden.unsqueeze(-1)
    return mask.unflatten(-1, (height, width))


def stratified_masks(step, side, args, run):
    """Masks for the global views of this process's n images, all first views, then all second ones:
    (2n, side, side) bool, the indices (M,) of hidden patches in masks.flatten(), and the weight of
    each of these patches: 1 / (hidden patches of its view x 2n). Test: test_masks.

    A share --mask-crops of all 2N views gets a mask (on 4 x 4 patches, 6 in a hundred of these stay
    empty, as no block fits; released code: 2). In random order, the i-th of them draws its ratio
    from the i-th of equal parts of --mask-ratio (released code). Numbers are drawn for the whole
    batch, so an image has the same masks with any number of processes.
    """
    N = args.batch_size
    low, high = args.mask_ratio
    generator = torch.Generator().manual_seed(args.seed * 2**20 + step)
    masked = int(2 * N * args.mask_crops)
    parts = torch.arange(masked) + torch.rand(masked, generator=generator)
    ratios = low + (high - low) * parts / max(masked, 1)
    ratios = F.pad(ratios, (0, 2 * N - masked))[torch.randperm(2 * N, generator=generator)]
    ratios = ratios.view(2, N)
    if args.random_masks:
        masks = random_mask(side, side, ratios, generator)
    else:
        masks = block_mask(side, side, ratios, generator, least=4)
    masks = masks.chunk(run.world, 1)[run.rank].flatten(0, 1)
    hidden = masks.flatten().nonzero().squeeze(1)
    counts = masks.sum((1, 2))
    weights = (1 / counts / len(masks)).repeat_interleave(counts)
    masks, hidden, weights = (
        common.to_device(x, run.device) for x in (masks, hidden, weights))
    if args.compile:  # M varies: without this the second step would recompile
        torch._dynamo.maybe_mark_dynamic(hidden, 0)
    return [masks, hidden, weights]


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


class MLPHead(nn.Module):
    """Projection head (DINO, Section 3.1): (n, d) -> z (n, 256) of length 1, s (n, K)."""

    def __init__(self, inputs, outputs, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck))
        self.mlp.apply(init_linear)
        self.last_layer = WeightNorm(bottleneck, outputs)

    def forward(self, x):
        z = F.normalize(self.mlp(x), dim=1)
        return z, self.last_layer(z)


class DINOv2(nn.Module):
    """Backbone and heads: V views (N, 3, S, S) in [0, 1] -> h (V N, d), z (V N, 256), s (V N, K) of
    class tokens and, given hidden, s' (M, K) of those patches of the global views.

    The two global views come first and go through the backbone together, as do the local ones.
    masks: (2N, S / P, S / P) bool, of the global views; mask_token replaces a hidden patch.
    hidden: (M,), indices of hidden patches in masks.flatten().
    """

    def __init__(self, backbone, out_dim=65536, hidden=2048, tied=False):
        super().__init__()
        self.backbone = backbone
        self.dino_head = MLPHead(backbone.dim, out_dim, hidden)
        self.ibot_head = None if tied else MLPHead(backbone.dim, out_dim, hidden)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def masked_tokens(self, views, masks=None):  # views of one size -> (V N, 1 + R + T, d)
        x = (torch.cat(views) - self.mean) / self.std
        x = self.backbone.patch_embed(x)  # (V N, d, S / P, S / P)
        if masks is not None:  # before positions are added: the student knows where a patch is
            x = torch.where(masks.unsqueeze(1), self.backbone.mask_token.view(-1, 1, 1), x)
        return self.backbone.encode(x)

    def forward(self, *views, masks=None, hidden=None):
        x = self.masked_tokens(views[:2], masks)
        h = x[:, 0]
        s_patch = []
        if hidden is not None:
            head = self.ibot_head or self.dino_head
            patches = x[:, 1 + self.backbone.registers :].flatten(0, 1)
            s_patch.append(head(patches[hidden])[1])  # (M, K)
        if views[2:]:
            h = torch.cat([h, self.masked_tokens(views[2:])[:, 0]])
        return h, *self.dino_head(h), *s_patch


def build(args, drop_path=0.0):
    """The untrained network, determined by args.seed."""
    torch.manual_seed(args.seed)
    dim, depth, heads, _ = VITS[args.arch]
    backbone = RegisterViT(
        dim, depth, heads, args.ffn, args.patch_size, args.image_size, args.registers,
        args.layer_scale, drop_path, args.checkpoint_activations)
    if dim < 384:
        start_with_sines(backbone)
    if args.arch == "vit_conv":
        backbone.patch_embed.proj = conv_stem(dim, args.patch_size)
    return DINOv2(backbone, args.out_dim, args.hidden, args.tied_heads)


# ==================================================================================================
# Loss
# ==================================================================================================


def sinkhorn_knopp(logits, tau, iterations=3, gather=None):
    """The teacher's outputs as distributions that are balanced over the batch (paper, Section 4,
    "Sinkhorn-Knopp centering"; Caron et al. 2020): Q = exp(logits / tau), then three times

        Q_nk <- Q_nk / sum_n Q_nk        every prototype gets the same share of all rows
        Q_nk <- Q_nk / sum_k Q_nk        every row is a distribution

    logits: (n, K) -> (n, K), rows sum to 1. Uses logarithms, so finite for finite logits. No
    gradient to logits. gather: (1, K) -> (world, K), for sums over the rows of all processes.
    Test: test_sinkhorn_equation.
    """
    Q = logits.detach() / tau  # (n, K), log Q
    for _ in range(iterations):
        columns = Q.logsumexp(0, keepdim=True)  # (1, K)
        Q -= gather(columns).logsumexp(0, keepdim=True) if gather else columns
        Q -= Q.logsumexp(1, keepdim=True)
    return Q.exp_()


def targets(t, center, tau_t, centering, gather=None):
    """Turn the teacher's raw outputs into the student's targets: with centering "sinkhorn" by
    Sinkhorn-Knopp, else, with the centre C from earlier steps, softmax((t - C) / tau_t) as in DINO
    (paper, Section 4).

    t: (n, K), center: (1, K) -> (n, K). No gradient to t. Test: test_targets.
    """
    if centering == "sinkhorn":
        return sinkhorn_knopp(t, tau_t, gather=gather)
    return F.softmax((t.detach() - center) / tau_t, dim=1)


def distillation(s, q, tau_s):
    """-sum_k q_k log softmax(s / tau_s)_k of each row (paper, Section 4, L_DINO and L_iBOT).

    s: (n, K) raw outputs, q: (n, K), rows sum to 1 -> (n,). No gradient to q; the log softmax is
    never stored. Test: test_distillation_equation.
    """
    s = s / tau_s
    return s.logsumexp(1) - torch.linalg.vecdot(q.detach(), s, dim=1)


def class_loss(student, targets, tau_s):
    """L_DINO: mean cross-entropy over images and all pairs of different views (paper, Section 4).

    student: list of (N, K), one for each view; targets: two or more (N, K) for the first of them,
    rows sum to 1 -> scalar. Test: test_class_loss_equation.
    """
    q_sum, pairs, loss = sum(targets), len(targets) * (len(student) - 1), 0.0
    for j, s in enumerate(student):
        others, n = q_sum, len(targets)
        if j < len(targets):  # not of the same view
            others, n = q_sum - targets[j], n - 1
        loss = loss + n / pairs * distillation(s, others / n, tau_s).mean()
    return loss


def masked_loss(s, targets, weights, tau_s):
    """L_iBOT: the sum over all hidden patches of weights times cross-entropy (paper, Section 4).

    s, targets: (M, K), weights: (M,), from stratified_masks -> scalar.
    Test: test_masked_loss_equation.
    """
    return (weights * distillation(s, targets, tau_s)).sum()


def koleo(x):
    """Kozachenko-Leonenko regulariser (paper, Section 4, "KoLeo regularizer"; Sablayrolles 2019):

        -1/n sum_i log d_i,   d_i = min_{j != i} |x_i / |x_i| - x_j / |x_j||

    x: (n, D) -> scalar. As in the released code, 1e-8 is added to each element of the difference
    (F.pairwise_distance) and to d before its logarithm. Test: test_koleo_equation.
    """
    x = F.normalize(x, eps=1e-8)
    nearest = (x @ x.T).detach().fill_diagonal_(-2.0).argmax(1)  # (n,) the largest cosine
    return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()


def mean_entropy(q):
    """Mean entropy of the targets (n, K), whose rows sum to 1 -> scalar (DINO's paper, Figure 7).

    0 log 0 is 0. Test: test_mean_entropy.
    """
    return torch.special.entr(q).sum(1).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================


@torch.no_grad()
def ema_update(net_ema, net, m):
    """theta_t <- m theta_t + (1 - m) theta_s (paper, Section 4), for the parameters alone:
    batch norm in the teacher keeps statistics of its own.

    m: a float or a 0-dim tensor. Test: test_ema_update.
    """
    ema, new = list(net_ema.parameters()), list(net.parameters())
    weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)
    torch._foreach_lerp_(ema, new, [weight] * len(new))  # ema + (1 - m) (new - ema)


def update_center(center, teacher, m):
    """C <- m C + (1 - m) mean of the raw outputs t (DINO, equation 4).

    center: (1, K), teacher: (n, K), or its mean over all processes (1, K) -> (1, K).
    Test: test_center.
    """
    return m * center + (1 - m) * teacher.mean(0, keepdim=True)


def mean_of_all(x, run):
    """Mean of the rows (n, K) of all processes, where n differs between processes -> (1, K)."""
    sums = run.mean(F.pad(x.sum(0), (0, 1), value=len(x)))  # their sum and number
    return (sums[:-1] / sums[-1].clamp(min=1)).view(1, -1)


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


def clip_modules(net, length):
    """Clip the gradients of the backbone and of each head to this norm, separately, as the
    released code does. Test: test_clip_modules."""
    for module in net.children():
        nn.utils.clip_grad_norm_(module.parameters(), length)


def check(args, steps):
    """Reject options that cannot work and warn of bad ones, before hours are spent on them."""
    least = min(args.image_size, args.local_size) if args.local_crops else args.image_size
    if least < args.patch_size:
        common.fail("--patch-size is over --image-size or --local-size, the side of a view")
    sizes = [args.image_size, args.hires_size][: 1 + bool(args.hires_epochs)]
    if args.arch == "vit_conv" and (
            any(s % args.patch_size for s in sizes) or args.patch_size not in (2, 4, 8, 16, 32)):
        common.fail("--patch-size of vit_conv has to be 2, 4, 8, 16 or 32 and divide --image-size "
                    "(and --hires-size)")
    if args.eval:
        return
    if args.hires_epochs and args.hires_size < args.patch_size:
        common.fail("--patch-size is over --hires-size, the side of a view")
    if args.local_crops and args.local_scale > args.global_scale:
        common.fail("--local-scale is over --global-scale, the largest area of a local crop")
    if args.no_class_loss and args.no_token_loss and not args.koleo:
        common.fail("--no-class-loss, --no-token-loss and --koleo 0 leave nothing to learn")
    if (args.image_size // args.patch_size) ** 2 * max(args.mask_ratio) < 1:
        common.fail("--mask-ratio hides none of the few patches: raise it or --image-size")
    if args.m ** (steps / 10) > 0.5:
        print("warning: the teacher's half-life is over a tenth of the run, lower --m")
    if min(sizes) // args.patch_size < 4 and not args.random_masks:
        print("warning: blocks hardly fit in fewer than 4 x 4 patches: lower --patch-size, or use "
              "--random-masks")
    if args.image_size % args.patch_size:
        print("warning: --image-size is not a multiple of --patch-size, the remainder is cut off")
    if args.local_crops and args.local_size >= args.image_size:
        print("warning: local views are not smaller than global ones, lower --local-size")


def train(args, run):
    """-> the trained teacher and the data."""
    data = common.load_data(args, OPTIONS, run, CPU)
    steps = args.epochs * data.per_epoch
    warmup = round(args.warmup * steps)
    peak = args.lr * math.sqrt(args.batch_size / 1024)
    if not args.eval:
        print(f"{steps:,} steps, {warmup:,} of warm-up")
    check(args, steps)
    common.show_views(run, data, crops(args), lambda views: augment(views, args))

    # -- model: net is g_s, the student; net_ema is g_t, the teacher, which is evaluated and kept
    net = build(args, args.drop_path)
    net_ema = build(args)
    renames = [(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.")]  # released: blocks.<chunk>.<block>
    common.load_weights(net, args, "net_ema", args.branch, renames, fit_tokens, MEAN)
    net_ema.load_state_dict(net.state_dict())
    net = run.place(net)
    net_ema = run.place(net_ema)
    net_ema.requires_grad_(False)  # stop-gradient: the teacher is only a moving average
    centers = torch.zeros(2, 1, args.out_dim, device=run.device)  # of class and patch tokens
    center_m = args.center_m if args.centering == "ema" else 1.0  # with 1 they stay 0
    torch._dynamo.config.automatic_dynamic_shapes = False  # as checkpoint fails with them
    student = run.parallel(net)
    teacher, aug = run.compiled(net_ema), run.compiled(augment)

    # -- optimiser
    last = [p for name, p in net.named_parameters() if "last_layer" in name]
    others = [p for name, p in net.named_parameters() if "last_layer" not in name]
    groups = [{"params": last},
              {"params": [p for p in others if p.ndim > 1]},
              {"params": [p for p in others if p.ndim <= 1]}]  # biases, norms, gammas: no decay
    optimizer = torch.optim.AdamW(groups, peak, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "net_ema": net_ema, "centers": centers,
             "optimizer": optimizer, "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net, net_ema, centers)  # puts back centres, batch norm after a skipped step
    cls_weight = 0.0 if args.no_class_loss else 1.0
    patch_weight = 0.0 if args.no_token_loss else 1.0
    even = math.log(args.out_dim)  # at chance; a view without a mask counts as 0
    equal = -2 * math.log(1e-8 * (1 + math.sqrt(net.backbone.dim)))  # KoLeo of equal tokens
    run.chance = {  # the values if all outputs are equal; KoLeo begins below
        "loss": even * (cls_weight + patch_weight * args.mask_crops) + args.koleo * equal,
        "cls": even, "patch": even * args.mask_crops, "entropy": even, "kl": 0.0, "koleo": equal}

    for epoch in run.epochs(data):
        hires = epoch >= args.epochs - args.hires_epochs
        size = args.hires_size if hires else args.image_size
        for step, views in run.batches(data, epoch, crops(args, size)):
            # -- step
            lr, m = lr_at(step, steps, warmup, peak), cosine(step, steps, args.m, args.m_end)
            wd = cosine(step, steps, args.weight_decay, args.weight_decay_end)
            tau_t = tau_at(step, steps, args.tau_t, args.tau_t_warmup)
            last_lr = 0.0 if epoch < args.freeze_last_layer else lr
            for group, rate, decay in zip(optimizer.param_groups, (last_lr, lr, lr), (wd, wd, 0)):
                group["lr"], group["weight_decay"] = rate, decay
            masks, hidden, weights = stratified_masks(step, size // args.patch_size, args, run)
            x = aug(views, args)  # 2 global views, then L local ones, (N, 3, S, S) each
            with run.autocast():
                h, _, s, s_patch = student(*x, masks=masks, hidden=hidden)  # ((2 + L) N, K), (M, K)
                _, _, t, t_patch = teacher(*x[:2], hidden=hidden)  # (2N, K), (M, K)
            h, s, t, s_patch, t_patch = (out.float() for out in (h, s, t, s_patch, t_patch))
            q = targets(t, centers[0], tau_t, args.centering, run.gather)
            q_patch = targets(t_patch, centers[1], tau_t, args.centering, run.gather)
            l_dino = class_loss(s.chunk(len(x)), q.chunk(2), args.tau_s)
            l_ibot = masked_loss(s_patch, q_patch, weights, args.tau_s)
            l_koleo = sum(koleo(view) for view in h.chunk(len(x))[:2])
            loss = cls_weight * l_dino + patch_weight * l_ibot + args.koleo * l_koleo
            t_entropy = mean_entropy(q)  # l_dino = entropy of q + KL(q, s)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_modules(net, args.clip)
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            ema_update(net_ema, net, torch.where(ok, m, 1.0))  # EMA: g_t = m g_t + (1 - m) g_s
            for C, outputs in zip(centers, (t, t_patch)):  # centres
                C.copy_(update_center(C, mean_of_all(outputs, run), center_m))
            undo(unless=ok)
            run.log(ok, loss=loss, cls=l_dino, patch=l_ibot, koleo=l_koleo, entropy=t_entropy,
                    kl=l_dino - t_entropy, lr=lr, m=m, wd=wd, tau_t=tau_t)
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
    is learned, and the entropy shows which of two collapses it is (DINO, Section 5.3)."""
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
    """Python that rebuilds the backbone with timm, which knows the released names; printed at the
    end of a run."""
    dim, depth, heads, _ = VITS[args.arch]
    stem = ""
    if args.arch == "vit_conv":
        stem = (f"\n\n{CONV_STEM}\n"
                f"net.patch_embed.proj = conv_stem({dim}, {args.patch_size})")
    more = ""
    if args.registers:
        more += f",\n    reg_tokens={args.registers}, no_embed_class=True"
    if args.ffn == "swiglu":
        ratio = (2 * SwiGLU(dim).w3.in_features + 0.5) / dim
        more += (",\n    mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU, "
                 f"mlp_ratio={ratio}")
    return ("import torch, timm\nfrom timm.models import vision_transformer\n"
            "from torch import nn\n\n"
            "class ViT(vision_transformer.VisionTransformer):\n"
            "    def load_state_dict(self, weights):  # with the released names\n"
            "        weights = vision_transformer.checkpoint_filter_fn(weights, self)\n"
            f"        return super().load_state_dict(weights)\n\nnet = ViT(  # {args.arch}\n"
            f"    img_size={args.image_size}, patch_size={args.patch_size}, embed_dim={dim}, "
            f"depth={depth}, num_heads={heads},\n    num_classes=0, init_values=1.0{more}){stem}")


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


class LayerScale(nn.Module):
    """x * gamma with a learned gamma (D,) (Touvron et al. 2021)."""

    def __init__(self, dim, gamma):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), gamma))

    def forward(self, x):
        return x * self.gamma


class SwiGLU(nn.Module):
    """w3(silu(w1 x) w2 x) (Shazeer 2020), w1 and w2 in one layer; width as in the released code."""

    def __init__(self, dim):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class ScaledBlock(nn.Module):
    """Pre-norm transformer block with LayerScale: (N, 1 + T, D) -> same. In training each residual
    branch is computed only for a random part of the images: a share drop_path is left out."""

    def __init__(self, dim, heads, ffn="mlp", layer_scale=1.0, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        if ffn == "swiglu":
            self.mlp = SwiGLU(dim)
        else:
            self.mlp = nn.Sequential(OrderedDict(
                fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x):
        x = self.add(x, lambda x: self.ls1(self.attn(self.norm1(x))))
        return self.add(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def add(self, x, branch):
        """x + branch(x): (N, 1 + T, D)."""
        if not self.training or self.drop_path == 0:
            return x + branch(x)
        n = len(x)
        kept = max(int(n * (1 - self.drop_path)), 1)
        some = torch.rand(n, device=x.device).argsort()[:kept]
        return torch.index_add(x, 0, some, branch(x[some]).to(x.dtype), alpha=n / kept)


def resized(pos_embed, height, width, registers):
    """Resize position embeddings (1, 1 + T, D) of a square grid to height x width patches.

    Bicubic, as in the released networks: with registers to a size, with antialiasing; without them
    by a factor, with 0.1 added to height and width. Non-square grids are returned unchanged.
    """
    patches = pos_embed.shape[1] - 1
    side = math.isqrt(patches)
    if (height, width) == (side, side) or side**2 != patches:
        return pos_embed
    if registers:
        how = {"size": (height, width), "antialias": True}
    else:
        how = {"scale_factor": ((height + 0.1) / side, (width + 0.1) / side)}
    grid = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), mode="bicubic", **how)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT.to(pos_embed.dtype)], 1)


class RegisterViT(nn.Module):
    """Vision transformer: (N, 3, H, W) -> (N, 1 + R + T, D) after the final norm: class token, R
    registers (Darcet et al. 2023), patches.

    Parameters are named and shaped as in the released weights. H, W: any multiples of P.
    """

    def __init__(self, dim, depth, heads, ffn="mlp", patch_size=14, image_size=518, registers=0,
                 layer_scale=1.0, drop_path=0.0, checkpoint=False):
        super().__init__()
        self.dim, self.patch_size = dim, patch_size
        self.registers, self.checkpoint = registers, checkpoint
        proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
            nn.init.normal_(self.register_tokens, std=1e-6)
        self.blocks = nn.ModuleList(
            ScaledBlock(dim, heads, ffn, layer_scale, drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_linear)

    def tokens(self, patches):
        """Embedded patches (N, D, H / P, W / P) -> (N, 1 + R + T, D): class token, registers
        (without positions), patches."""
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT], 1)
        x = x + resized(self.pos_embed, *patches.shape[2:], self.registers)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return x

    def encode(self, patches):
        x = self.tokens(patches)
        for block in self.blocks:
            if self.checkpoint:
                x = checkpoint(block, x, use_reentrant=False)
            else:
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


vit_small = functools.partial(RegisterViT, *VITS["vit_small"])  # (patch_size=14, ...)
vit_base = functools.partial(RegisterViT, *VITS["vit_base"])
vit_large = functools.partial(RegisterViT, *VITS["vit_large"])
vit_giant = functools.partial(RegisterViT, *VITS["vit_giant"])


def fit_tokens(weights, net):
    """Resample a file's position embeddings to the grid of net; add a mask token if it has none."""
    weights.setdefault("backbone.mask_token", net.backbone.mask_token)
    name = "backbone.pos_embed"
    if name in weights:
        side = math.isqrt(net.backbone.pos_embed.shape[1] - 1)
        weights[name] = resized(weights[name], side, side, net.backbone.registers)
    return weights


def main(argv=None):
    args = common.options("dinov2", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()
