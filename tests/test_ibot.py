"""iBOT against its paper (equations 2 and 3, Algorithm 1), BEiT's blocks, the released code and its
promises. What has the text of dino.py is tested in test_dino.py."""

import copy
import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from tools import TINY, close, draw, quiet, refused, same

import common
import ibot

SHORT = [*TINY, "--epochs", "1", "--eval-every", "0"]

# ==================================================================================================
# Loss
# ==================================================================================================


def H(t, s, C, tau_s, tau_t):
    """-P_t^T log P_s for the raw outputs of one token, with the sum over k written out."""
    K = range(len(t))
    of_t = [math.exp((t[k].item() - C[k].item()) / tau_t) for k in K]
    of_s = [math.exp(s[k].item() / tau_s) for k in K]
    return -sum(of_t[k] / sum(of_t) * math.log(of_s[k] / sum(of_s)) for k in K)


def masked(s, t, mask, C, tau_s, tau_t, mistake=None):
    """The paper's loss of the hidden patches of one view, typed in, or with a usual mistake:

        L_MIM = - sum_{i=1}^T m_i P_theta'^patch(u_i)^T log P_theta^patch(u^_i)

    over sum_i m_i (its Algorithm 1), and the mean over the images of a batch; one without a mask
    counts as 0 (released code: max(1, sum_i m_i)).
    """
    total, (B, T, _) = 0.0, s.shape
    C = {"no centre": 0 * C, "centre added": -C}.get(mistake, C)
    m = {"visible patches too": mask | True, "the visible patches": ~mask}.get(mistake, mask)
    if mistake == "temperatures swapped":
        tau_s, tau_t = tau_t, tau_s
    for b in range(B):
        divisor = {"all patches": T, "no divisor": 1, "one mean over the batch": m.sum().item() / B,
                   }.get(mistake, max(1, sum(m[b, i].item() for i in range(T))))
        for i in range(T):
            total += m[b, i].item() * H(t[b, i], s[b, i], C[0, 0], tau_s, tau_t) / divisor
    counted = m.any(1).sum().item() if mistake == "images without a mask left out" else B
    return total / counted


def some_mask(B, T, seed=0):
    """Differently many in every image, none in the first, all in the last."""
    mask = draw(B, T, seed=seed) < torch.linspace(-0.5, 0.7, B)[:, None]
    mask[0], mask[-1] = False, True
    return mask


def test_patch_loss_equation():
    for seed, (B, T, K, tau_s, tau_t) in enumerate(
            ((4, 6, 5, 0.1, 0.04), (3, 4, 2, 0.5, 0.3), (5, 9, 3, 1.0, 0.2))):
        s, t = (0.3 * draw(B, T, K, seed=10 * seed + i).requires_grad_() for i in range(2))
        C, mask = 0.3 * draw(1, 1, K, seed=seed + 99), some_mask(B, T, seed)
        given = s, t, mask, C, tau_s, tau_t
        value = ibot.patch_loss(*given)
        assert close(value.detach(), masked(*given))
        of_s, of_t = torch.autograd.grad(value, [s, t], allow_unused=True)
        assert of_t is None and torch.equal(of_s.abs().sum(2) > 1e-9, mask)
        for mistake in ("temperatures swapped", "no centre", "centre added", "visible patches too",
                        "the visible patches", "all patches", "no divisor",
                        "one mean over the batch", "images without a mask left out"):
            assert not close(value.detach(), masked(*given, mistake), 1e-3), mistake
        over_patches = -((t - C) / tau_t).softmax(1) * (s / tau_s).log_softmax(1) * mask[..., None]
        each = over_patches.sum((1, 2)) / mask.sum(1).clamp(min=1)
        assert not close(value.detach(), each.mean().detach(), 1e-3)
    assert torch.autograd.gradcheck(lambda s: ibot.patch_loss(s, t, mask, C, 0.5, 0.3), s)


def test_closed_forms_of_the_patches():
    K, mask = 6, some_mask(5, 8)  # of five images four have a mask
    t, even, C = draw(5, 8, K), 0 * draw(5, 8, K) + 3, draw(1, 1, K, seed=1)
    assert close(ibot.patch_loss(even, t, mask, C, 0.1, 0.04), 4 / 5 * math.log(K))
    assert ibot.patch_loss(t, t, mask & False, C, 0.1, 0.04) == 0
    large = 1e3 * t.float()  # float32: log(softmax) would be infinite
    assert ibot.patch_loss(large, -large, mask, 0 * C.float(), 0.1, 0.04).isfinite()


def two_terms(s_cls, t_cls, s_patch, t_patch, masks, C, C_patch, tau_s, tau_t, tau_t_patch,
              mistake=None):
    """The paper's L_[CLS] = - P_theta'^[CLS](v)^T log P_theta^[CLS](u^), the mean over pairs of
    different views, with local ones as in DINO; and L_MIM of the same view, averaged over two."""
    same_view = mistake == "class of the same view"
    pairs = [(i, j) for i in range(2) for j in range(len(s_cls)) if (i == j) == same_view]
    if mistake == "no local views":
        pairs = [(i, j) for i, j in pairs if j < 2]
    if mistake == "centres swapped":
        C, C_patch = C_patch[0], C[None]
    tau_t_patch = tau_t if mistake == "one temperature" else tau_t_patch
    of_class = [H(t, s, C[0], tau_s, tau_t) for i, j in pairs for t, s in zip(t_cls[i], s_cls[j])]
    t_patch = t_patch[::-1] if mistake == "patches of the other view" else t_patch
    masks = masks[::-1] if mistake == "masks of the other view" else masks
    of_views = [masked(s, t, m, C_patch, tau_s, tau_t_patch)
                for s, t, m in zip(s_patch, t_patch, masks)]
    divisor = 1 if mistake == "sum of the two views" else 2
    return sum(of_class) / len(of_class), sum(of_views) / divisor


def test_ibot_loss_equation():
    mistakes = ["class of the same view", "centres swapped", "one temperature",
                "patches of the other view", "masks of the other view", "sum of the two views"]
    for views, B, T, K in ((2, 3, 4, 5), (5, 4, 6, 2)):
        s_cls, t_cls = ([0.3 * draw(B, K, seed=10 * i + j) for j in range(n)]
                        for i, n in enumerate((views, 2)))
        s_patch, t_patch = ([0.3 * draw(B, T, K, seed=i + j) for j in (0, 1)] for i in (20, 30))
        masks = [some_mask(B, T, seed=i) for i in range(2)]
        given = (s_cls, t_cls, s_patch, t_patch, masks, 0.3 * draw(1, K, seed=50),
                 0.3 * draw(1, 1, K, seed=51), 0.1, 0.04, 0.07)
        got = ibot.ibot_loss(*given)
        assert close(got, two_terms(*given))
        for mistake in mistakes if views == 2 else mistakes + ["no local views"]:
            assert not close(got, two_terms(*given, mistake), 1e-3), mistake
    assert torch.autograd.gradcheck(
        lambda *s: ibot.ibot_loss(s[:5], t_cls, s[5:], t_patch, masks, *given[5:7], 0.5, 0.3, 0.4),
        [x.requires_grad_() for x in s_cls + s_patch])


# ==================================================================================================
# Masks
# ==================================================================================================


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def beit_blocks(H, W, ratio, generator, least, mistake=None):
    """BEiT's Algorithm 1 as iBOT bounds it, with sets of patches: rectangles of area s between
    `least` and what is left, aspect r log-uniform in [0.3, 1 / 0.3], sides sqrt(s r), sqrt(s / r),
    anywhere; ten attempts for each, one that hides too much or nothing new does not count."""
    hidden, attempts = set(), 0
    while attempts < 10 and (left := ratio * H * W - len(hidden)) >= 1:
        u = torch.rand(4, generator=generator).tolist()
        s = least + u[0] * (left - least)
        r = math.exp(math.log(0.3) + u[1] * (math.log(1 / 0.3) - math.log(0.3)))
        r = {"all squares": 1.0, "height and width swapped": 1 / r}.get(mistake, r)
        h, w = round(math.sqrt(s * r)), round(math.sqrt(s / r))
        attempts += 1
        if h < H and w < W:
            top, start = math.floor(u[2] * (H - h + 1)), math.floor(u[3] * (W - w + 1))
            block = {(top + i, start + j) for i in range(h) for j in range(w)}
            new = len(block) if mistake == "what is hidden counted twice" else len(block - hidden)
            if block - hidden and new <= left:
                hidden, attempts = hidden | block, 10 * (mistake == "one block")
    return torch.tensor([[(i, j) in hidden for j in range(W)] for i in range(H)])


def test_block_mask():
    """BEiT's blocks, patch for patch, from the same numbers."""
    def agrees(mistake=None, least=None, own=None):
        for i, (h, w, ratio) in enumerate([(14, 14, 0.3), (14, 14, 0.5), (7, 12, 0.4), (4, 4, 0.5),
                                           (12, 5, 0.2), (2, 2, 0.5)] * 5):
            area = (min(h, w) // 3) ** 2 if least is None else least
            expected = beit_blocks(h, w, ratio, numbers(i), area, mistake)
            if not torch.equal(ibot.block_mask(h, w, ratio, numbers(i), own), expected):
                return False
        return True

    assert agrees() and agrees(least=4, own=4) and not agrees(least=4) and not agrees(least=0)
    ratios = torch.linspace(0, 0.5, 40)  # many at once as one by one
    draws = torch.stack([torch.rand(300, generator=numbers(i)) for i in range(40)])
    for i, mask in enumerate(ibot.block_masks(14, 14, ratios, draws)):
        assert torch.equal(mask, beit_blocks(14, 14, ratios[i].item(), numbers(i), 16))
    for mistake in ("all squares", "height and width swapped", "what is hidden counted twice",
                    "one block"):
        assert not agrees(mistake), mistake


def random_mask(height, width, ratio, generator):
    draws = torch.rand(1, height * width, generator=generator)
    return ibot.random_masks(height, width, torch.tensor([ratio]).double(), draws)[0]


def neighbours(mask):
    """Share of neighbouring patches of which both are hidden or neither."""
    pairs = (mask[1:] == mask[:-1]).flatten(), (mask[:, 1:] == mask[:, :-1]).flatten()
    return torch.cat(pairs).double().mean().item()


def test_masks_of_every_size():
    """At most the share that was asked for, near to it on a large grid, and in blocks; one by one
    exactly as many. They end, whatever the grid."""
    kinds = ibot.block_mask, random_mask
    for h, w in ((1, 1), (1, 3), (2, 2), (4, 4), (3, 8), (14, 14)):
        for most in (ratio * h * w for ratio in (0.0, 0.1, 0.3, 0.5, 1.0)):
            block, single = (make(h, w, most / (h * w), numbers()) for make in kinds)
            assert block.shape == single.shape == (h, w)
            assert block.dtype == single.dtype == torch.bool
            assert block.sum() <= most and single.sum() == int(most)
            assert block.any() or most < 1 or min(h, w) == 1
    blocks, singles = ([make(14, 14, 0.4, numbers(i)) for i in range(100)] for make in kinds)
    assert sum(mask.sum() for mask in blocks) > 0.9 * 0.4 * 100 * 196
    assert min(map(neighbours, blocks)) > 0.7 > 0.65 > max(map(neighbours, singles))
    for masks in (blocks, singles):
        assert len(torch.stack(masks).flatten(1).unique(dim=0)) == 100


def completed(*argv, side=None, n=4000):
    args = ibot.options([*argv])
    ibot.complete(args, side, n)
    return args


def masks_of(*argv, step=0, rank=0, world=1):
    args = completed("--batch-size", "200", "--image-size", "56", "--patch-size", "4", *argv)
    return ibot.draw_masks(step, args, SimpleNamespace(rank=rank, world=world))


def test_draw_masks():
    """Counted on 400 views; a normal deviate is beyond 3.5 once in 2000 times."""
    plain, single = masks_of(), masks_of("--random-masks")
    for seen in (plain, single):
        assert seen.shape == (400, 14, 14) and seen.dtype == torch.bool
        shares = seen.double().mean((1, 2))
        assert abs((shares > 0).double().mean() - 0.5) < 3.5 * 0.5 / 20
        shares = shares[shares > 0]  # uniform in [0.1, 0.5], of standard deviation 0.12
        assert 0.07 < shares.min() and 0.45 < shares.max() <= 0.5
        assert abs(shares.mean() - 0.3) < 3.5 * 0.12 / math.sqrt(len(shares)) + 0.01  # less corners
        first, second = seen.flatten(1).chunk(2)  # each view of an image is on its own
        both = first.any(1) & second.any(1)
        assert abs(both.double().mean() - 0.25) < 3.5 * 0.43 / math.sqrt(200)
        assert not (first == second).all(1)[both].any()
    for other in (masks_of(step=1), masks_of("--seed", "1"), single):
        assert not torch.equal(plain, other)
    for world in (1, 2, 4):  # each process makes its images' masks only, and they are the same
        shares = [masks_of(rank=r, world=world).chunk(2) for r in range(world)]
        assert torch.equal(plain, torch.cat([s[i] for i in range(2) for s in shares]))
    assert not masks_of("--mask-crops", "0").any()
    every = masks_of("--mask-crops", "1", "--mask-ratio", "0.25", "0.25", "--random-masks")
    assert (every.sum((1, 2)) == 49).all() and len(every.flatten(1).unique(dim=0)) == 400


# ==================================================================================================
# Model
# ==================================================================================================

TINIEST = "--hidden 10 --out-dim 12 --image-size 16 --patch-size 4 --local-size 8".split()


def small(args, drop_path=0.0):
    """iBOT on next to nothing: of width 8, without batch norm, and with weights that are large."""
    torch.manual_seed(args.seed)
    net = ibot.IBOT(ibot.ViT(8, 2, 2, 4, 16), 12, 10, separate_heads=args.separate_heads)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    for p in (net.masked_embed, net.backbone.pos_embed, net.backbone.cls_token):
        nn.init.normal_(p)
    return net


def small_net(*argv):
    return small(completed(*TINIEST, *argv)).double().eval()


def outputs(g, x, mask=None, mistake=None):
    """Of one view, typed in: patches, masked_embed in place of the hidden ones, positions, blocks,
    then the head on every token. -> (N, K) of the class token, (N, T, K) of the patches"""
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (ibot.MEAN, ibot.STD))
    x = g.backbone.patch_embed((x - mean) / std).flatten(2).transpose(1, 2)  # (N, T, D)
    positions = ibot.resample(g.backbone.pos_embed, *2 * [math.isqrt(x.shape[1])])
    if mask is not None:
        hidden = mask.flatten(1).unsqueeze(2).to(x.dtype)
        x = x * (1 - hidden) + g.masked_embed * hidden
        x = x - positions[:, 1:] * hidden if mistake == "after the positions" else x
    x = torch.cat([g.backbone.cls_token.expand(len(x), 1, -1), x], 1) + positions
    for block in g.backbone.blocks:
        x = block(x)
    z = g.head.mlp(g.backbone.norm(x))
    z = z / z.norm(dim=2, keepdim=True)
    layers = [g.head.last_layer, g.head.last_layer2 or g.head.last_layer]
    layers = layers[::-1] if mistake == "last layers swapped" else layers
    return layers[0](z[:, 0]), layers[1](z[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8, 8, 8), (16, 16, 16, 16)])
def test_model(separate, sizes):
    """Views together are views one by one; masks are of the first two, also where all have one
    size; a teacher gets none."""
    net = small_net(*["--separate-heads"] * separate)
    views = [draw(3, 3, side, side, seed=i).sigmoid() for i, side in enumerate(sizes)]
    masks = draw(6, 4, 4, seed=9) < 0
    h, z, s, s_patch = net(*views, masks=masks, with_patches=True)
    assert h.shape == (3 * len(views), 8) and z.shape == (3 * len(views), 256)
    assert s.shape == (3 * len(views), 12) and s_patch.shape == (6, 16, 12)

    def agree(said, masks, mistake=None):
        parts = [outputs(net, x, m, mistake) for x, m in zip(views, masks)]
        patches = torch.cat([p for _, p in parts[:2]])
        return close(said[0], torch.cat([c for c, _ in parts]), 1e-6) and close(
            said[1], patches, 1e-6)

    u, v, none = *masks.split(3), [None] * len(views)
    assert agree((s, s_patch), [u, v, *none[2:]])
    for mistake in ["after the positions"] + ["last layers swapped"] * separate:
        assert not agree((s, s_patch), [u, v, *none[2:]], mistake), mistake
    assert not agree((s, s_patch), [v, u, *none[2:]]) and not agree((s, s_patch), none)
    if sizes == (16, 16, 16, 16):
        assert not agree((s, s_patch), [u, v, u, v])
    assert agree(net(*views, with_patches=True)[2:], none)
    assert len(net(*views)) == 3 and close(net(*views)[2], net(*views, with_patches=True)[2])


@torch.no_grad()
def test_what_is_hidden_is_not_seen():
    net, x, masks = small_net(), draw(2, 3, 16, 16).sigmoid(), draw(2, 4, 4, seed=3) < 0
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]  # (2, 1, 16, 16)

    def said(x, masks=masks):
        *_, s, patches = net(x[:1], x[1:], masks=masks, with_patches=True)
        return torch.cat([s[:, None], patches], 1)  # (2, 17, 12)

    noise = draw(2, 3, 16, 16, seed=7)
    assert torch.equal(said(x), said(torch.where(pixels, noise, x)))
    assert not close(said(x), said(torch.where(pixels, x, noise)), 1e-3)
    assert not close(said(x), said(x, masks & False), 1e-3)
    blind = said(x, masks | True)[:, 1:]
    assert close(blind[0], blind[1]) and not close(blind[0, 0], blind[0, 1], 1e-3)  # it knows where
    nn.init.zeros_(net.backbone.pos_embed)
    blind = said(x, masks | True)[:, 1:]
    assert close(blind, blind[:1, :1].expand_as(blind))


def test_names_of_the_weights():
    """timm's below backbone, the released ones of the head; masked_embed is not in the backbone,
    which goes out without it."""
    shared, separate = (set(small_net(*flag).state_dict()) for flag in ([], ["--separate-heads"]))
    assert separate - shared == {"head.last_layer2.weight_g", "head.last_layer2.weight_v"}
    assert {k for k in shared if not k.startswith("backbone.")} == {
        "masked_embed", "head.last_layer.weight_g", "head.last_layer.weight_v", *(
            f"head.mlp.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias"))}
    net = ibot.build(completed("--separate-heads"))
    assert net.masked_embed.shape == (1, 128) and net.masked_embed.eq(0).all()
    assert not torch.equal(net.head.last_layer2.weight_v, net.head.last_layer.weight_v)


# ==================================================================================================
# The step
# ==================================================================================================


def algorithm_1(net, views, masks, flags, mistake=None):
    """The paper's Algorithm 1, typed in from its lines:

        u^, m_u = blockwise_mask(u); v^, m_v = blockwise_mask(v)
        student: class and patch tokens of u^, v^; teacher: those of u, v
        L_[CLS] = H(u^_s, v_t, C) / 2 + H(v^_s, u_t, C) / 2
        L_MIM = sum(m_u H(u^_s, u_t, C')) / sum(m_u) / 2 + the same of v
        update g_s; g_t = l g_t + (1 - l) g_s
        C = m C + (1 - m) mean of u_t, v_t, and C' of their patches, over batch and tokens

    with AdamW, and with local views as DINO has them. -> gs, gt, C, C', entropy of the teacher and
    KL of the class term in the last step.
    """
    steps, gs, gt = len(views), net, copy.deepcopy(net)
    C, C_patch, m = torch.zeros(1, 12), torch.zeros(1, 1, 12), flags.center_m
    moments = {k: (0 * p, 0 * p) for k, p in gs.named_parameters()}

    def schedule(k, first, last):
        return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2

    def H(s, t, c, tau_t):
        s = torch.softmax(s / flags.tau_s, dim=-1)
        t = torch.softmax((t.detach() - c) / tau_t, dim=-1)
        return -(t * torch.log(s)).sum(dim=-1)

    def average(l):  # noqa: E741, the paper's name
        for old, new in zip(gt.parameters(), gs.parameters()):
            old.data = l * old.data + (1 - l) * new.data

    for k, ((u, v, *others), (m_u, m_v)) in enumerate(zip(views, masks)):
        tau, tau_patch = (0.04 + (last - 0.04) * k / steps
                          for last in (flags.tau_t, flags.tau_t_patch))
        l = schedule(k, flags.m, 1.0)  # noqa: E741
        whole, blind = mistake == "student sees all", mistake == "teacher sees the mask"
        (us, us_p), (vs, vs_p) = (outputs(gs, x, None if whole else m_x)
                                  for x, m_x in ((u, m_u), (v, m_v)))
        (ut, ut_p), (vt, vt_p) = (outputs(gt, x, m_x if blind else None)
                                  for x, m_x in ((u, m_u), (v, m_v)))
        said = torch.cat([ut_p, vt_p]).flatten(0, 1)
        if mistake == "centre of hidden patches":
            said = said[torch.cat([m_u, m_v]).flatten()]
        if mistake == "one centre":
            said = torch.cat([ut, vt])
        centred = [m * C + (1 - m) * torch.cat([ut, vt]).mean(0).detach(),
                   m * C_patch + (1 - m) * said.mean(0).detach()]
        if mistake == "centres before the loss":
            C, C_patch = centred
        pairs = [(vt, us), (ut, vs), *((t, outputs(gs, x)[0]) for x in others for t in (ut, vt))]
        of_class = sum(H(s, t, C, tau).mean() for t, s in pairs) / len(pairs)
        if mistake == "patches of the other view":
            ut_p, vt_p = vt_p, ut_p
        of_patches = sum((m_x.flatten(1) * H(s, t, C_patch, tau_patch)).sum(1).div(
            m_x.sum((1, 2)).clamp(min=1)).mean() / 2 for s, t, m_x in (
                (us_p, ut_p, m_u), (vs_p, vt_p, m_v)))
        loss = of_class * (not flags.no_class_loss) + of_patches * (not flags.no_token_loss)
        P = torch.softmax((torch.cat([ut, vt]) - C) / tau, dim=1)
        entropy = -(P * P.log()).sum(1).mean()
        teaching = torch.stack([entropy, of_class - entropy]).detach()
        named = {k: p for k, p in gs.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, [*named.values()], materialize_grads=True)
        if mistake == "EMA before the step":
            average(l)
        for (name, p), g in zip(named.items(), grads):
            rests = "last_layer" in name and not (
                mistake == "the second layer does not rest" and "layer2" in name)
            if flags.freeze_last_layer and rests:  # the run has one epoch
                continue
            g = g * min(1.0, flags.clip / (g.norm().item() + 1e-6))
            a, b = moments[name]
            moments[name] = a, b = 0.9 * a + 0.1 * g, 0.999 * b + 0.001 * g**2
            lr = schedule(k, flags.lr * 16 / 256, 0.0)
            decay = schedule(k, flags.weight_decay, flags.weight_decay_end) * (p.ndim > 1)
            a, b = a / (1 - 0.9 ** (k + 1)), b / (1 - 0.999 ** (k + 1))
            p.data = p.data - lr * decay * p.data - lr * a.data / (b.data.sqrt() + 1e-8)
        if mistake != "EMA before the step":
            average(l)
        if mistake != "centres before the loss":
            C, C_patch = centred
    return gs, gt, C, C_patch, teaching


@pytest.fixture
def doubles():
    """Double precision: Adam makes steps of the noise of a gradient that is 0."""
    single = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t.double() if t.ndim else single(t))
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def shipped(doubles, tmp_path, monkeypatch):
    """flags -> what ibot.main makes of them in three steps: the untrained network, views and masks
    of every step, `state` of last.pt, the row of metrics.jsonl and what was printed."""

    def run(flags=""):
        argv = [*SHORT, *TINIEST, *"--lr 0.16 --warmup 0 --weight-decay 0.04 --m 0.5 --tau-t 0.06 "
                "--tau-t-patch 0.09 --tau-t-warmup 1 --weight-decay-end 0.4 --clip 1e9 "
                "--freeze-last-layer 0 --local-crops 0".split(), *flags.split(),
                "--out", str(tmp_path / f"run{flags}")]
        seen, augment = [], ibot.augment

        def looking(views, args):
            seen.append([x.double() for x in augment(views, args)])
            return [x.clone() for x in seen[-1]]

        with monkeypatch.context() as patch:
            patch.setattr(ibot, "build", small)
            patch.setattr(ibot, "augment", looking)
            patch.setattr(ibot, "report", lambda *_: {"verdict": "not looked at"})
            patch.setattr(common, "curves", lambda *_: None)
            results, said = quiet(ibot, argv)
        args, folder = completed(*argv), Path(results["out"])
        views = [v for v in seen if len(v[0]) == 16]  # those of views.png are eight
        assert len(views) == 3 and not close(*views[0][:2], 0.1)
        alone = SimpleNamespace(rank=0, world=1)
        net = small(args)
        for k, p in net.named_parameters():
            p.requires_grad_(not (args.norm_last_layer and k.endswith("weight_g")))
        return SimpleNamespace(
            net=net, views=views, args=args, said=said,
            masks=[ibot.draw_masks(step, args, alone).split(16) for step in range(3)],
            state=torch.load(folder / "last.pt", weights_only=True)["state"],
            row=json.loads((folder / "metrics.jsonl").read_text()))

    return run


def agree(run, flags, mistake=None):
    """Whether networks, centres and what is said of the teacher are the algorithm's."""
    gs, gt, *others = algorithm_1(copy.deepcopy(run.net), run.views, run.masks, flags, mistake)
    theirs = [*gs.state_dict().values(), *gt.state_dict().values(), *others]
    ours = [*run.state["net"].values(), *run.state["net_ema"].values(),
            *(run.state[k] for k in ("center", "center_patch", "teaching"))]
    assert len(theirs) == len(ours) > 70 and all(t.isfinite().all() for t in theirs)
    return all(close(a, b, 1e-8) for a, b in zip(theirs, ours))


def test_algorithm_1(shipped):
    run = shipped()
    assert agree(run, run.args) and all(len(v) == 2 for v in run.views)
    for mistake in ("student sees all", "teacher sees the mask", "centres before the loss",
                    "centre of hidden patches", "one centre", "patches of the other view",
                    "EMA before the step"):
        assert not agree(run, run.args, mistake), mistake


@pytest.mark.parametrize("flags, changed", [
    ("--no-token-loss", "no_token_loss"), ("--no-class-loss", "no_class_loss"),
    ("--mask-crops 0", None), ("--random-masks --mask-crops 1", None), ("--local-crops 2", None),
    ("--separate-heads --clip 0.2 --center-m 0.5", "clip"),
    ("--separate-heads --norm-last-layer", None),
    ("--separate-heads --freeze-last-layer 1", "freeze_last_layer")])
def test_flags_change_the_algorithm(shipped, flags, changed):
    run = shipped(flags)
    assert agree(run, run.args) and len(run.views[0]) == 2 + run.args.local_crops
    if changed:  # without it the algorithm is another
        plain = vars(run.args) | {changed: 1e9 if changed == "clip" else False}
        assert not agree(run, Namespace(**plain))
    if "freeze" in flags:
        assert not agree(run, run.args, "the second layer does not rest")
    still = [k for k, p in run.net.named_parameters() if torch.equal(p, run.state["net"][k])]
    assert len(still) == 4 * ("freeze" in flags) + 2 * ("norm-last" in flags)
    shown, a, b = run.row, "--no-class-loss" not in flags, "--no-token-loss" not in flags
    assert close(shown["loss"], a * shown["class"] + b * shown["patch"])
    assert (shown["patch"] > 0) == (flags != "--mask-crops 0") and shown["class"] > 0
    chance = (a + b * run.args.mask_crops) * math.log(12)  # without a mask the patches' is 0
    assert f": loss {shown['loss']:.3f} (chance {chance:.3f})" in run.said


# ==================================================================================================
# Weights in, and options
# ==================================================================================================

NANO = "--arch vit_nano --patch-size 8 --out-dim 12 --hidden 10 --no-head-bn --image-size 32"


def options(*changes):
    return completed(*NANO.split(), *changes)


def released(weights):
    """Under the released names: masked_embed is of the backbone, and the second last layer is
    always there."""
    out = {k: v for k, v in weights.items() if k != "masked_embed"}
    out["backbone.masked_embed"] = weights["masked_embed"]
    return {k.replace("last_layer.", "last_layer2."): v for k, v in out.items()} | out


@pytest.fixture(params=["shared", "separate"])
def official(request, tmp_path):
    """Files in the layouts of the released ones and of our own last.pt: name -> path, and the
    weights of student and teacher."""
    nets = SimpleNamespace(argv=["--separate-heads"] * (request.param == "separate"))
    for seed, name in (("5", "student"), ("6", "teacher")):
        net = ibot.build(options(*nets.argv, "--seed", seed))
        nn.init.normal_(net.masked_embed)
        setattr(nets, name, dict(net.state_dict()))
    student, teacher = released(nets.student), released(nets.teacher)
    full = {"student": {f"module.{k}": v for k, v in student.items()}, "epoch": 3, "teacher":
            {k: v for k, v in teacher.items() if "masked" not in k}, "args": Namespace(seed=0),
            "ibot_loss": {"center": torch.zeros(1, 12), "center2": torch.zeros(1, 1, 12)}}
    flat = {k[len("backbone."):]: v for k, v in student.items() if "backbone" in k}
    last = {"method": "ibot", "state": {"net": nets.student, "net_ema": nets.teacher}}
    for name, content in (("full", full), ("backbone", {"state_dict": flat}), ("last", last)):
        torch.save(content, tmp_path / f"{name}.pth")
        setattr(nets, name, str(tmp_path / f"{name}.pth"))
    return nets


def loaded(path, args):
    """What load_weights makes of a network of another seed."""
    ibot.load_weights(net := ibot.build(args), path, args)
    return dict(net.state_dict())


def test_released_checkpoints(official, capsys):
    unmasked = official.teacher | {"masked_embed": torch.zeros(1, 128)}  # the released has none
    for path, branch, expected in (
            (official.full, "student", official.student), (official.full, "teacher", unmasked),
            (official.last, "student", official.student),
            (official.last, "teacher", official.teacher)):
        assert same(loaded(path, options(*official.argv, "--branch", branch)), expected)
        n = 51 + 2 * len(official.argv)
        assert f"{n} tensors loaded, missing 0, unexpected 0" in capsys.readouterr().out
    for path, others in ((official.backbone, []), (official.full, ["--out-dim", "13"])):
        args = options(*official.argv, *others, "--branch", "student")
        got, untrained = loaded(path, args), ibot.build(args).state_dict()
        assert "the head stays random" in capsys.readouterr().out
        assert all(torch.equal(v, (untrained if "head." in k else official.student)[k])
                   for k, v in got.items())
    other = loaded(official.full, options(*official.argv, "--image-size", "16"))
    assert other["backbone.pos_embed"].shape == (1, 5, 128)


def test_wrong_checkpoints(official, tmp_path, capsys):
    """Another network, other last layers, a file with one of two networks."""
    torch.save({"student": official.student}, tmp_path / "half.pth")
    wrong = [(official.full, ["--arch", "vit_tiny"]), (tmp_path / "half.pth", official.argv),
             (official.backbone, ["--patch-size", "4"])]
    if official.argv:  # not those of two layers where there is one
        wrong += [(official.full, []), (official.last, [])]
    else:  # a second one is not made up; a released file lists it
        wrong += [(official.last, ["--separate-heads"])]
    for path, changes in wrong:
        with pytest.raises(SystemExit) as stopped:
            loaded(path, options(*changes))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and str(path) in error, changes


@pytest.mark.parametrize("argv, names", [
    ("--mask-ratio 0.5 0.1", "--mask-ratio"), ("--mask-ratio 0.3", "--mask-ratio"),
    ("--mask-ratio 0.1 1.5", "--mask-ratio"), ("--mask-crops 2", "--mask-crops"),
    ("--tau-t-patch 0", "--tau-t-patch"), ("--arch resnet18", "--arch"),
    ("--patch-size 32", "--patch-size"), ("--local-size 8 --patch-size 16", "--patch-size"),
    ("--local-scale 0.9", "--local-scale"), ("--optimizer sgd", "--optimizer"),
    ("--mask-ratio 0.01 0.05", "hides none"),
    ("--no-class-loss --no-token-loss", "nothing to learn")])
def test_wrong_options(argv, names, tmp_path, capsys):
    out = tmp_path / "run"
    assert names in refused(ibot, [*SHORT, *argv.split(), "--out", out], capsys)
    assert not (out / "last.pt").exists()


def test_recipe_is_the_papers():
    """The released run of ViT-S: 10 local views, areas from 0.25 and 0.05, K of 8192."""
    args = completed(side=500, n=10**6)
    assert ibot.crops(args) == [common.Crop(224, (0.25, 1.0), (3 / 4, 4 / 3), 2),
                                common.Crop(96, (0.05, 0.25), (3 / 4, 4 / 3), 10)]
    assert (args.tau_s, args.tau_t, args.tau_t_patch, args.m) == (0.1, 0.07, 0.07, 0.996)
    assert (args.arch, args.out_dim, args.mask_ratio) == ("vit_small", 8192, [0.1, 0.5])
