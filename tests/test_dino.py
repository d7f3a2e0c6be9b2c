"""DINO against its slides (Algorithm 1), the paper, the released code and timm."""

import copy
import math
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import tools
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tools import PLAIN, TINY, Watched, close, draw, fails, refused, same, train

import common
import dino
import dinov2
import ibot

SHORT = [*TINY, *PLAIN, "--epochs", "1", "--eval-every", "0"]


def completed(file, argv=(), side=None, **more):
    return tools.completed(file, argv if side else [*PLAIN, *argv], side, **more)

# ==================================================================================================
# Loss
# ==================================================================================================


def slide_h(t, s, C, tps, tpt):
    """The slide's H, typed in, with its sums over k and its mean over n written out:

        s = softmax(s / tps, dim=1)
        t = softmax((t - C) / tpt, dim=1) # center + sharpen
        return - (t * log(s)).sum(dim=1).mean()
    """
    (N, K), total = t.shape, 0.0
    for n in range(N):
        of_t = [math.exp((t[n, k].item() - C[0, k].item()) / tpt) for k in range(K)]
        of_s = [math.exp(s[n, k].item() / tps) for k in range(K)]
        for k in range(K):
            total -= of_t[k] / sum(of_t) * math.log(of_s[k] / sum(of_s))
    return total / N


def equation_3(student, teacher, C, tps, tpt):
    """The paper's equation 3: the sum over x in {x1, x2}, the global views, and x' in V, all views,
    x' != x, of H(P_t(x), P_s(x')); here the mean over these pairs."""
    terms = [slide_h(teacher[i], student[j], C, tps, tpt)
             for i in range(len(teacher)) for j in range(len(student)) if j != i]
    return sum(terms) / len(terms)


def variant(student, teacher, C, tau_s, tau_t, mistake=None):
    """The loss by pairs, with one of the usual mistakes."""
    if mistake == "temperatures swapped":
        tau_s, tau_t = tau_t, tau_s
    C = {"no centre": 0 * C, "centre added": -C, "centre not in the temperature": C * tau_t,
         "centre with a temperature too many": C / tau_t}.get(mistake, C)
    dim, terms = 0 if mistake == "softmax over the batch" else 1, []
    for i, t in enumerate(teacher):
        t = t if mistake == "gradient to the teacher" else t.detach()
        t = F.softmax((t - C) / tau_t, dim)
        for j, s in enumerate(student):
            if j == i and mistake != "the same view too":
                continue
            if j >= len(teacher) > 1 and mistake == "no local views":
                continue
            s = s - C if mistake == "centre in the student too" else s
            f = F.softmax if mistake == "softmax of the student" else F.log_softmax
            losses = -(t * f(s / tau_s, dim)).sum(1)
            terms.append(losses.sum() if mistake == "sum over the batch" else losses.mean())
    return sum(terms) / (1 if mistake == "sum over the pairs" else len(terms))


MISTAKES = ("temperatures swapped", "no centre", "centre added", "centre not in the temperature",
            "centre with a temperature too many", "softmax over the batch",
            "centre in the student too", "softmax of the student", "gradient to the teacher",
            "sum over the batch")
OF_PAIRS = "the same view too", "no local views", "sum over the pairs"


def agrees(loss, views):
    """Whether loss(student, teacher, C, tau_s, tau_t) is equation 3 and goes to the student alone;
    views: how many the student and the teacher get."""
    for seed, (N, K, tau_s, tau_t) in enumerate(
            ((3, 5, 0.1, 0.04), (4, 2, 0.5, 0.3), (1, 7, 1.0, 0.2))):
        s, t = ([0.3 * draw(N, K, seed=10 * seed + i + first) for i in range(n)]
                for first, n in zip((0, 5), views))
        s, t = ([x.requires_grad_() for x in part] for part in (s, t))
        C = 0.3 * draw(1, K, seed=seed + 99)
        value = loss(s, t, C, tau_s, tau_t)
        grads = torch.autograd.grad(value, [*s, *t], allow_unused=True)
        used = [j for j in range(len(s)) if len(t) > 1 or j]  # t_0 alone is not asked of s_0
        if not close(value.detach(), equation_3(s, t, C, tau_s, tau_t)) or any(
                g is not None for g in grads[len(s):]) or any(
                grads[j] is None or not grads[j].abs().max() > 1e-5 for j in used):
            return False
    return True


def test_h_equation():
    """H(t, s) is the loss of the pair of t and s."""
    assert agrees(variant, (2, 1))
    assert agrees(lambda s, t, *rest: dino.H(t[0], s[1], *rest), (2, 1))
    assert not agrees(lambda s, t, *rest: dino.H(s[1], t[0], *rest), (2, 1))
    for mistake in MISTAKES:
        if mistake != "sum over the pairs":
            assert not agrees(lambda *given, m=mistake: variant(*given, m), (2, 1)), mistake
    t, s, C = (draw(*shape, seed=i) for i, shape in enumerate(((3, 4), (3, 4), (1, 4))))
    assert torch.autograd.gradcheck(lambda s: dino.H(t, s, C, 0.5, 0.3), s.requires_grad_())


def test_dino_loss_equation():
    for views in ((2, 2), (5, 2), (4, 3)):
        assert agrees(variant, views) and agrees(dino.dino_loss, views)
        assert agrees(lambda s, t, *rest: sum(  # the mean of H
            dino.H(t[i], s[j], *rest) for i in range(len(t)) for j in range(len(s)) if i != j
        ) / (len(t) * (len(s) - 1)), views)
        for mistake in (*MISTAKES, *OF_PAIRS):
            if mistake != "no local views" or views[0] > views[1]:
                assert not agrees(lambda *given, m=mistake: variant(*given, m), views), mistake
    s = [draw(2, 3, seed=i).requires_grad_() for i in range(3)]
    t, C = [draw(2, 3, seed=i + 5) for i in range(2)], draw(1, 3, seed=9)
    assert torch.autograd.gradcheck(lambda *s: dino.dino_loss([*s], t, C, 0.5, 0.3), s)


def test_closed_forms():
    K, C = 6, draw(1, 6)
    even, t, s = 0 * draw(4, K) + 3, C.expand(4, K), draw(4, K, seed=1)
    assert close(dino.H(t, even, C, 0.1, 0.04), math.log(K))
    assert close(dino.dino_loss([even] * 4, [t] * 2, C, 0.1, 0.04), math.log(K))
    assert close(dino.dino_loss([even] * 4, [s] * 2, C, 0.1, 0.04), math.log(K))  # whatever t says
    assert close(dino.H(s, s, 0 * C, 0.3, 0.3), dino.entropy(s, 0 * C, 0.3))
    first = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    assert close(dino.H(first, 0.1 * first, 0 * first, 0.1, 1e-3), math.log(math.e + 2) - 1)
    large = 1e3 * draw(4, K).float()  # float32: log(softmax) would be infinite
    assert dino.H(large, -large, 0 * large[:1], 0.1, 0.04).isfinite()
    assert dino.dino_loss([large, -large], [large, large], 0 * large[:1], 0.1, 0.04).isfinite()


def test_entropy():
    for N, K, tau, seed in ((3, 5, 0.04, 0), (4, 2, 0.3, 1), (1, 7, 1.0, 2)):
        t, C = 0.2 * draw(N, K, seed=seed).requires_grad_(), 0.2 * draw(1, K, seed=seed + 9)
        by_hand = 0.0
        for n in range(N):
            of_t = [math.exp((t[n, k].item() - C[0, k].item()) / tau) for k in range(K)]
            by_hand -= sum(e / sum(of_t) * math.log(e / sum(of_t)) for e in of_t) / N
        got = dino.entropy(t, C, tau)
        assert close(got, by_hand) and not got.requires_grad
        for other in (dino.entropy(t, -C, tau), dino.entropy(t, 0 * C, tau),
                      dino.entropy(t, C, 2 * tau)):
            assert not close(other, by_hand, 1e-3)
        s = [draw(N, K, seed=i) for i in range(3)]  # the loss is this and the KL, which is positive
        assert dino.dino_loss(s, [t, t], C, 0.1, tau) > got
    C = draw(1, 6)
    assert close(dino.entropy(C.expand(4, 6), C, 0.04), math.log(6))
    assert dino.entropy(1e5 * torch.eye(6), 0 * C, 0.04) == 0  # 0 log 0 is 0


# ==================================================================================================
# EMA, centre, schedules, clipping
# ==================================================================================================


def test_ema_update():
    net, net_ema = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double() for _ in range(2))
    nn.init.constant_(net[1].weight, 3)
    nn.init.constant_(net[1].bias, 2)
    for m in (0.9, torch.tensor(0.25)):
        old = [p.tolist() for p in net_ema.parameters()]
        dino.ema_update(net_ema, net, m)
        for p, a, b in zip(net_ema.parameters(), old, net.parameters()):
            a, b, m = np.array(a), b.detach().numpy(), float(m)
            assert close(p.detach(), m * a + (1 - m) * b)
            assert not close(p.detach(), (1 - m) * a + m * b, 1e-3)
    before = copy.deepcopy([*net_ema.parameters()])
    net[1].running_mean += 1
    dino.ema_update(net_ema, net, torch.tensor(1.0))  # as after a failed step: nothing moves
    assert same(before, [*net_ema.parameters()]) and net_ema[1].running_mean.eq(0).all()
    dino.ema_update(net_ema, net, 0.0)
    assert same([*net.parameters()], [*net_ema.parameters()])


def test_center():
    """C_n = m^n C_0 + (1 - m) sum_t m^(n-t) mean_t, of raw outputs."""
    start = C = draw(1, 5, seed=9)
    means, m, n = [], 0.9, 6
    for t in range(n):
        teacher = draw(4, 5, seed=t) + t
        means.append([sum(teacher[i, k].item() for i in range(4)) / 4 for k in range(5)])
        before, C = C, dino.update_center(C, teacher, m)
        assert C.shape == (1, 5)
        assert close(C, dino.update_center(before, teacher.mean(0, keepdim=True), m))
    geometric = [m**n * start[0, k].item() + (1 - m) * sum(
        m ** (n - 1 - t) * means[t][k] for t in range(n)) for k in range(5)]
    assert close(C[0], geometric)
    reverse = [m**n * start[0, k].item() + (1 - m) * sum(
        m**t * means[t][k] for t in range(n)) for k in range(5)]
    assert not close(C[0], reverse, 1e-2)
    assert close(dino.update_center(start, teacher, 0.0), teacher.mean(0, keepdim=True))
    assert torch.equal(dino.update_center(start, teacher, 1.0), start)


def test_cosine():
    """Released code: cosine_scheduler, final + 0.5 (base - final) (1 + cos(pi i / n))."""
    for start, end, n in ((0.996, 1.0, 1000), (0.04, 0.4, 7), (0.4, 0.4, 3)):
        values = [dino.cosine(i, n, start, end) for i in range(n + 1)]
        for i, v in enumerate(values):
            assert close(v, end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)), 1e-15)
        assert close(values[0], start, 1e-15) and values[-1] == end and values == sorted(values)
    assert close(dino.cosine(500, 1000, 0.04, 0.4), 0.22, 1e-12)


def test_tau_at():
    def taus(tau_t, warmup, n=10):
        return [dino.tau_at(i, n, tau_t, warmup) for i in range(n)]

    rising = taus(0.07, 0.3)
    assert rising == pytest.approx([0.04, 0.05, 0.06] + [0.07] * 7)
    assert taus(0.07, 1.0) == pytest.approx([0.04 + 0.003 * i for i in range(10)])
    assert taus(0.04, 0.3) == pytest.approx([0.04] * 10)
    assert taus(0.02, 0.3) == pytest.approx([0.02] * 10)  # it does not start above what is asked
    assert taus(0.07, 0.0)[1:] == pytest.approx([0.07] * 9)


def test_lr_at():
    steps, warmup, peak = 100, 10, 2.0
    for t in range(steps + 1):
        cosine = peak * (1 + math.cos(math.pi * (t - 10) / 90)) / 2
        expected = (t + 1) / 10 * peak if t < 10 else cosine
        assert close(dino.lr_at(t, steps, warmup, peak), expected, 1e-12), t
    assert dino.lr_at(0, 10, 0, peak) == dino.lr_at(9, 10, 10, peak) == peak


def test_momentum():
    """The half-life is a twentieth of the run's steps, but m is at least 0.9 and at most 0.996."""
    args = Namespace(batch_size=10, epochs=10)
    for n, expected in ((10, 0.9), (200, 0.5**0.1), (10**6, 0.996)):
        assert close(dino.momentum(args, n), expected, 1e-12)


def test_momentum_stays_on_the_built_in_set(tmp_path):
    given = [("", None, None), ("--m 0.3", 0.3, 0.3), ("--m 0.3 --m-end 1", 0.3, 1.0)]
    for i, (flags, first, last) in enumerate(given):
        argv = [*SHORT, *flags.split(), "--out", tmp_path / str(i)]
        _, _, run = train(dino, argv)
        assert first in (run.args.m, None) and run.args.m_end == (last or run.args.m)
    for file in (dino, ibot, dinov2):
        built_in, *others = file.OPTIONS["m_end"][:3]
        assert built_in(Namespace(m=0.3), 9) == 0.3 and others == [1.0, 1.0]


def clip_gradients(model, clip):
    """Typed in from the released utils.py."""
    for _, p in model.named_parameters():
        if p.grad is not None:
            param_norm = p.grad.data.norm(2)
            clip_coef = clip / (param_norm + 1e-6)
            if clip_coef < 1:
                p.grad.data.mul_(clip_coef)


def test_clip_each():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    nets = [net, copy.deepcopy(net), copy.deepcopy(net)]
    for i, clip in enumerate((lambda net: dino.clip_each(net, 1.0), lambda net: clip_gradients(
            net, 1.0), lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1.0))):
        for k, p in enumerate([*nets[i].parameters()][:-1]):  # of the last there is no gradient
            p.grad = 5**k * draw(*p.shape, seed=k) / 30
        clip(nets[i])
    ours, released, together = ([p.grad for p in net.parameters()][:-1] for net in nets)
    assert all(map(close, ours, released)) and not all(map(close, ours, together))
    lengths = [g.norm().item() for g in ours]
    assert min(lengths) < 0.5 and max(lengths) == pytest.approx(1, abs=1e-5)


# ==================================================================================================
# Augmentation
# ==================================================================================================


def recorded(patch, done):
    """common's operations change nothing and write what they were called with to `done`."""
    for name in ("flip", "color_jitter", "grey", "blur", "solarize"):
        patch.setattr(common, name, lambda x, *numbers, name=name, **named: done.append(
            (name, tuple(x.shape), *numbers, *(named[k] for k in sorted(named)))) or x)


def test_augmentation_is_the_papers(monkeypatch):
    """Section 3.2 and the released DataAugmentationDINO: BYOL's, another one for each global view,
    the locals all in one batch."""
    args, done = completed(dino, side=500, n=10**6), []
    assert dino.crops(args) == [common.Crop(224, (0.4, 1.0), (3 / 4, 4 / 3), 2),
                                common.Crop(96, (0.05, 0.4), (3 / 4, 4 / 3), 8)]
    recorded(monkeypatch, done)
    views = [torch.full((2, 3, s, s), i) for i, s in enumerate([224] * 2 + [96] * 8)]
    assert same(dino.augment(views, args), views)  # count, sizes and order
    expected = []
    for shape, blur, taps, solarize in (((2, 3, 224, 224), 1.0, 23, 0.0),
                                        ((2, 3, 224, 224), 0.1, 23, 0.2),
                                        ((16, 3, 96, 96), 0.5, 9, 0.0)):
        expected += [("flip", shape, 0.5), ("color_jitter", shape, 0.4, 0.4, 0.2, 0.1, 0.8),
                     ("grey", shape, 0.2), ("blur", shape, blur, (0.1, 2.0), taps),
                     ("solarize", shape, solarize)]
    assert done == expected
    args, done[:] = completed(dino, ["--local-crops", "0"]), []
    assert [c.count for c in dino.crops(args)] == [2]
    assert len(dino.augment([torch.zeros(2, 3, 32, 32)] * 2, args)) == 2
    assert [name for name, *_ in done] == ["flip", "color_jitter", "grey", "solarize"] * 2


def test_local_views_are_of_whole_patches():
    for side, patch, size in ((224, 16, 96), (224, 14, 98), (96, 16, 48), (32, 16, 16)):
        flags = ["--image-size", side, "--patch-size", patch]
        assert completed(dino, flags, side=300).local_size == size


# ==================================================================================================
# Vision transformer
# ==================================================================================================


def strange(net):
    """Double precision, random weights everywhere, norms and gains away from 1."""
    for i, (name, p) in enumerate(net.named_parameters()):
        spread = 0.3 if "norm" in name else 0.02 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5
        p.data = spread * draw(*p.shape, seed=i, dtype=torch.float64)
        p.data += 1.0 if name.endswith("norm.weight") or ".norm" in name and "weight" in name else 0
    return net.double().eval()


@pytest.fixture(scope="module")
def twins():
    """vit_tiny and timm's of the same weights."""
    timm = pytest.importorskip("timm")
    net = strange(dino.vit_tiny(16, 64))
    other = timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=192, depth=12,
                                          num_heads=3, num_classes=0).double().eval()
    other.load_state_dict(net.state_dict())
    net.load_state_dict(other.state_dict())
    return net, other


@torch.no_grad()
def test_vit_is_timms(twins):
    net, other = twins
    x = draw(2, 3, 64, 64)
    ours, theirs = net(x), other.forward_features(x)
    assert ours.shape == (2, 17, 192) and close(ours, theirs, 1e-8)
    assert close(ours[:, 0], other(x), 1e-8) and ours.std() > 0.5
    patches = net.patch_embed(x)  # in the order of reading: patch 1 is right of patch 0
    assert close(net.tokens(patches)[:, 1:] - net.pos_embed[:, 1:],
                 torch.stack([patches[:, :, i // 4, i % 4] for i in range(16)], 1))

    def differs(change):
        changed = copy.deepcopy(net)
        for m in changed.modules():
            change(m)
        return not close(changed(x), theirs, 1e-6)

    assert not differs(lambda m: None)
    assert differs(lambda m: setattr(m, "eps", 1e-4))
    assert differs(lambda m: setattr(m, "approximate", "tanh"))
    assert differs(lambda m: setattr(m, "heads", 2 * getattr(m, "heads", 0)))


@pytest.mark.parametrize("name, width, heads, parameters", [
    ("vit_tiny", 192, 3, 5_524_416), ("vit_small", 384, 6, 21_665_664),
    ("vit_base", 768, 12, 85_798_656)])
def test_official_sizes(name, width, heads, parameters):
    make = getattr(dino, name)
    with torch.device("meta"):
        net = make()
        small = make(8)
    weights = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert len(weights) == 150 and sum(map(math.prod, weights.values())) == parameters
    assert weights["pos_embed"] == (1, 197, width) and weights["cls_token"] == (1, 1, width)
    assert small.pos_embed.shape == (1, 785, width)
    assert weights["blocks.11.attn.qkv.weight"] == (3 * width, width)
    assert net.blocks[0].attn.heads == heads
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        other = timm.create_model(f"{name}_patch16_224", num_classes=0).state_dict()
    assert {k: tuple(v.shape) for k, v in other.items()} == weights


def interpolate_pos_encoding(pos_embed, npatch, w, h, patch_size, how=None):
    """The released code's, typed in; there x is (B, nc, w, h). how: of F.interpolate."""
    N = pos_embed.shape[1] - 1
    if npatch == N and w == h:
        return pos_embed
    class_pos_embed = pos_embed[:, 0]
    patch_pos_embed = pos_embed[:, 1:]
    dim = pos_embed.shape[-1]
    w0 = w // patch_size
    h0 = h // patch_size
    w0, h0 = w0 + 0.1, h0 + 0.1
    how = how or {"scale_factor": (w0 / math.sqrt(N), h0 / math.sqrt(N)), "mode": "bicubic"}
    patch_pos_embed = F.interpolate(
        patch_pos_embed.reshape(1, int(math.sqrt(N)), int(math.sqrt(N)), dim).permute(0, 3, 1, 2),
        **how)
    assert int(w0) == patch_pos_embed.shape[-2] and int(h0) == patch_pos_embed.shape[-1]
    patch_pos_embed = patch_pos_embed.permute(0, 2, 3, 1).reshape(1, -1, dim)
    return torch.cat((class_pos_embed.unsqueeze(0), patch_pos_embed), dim=1)


GRIDS = (4, 4), (14, 14), (2, 2), (6, 3), (3, 6), (2, 8), (5, 4)


def test_resampled_positions():
    """As the released code, and not as it would be to a size or with antialiasing."""
    native = draw(1, 17, 12).float()
    for h, w in GRIDS:
        got = dino.resample(native, h, w)
        expected = interpolate_pos_encoding(native, h * w, 16 * h, 16 * w, 16)
        assert got.shape == (1, 1 + h * w, 12) and close(got, expected, 1e-6), (h, w)
        if (h, w) == (4, 4):
            assert got is native
            continue
        size = {"size": (h, w), "mode": "bicubic"}
        for how in (size, size | {"antialias": True}, size | {"mode": "bilinear"}):
            another = interpolate_pos_encoding(native, h * w, 16 * h, 16 * w, 16, how)
            assert not close(another, expected, 1e-3), how


@torch.no_grad()
@pytest.mark.parametrize("h, w", GRIDS)
def test_other_resolutions(twins, h, w):
    """All but the positions is as timm, which resamples them to a size, with antialiasing."""
    net, other = twins
    x, native = draw(1, 3, 16 * h, 16 * w), net.pos_embed.float()
    positions = dino.resample(native, h, w)
    tokens = torch.cat([net.cls_token, net.patch_embed(x).flatten(2).mT], 1) + positions
    got = net(x)
    assert got.shape == (1, 1 + h * w, 192)
    assert close(other.norm(other.blocks(tokens)), got, 1e-5)
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    theirs = resample(native, [h, w], num_prefix_tokens=1)
    assert close(theirs, positions, 1e-3) == ((h, w) == (4, 4))


def test_start_with_sines():
    """Row y and column x of a patch, in waves of 2 sides / side^(j / (J - 1)) patches; the rest of
    the ViT as it was but for the linear layers of the blocks."""
    torch.manual_seed(0)
    paper, side, J = dino.ViT(*dino.VITS["vit_nano"], 8, 40), 5, 32
    vit = copy.deepcopy(paper)
    dino.start_with_sines(vit)
    for patch in (0, 1, 7, 24):
        y, x = divmod(patch, side)
        expected = [f(at * math.pi / side * side ** (j / (J - 1))) for at in (y, x)
                    for f in (math.sin, math.cos) for j in range(J)]
        assert close(vit.pos_embed[0, 1 + patch], expected, 1e-5)
    for (name, a), b in zip(paper.named_parameters(), vit.parameters()):
        linear = a.ndim == 2 and "blocks" in name
        same_class = name == "pos_embed" and torch.equal(a[:, 0], b[:, 0])
        assert same_class or torch.equal(a, b) != linear, name
        if linear:
            bound = math.sqrt(6 / sum(b.shape))
            assert 0.98 * bound < b.abs().max() <= bound and a.std() < 0.021
    for net in (paper, vit):  # what it is for: two patches of one colour, in two places
        tokens = net.tokens(torch.ones(1, 128, 5, 5))[0, 1:]
        assert ((tokens - tokens.mean(0)).std() > 0.5) == (net is vit)


def test_drop_path():
    """Linear over the depth, whole images, 0 in evaluation, and on average nothing changes."""
    net = dino.ViT(24, 5, 3, 8, 16, drop_path=0.4)
    assert [b.drop.p for b in net.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [b.drop.p for b in dino.vit_tiny(16, 32).blocks] == [0] * 12
    assert dino.ViT(24, 1, 3, 8, 16, drop_path=0.4).blocks[0].drop.p == 0
    torch.manual_seed(0)
    x, n = torch.ones(20000, 2, 3), 20000
    for block, p in zip(net.blocks, (0, 0.1, 0.2, 0.3, 0.4)):
        assert block.eval().drop(x) is x
        y = block.train().drop(x)
        assert torch.equal(y, y[:, :1, :1].expand_as(y))
        dropped = y[:, 0, 0] == 0
        assert close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)), 1e-6)
        assert abs(dropped.float().mean() - p) <= 3.5 * math.sqrt(p * (1 - p) / n)
        assert abs(y.mean() - 1) <= 3.5 * math.sqrt(p / (1 - p) / n)
    x = draw(8, 3, 16, 16, dtype=torch.float32)
    assert not close(net(x), net(x), 1e-4) and torch.equal(net.eval()(x), net(x))
    args = completed(dino, ["--drop-path", "0.3", "--seed", "3"])
    assert dino.build(args, args.drop_path).backbone.blocks[-1].drop.p == 0.3
    assert dino.build(args).backbone.blocks[-1].drop.p == 0  # the teacher's
    assert same(dino.build(args, 0.3).state_dict(), dino.build(args).state_dict())
    assert not same(dino.build(args).state_dict(), dino.build(completed(dino)).state_dict())
    wide = dino.build(completed(dino, ["--arch", "vit_small", "--image-size", "16"])).backbone
    assert wide.pos_embed.std() < 0.03 < dino.build(args).backbone.pos_embed.std()  # of sines


# ==================================================================================================
# Head and multi-crop
# ==================================================================================================


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_multi_crop_is_one_call_per_view(arch):
    args = completed(dino, ["--arch", arch, *"--hidden 20 --out-dim 9 --no-head-bn".split()])
    net = dino.build(args).double().eval()
    views = [draw(3, 3, s, s, seed=i).sigmoid() for i, s in enumerate((32, 32, 16, 16, 16))]
    calls = []
    net.backbone.register_forward_pre_hook(lambda m, given: calls.append(len(given[0])))
    with torch.no_grad():
        at_once = net(*views)
        assert calls == [6, 9]  # a call per resolution
        one_by_one = [net(x) for x in views]
    dim = {"vit_nano": 128, "resnet18": 512}[arch]
    assert [tuple(t.shape) for t in at_once] == [(15, dim), (15, 256), (15, 9)]
    for got, *parts in zip(at_once, *one_by_one):
        assert close(got, torch.cat(parts)) and not close(got, torch.cat(parts[::-1]), 1e-4)
    mean, std = (torch.tensor(t).double().view(3, 1, 1) for t in (dino.MEAN, dino.STD))
    with torch.no_grad():
        h = net.backbone((views[0] - mean) / std)
    assert close(at_once[0][:3], h[:, 0] if arch == "vit_nano" else h, 1e-6)
    assert not {"mean", "std"} & net.state_dict().keys()


def test_head():
    """The released head: three layers, z of length 1, a last layer with weight norm."""
    torch.manual_seed(0)
    head, x = dino.Head(7, 11, hidden=9).double(), draw(5, 7)
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert shapes == {"mlp.0.weight": (9, 7), "mlp.0.bias": (9,), "mlp.2.weight": (9, 9),
                      "mlp.2.bias": (9,), "mlp.4.weight": (256, 9), "mlp.4.bias": (256,),
                      "last_layer.weight_g": (11, 1), "last_layer.weight_v": (11, 256)}
    assert head.last_layer.weight_g.eq(1).all()
    for i in (0, 2, 4):
        assert head.mlp[i].bias.eq(0).all() and 0.01 < head.mlp[i].weight.std() < 0.03
    z, s = head(x)
    assert close(z.norm(dim=1), torch.ones(5)) and s.shape == (5, 11)
    last = head.last_layer
    nn.init.uniform_(last.weight_g, 0.5, 2)
    rows = last(torch.eye(256, dtype=torch.float64)).T  # what z is multiplied by
    assert close(rows.norm(dim=1), last.weight_g.flatten())
    assert close(F.cosine_similarity(rows, last.weight_v), torch.ones(11))
    official = nn.utils.parametrizations.weight_norm(nn.Linear(256, 11, bias=False).double())
    official.load_state_dict(last.state_dict())  # it knows the names of old files
    assert close(official(z), head(x)[1])
    twin = copy.deepcopy(head)
    nn.init.zeros_(twin.last_layer.weight_g)
    assert head(x)[1].abs().max() > 0.1 and twin(x)[1].abs().max() == 0
    normed = dino.Head(7, 11, hidden=9, batch_norm=True)
    kinds = [type(m) for m in normed.mlp]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.GELU] * 2 + [nn.Linear]
    assert normed.mlp[1] is not normed.mlp[4]


# ==================================================================================================
# The step
# ==================================================================================================


def small(args, drop_path=0.0):
    """DINO on next to nothing, without batch norm: how views are grouped does not matter."""
    torch.manual_seed(args.seed)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.Tanh())
    backbone.dim = 8
    net = dino.DINO(backbone, args.out_dim, args.hidden)
    for layer in net.head.mlp[::2]:  # with weights as small as they are, gradients are huge
        layer.reset_parameters()
    return net


def algorithm_1(net, views, flags, mistake=None):
    """The slide's Algorithm 1, typed in:

        gt.params = gs.params
        for x in loader: # load a minibatch x with n samples
            x1, x2 = augment(x), augment(x) # random views
            s1, s2 = gs(x1), gs(x2) # student output n-by-K
            t1, t2 = gt(x1), gt(x2) # teacher output n-by-K
            loss = H(t1, s2)/2 + H(t2, s1)/2
            loss.backward() # back-propagate
            # student, teacher and center updates
            update(gs) # SGD
            gt.params = l*gt.params + (1-l)*gs.params
            C = m*C + (1-m)*cat([t1, t2]).mean(dim=0)

    With local views x3, ... the loss is the mean over all pairs of different views (equation 3);
    update is SGD with momentum, decay, clipping and a last layer that rests as in the released
    code. -> gs, gt, C, mean loss, entropy of the teacher and KL.
    """
    steps, gs, gt = len(views), net, copy.deepcopy(net)
    C, m, tps, terms = torch.zeros(1, flags.out_dim), flags.center_m, flags.tau_s, []
    v = {k: torch.zeros_like(p) for k, p in gs.named_parameters()}

    def schedule(k, first, last):
        return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2

    def H(t, s):
        t = t.detach()  # stop gradient
        s = torch.softmax(s / tps, dim=1)
        t = torch.softmax((t - C) / tpt, dim=1)  # center + sharpen
        return -(t * torch.log(s)).sum(dim=1).mean()

    def average(l):  # noqa: E741, the slide's name
        for old, new in zip(gt.parameters(), gs.parameters()):
            old.data = l * old.data + (1 - l) * new.data

    for k, (x1, x2, *others) in enumerate(views):
        tpt = 1.0 if flags.no_sharpening else 0.04 + (flags.tau_t - 0.04) * k / steps
        late = mistake == "momentum of the next step"
        l = schedule(k + late, flags.m, flags.m_end)  # noqa: E741
        s1, s2 = gs(x1)[2], gs(x2)[2]
        t1, t2 = gt(x1)[2], gt(x2)[2]
        if mistake == "the student as teacher":
            t1, t2 = s1, s2
        outputs = {"centre of the student": [s1, s2], "centre of one view": [t1]}.get(
            mistake, [t1, t2])
        if mistake == "centre of probabilities":
            outputs = [torch.softmax((t - C) / tpt, dim=1) for t in outputs]
        centred = m * C + (1 - m) * torch.cat(outputs).mean(dim=0, keepdim=True).detach()
        centred = 0 * C if flags.no_centering else centred
        if mistake == "centre before the loss":
            C = centred
        loss = H(t1, s2) / 2 + H(t2, s1) / 2
        if mistake == "the same view":
            loss = H(t1, s1) / 2 + H(t2, s2) / 2
        if mistake == "one direction only":
            loss = H(t1, s2)
        if others and mistake != "no local views":
            pairs = [H(t, gs(x)[2]) for x in others for t in (t1, t2)]
            loss = (2 * loss + sum(pairs)) / (2 + len(pairs))
        P = torch.softmax((torch.cat([t1, t2]) - C) / tpt, dim=1)
        entropy = -(P * P.log()).sum(1).mean()
        terms.append(torch.stack([loss, entropy, loss - entropy]).detach())
        named = {k: p for k, p in gs.named_parameters() if p.requires_grad}
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
        if mistake == "EMA before the step":
            average(l)
        if mistake == "clipped together":
            whole = torch.stack([g.norm() for g in grads.values()]).norm()
        for name, p in named.items():
            if flags.freeze_last_layer and "last_layer" in name:  # the run has one epoch
                if mistake == "decay of the frozen layer":
                    p.data = p.data * (1 - flags.lr / 16)
                continue
            g = grads[name]
            norm = whole if mistake == "clipped together" else g.norm()
            g = g * min(1.0, flags.clip / (norm.item() + 1e-6))
            decay = schedule(k, flags.weight_decay, flags.weight_decay_end) * (p.ndim > 1)
            v[name] = 0.9 * v[name] + g + decay * p.data
            p.data = p.data - schedule(k, flags.lr * 16 / 256, 0.0) * v[name]
        if mistake != "EMA before the step":
            average(l)
        C = C if mistake == "centre before the loss" else centred
    return gs, gt, C, torch.stack(terms).mean(0)


@pytest.fixture
def shipped(tmp_path):
    """flags -> the run that dino.train makes of them in three steps."""
    class Small(Watched):
        def place(self, net):
            return small(self.args)

    def run(flags=""):
        argv = [*SHORT, *"--optimizer sgd --lr 1 --warmup 0 --weight-decay 0.04 --m 0.5 --m-end 1 "
                "--tau-t 0.07 --tau-t-warmup 1 --weight-decay-end 0.4 --hidden 10 --out-dim 12 "
                "--clip 1e9 --freeze-last-layer 0 --local-crops 0 --local-size 8".split(),
                *flags.split(),
                "--out", tmp_path / f"run{flags}"]
        _, _, run = train(dino, argv, Small)
        assert len(run.views) == 3 and not close(*run.views[0][:2], 0.1)
        run.net = small(run.args)
        run.net.head.last_layer.weight_g.requires_grad_(not run.args.norm_last_layer)
        return run

    return run


def agree(run, flags, mistake=None):
    """Whether both networks, the centre and the figures of the epoch are the algorithm's."""
    gs, gt, C, terms = algorithm_1(copy.deepcopy(run.net), run.views, flags, mistake)
    theirs = [*gs.state_dict().values(), *gt.state_dict().values(), C]
    ours = [t for k in ("net", "net_ema") for t in run.state[k].state_dict().values()]
    ours += [run.state["center"]]
    assert len(theirs) == len(ours) == 21 and all(t.isfinite().all() for t in theirs)
    figures = [run.rows[0][k] for k in ("loss", "entropy", "kl")]
    return all(close(a, b, 1e-6) for a, b in zip(theirs, ours)) and close(terms, figures, 1e-5)


def test_algorithm_1(shipped):
    run = shipped()
    assert all(len(v) == 2 for v in run.views) and agree(run, run.args)
    for mistake in ("centre before the loss", "EMA before the step", "the same view",
                    "the student as teacher", "centre of the student", "centre of one view",
                    "centre of probabilities", "one direction only", "momentum of the next step"):
        assert not agree(run, run.args, mistake), mistake
    moved = [close(a, b, 1e-4) for a, b in zip(run.net.state_dict().values(),
                                               run.state["net"].state_dict().values())]
    assert not any(moved) and run.state["center"].abs().max() > 1e-3


@pytest.mark.parametrize("flags, mistake", [
    ("--no-centering", None), ("--no-sharpening", None), ("--no-centering --no-sharpening", None),
    ("--center-m 0.9 --tau-s 0.2", None), ("--m-end 0.6", None),
    ("--local-crops 3", "no local views"), ("--clip 0.2", "clipped together"),
    ("--freeze-last-layer 1", "decay of the frozen layer"),
    ("--norm-last-layer", None)])
def test_flags_change_the_algorithm(shipped, flags, mistake):
    run, plain = shipped(flags), shipped()
    assert agree(run, run.args) and not (mistake and agree(run, run.args, mistake))
    assert len(run.views[0]) == 2 + run.args.local_crops
    assert run.state["center"].eq(0).all() == ("centering" in flags)
    gains = run.state["net"].head.last_layer.weight_g
    assert gains.eq(1).all() == ("last-layer" in flags)
    run.net.requires_grad_(True)
    if "crops" not in flags:  # there the views do it
        assert same(run.views, plain.views) and not agree(run, plain.args)


def test_the_last_layer_thaws(tmp_path):
    class Noted(Watched):
        def end_epoch(self, state):
            last = self.state["net"].head.last_layer.weight_v
            self.layers = [*getattr(self, "layers", []), last.detach().clone()]
            return super().end_epoch(state)

    argv = [*SHORT, *"--limit 16 --epochs 3 --freeze-last-layer 2 --local-crops 0 --out".split()]
    _, _, run = train(dino, [*argv, tmp_path / "run"], Noted)
    start = dino.build(run.args).head.last_layer.weight_v
    assert [torch.equal(start, layer) for layer in run.layers] == [True, True, False]


def test_the_teacher_drops_no_paths(tmp_path):
    argv = [*SHORT, *"--limit 16 --drop-path 0.5 --local-crops 0 --out".split(), tmp_path / "run"]
    _, _, run = train(dino, argv, Watched)
    rates = [[b.drop.p for b in run.state[name].backbone.blocks] for name in ("net", "net_ema")]
    assert max(rates[0]) == 0.5 and not any(rates[1])


# ==================================================================================================
# Weights in and out
# ==================================================================================================

NANO = "--arch vit_nano --patch-size 8 --out-dim 12 --hidden 10 --no-head-bn --image-size 32"
NANO = NANO.split()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Files in the layouts of the released ones and of our own last.pt: name -> path, and the
    weights of student and teacher."""
    args, nets, folder = completed(dino, NANO), SimpleNamespace(), tmp_path_factory.mktemp("files")
    for args.seed, name in ((5, "student"), (6, "teacher")):
        setattr(nets, name, dino.build(args).state_dict())
    full = {
        "student": {f"module.{k}": v for k, v in nets.student.items()}, "teacher": nets.teacher,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [
            {"lr": np.float64(5e-4), "weight_decay": np.float32(0.4), "params": [0]}]},
        "epoch": 3, "args": Namespace(arch="vit_small", local_crops_scale=(0.05, 0.4), lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 12)}, "fp16_scaler": {"scale": 65536.0}}
    backbone = {k.removeprefix("backbone."): v for k, v in nets.teacher.items() if "head" not in k}
    last = {"method": "dino", "state": {"net": nets.student, "net_ema": nets.teacher}}
    half = {"student": nets.student}
    for name, content in (("full", full), ("backbone", backbone), ("last", last), ("half", half)):
        torch.save(content, folder / f"{name}.pth")
        setattr(nets, name, folder / f"{name}.pth")
    return nets


def loaded(path, tmp_path, *changes):
    """What dino.train makes of a network of another seed."""
    argv = [*SHORT, *NANO, *map(str, changes), "--eval", path, "--out", tmp_path / "run"]
    return dict(train(dino, argv)[0].state_dict())


@pytest.mark.parametrize("file", ["full", "last"])
def test_released_checkpoints_and_our_own(file, official, tmp_path):
    for argv, expected in (([], official.teacher), (["--branch", "student"], official.student)):
        assert same(loaded(getattr(official, file), tmp_path, *argv), dict(expected))
    assert not same(dict(official.teacher), dict(official.student))


def test_a_backbone_alone_leaves_the_head_as_it_was(official, tmp_path):
    for path, changes in ((official.backbone, []), (official.full, ["--out-dim", 13])):
        untrained = dino.build(completed(dino, [*NANO, *changes])).state_dict()
        for k, v in loaded(path, tmp_path, *changes).items():
            assert torch.equal(v, (untrained if k.startswith("head.") else official.teacher)[k]), k


def test_released_checkpoints_at_another_resolution(official, tmp_path):
    for size, side in ((16, 2), (64, 8)):
        for k, v in loaded(official.full, tmp_path, "--image-size", size).items():
            expected = official.teacher[k]
            if k == "backbone.pos_embed":
                expected = interpolate_pos_encoding(expected, side * side, size, size, 8)
            assert close(v, expected, 1e-6), k


def test_released_resnets(tmp_path):
    """Both branches come out of DistributedDataParallel: there the teacher has batch norm too."""
    changes = ["--arch", "resnet18", "--head-bn"]
    net = dino.build(completed(dino, [*NANO, *changes, "--seed", "7"])).state_dict()
    wrapped = {f"module.{k}": v for k, v in net.items()}
    torch.save({"student": wrapped, "teacher": wrapped}, tmp_path / "full.pth")
    assert same(loaded(tmp_path / "full.pth", tmp_path, *changes), dict(net))


def test_wrong_checkpoints(official, tmp_path, capsys):
    for path, *changes in ((official.backbone, "--arch", "vit_tiny"),
                           (official.full, "--arch", "resnet18"),
                           (official.full, "--patch-size", "4"), (official.half,)):  # no teacher
        argv = [*SHORT, *NANO, *changes, "--init", path, "--out", tmp_path / "run"]
        assert path.name in refused(dino, argv, capsys)


@pytest.mark.parametrize("arch, stem", [("vit_nano", "7x7"), ("vit_small", "7x7"),
                                        ("resnet18", "7x7"), ("resnet18", "3x3")])
def test_the_printed_lines_rebuild_the_backbone(arch, stem):
    """Strictly, with the same features: a file alone, as it is published."""
    pytest.importorskip("timm")
    flags = ["--arch", arch, "--stem", stem, "--image-size", "24"]
    net = dino.build(args := completed(dino, [*NANO, *flags])).backbone.eval()
    exec(dino.loading(args), names := {})
    names["net"].load_state_dict(net.state_dict())
    x = draw(2, 3, 24, 24, dtype=torch.float32)
    with torch.no_grad():
        h = net(x)
        h = h[:, 0] if "vit" in arch else h
        assert close(names["net"].eval()(x), h, 1e-5) and h.std() > 1e-3


def test_resnets_are_torchvisions():
    with torch.device("meta"):
        ours = dino.build(completed(dino, ["--arch", "resnet50"], side=300)).backbone.state_dict()
        official = torchvision.models.resnet50().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in official.items() if not k.startswith("fc.")}


# ==================================================================================================
# Warnings and verdicts
# ==================================================================================================


def test_check(capsys):
    def printed(*flags):
        dino.check(completed(dino, [*SHORT, *map(str, flags)]), steps=69)
        return capsys.readouterr().out

    for flags, words in ((["--patch-size", 32], "--patch-size is over"),
                         (["--local-size", 8, "--patch-size", 16], "--local-size"),
                         (["--local-scale", 0.9], "--local-scale is over")):
        assert words in fails(lambda: printed(*flags), capsys)  # noqa: B023
    good = ["--m", 0, "--local-size", 8]
    assert "warning:" not in printed(*good)
    for flags, words in ((["--m", 0.99], "half-life is over a tenth"),
                         (["--image-size", 17], "the remainder is cut off"),
                         (["--local-size", 16], "not smaller than global")):
        found = [line for line in printed(*good, *flags).split("\n") if "warning" in line]
        assert len(found) == 1 and words in found[0], flags
    assert "warning:" not in printed(*good, "--local-size", 16, "--local-crops", 0)
    assert "warning:" not in printed(*good, "--local-scale", 0.9, "--local-crops", 0)


def test_the_collapse_is_named():
    """Figure 7 of the paper: where KL goes to 0 nothing is learned; the entropy tells why."""
    def verdict(H, KL, word="healthy"):
        last = {"entropy": H * math.log(512), "kl": KL * math.log(512)}
        run = SimpleNamespace(rows=[{"entropy": 9.0, "kl": 9.0}, last])
        return dino.teacher_verdict(f"{word}: z has spread 0.9", run, 512)

    assert verdict(0.99, 0.001).startswith("uniform teacher: z has spread 0.9")
    assert verdict(0.001, 0.001).startswith("one-hot teacher: ")
    assert verdict(0.0, 0.0).startswith("one-hot teacher: ")
    for H, KL in ((0.99, 0.2), (0.001, 0.2), (0.5, 0.001), (0.5, 0.2), (math.nan, math.nan)):
        assert verdict(H, KL).startswith("healthy: ")
    assert verdict(0.5, 0.2, "collapsed to a point").startswith("collapsed to a point: ")
    assert verdict(0.5, 0.2).endswith("teacher's entropy 0.50 of ln K, KL 0.200")
    assert dino.teacher_verdict("healthy: z", SimpleNamespace(rows=[]), 512) == "healthy: z"
    failed = SimpleNamespace(rows=[{"entropy": 0.0, "kl": 0.0}])
    assert dino.teacher_verdict("features are not finite", failed, 512) == "features are not finite"


@pytest.mark.parametrize("flag, word", [("--no-sharpening", "uniform teacher"),
                                        ("--no-centering", "one-hot teacher")])
def test_a_collapsed_run_says_so(flag, word, tmp_path):
    """A network that answers the same to every image, made by hand; the run has to find out."""
    class Collapsed(Watched):
        def place(self, net):
            net, v = small(self.args), draw(256, dtype=torch.float32)
            net.head.mlp[4].bias.data[:] = 10 * v  # z is about v / |v|, whatever comes in
            net.head.last_layer.weight_v.data[0] = v
            net.head.last_layer.weight_v.data[1:] = v if flag == "--no-sharpening" else -v
            return net

    argv = [*SHORT, flag, "--out", tmp_path / "run", "--lr", "1e-6"]
    net, data, run = train(dino, argv, Collapsed)
    data.train.labels[:] = -1  # no probes
    assert dino.evaluate(net, data, run.args, run)["verdict"].startswith(word)
