"""iBOT against its paper (equations 2 and 3, Algorithm 1), BEiT's blocks, the released code, timm
and its promises."""

import copy
import functools
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from tools import PLAIN, TINY, Watched, blocks_agree, close, draw, fails, options, same, train

import common
import ibot


def completed(*argv, column=0, n=4000):
    """The options with the defaults of a column of the table, for n images."""
    args = options(ibot, [*PLAIN, *argv] if column == 0 else argv)
    for name, row in ibot.OPTIONS.items():
        if getattr(args, name) is None:
            value = row[column](args, n) if callable(row[column]) else row[column]
            setattr(args, name, [*value] if isinstance(value, tuple) else value)
    return args


# ==================================================================================================
# Loss
# ==================================================================================================


def H(t, s, C, tau_s, tau_t):
    """-P_t^T log P_s for the raw outputs of one token, with the sum over k written out."""
    K = range(len(t))
    of_t = [math.exp((t[k].item() - C[k].item()) / tau_t) for k in K]
    of_s = [math.exp(s[k].item() / tau_s) for k in K]
    return -sum(of_t[k] / sum(of_t) * math.log(of_s[k] / sum(of_s)) for k in K)


def pairs_of_views(student, teacher, C, tau_s, tau_t, mistake=None):
    """DINO's equation 3 as a mean: H of each of the teacher's views and each other view."""
    if mistake == "temperatures swapped":
        tau_s, tau_t = tau_t, tau_s
    C = {"no centre": 0 * C, "centre added": -C}.get(mistake, C)
    same_view = mistake == "the same view"
    pairs = [(i, j) for i in range(len(teacher)) for j in range(len(student))
             if (i == j) == same_view]
    if mistake == "no local views":
        pairs = [(i, j) for i, j in pairs if j < len(teacher)]
    terms = [H(t, s, C[0], tau_s, tau_t) for i, j in pairs for t, s in zip(teacher[i], student[j])]
    return sum(terms) / (len(pairs) if mistake == "sum over the batch" else len(terms))


def test_dino_loss_equation():
    for views, N, K, tau_s, tau_t in ((2, 3, 5, 0.1, 0.04), (5, 4, 2, 0.5, 0.3)):
        s, t = ([0.3 * draw(N, K, seed=10 * i + j).requires_grad_() for j in range(n)]
                for i, n in enumerate((views, 2)))
        given = s, t, 0.3 * draw(1, K, seed=99), tau_s, tau_t
        value = ibot.dino_loss(*given)
        assert close(value.detach(), pairs_of_views(*given))
        mistakes = ["temperatures swapped", "no centre", "centre added", "the same view",
                    "sum over the batch"] + ["no local views"] * (views > 2)
        for mistake in mistakes:
            assert not close(value.detach(), pairs_of_views(*given, mistake), 1e-3), mistake
        grads = torch.autograd.grad(value, [*s, *t], allow_unused=True)
        assert all(g.abs().max() > 1e-5 for g in grads[:views])
        assert all(g is None for g in grads[views:])  # no gradient to the teacher
    assert torch.autograd.gradcheck(lambda *s: ibot.dino_loss(s, t, given[2], 0.5, 0.3), s)


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
    """Differently many in every image: none in the first, one in the second, all in the last."""
    mask = draw(B, T, seed=seed) < torch.linspace(-0.5, 0.7, B)[:, None]
    mask[:2], mask[1, seed % T], mask[-1] = False, True, True
    return mask


def test_patch_loss_equation():
    for seed, (B, T, K, tau_s, tau_t) in enumerate(
            ((4, 6, 5, 0.1, 0.04), (3, 4, 2, 0.5, 0.3), (5, 9, 3, 1.0, 0.2))):
        s, t = (0.3 * draw(B, T, K, seed=10 * seed + i).requires_grad_() for i in range(2))
        C, mask = 0.5 * draw(1, 1, K, seed=seed + 77), some_mask(B, T, seed)
        given = s, t, mask, C, tau_s, tau_t
        value = ibot.patch_loss(*given)
        assert close(value.detach(), masked(*given))
        of_s, of_t = torch.autograd.grad(value, [s, t], allow_unused=True)
        assert of_t is None and torch.equal(of_s.abs().sum(2) > 1e-9, mask)
        for mistake in ("temperatures swapped", "no centre", "centre added", "visible patches too",
                        "the visible patches", "all patches", "no divisor",
                        "one mean over the batch", "images without a mask left out"):
            assert not close(value.detach(), masked(*given, mistake), 1e-3), mistake
    assert torch.autograd.gradcheck(lambda s: ibot.patch_loss(s, t, mask, C, 0.5, 0.3), s)


def test_closed_forms():
    K, mask = 6, some_mask(5, 8)  # of five images four have a mask
    t, even, C = draw(5, 8, K), 0 * draw(5, 8, K) + 3, draw(1, 1, K, seed=1)
    assert close(ibot.patch_loss(even, t, mask, C, 0.1, 0.04), 4 / 5 * math.log(K))
    assert ibot.patch_loss(t, t, mask & False, C, 0.1, 0.04) == 0
    assert close(ibot.dino_loss([even[0]] * 4, [t[0]] * 2, C[0], 0.1, 0.04), math.log(K))
    large = 1e3 * t.float()  # float32: log(softmax) would be infinite
    assert ibot.patch_loss(large, -large, mask, 0 * C.float(), 0.1, 0.04).isfinite()
    assert ibot.dino_loss([large[0], -large[0]], [large[0]] * 2, C[0].float(), 0.1, 0.04).isfinite()


def two_terms(s_cls, t_cls, s_patch, t_patch, masks, C, C_patch, tau_s, tau_t, tau_t_patch,
              mistake=None):
    """The paper's L_[CLS] = - P_theta'^[CLS](v)^T log P_theta^[CLS](u^), the mean over pairs of
    different views, with local ones as in DINO; and L_MIM of the same view, averaged over two."""
    if mistake == "centres swapped":
        C, C_patch = C_patch[0], C[None]
    tau_t_patch = tau_t if mistake == "one temperature" else tau_t_patch
    t_patch = t_patch[::-1] if mistake == "patches of the other view" else t_patch
    masks = masks[::-1] if mistake == "masks of the other view" else masks
    of_views = [masked(s, t, m, C_patch, tau_s, tau_t_patch)
                for s, t, m in zip(s_patch, t_patch, masks)]
    divisor = 1 if mistake == "sum of the two views" else 2
    return (pairs_of_views(s_cls, t_cls, C, tau_s, tau_t, mistake), sum(of_views) / divisor)


def test_ibot_loss_equation():
    for views, B, T, K in ((2, 3, 4, 5), (5, 4, 6, 2)):
        s_cls, t_cls = ([0.3 * draw(B, K, seed=10 * i + j) for j in range(n)]
                        for i, n in enumerate((views, 2)))
        s_patch, t_patch = ([0.3 * draw(B, T, K, seed=i + j) for j in (0, 1)] for i in (20, 30))
        masks = [some_mask(B, T, seed=i) for i in range(2)]
        given = (s_cls, t_cls, s_patch, t_patch, masks, 0.3 * draw(1, K, seed=50),
                 0.3 * draw(1, 1, K, seed=51), 0.1, 0.04, 0.07)
        got = ibot.ibot_loss(*given)
        assert close(got, two_terms(*given))
        for mistake in ("the same view", "centres swapped", "one temperature",
                        "patches of the other view", "masks of the other view",
                        "sum of the two views"):
            assert not close(got, two_terms(*given, mistake), 1e-3), mistake
    assert torch.autograd.gradcheck(
        lambda *s: ibot.ibot_loss(s[:5], t_cls, s[5:], t_patch, masks, *given[5:7], 0.5, 0.3, 0.4),
        [x.requires_grad_() for x in s_cls + s_patch])


def test_entropy():
    t, C, tau = 0.2 * draw(3, 5).requires_grad_(), 0.2 * draw(1, 5, seed=9), 0.3
    by_hand = sum(H(row, row - C[0], C[0], tau, tau) for row in t) / 3
    got = ibot.entropy(t, C, tau)
    assert close(got, by_hand) and not got.requires_grad
    for other in (ibot.entropy(t, -C, tau), ibot.entropy(t, C, 2 * tau)):
        assert not close(other, by_hand, 1e-3)
    assert close(ibot.entropy(C.expand(4, 5), C, 0.04), math.log(5))
    assert ibot.entropy(1e5 * torch.eye(5), 0 * C, 0.04) == 0  # 0 log 0 is 0


# ==================================================================================================
# Masks
# ==================================================================================================


def test_block_mask():
    make = ibot.block_mask
    assert blocks_agree(make) and blocks_agree(functools.partial(make, least=4), least=4)
    assert not blocks_agree(make, least=4) and not blocks_agree(make, least=0)
    for mistake in ("all squares", "height and width swapped", "what is hidden counted twice",
                    "one block", "nine attempts"):
        assert not blocks_agree(make, mistake), mistake


def neighbours(mask):
    """Share of neighbouring patches of which both are hidden or neither."""
    pairs = (mask[1:] == mask[:-1]).flatten(), (mask[:, 1:] == mask[:, :-1]).flatten()
    return torch.cat(pairs).double().mean().item()


def test_masks_of_every_size():
    """At most the share that was asked for, near to it on a large grid, and in blocks; one by one
    exactly as many. They end, whatever the grid."""
    def generator():
        return torch.Generator().manual_seed(0)

    kinds = ibot.block_mask, ibot.random_mask
    for h, w in ((1, 1), (1, 3), (2, 2), (4, 4), (3, 8), (14, 14)):
        for most in (ratio * h * w for ratio in (0.0, 0.1, 0.3, 0.5, 1.0)):
            block, single = (make(h, w, most / (h * w), generator()) for make in kinds)
            assert block.shape == single.shape == (h, w)
            assert block.dtype == single.dtype == torch.bool
            assert block.sum() <= most and single.sum() == int(most)
            assert block.any() or most < 1 or min(h, w) == 1
    ratios = torch.full((2, 50), 0.4)
    blocks, singles = (make(14, 14, ratios, generator()).flatten(0, 1) for make in kinds)
    assert blocks.sum() > 0.9 * 0.4 * 100 * 196
    assert min(map(neighbours, blocks)) > 0.7 > 0.65 > max(map(neighbours, singles))
    for masks in (blocks, singles):
        assert len(masks.flatten(1).unique(dim=0)) == 100


def masks_of(*argv, step=0, rank=0, world=1):
    args = completed("--batch-size", "200", "--image-size", "56", "--patch-size", "4", *argv)
    return ibot.draw_masks(step, args, SimpleNamespace(rank=rank, world=world))


def test_draw_masks():
    """Counted on 400 views; a normal deviate is beyond 3.5 once in 2000 times."""
    plain, single = masks_of(), masks_of("--random-masks")
    for masks in (plain, single):
        assert masks.shape == (400, 14, 14) and masks.dtype == torch.bool
        shares = masks.double().mean((1, 2))
        assert abs((shares > 0).double().mean() - 0.5) < 3.5 * 0.5 / 20
        shares = shares[shares > 0]  # uniform in [0.1, 0.5], of standard deviation 0.12
        assert 0.07 < shares.min() and 0.45 < shares.max() <= 0.5
        assert abs(shares.mean() - 0.3) < 3.5 * 0.12 / math.sqrt(len(shares)) + 0.01  # less corners
        first, second = masks.flatten(1).chunk(2)  # each view of an image is on its own
        both = first.any(1) & second.any(1)
        assert abs(both.double().mean() - 0.25) < 3.5 * 0.43 / math.sqrt(200)
        assert not (first == second).all(1)[both].any()
    for other in (masks_of(step=1), masks_of("--seed", "1"), single):
        assert not torch.equal(plain, other)
    for world in (1, 2, 4):  # each process makes its images' masks, and they are the same
        parts = [masks_of(rank=r, world=world).chunk(2) for r in range(world)]
        assert torch.equal(plain, torch.cat([p[i] for i in range(2) for p in parts]))
    assert not masks_of("--mask-crops", "0").any()
    every = masks_of("--mask-crops", "1", "--mask-ratio", "0.25", "0.25", "--random-masks")
    assert (every.sum((1, 2)) == 49).all() and len(every.flatten(1).unique(dim=0)) == 400


# ==================================================================================================
# Views, model and backbone
# ==================================================================================================


def test_the_recipe_is_the_released_one():
    """The released ViT-S: 10 local views, areas from 0.25 and 0.05, K of 8192."""
    args = completed(column=2, n=10**6)
    assert ibot.crops(args) == [common.Crop(224, (0.25, 1.0), (3 / 4, 4 / 3), 2),
                                common.Crop(96, (0.05, 0.25), (3 / 4, 4 / 3), 10)]
    assert (args.tau_s, args.tau_t, args.tau_t_patch, args.m) == (0.1, 0.07, 0.07, 0.996)
    assert (args.arch, args.out_dim, args.mask_ratio) == ("vit_small", 8192, [0.1, 0.5])
    assert (args.blur, args.solarize, args.lr) == ([1.0, 0.1, 0.5], 0.2, 5e-4)
    assert len(ibot.crops(completed("--local-crops", "0"))) == 1


def test_augment():
    """Blur in u, v and local views and solarization in v, all or nothing on 64 grey images."""
    bright, edge = torch.full((64, 3, 40, 40), 0.75), torch.zeros(64, 3, 40, 40)
    edge[..., ::2] = 0.3
    args = completed("--blur", "0", "1", "0", "--solarize", "1")
    for x, changed in ((bright, (False, True, False)), (edge, (False, True, False))):
        common.reseed(0)
        u, v, *local = ibot.augment([x, x, x[..., :20], x[..., :20]], args)
        assert [len(view) for view in (u, v, *local)] == [64] * 4 and local[1].shape[3] == 20
        rows = [view.std(3).amax((1, 2)) for view in (u, v, local[0])]  # 0 where all is one grey
        if x is edge:  # blurred stripes are weaker
            assert rows[1].median() < 0.5 * rows[0].median()
            assert rows[2].median() > 0.5 * rows[0].median()
        else:
            assert [(view.mean() < 0.5).item() for view in (u, v, local[0])] == [*changed]
    assert not torch.equal(local[0], local[1])


TINIEST = "--hidden 10 --out-dim 12 --image-size 16 --patch-size 4 --local-size 8 --no-head-bn"


def net_of(*argv):
    """The built network in double precision, with weights that are large."""
    net = ibot.build(completed(*TINIEST.split(), *argv)).double().eval()
    for i, (name, p) in enumerate(net.named_parameters()):
        if p.ndim > 1 and "weight_g" not in name:
            p.data = draw(*p.shape, seed=i) * (0.3 if p.numel() > 1000 else 1.0)
    return net


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
    layers = [g.head.last_layer, g.head.last_layer2]
    layers = layers[::-1] if mistake == "last layers swapped" else layers
    return layers[0](z[:, 0]), layers[1](z[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8, 8, 8), (16, 16, 16, 16)])
def test_model(separate, sizes):
    """Views together are views one by one; masks are of the first two, also where all have one
    size; a teacher gets none."""
    net = net_of(*["--separate-heads"] * separate)
    views = [draw(3, 3, side, side, seed=i).sigmoid() for i, side in enumerate(sizes)]
    masks = draw(6, 4, 4, seed=9) < 0
    h, z, s, s_patch = net(*views, masks=masks, with_patches=True)
    assert h.shape == (3 * len(views), 128) and z.shape == (3 * len(views), 256)
    assert s.shape == (3 * len(views), 12) and s_patch.shape == (6, 16, 12)

    def agree(s, s_patch, masks, mistake=None):
        parts = [outputs(net, x, m, mistake) for x, m in zip(views, masks)]
        patches = torch.cat([p for _, p in parts[:2]])
        return close(s, torch.cat([c for c, _ in parts]), 1e-5) and close(s_patch, patches, 1e-5)

    u, v, none = *masks.split(3), [None] * len(views)
    assert agree(s, s_patch, [u, v, *none[2:]])
    for mistake in ["after the positions"] + ["last layers swapped"] * separate:
        assert not agree(s, s_patch, [u, v, *none[2:]], mistake), mistake
    assert not agree(s, s_patch, [v, u, *none[2:]]) and not agree(s, s_patch, none)
    assert agree(*net(*views, with_patches=True)[2:], none)
    assert len(net(*views)) == 3 and close(net(*views)[2], net(*views, with_patches=True)[2])


@torch.no_grad()
def test_hidden_patches_have_no_influence():
    net, x, masks = net_of(), draw(2, 3, 16, 16).sigmoid(), draw(2, 4, 4, seed=3) < 0
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]  # (2, 1, 16, 16)

    def answers(x, masks=masks):
        *_, s, patches = net(x[:1], x[1:], masks=masks, with_patches=True)
        return torch.cat([s[:, None], patches], 1)  # (2, 17, 12)

    noise = draw(2, 3, 16, 16, seed=7)
    assert torch.equal(answers(x), answers(torch.where(pixels, noise, x)))
    assert not close(answers(x), answers(torch.where(pixels, x, noise)), 1e-3)
    assert not close(answers(x), answers(x, masks & False), 1e-3)
    blind = answers(x, masks | True)[:, 1:]
    assert close(blind[0], blind[1]) and not close(blind[0, 0], blind[0, 1], 1e-3)  # it knows where
    nn.init.zeros_(net.backbone.pos_embed)
    blind = answers(x, masks | True)[:, 1:]
    assert close(blind, blind[:1, :1].expand_as(blind))


def test_names_of_the_weights():
    """timm's below backbone, the released ones of the head, where a shared last layer has two;
    masked_embed is not in the backbone, which goes out without it."""
    shared, separate = (net_of(*flag) for flag in ([], ["--separate-heads"]))
    expected = {"masked_embed", *(f"head.{layer}.weight_{x}" for layer in
                                  ("last_layer", "last_layer2") for x in "gv"),
                *(f"head.mlp.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias"))}
    for net in (shared, separate):
        assert {k for k in net.state_dict() if not k.startswith("backbone.")} == expected
    assert shared.head.last_layer2 is shared.head.last_layer
    assert len([*separate.parameters()]) == len([*shared.parameters()]) + 2
    net = ibot.build(completed("--separate-heads"))
    assert net.masked_embed.shape == (1, 128) and net.masked_embed.eq(0).all()
    assert not torch.equal(net.head.last_layer2.weight_v, net.head.last_layer.weight_v)


@torch.no_grad()
def test_the_printed_lines_rebuild_the_backbone():
    """timm's ViT, with the same features; the official sizes and stochastic depth with them."""
    timm = pytest.importorskip("timm")
    args = completed("--image-size", "24")
    net = ibot.build(args, drop_path=0.4).backbone.double().eval()
    exec(ibot.loading(args), names := {})
    twin = names["net"].double().eval()
    twin.load_state_dict(net.state_dict())
    x = draw(2, 3, 24, 24)
    assert close(net(x), twin.forward_features(x), 1e-8) and net(x).std() > 0.5
    assert net(draw(2, 3, 16, 32)).shape == (2, 9, 128)
    assert [b.drop.p for b in net.blocks] == pytest.approx([0, 0.2, 0.4])
    with torch.device("meta"):
        ours = ibot.ViT(*ibot.VITS["vit_small"])
        other = timm.create_model("vit_small_patch16_224", num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()}


def test_start_with_sines():
    """Row y and column x of a patch, in waves of 2 sides / side^(j / (J - 1)) patches."""
    vit, side, J = ibot.build(completed("--image-size", "40")).backbone, 5, 32
    for patch in (0, 1, 7, 24):
        y, x = divmod(patch, side)
        expected = [f(at * math.pi / side * side ** (j / (J - 1))) for at in (y, x)
                    for f in (math.sin, math.cos) for j in range(J)]
        assert close(vit.pos_embed[0, 1 + patch], expected, 1e-5)
    for name, p in vit.blocks.named_parameters():
        if p.ndim == 2:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
    wide = ibot.build(completed("--arch", "vit_small", "--patch-size", "16")).backbone
    assert wide.pos_embed.abs().max() < 0.2 and wide.blocks[0].mlp.fc1.weight.std() < 0.021


# ==================================================================================================
# EMA, centre, schedules, clipping
# ==================================================================================================


def test_ema_update():
    for m in (0.0, 0.9, 1.0, torch.tensor(0.9)):
        ema, net = nn.Linear(3, 2).double(), nn.BatchNorm1d(2).double()
        ema, net = (nn.Sequential(copy.deepcopy(ema), copy.deepcopy(net)) for _ in range(2))
        for i, p in enumerate([*ema.parameters(), *net.parameters()]):
            p.data = draw(*p.shape, seed=i)
        net[1].running_mean += 1
        expected = [m * a + (1 - m) * b for a, b in zip(ema.parameters(), net.parameters())]
        ibot.ema_update(ema, net, m)
        assert all(close(a, b, 1e-7) for a, b in zip(ema.parameters(), expected))
        assert ema[1].running_mean.eq(0).all()  # the parameters alone


def test_center():
    """C_n = m^n C_0 + (1 - m) sum_t m^(n-t) mean_t, of raw outputs."""
    start = C = draw(1, 5, seed=9)
    means, m, n = [], 0.9, 6
    for t in range(n):
        teacher = draw(4, 5, seed=t) + t
        means.append([sum(teacher[i, k].item() for i in range(4)) / 4 for k in range(5)])
        before, C = C, ibot.update_center(C, teacher, m)
        assert close(C, ibot.update_center(before, teacher.mean(0, keepdim=True), m))
    weights = [m ** (n - 1 - t) for t in range(n)]
    for powers, right in ((weights, True), (weights[::-1], False)):
        expected = [m**n * start[0, k].item() + (1 - m) * sum(
            w * mean[k] for w, mean in zip(powers, means)) for k in range(5)]
        assert close(C[0], expected, 1e-10 if right else 1e-2) == right


def test_lr_at():
    rates = [ibot.lr_at(k, 10, 4, 0.8) for k in range(11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    expected = [0.4 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    assert rates[4:] == pytest.approx(expected) and ibot.lr_at(0, 10, 0, 0.8) == 0.8


def test_cosine():
    for start, end, n in ((0.996, 1.0, 1000), (0.04, 0.4, 7)):
        values = [ibot.cosine(i, n, start, end) for i in range(n + 1)]
        for i, v in enumerate(values):  # cosine_scheduler of the released code
            assert close(v, end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)), 1e-15)
        assert values[-1] == end and values == sorted(values)


def test_tau_at():
    def taus(tau_t, warmup, n=10):
        return [ibot.tau_at(i, n, tau_t, warmup) for i in range(n)]

    assert taus(0.07, 0.3) == pytest.approx([0.04, 0.05, 0.06] + [0.07] * 7)
    assert taus(0.02, 0.3) == pytest.approx([0.02] * 10)  # it does not start above what is asked
    assert taus(0.07, 0.0) == pytest.approx([0.07] * 10)


def test_clip_each():
    """clip_gradients of the released code, tensor by tensor."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    for i, p in enumerate([*net.parameters()][:4]):
        p.grad = draw(*p.shape, seed=i) * (10 if i % 2 else 0.1)
    before = [p.grad.clone() for p in [*net.parameters()][:4]]
    ibot.clip_each(net, 1.0)
    for p, g in zip(net.parameters(), before):
        assert close(p.grad, g * min(1.0, 1.0 / (g.norm().item() + 1e-6)))
    assert [p.grad.norm() < 1 - 1e-3 for p in [*net.parameters()][:4]] == [True, False] * 2


# ==================================================================================================
# The step
# ==================================================================================================

STEPS = [*TINY, *PLAIN, "--epochs", "1", *TINIEST.split(), *(
    "--limit 12 --batch-size 4 --lr 0.064 --warmup 0 --weight-decay 0.04 --weight-decay-end 0.4 "
    "--m 0.5 --m-end 1 --tau-t 0.06 --tau-t-patch 0.09 --tau-t-warmup 1 --clip 1e9 "
    "--freeze-last-layer 0 --local-crops 0 --mask-ratio 0.3 0.5 --eval-every 0").split()]


def algorithm_1(net, views, masks, flags, mistake=None):
    """The paper's Algorithm 1, typed in from its lines:

        u^, m_u = blockwise_mask(u); v^, m_v = blockwise_mask(v)
        student: class and patch tokens of u^, v^; teacher: those of u, v
        L_[CLS] = H(u^_s, v_t, C) / 2 + H(v^_s, u_t, C) / 2
        L_MIM = sum(m_u H(u^_s, u_t, C')) / sum(m_u) / 2 + the same of v
        update g_s; g_t = l g_t + (1 - l) g_s
        C = m C + (1 - m) mean of u_t, v_t, and C' of their patches, over batch and tokens

    with AdamW, and with local views as DINO has them. -> gs, gt, C, C', means over the steps of the
    loss, its two terms, entropy of the teacher and KL of the class term.
    """
    steps, gs, gt = len(views), net, copy.deepcopy(net)
    C, C_patch, m = torch.zeros(1, 12), torch.zeros(1, 1, 12), flags.center_m
    moments, rows = {k: (0 * p, 0 * p) for k, p in gs.named_parameters()}, []

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
        l = schedule(k, flags.m, flags.m_end)  # noqa: E741
        whole, blind = mistake == "student sees all", mistake == "teacher sees the mask"
        (us, us_p), (vs, vs_p) = (outputs(gs, x, None if whole else m_x)
                                  for x, m_x in ((u, m_u), (v, m_v)))
        (ut, ut_p), (vt, vt_p) = (outputs(gt, x, m_x if blind else None)
                                  for x, m_x in ((u, m_u), (v, m_v)))
        tokens = torch.cat([ut_p, vt_p]).flatten(0, 1)
        if mistake == "centre of hidden patches":
            tokens = tokens[torch.cat([m_u, m_v]).flatten()]
        if mistake == "one centre":
            tokens = torch.cat([ut, vt])
        centred = [m * C + (1 - m) * torch.cat([ut, vt]).mean(0).detach(),
                   m * C_patch + (1 - m) * tokens.mean(0).detach()]
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
        rows.append(torch.stack([loss, of_class, of_patches, entropy, of_class - entropy]).detach())
        named = dict(gs.named_parameters())
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
            lr = schedule(k, flags.lr * 4 / 256, 0.0)
            decay = schedule(k, flags.weight_decay, flags.weight_decay_end) * (p.ndim > 1)
            a, b = a / (1 - 0.9 ** (k + 1)), b / (1 - 0.999 ** (k + 1))
            p.data = p.data - lr * decay * p.data - lr * a.data / (b.data.sqrt() + 1e-8)
        if mistake != "EMA before the step":
            average(l)
        if mistake != "centres before the loss":
            C, C_patch = centred
    return gs, gt, C, C_patch, torch.stack(rows).mean(0)


def three_steps(tmp_path, *flags):
    """ibot.train as it is shipped, for three steps: the run, which has views and state."""
    *_, run = train(ibot, [*STEPS, *flags, "--out", tmp_path / "run"], Watched)
    alone = SimpleNamespace(rank=0, world=1)
    run.masks = [ibot.draw_masks(step, run.args, alone).split(4) for step in range(3)]
    assert len(run.views) == 3 and not close(*run.views[0][:2], 0.1)
    return run


def agree(run, flags=None, mistake=None):
    """Whether networks, centres and figures are the algorithm's in double precision. The networks
    by their movement, but for biases of keys: their gradient is 0, Adam makes much of its noise."""
    net = ibot.build(run.args).double()
    views = [[x.double() for x in step] for step in run.views]
    gs, gt, C, C_patch, terms = algorithm_1(
        copy.deepcopy(net), views, run.masks, flags or run.args, mistake)
    start, apart, moved = net.state_dict(), 0.0, 0.0
    for ours, theirs in ((run.state["net"], gs), (run.state["net_ema"], gt)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        for k in (k for k in theirs if "qkv.bias" not in k):
            apart += (ours[k] - theirs[k]).square().sum().item()
            moved += (theirs[k] - start[k]).square().sum().item()
    centres = zip((run.state["center"], run.state["center_patch"]), (C, C_patch))
    return apart < 1e-6 * moved and all(close(a, b, 1e-6) for a, b in centres) and close(
        terms, [run.rows[0][k] for k in run.chance], 1e-5)


def test_algorithm_1(tmp_path):
    run = three_steps(tmp_path)
    assert agree(run)
    for mistake in ("student sees all", "teacher sees the mask", "centres before the loss",
                    "centre of hidden patches", "one centre", "patches of the other view",
                    "EMA before the step"):
        assert not agree(run, mistake=mistake), mistake


@pytest.mark.parametrize("flags, changed", [
    ("--no-token-loss --local-crops 2", "no_token_loss"),
    ("--no-class-loss --random-masks --mask-crops 1", "no_class_loss"), ("--mask-crops 0", None),
    ("--separate-heads --clip 0.02 --center-m 0.9 --m-end 0.6", "clip"),
    ("--separate-heads --freeze-last-layer 1", "freeze_last_layer")])
def test_flags_change_the_algorithm(tmp_path, flags, changed):
    run = three_steps(tmp_path, *flags.split())
    assert agree(run) and len(run.views[0]) == 2 + run.args.local_crops
    if changed:  # without it the algorithm is another
        plain = vars(run.args) | {changed: 1e9 if changed == "clip" else False}
        assert not agree(run, Namespace(**plain))
    if "freeze" in flags:
        assert not agree(run, mistake="the second layer does not rest")
    row, a, b = run.rows[0], "--no-class-loss" not in flags, "--no-token-loss" not in flags
    assert close(row["loss"], a * row["cls"] + b * row["patch"], 1e-6)
    assert (row["patch"] > 0) == (flags != "--mask-crops 0") and row["cls"] > 0
    chance = (a + b * run.args.mask_crops) * math.log(12)  # without a mask the patches' is 0
    assert close(run.chance["loss"], chance)


# ==================================================================================================
# Weights in, options, words
# ==================================================================================================

NANO = "--arch vit_nano --patch-size 8 --out-dim 12 --hidden 10 --no-head-bn --image-size 32"


def small_args(*changes):
    return completed(*NANO.split(), *changes)


@pytest.fixture(params=["shared", "separate"])
def official(request, tmp_path):
    """Files in the layouts of the released ones and of our own last.pt: name -> path, and the
    weights of student and teacher. In the released files masked_embed is in the student's backbone
    alone."""
    nets = SimpleNamespace(argv=["--separate-heads"] * (request.param == "separate"))
    for seed, name in (("5", "student"), ("6", "teacher")):
        net = ibot.build(small_args(*nets.argv, "--seed", seed))
        nn.init.normal_(net.masked_embed)
        setattr(nets, name, dict(net.state_dict()))
    student, teacher = dict(nets.student), dict(nets.teacher)
    student["backbone.masked_embed"] = student.pop("masked_embed")
    del teacher["masked_embed"]
    full = {"student": {f"module.{k}": v for k, v in student.items()}, "teacher": teacher,
            "epoch": 3, "ibot_loss": {"center": torch.zeros(1, 12)}}
    flat = {k[len("backbone."):]: v for k, v in student.items() if "backbone" in k}
    last = {"method": "ibot", "state": {"net": nets.student, "net_ema": nets.teacher}}
    for name, content in (("full", full), ("backbone", {"state_dict": flat}), ("last", last)):
        torch.save(content, tmp_path / f"{name}.pth")
        setattr(nets, name, str(tmp_path / f"{name}.pth"))
    return nets


def loaded(path, *argv):
    """The weights with which a network of another seed would be evaluated."""
    argv = [*TINY, *PLAIN, *NANO.split(), "--local-crops", "0", *argv, "--eval", path]
    argv += ["--out", f"{path}-run", "--limit", "20"]
    net, *_ = train(ibot, argv)
    return dict(net.state_dict())


def test_weights_from_files(official, capsys):
    argv = [*official.argv]
    assert same(loaded(official.full, *argv, "--branch", "student"), official.student)
    assert same(loaded(official.last, *argv), official.teacher)
    got = loaded(official.full, *argv)  # the released teacher, its head too
    assert all(torch.equal(v, official.teacher[k]) for k, v in got.items() if k != "masked_embed")
    argv += ["--image-size", "16"]
    untrained = ibot.build(small_args(*argv)).state_dict()
    got = loaded(official.backbone, *argv)
    for k, v in got.items():
        expected = (official.student if "backbone." in k else untrained)[k]
        if k == "backbone.pos_embed":
            expected = ibot.resample(expected, 2, 2)
        assert torch.equal(v, expected), k
    for changes in ("--arch=vit_tiny", "--patch-size=4"):
        error = fails(functools.partial(loaded, official.full, *argv, changes), capsys)
        assert "another network" in error


@pytest.mark.parametrize("argv, words", [
    ("--patch-size 32", "--patch-size is over"), ("--local-size 8 --patch-size 16", "--patch-size"),
    ("--local-scale 0.9", "--local-scale is over"), ("--mask-ratio 0.01 0.05", "hides none"),
    ("--no-class-loss --no-token-loss", "nothing to learn"),
    ("--no-class-loss --mask-crops 0", "nothing to learn"), ("--mask-ratio 0.3", "--mask-ratio"),
    ("--mask-ratio 0.1 1.5", "--mask-ratio"), ("--tau-t-patch 0", "--tau-t-patch"),
    ("--mask-crops 2", "--mask-crops"), ("--arch resnet18", "--arch")])
def test_what_cannot_work(argv, words, capsys):
    assert words in fails(lambda: ibot.check(completed(*TINY, *argv.split()), 100), capsys)


def test_warnings(capsys):
    for argv, words in (("--m 0.99", "half-life"), ("--m 0 --patch-size 5", "multiple of"),
                        ("--m 0 --local-size 32", "not smaller than"), ("--m 0", ""),
                        ("--m 0 --mask-ratio 0.05 0.5", "hide no patch"),
                        ("--m 0 --patch-size 16 --mask-ratio 0.2 1", "hide no patch"),
                        ("--m 0 --local-crops 0 --local-scale 0.9", "")):
        ibot.check(completed(*argv.split()), 100)
        out = capsys.readouterr().out
        assert words in out and out.count("warning") == bool(words)
    evaluated = completed("--local-scale", "0.9", "--m", "1")
    evaluated.eval = "x"
    ibot.check(evaluated, 100)  # what training alone would need
    assert not capsys.readouterr().out


def test_the_collapse_is_named():
    """DINO's Figure 7: where KL goes to 0 nothing is learned; the entropy says why."""
    def words(entropy, kl):
        row = {"entropy": entropy * math.log(12), "kl": kl * math.log(12)}
        return ibot.teacher_verdict("healthy: z is fine", SimpleNamespace(rows=[row]), 12)

    assert words(0.99, 0.001).startswith("uniform teacher: z is fine, teacher's entropy 0.99")
    assert words(0.001, 0.001).startswith("one-hot teacher: ")
    assert words(0.99, 0.2).startswith("healthy: ") and words(0.5, 0.001).startswith("healthy: ")
    assert ibot.teacher_verdict("healthy: z", SimpleNamespace(rows=[]), 12) == "healthy: z"
    failed = SimpleNamespace(rows=[{"entropy": 0.0, "kl": 0.0}])
    assert ibot.teacher_verdict("features are not finite", failed, 12) == "features are not finite"


def test_equal_outputs_have_the_value_of_chance(tmp_path):
    """A last layer of length 0 says the same of everything: every figure is its chance."""
    path = tmp_path / "equal.pth"
    net = ibot.build(small_args())
    nn.init.zeros_(net.head.last_layer.weight_g)
    torch.save({"state_dict": dict(net.state_dict())}, path)
    argv = [*TINY, *PLAIN, *NANO.split(), "--epochs", "1", "--init", path, "--lr", "1e-9"]
    *_, run = train(ibot, [*argv, "--mask-crops", "1", "--out", tmp_path / "run"])
    for name, chance in run.chance.items():
        assert close(run.rows[0][name], chance, 1e-3), name
