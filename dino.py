"""DINO: Emerging Properties in Self-Supervised Vision Transformers
Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, 2021, https://arxiv.org/abs/2104.14294
Slides: "Contrastive Learning: Distillation with No Labels (DINO)", "How does DINO work?".

A student says of every crop of an image what a teacher says of another, larger one: both answer
with a distribution over K classes that nobody defined. The teacher is a slow average of the
student. Centring its answers keeps one class from winning everywhere, sharpening them keeps all
classes from being equal.

Algorithm 1 (on the slides) with multi-crop, for a batch of N images:
 1. x1, x2, ... = augment(x)        2 global views, L smaller local ones     `crops`, `augment`
 2. s = g_s(x1, x2, ...)            student, all views                       `DINO.forward`
 3. t = g_t(x1, x2)                 teacher, the global views only           the same
 4. L = mean of H(t_i, s_j) over all pairs of different views                `dino_loss`
    H(t, s) = -sum softmax((t - C) / tau_t) log softmax(s / tau_s)           `H`
 5. update g_s                      AdamW, clipped by tensor                 `clipped_update`
 6. g_t = m g_t + (1 - m) g_s       m from --m to 1                          `ema_update`
 7. C = m_C C + (1 - m_C) mean(t)   after the loss                           `update_center`

Symbols: x_i (N, 3, S, S) views in [0, 1]; h (V N, d) class tokens of V views; z (V N, 256) unit
vectors before the last layer; s, t (N, K) raw outputs of student and teacher for a view; C (1, K)
centre; tau_s, tau_t temperatures; m momentum. net is g_s, net_ema is g_t, which is kept.

Departures from the paper:
 1. Schedules go by steps, also that of tau_t (released code: by epochs), and end at 0 (1e-6). Warm-
    ups are shares of the run.
 2. Crops are resized bilinearly with antialiasing (bicubic).
 3. RECIPES: small images without blur; narrow ViTs start with sines (`start_with_sines`). The
    built-in set on a CPU has a smaller network, and batch norm in the head (an option of the
    released code): without it the teacher became uniform (lessons/dino_collapse.py).

    python dino.py      105 s on 2 CPU cores; top-1 of h: 26.4 +- 1.4 % linear, 27.4 +- 0.7 % k-NN,
                        3 seeds (untrained 16.0 and 13.7, pixels 29.6 and 48.5); README: more
"""

import argparse
import copy
import functools
import json
import math
import time
from collections import OrderedDict
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


def momentum(most):
    """m for a run on n images: at best a half-life of a twentieth of its steps, at least 0.9."""
    return lambda args, n: min(most, max(0.9, 0.5 ** (20 * args.batch_size / (args.epochs * n))))


def local(args, n):
    """Side of a local view: 96 pixels (DINOv2: 98) where the image has 224, in whole patches."""
    return args.patch_size * max(1, round(args.image_size * 3 / 7 / args.patch_size))


RECIPES = {  # by data, an option overrides an entry; lr is for a batch of 256 and grows with it
    # the built-in set, on a CPU
    "shapes": dict(arch="vit_nano", start="sines", stem="7x7", patch_size=8, image_size=32,
                   local_size=16, local_crops=4, global_scale=0.5, local_scale=0.2,
                   blur=[0.0, 0.0, 0.0], solarize=0.0, drop_path=0.0, out_dim=512, hidden=512,
                   head_bn=True, tau_t=0.04, epochs=10, batch_size=64, lr=4e-3, weight_decay=0.04,
                   weight_decay_end=0.04, m=momentum(0.99)),
    # images up to 64 pixels: no blur
    "small": dict(arch="vit_tiny", start="sines", stem="3x3", patch_size=4, image_size=32,
                  local_size=16, local_crops=6, global_scale=0.4, local_scale=0.1,
                  blur=[0.0, 0.0, 0.0], solarize=0.2, drop_path=0.1, out_dim=4096, hidden=2048,
                  head_bn=False, tau_t=0.07, epochs=200, batch_size=512, lr=5e-4,
                  weight_decay=0.04, weight_decay_end=0.4, m=momentum(0.996)),
    # larger ones: the released code's ViT-S of 100 epochs
    "large": dict(arch="vit_small", start="paper", stem="7x7", patch_size=16, image_size=224,
                  local_size=local, local_crops=8, global_scale=0.4, local_scale=0.05,
                  blur=[1.0, 0.1, 0.5], solarize=0.2, drop_path=0.1, out_dim=65536, hidden=2048,
                  head_bn=False, tau_t=0.07, epochs=100, batch_size=256, lr=5e-4,
                  weight_decay=0.04, weight_decay_end=0.4, m=momentum(0.996)),
}
ARCHS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
         "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3])}
VITS = {  # width, depth, heads
    "vit_nano": (128, 3, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}


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
    o("--out", help="output folder (runs/dino-<dataset>-s<seed>)")
    o("--resume", action="store_true", help="go on with the interrupted run in --out")
    o = p.add_argument_group("data").add_argument
    o("--dataset", default="shapes", help="shapes, a torchvision set or a folder (shapes)")
    o("--data-dir", default="data", help="where downloaded sets are kept (data)")
    o("--limit", type=whole(1), help="use only so many training images (all)")
    o("--image-size", type=whole(8), help="side of a view in pixels")
    o("--workers", type=whole(0), default=common.cores(), help="readers of files (a core each)")
    o("--memory-limit", type=common.number(float, 0), default=8, help="GB, more is streamed (8)")
    o = p.add_argument_group("method").add_argument
    o("--arch", choices=[*VITS, *ARCHS], help="of the backbone (paper: vit_small)")
    o("--start", choices=["paper", "sines"], help="weights of the ViT before training (paper; "
      "sines: for narrow ones and short runs)")
    o("--stem", choices=["3x3", "7x7"], help="of a ResNet; 3x3: for small images")
    o("--patch-size", type=whole(1), help="of a ViT, pixels (paper: 16 and 8)")
    o("--drop-path", type=common.number(float, 0, 0.99), help="stochastic depth in "
      "the student's last block (paper: 0.1)")
    o("--out-dim", type=whole(2), help="K (paper: 65536)")
    o("--hidden", type=whole(1), help="width of the head (paper: 2048)")
    o("--head-bn", action=argparse.BooleanOptionalAction, help="batch norm in the head (paper: no)")
    o("--norm-last-layer", action="store_true", help="rows of the last layer keep length 1")
    o("--tau-s", type=positive, default=0.1, help="temperature of the student (0.1)")
    o("--tau-t", type=positive, help="of the teacher (paper: 0.04 to 0.07)")
    o("--tau-t-warmup", type=share, default=0.3, help="share of the run in which "
      "tau_t grows from 0.04 (0.3)")
    o("--m", type=share, help="momentum of the teacher at first (paper: 0.996)")
    o("--center-m", type=share, default=0.9, help="momentum of the centre (0.9)")
    o("--no-centering", action="store_true", help="C stays 0")
    o("--no-sharpening", action="store_true", help="tau_t = 1")
    o("--local-crops", type=whole(0), help="L, local views (paper: 8)")
    o("--local-size", type=whole(8), help="side of a local view in pixels (paper: 96)")
    o("--global-scale", type=share, help="area of a global crop, from this share to 1, and the "
      "largest of a local one (paper: 0.4)")
    o("--local-scale", type=share, help="smallest area of a local crop (paper: 0.05)")
    o("--blur", type=share, nargs=3, help="probability in x1, x2, locals (paper: 1, 0.1, 0.5)")
    o("--solarize", type=share, help="probability in x2 (paper: 0.2)")
    o = p.add_argument_group("optimiser").add_argument
    o("--epochs", type=whole(1), help="passes over the training images (paper: 100 to 800)")
    o("--batch-size", type=whole(2), help="N, images in a step of all processes (paper: 1024)")
    o("--optimizer", choices=["adamw", "sgd"], default="adamw", help="(adamw; for ResNets sgd)")
    o("--lr", type=positive, help="peak for a batch of 256, others in proportion (paper: 5e-4)")
    o("--weight-decay", type=share, help="at first (paper: 0.04)")
    o("--weight-decay-end", type=share, help="at last, by half a cosine (paper: 0.4)")
    o("--warmup", type=share, default=0.1, help="share of the run (0.1; paper: 10 epochs)")
    o("--clip", type=positive, default=3.0, help="longest gradient of a tensor (3)")
    o("--freeze-last-layer", type=whole(0), default=1, help="epochs at first (1)")
    o = p.add_argument_group("evaluation").add_argument
    o("--eval-every", type=whole(0), help="epochs (a quarter of the run; 0: never)")
    o("--knn-k", type=whole(1), default=20, help="neighbours (20)")
    o("--knn-tau", type=positive, default=0.07, help="temperature of their votes (0.07)")
    o("--init", metavar="FILE", help="start from a backbone.pt, last.pt or official file")
    o("--branch", choices=["teacher", "student"], default="teacher", help="of a full checkpoint")
    o("--eval", metavar="FILE", help="evaluate such a file, train nothing")
    return p.parse_args(argv)


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
    """Multi-crop ("Implementation details"): two global and L local crops of every image."""
    ratio, s = (3 / 4, 4 / 3), args.global_scale
    local = common.Crop(args.local_size, (args.local_scale, s), ratio, args.local_crops)
    return [common.Crop(args.image_size, (s, 1.0), ratio, 2), local][: 1 + (args.local_crops > 0)]


def augment(views, args):
    """The rest of it, as BYOL's: views (N, 3, S, S) in [0, 1], two global, then local ones -> same,
    an own draw for every image."""
    seen, parts = [], [views[0], views[1], *([torch.cat(views[2:])] if views[2:] else [])]
    for x, blur, solarize in zip(parts, args.blur, (0.0, args.solarize, 0.0)):
        x = common.flip(x, p=0.5)
        x = common.grey(common.color_jitter(x, 0.4, 0.4, 0.2, 0.1, p=0.8), p=0.2)
        if blur:  # as wide as a tenth of the image
            x = common.blur(x, sigma=(0.1, 2.0), taps=x.shape[-1] // 20 * 2 + 1, p=blur)
        seen += common.solarize(x, p=solarize).split(len(views[0]))
    return seen


# ==================================================================================================
# Model
# ==================================================================================================


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the input, ImageNet's


class Attention(nn.Module):
    """Multi-head self-attention: (N, T, D) -> same."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, x):
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)  # (N, heads, T, D / heads) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, x):
        """(N, heads, T, T): row i says how much token i takes from each."""
        q, k, _ = self.split(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class Block(nn.Module):
    """Pre-norm transformer block; in training a residual branch is left out with drop_path."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = drop_path

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x):
        """Stochastic depth (Huang et al. 2016): 0 for whole images, the others scaled up."""
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


def resample(pos_embed, height, width):
    """Position embeddings (1, 1 + T, D) of a square grid for one of height x width patches.

    The released code's formula: bicubic, by a factor with 0.1 added to the size.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (height, width) == (side, side):
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), scale_factor=((height + 0.1) / side, (width + 0.1) / side),
                         mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT.to(pos_embed.dtype)], 1)


class ViT(nn.Module):
    """Vision transformer: (N, 3, H, W) -> (N, 1 + T, D) after the final norm, class token first.

    Names and shapes of timm and of the released weights. H, W: any multiples of the patch size.
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
        """Embedded patches (N, D, H / P, W / P) -> (N, 1 + T, D), class token first, all with their
        positions."""
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

    def attention(self, x):
        """Of the last block: (N, heads, 1 + T, 1 + T)."""
        x = self.tokens(self.patch_embed(x))
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))


def init_linear(m):
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        nn.init.zeros_(m.bias)


@torch.no_grad()
def start_with_sines(vit):
    """Positions as sines and cosines of row and column (as in MoCo v3), in waves from two grids to
    two patches long, and linear layers of the blocks by Xavier's rule.

    The paper's start, deviations of 0.02 everywhere, is for widths of 384 and more: in a narrow ViT
    patches outweigh where they are. Test: test_start_with_sines.
    """
    side = math.isqrt(vit.pos_embed.shape[1] - 1)
    waves = math.pi / side * side ** torch.linspace(0, 1, vit.dim // 4)  # radians a patch
    angles = torch.arange(side).outer(waves)
    line = torch.cat([angles.sin(), angles.cos()], 1)  # (side, dim / 2)
    vit.pos_embed[0, 1:] = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1)
    for m in vit.blocks.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)


def vit_tiny(patch_size=16, image_size=224, drop_path=0.0):
    return ViT(*VITS["vit_tiny"], patch_size, image_size, drop_path)


def vit_small(patch_size=16, image_size=224, drop_path=0.0):
    return ViT(*VITS["vit_small"], patch_size, image_size, drop_path)


def vit_base(patch_size=16, image_size=224, drop_path=0.0):
    return ViT(*VITS["vit_base"], patch_size, image_size, drop_path)


def vit_large(patch_size=16, image_size=224, drop_path=0.0):
    return ViT(*VITS["vit_large"], patch_size, image_size, drop_path)


class WeightNorm(nn.Module):
    """A linear layer without bias whose rows have length weight_g: (N, D) -> (N, K)."""

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
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.mlp = nn.Sequential(nn.Linear(inputs, hidden), *norm, nn.GELU(),
                                 nn.Linear(hidden, hidden), *copy.deepcopy(norm), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.mlp.apply(init_linear)
        self.last_layer = WeightNorm(bottleneck, outputs)

    def forward(self, x):
        z = F.normalize(self.mlp(x), dim=1)
        return z, self.last_layer(z)


class DINO(nn.Module):
    """Backbone and head: V views (N, 3, S, S) in [0, 1] -> h (V N, d), z (V N, 256), s (V N, K).

    Views of one size, next to each other, go through the backbone together.
    """

    def __init__(self, backbone, out_dim=65536, hidden=2048, head_bn=False):
        super().__init__()
        self.backbone, self.head = backbone, Head(backbone.dim, out_dim, hidden, head_bn)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, *views):
        sizes = dict.fromkeys(x.shape[-1] for x in views)
        groups = [torch.cat([x for x in views if x.shape[-1] == size]) for size in sizes]
        h = [self.backbone((x - self.mean) / self.std) for x in groups]
        h = torch.cat([x[:, 0] if x.ndim == 3 else x for x in h])  # of a ViT the class token
        return h, *self.head(h)


def resnet(arch, stem, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier: (N, 3, S, S) -> (N, d)."""
    net = ResNet(*ARCHS[arch], norm_layer=norm_layer)
    net.dim, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def build(args, drop_path=0.0):
    """The untrained network: the same weights for the same seed whenever it is called."""
    torch.manual_seed(args.seed)
    if args.arch in VITS:
        backbone = ViT(*VITS[args.arch], args.patch_size, args.image_size, drop_path)
        if args.start == "sines":
            start_with_sines(backbone)
    else:
        backbone = resnet(args.arch, args.stem)
    return DINO(backbone, args.out_dim, args.hidden, args.head_bn)


# ==================================================================================================
# Loss
# ==================================================================================================


def H(t, s, center, tau_s, tau_t):
    """Cross-entropy of teacher and student (slide Algorithm 1, H; paper, equation 2), mean over N:

        H(t, s) = -sum_k softmax((t - C) / tau_t)_k log softmax(s / tau_s)_k

    t, s: (N, K) raw outputs, center: (1, K) -> scalar. No gradient to t. Test: test_h_equation.
    """
    t = F.softmax((t.detach() - center) / tau_t, dim=1)  # centre and sharpen
    return -(t * F.log_softmax(s / tau_s, dim=1)).sum(1).mean()


def dino_loss(student, teacher, center, tau_s, tau_t):
    """Mean of H(t_i, s_j) over all pairs of different views (DINO, equation 3; slide Algorithm 1).

    student, teacher: lists of (N, K), a view each; the teacher's views are the student's first ones
    -> scalar. Every softmax is taken once. Test: test_dino_loss_equation.
    """
    t = [F.softmax((t.detach() - center) / tau_t, dim=1) for t in teacher]
    total, pairs = sum(t), len(teacher) * (len(student) - 1)
    loss = 0.0
    for j, s in enumerate(student):  # sum over i of H(t_i, s_j) is H of the sum of t_i
        others = total - t[j] if j < len(t) else total
        loss = loss - (others * F.log_softmax(s / tau_s, dim=1)).sum(1).mean() / pairs
    return loss


def entropy(teacher, center, tau_t):
    """Mean entropy of the teacher's n answers, (n, K) -> scalar (DINO's paper, Figure 7).

    Test: test_entropy.
    """
    return torch.special.entr(F.softmax((teacher.detach() - center) / tau_t, dim=1)).sum(1).mean()


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================


@torch.no_grad()
def ema_update(net_ema, net, m):
    """theta_ema <- m theta_ema + (1 - m) theta (slide "Momentum Contrast (MoCo)").

    The parameters alone, no buffers. m: a float or a 0-dim tensor. Test: test_ema_update.
    """
    ema, new = list(net_ema.parameters()), list(net.parameters())
    weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)
    torch._foreach_lerp_(ema, new, [weight] * len(new))  # in one pass; exact for m = 0 and 1


def update_center(center, teacher, m):
    """C <- m C + (1 - m) mean of t (DINO, equation 4; slide Algorithm 1), of raw outputs.

    center: (1, K), teacher: (n, K), or its mean over all processes (1, K) -> (1, K).
    Test: test_center.
    """
    return m * center + (1 - m) * teacher.mean(0, keepdim=True)


def cosine(step, steps, start, end):
    """From start to end by half a cosine, for m and the weight decay. Test: test_cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def tau_at(step, steps, tau_t, warmup):
    """The teacher's temperature: from 0.04 linearly to tau_t in this share of the run.

    Test: test_tau_at.
    """
    share = min(1.0, step / (warmup * steps)) if warmup else 1.0
    return tau_t + (1 - share) * min(0.04 - tau_t, 0.0)


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


def averaged(x):
    """Mean over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def lr_at(step, steps, warmup, peak):
    """Linear to peak in `warmup` steps, then a half cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def clipped_update(loss, net, optimizer, scaler, buffers, clip, frozen):
    """The optimiser's step -> loss, averaged over processes, and finite (0-dim bool). Where loss or
    gradient of any process are not, weights and moments stay and buffers, a list of (b, b before
    the forward pass), go back. loss: 0-dim, or (T,) with its parts -> (T,).

    The gradient of every tensor is cut to the length `clip` by itself, as the released code does,
    not all of them together. frozen: parameters that this step leaves alone, whatever it decays.
    Decided on the device: the fused optimisers do nothing where found_inf is 1.
    """
    scaler.unscale_(optimizer)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads)
    loss = loss.detach().reshape(-1)
    said = torch.cat([~torch.isfinite(torch.stack(norms).sum() + loss.sum()).view(1), loss])
    said = averaged(said)
    failed = (said[0] > 0).float()
    torch._foreach_mul_(grads, [(clip / (n + 1e-6)).clamp(max=1.0) for n in norms])
    for p in frozen:
        p.grad = None
    optimizer.grad_scale, optimizer.found_inf = None, failed
    optimizer.step()
    scaler.update()
    for b, before in buffers:
        b.copy_(torch.where(failed > 0, before, b))
    return said[1:], failed == 0


def load_weights(net, path, args):
    """Load last.pt or a full released checkpoint, backbone and head, or a backbone alone. Position
    embeddings of another resolution are resampled."""
    found, method = common.read_checkpoint(path), Path(__file__).stem
    if "state" in found:
        if found["method"] != method:
            common.fail(f"{path} is a run of {found['method']}, not of {method}; give its "
                        "backbone.pt")
        weights = found["state"][{"teacher": "net_ema", "student": "net"}[args.branch]]
    elif args.branch in found:
        weights = {k.removeprefix("module."): v for k, v in found[args.branch].items()}
    else:
        found = found.get("state_dict", found)
        weights = {f"backbone.{k}": v for k, v in found.items() if not k.startswith("fc.")}
    own = net.state_dict()
    if not any(k.startswith("head.") and v.shape == own.get(k, v).shape
               for k, v in weights.items() if k.endswith("weight_v")):
        print("the head stays random: what is said of z means nothing before training")
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
        weights |= {k: v for k, v in own.items() if k.startswith("head.")}
    if (k := "backbone.pos_embed") in weights and k in own:
        side = math.isqrt(own[k].shape[1] - 1)
        weights[k] = resample(weights[k], side, side)
    common.load_into(net, weights, path)


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
    least = min([args.image_size] + [args.local_size] * (args.local_crops > 0))
    if args.arch in VITS and least < args.patch_size:
        common.fail(f"views of {least} pixels are smaller than --patch-size {args.patch_size}")
    if args.arch in VITS and args.image_size % args.patch_size:
        print(f"warning: {args.image_size % args.patch_size} rows and columns of a view are in no "
              "patch, make --image-size a multiple of --patch-size")
    if args.local_crops and args.local_size >= args.image_size:
        print("warning: local views are not smaller than global ones, lower --local-size")
    net, net_ema = build(args, args.drop_path), build(args)
    if args.init or args.eval:
        load_weights(net, args.init or args.eval, args)
    if run.world > 1 and run.device.type == "cuda":
        net, net_ema = map(nn.SyncBatchNorm.convert_sync_batchnorm, (net, net_ema))
    elif run.world > 1 and (args.head_bn or args.arch in ARCHS):
        print("note: no synchronised batch norm on CPUs, each process has its own statistics")
    for part in (net, net_ema):
        part.load_state_dict(net.state_dict())
        part.to(run.device, memory_format=torch.channels_last)
    net_ema.requires_grad_(False)
    net.head.last_layer.weight_g.requires_grad_(not args.norm_last_layer)
    center = torch.zeros(1, args.out_dim, device=run.device)
    teaching = torch.full((2,), math.nan, device=run.device)  # entropy and KL of the last step
    compiled = torch.compile if args.compile else lambda f: f
    augmented, student, teacher = compiled(augment), compiled(net), compiled(net_ema)
    student = nn.parallel.DistributedDataParallel(student) if run.world > 1 else student
    state = {"net": net, "net_ema": net_ema, "center": center, "teaching": teaching}

    # -- optimiser
    peak, warmup = args.lr * batch / 256, round(args.warmup * steps)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "decays": 1.0},
              {"params": [p for p in trained if p.ndim <= 1], "decays": 0.0}]
    kind = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9)}
    optimizer = kind[args.optimizer](groups, peak, fused=True)
    for p in trained if args.optimizer == "sgd" else ():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)  # unset if a first step fails
    last_layer = [*net.head.last_layer.parameters()]
    chance = {"loss": math.log(args.out_dim), "entropy": math.log(args.out_dim), "kl": 0.0}
    half_life = math.log(2) / max(-math.log(args.m or 1e-9), 1e-9) / per_epoch
    print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {batch} / 256; "
          f"half-life of the teacher {half_life:.2g} epochs at first")
    if args.local_scale > args.global_scale:
        common.fail(f"--local-scale {args.local_scale:g} is over --global-scale "
                    f"{args.global_scale:g}, the largest of a local crop")
    if half_life > args.epochs / 10:
        print("warning: the teacher's half-life is over a tenth of the run, lower --m")
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
    show_views(folder, data, args, run)
    for epoch in range(step // per_epoch, 0 if args.eval else args.epochs):
        first = step % per_epoch
        batches = data.epoch(epoch, first, batch, crops(args), run, args.seed)
        bar = common.Bar(batches, per_epoch, first, f"epoch {epoch + 1}/{args.epochs}")
        for views, _ in bar:
            # -- step
            rates = {"lr": lr_at(step, steps, warmup, peak), "m": cosine(step, steps, args.m, 1.0),
                     "wd": cosine(step, steps, args.weight_decay, args.weight_decay_end),
                     "tau_t": (tau := 1.0 if args.no_sharpening else
                               tau_at(step, steps, args.tau_t, args.tau_t_warmup))}
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = rates["lr"], rates["wd"] * group["decays"]
            buffers = [(b, b.clone()) for f in (net, net_ema) for b in f.buffers()
                       if b.is_floating_point()]
            x = augmented(views, args)  # 2 + L views (N, 3, S, S)
            with run.autocast():
                _, _, s = student(*x)  # ((2 + L) N, K)
                _, _, t = teacher(*x[:2])  # (2 N, K)
            s, t = s.float(), t.float()
            loss = dino_loss(s.chunk(len(x)), t.chunk(2), center, args.tau_s, tau)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            unsure = entropy(t, center, tau)  # loss = entropy of t + KL(t, s)
            said = torch.stack([loss, unsure, loss - unsure])
            frozen = last_layer if step < args.freeze_last_layer * per_epoch else []
            losses, finite = clipped_update(said, net, optimizer, scaler, buffers, args.clip,
                                            frozen)
            ema_update(net_ema, net, torch.where(finite, rates["m"], 1.0))
            centred = update_center(center, averaged(t.mean(0, keepdim=True)), args.center_m)
            center.copy_(torch.where(finite, centred * (not args.no_centering), center))
            teaching.copy_(torch.where(finite, losses[1:], teaching))
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
    """Python that rebuilds the backbone with timm or torchvision and loads the file strictly."""
    load = f"torch.load({str(path)!r}, weights_only=True)['state_dict']"
    if args.arch in VITS:
        dim, depth, heads = VITS[args.arch]
        return (f"import torch, timm\nnet = timm.models.VisionTransformer(\n"
                f"    img_size={args.image_size}, patch_size={args.patch_size}, embed_dim={dim}, "
                f"depth={depth}, num_heads={heads},\n    num_classes=0)  # {args.arch}\n"
                f"net.load_state_dict({load})\n")
    block, layers = ARCHS[args.arch]
    stem = "net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()\n"
    return (f"import torch\nfrom torch import nn\nfrom torchvision.models import resnet\n"
            f"net = resnet.ResNet(resnet.{block.__name__}, {layers})  # {args.arch}\n"
            f"{stem * (args.stem == '3x3')}net.fc = nn.Identity()\nnet.load_state_dict({load})\n")


# ==================================================================================================
# Evaluation
# ==================================================================================================

KEPT = "net_ema"  # of state: the network that is evaluated and written


def central(args, size=None):
    """The view for evaluation: a central square, of 7/8 of a larger image (released code)."""
    return [common.Crop(size or args.image_size, 1.0 if args.image_size <= 64 else 0.875)]


def show_views(folder, data, args, run):
    """views.png: eight training images and, to the right, what the network gets to see of them."""
    eight = torch.arange(min(8, len(data.train.labels)))
    draws = [next(common.batches(data.train, eight, 8, c, run.device, seed=(args.seed, i)))[0]
             for i, c in enumerate([central(args)] + [crops(args)] * 3)]
    seen = [v for views in draws[1:] for v in augment(views, args)]
    common.picture(folder / "views.png", draws[0] + seen)


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
    """The figures of z, which has this shape, and of the teacher in the last step, in words."""
    spread, rank, D = figures["spread"], figures["rank_z"], shape[1]
    flat = rank < 0.05 * min(shape)
    word = "collapsed to a point" if spread < 0.1 else "dimensional collapse" if flat else "healthy"
    said = f"z has spread {spread:.2f} of 1, rank {rank:.0f} of {D}"
    H, KL = (state["teaching"] / math.log(args.out_dim)).tolist()  # nan before the first step
    if H > 0.95 and KL < 0.01:
        word = "uniform teacher"
    elif H < 0.05 and KL < 0.01:
        word = "one-hot teacher"
    return f"{word}: {said}" + f", teacher's entropy {H:.2f} of ln K, KL {KL:.3f}" * (H >= 0)


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
