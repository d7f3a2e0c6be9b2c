"""SimCLR against its slides (Algorithm 1) and the paper."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tools import TINY, Watched, close, draw, options, refused, same, train

import common
import simclr

SHORT = [*TINY, *"--epochs 1 --eval-every 0".split()]

# ==================================================================================================
# Loss
# ==================================================================================================


def algorithm_1(z1, z2, tau):
    """The slide, typed in: l(i, j) = -log( exp(s_ij) / sum_{k=1}^{2N} 1[k != i] exp(s_ik) ),
    L = 1 / 2N sum_{k=1}^N [ l(2k-1, 2k) + l(2k, 2k-1) ]; views of image k are 2k-1 and 2k, from 1.
    """
    N, z, s = len(z1), {}, {}
    for k in range(1, N + 1):
        z[2 * k - 1], z[2 * k] = z1[k - 1].tolist(), z2[k - 1].tolist()
    for i in range(1, 2 * N + 1):
        for j in range(1, 2 * N + 1):
            dot = sum(a * b for a, b in zip(z[i], z[j]))
            norms = math.sqrt(sum(a * a for a in z[i])) * math.sqrt(sum(b * b for b in z[j]))
            s[i, j] = dot / (tau * norms)

    def ell(i, j):
        total = sum(np.exp(s[i, k]) for k in range(1, 2 * N + 1) if k != i)
        return -np.log(np.exp(s[i, j]) / total)

    return sum(ell(2 * k - 1, 2 * k) + ell(2 * k, 2 * k - 1) for k in range(1, N + 1)) / (2 * N)


def variant(z1, z2, tau, mistake=None):
    """NT-Xent by matrices, with one of the usual mistakes."""
    N, i = len(z1), torch.arange(2 * len(z1))
    z = torch.cat([z1, z2])
    z = z if mistake == "not normalised" else F.normalize(z, dim=1)
    s = z @ z.T / (tau**2 if mistake == "tau squared" else tau)
    j = i ^ 1 if mistake == "neighbours as positives" else (i + N) % (2 * N)
    keep = i[:, None] != (-1 if mistake == "self-similarity kept" else i)
    if mistake == "positive left out of the denominator":
        keep = keep & (i != j[:, None])
    if mistake == "negatives only from the other view":
        keep = keep & ((i[:, None] < N) != (i < N))
    losses = s.masked_fill(~keep, -math.inf).logsumexp(1) - s[i, j]
    losses = losses[:N] if mistake == "one direction only" else losses
    return losses.sum() / N if mistake == "mean over N" else losses.mean()


def test_nt_xent_equation():
    for N, D, tau, seed in ((5, 3, 0.5, 0), (4, 7, 0.1, 1), (2, 2, 1.0, 2)):
        z1, z2 = draw(N, D, seed=seed), 3 * draw(N, D, seed=seed + 9)
        slide = algorithm_1(z1, z2, tau)
        assert close(simclr.nt_xent(z1, z2, tau), slide) and close(variant(z1, z2, tau), slide)
        for mistake in ("self-similarity kept", "positive left out of the denominator",
                        "not normalised", "tau squared", "one direction only", "mean over N",
                        "neighbours as positives", "negatives only from the other view"):
            if (mistake, tau) != ("tau squared", 1.0):
                assert abs(variant(z1, z2, tau, mistake) - slide) > 1e-4, mistake
    z1, z2 = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: simclr.nt_xent(a, b, 0.5), (z1, z2))


def test_nt_xent_closed_forms():
    for N in (2, 8):
        same_everywhere = draw(1, 4).expand(N, 4)
        assert close(simclr.nt_xent(same_everywhere, same_everywhere, 0.1), math.log(2 * N - 1))
    axes = torch.eye(4, dtype=torch.float64)  # positives 1, negatives 0
    assert close(simclr.nt_xent(axes, axes, 0.5), math.log(math.exp(2) + 6) - 2)
    z1, z2, scale = draw(6, 5), draw(6, 5, seed=1), draw(6, 1, seed=2).abs() + 0.1
    assert close(simclr.nt_xent(scale * z1, 7 * z2, 0.2), simclr.nt_xent(z1, z2, 0.2))
    sharp = [simclr.nt_xent(z1.to(t), z2.to(t), 1e-3) for t in (torch.float32, torch.float64)]
    assert close(sharp[0].double() / sharp[1], 1.0, 1e-4)  # exp(1000) would overflow


def test_nt_xent_keeps_one_matrix_for_backward():
    def kept(loss):
        found = set()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: found.add(t.untyped_storage().data_ptr()) or t
                if t.shape == (16, 16) and t.is_floating_point() else t, lambda t: t):
            z1, z2 = draw(8, 3).requires_grad_(), draw(8, 3, seed=1).requires_grad_()
            out = loss(z1, z2)
            assert out.requires_grad
        return len(found)

    def wasteful(z1, z2):
        s = (z := F.normalize(torch.cat([z1, z2]))) @ z.T
        return (s.exp() * (1 - torch.eye(16, dtype=s.dtype))).sum(1).log().mean() - s.sin().mean()

    assert kept(lambda a, b: simclr.nt_xent(a, b, 0.2)) <= 1 < kept(wasteful)


# ==================================================================================================
# Optimiser
# ==================================================================================================


def lars_by_hand(weights, grads, rates, mistake=None, mu=0.9, wd=0.3, eta=0.01):
    """The docstring of LARS in NumPy: weights (list), grads[step][tensor], a rate per step."""
    weights, v = [w.copy() for w in weights], [np.zeros_like(w) for w in weights]

    def length(x):
        return math.sqrt(sum(float(a) ** 2 for a in x.ravel()))

    for g_step, lr in zip(grads, rates):
        for n, g in enumerate(g_step):
            w, inside = weights[n], lr if mistake == "rate before the momentum" else 1
            if w.ndim > 1 or mistake == "biases too":
                total = g if mistake == "no decay" else g + wd * w
                norm = length(g if mistake == "trust without the decay" else total)
                trust = eta * length(w) / norm if length(w) * norm > 0 else 1.0
                g = total + (trust - 1) * (g if mistake == "decay outside the trust" else total)
                g = total if mistake == "no trust" else g
            v[n] = mu * v[n] + inside * g
            weights[n] = w - (1 if inside != 1 else lr) * v[n]
    return weights


def test_lars_equation():
    shapes, rates = [(4, 3), (2, 3, 2, 2), (5, 2), (4,)], (0.5, 0.2, 0.9, 0.1)
    weights = [draw(*s, seed=i) for i, s in enumerate(shapes)]
    weights[2].zero_()  # no trust ratio where there is no weight yet
    weights[1] *= 1e-3  # however small it is
    grads = [[draw(*s, seed=10 * t + i + 5) for i, s in enumerate(shapes)] for t in range(4)]
    grads[0][2].zero_()
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = simclr.LARS(params, 1.0, momentum=0.9, weight_decay=0.3, eta=0.01)
    for g_step, lr in zip(grads, rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, g_step):
            p.grad = g.clone()
        optimizer.step()
    args = [w.numpy() for w in weights], [[g.numpy() for g in s] for s in grads], rates

    def agrees(mistake=None):
        return all(close(p.detach(), w) for p, w in zip(params, lars_by_hand(*args, mistake)))

    assert agrees()
    for mistake in ("rate before the momentum", "biases too", "no decay", "no trust",
                    "trust without the decay", "decay outside the trust"):
        assert not agrees(mistake), mistake
    assert simclr.LARS(params, 1.0, 0.9, 0.0).eta == 0.001  # paper's code: EETA_DEFAULT


def test_rate():
    """Paper, Appendix B.1: 0.3 N / 256 and 0.075 sqrt(N) are the same for 4,096 images."""
    for N in (256, 4096):
        lr = simclr.rate(SimpleNamespace(optimizer="lars", batch_size=N), 0)
        assert close(lr * N / 256, 0.075 * math.sqrt(N))
    assert close(lr, 0.3)
    assert simclr.rate(SimpleNamespace(optimizer="sgd", batch_size=256), 0) == 0.3


def test_lr_at():
    steps, warmup, peak = 100, 10, 2.0
    rate = [simclr.lr_at(t, steps, warmup, peak) for t in range(steps + 1)]
    for t in range(steps + 1):
        cosine = peak * (1 + math.cos(math.pi * (t - 10) / 90)) / 2
        assert close(rate[t], (t + 1) / 10 * peak if t < 10 else cosine, 1e-12), t
    assert rate[0] == 0.2 and rate[9] == rate[10] == peak == max(rate) and rate[-1] < 1e-12
    assert close(rate[55], peak / 2) and sorted(rate[10:], reverse=True) == rate[10:]
    assert simclr.lr_at(0, 10, 0, peak) == peak and 0 < simclr.lr_at(9, 10, 0, peak) < 0.1
    assert simclr.lr_at(9, 10, 10, peak) == peak


# ==================================================================================================
# Augmentation and model
# ==================================================================================================


def test_augmentation_is_the_papers():
    args = options(simclr, "--image-size 16 --strength 0.5 --blur 0.5 --min-scale 0.08".split())
    assert simclr.crops(args) == [common.Crop(16, (0.08, 1.0), (3 / 4, 4 / 3), 2)]
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    for y in simclr.augment([x, x], args):
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and len(y.unique(dim=0)) > 50
        share = (y.amax(1) - y.amin(1)).flatten(1).amax(1).lt(1e-5).float().mean()
        assert 0.05 < share < 0.4  # a fifth is grey
    y1, y2 = simclr.augment([x, x], args)
    assert (y1 == y2).flatten(1).all(1).float().mean() < 0.2  # the two views have own draws
    args.no_color, args.blur, args.no_crop = True, 0.0, True
    assert len(simclr.augment([x], args)[0].unique(dim=0)) == 2  # mirrored or not
    assert simclr.crops(args) == [common.Crop(16, 1.0, None, 2)]


def test_augmentation_has_the_papers_numbers(monkeypatch):
    """Appendix A: jitter of strength s in 80 %, grey in 20 %, blur as wide as a tenth of the image
    in half of them."""
    done = []
    for name in ("flip", "color_jitter", "grey", "blur"):
        monkeypatch.setattr(common, name, lambda x, *numbers, name=name, **named: done.append(
            (name, *numbers, *(named[k] for k in sorted(named)))) or x)
    args = options(simclr, "--image-size 224 --strength 1 --blur 0.5".split())
    args.no_color = False
    simclr.augment([torch.zeros(2, 3, 8, 8)] * 2, args)
    assert done == 2 * [("flip", 0.5), ("color_jitter", 0.8, 0.8, 0.8, 0.2, 0.8), ("grey", 0.2),
                        ("blur", 0.5, (0.1, 2.0), 23)]


def test_model():
    x = draw(2, 3, 16, 16, dtype=torch.float32)
    for head, D, layers in (("none", 96, 0), ("linear", 5, 1), ("mlp", 5, 2)):
        net = simclr.SimCLR("convnet", "7x7", head, 5)
        h, z = net(x)
        assert h.shape == (2, 96) and z.shape == (2, D)
        assert sum(isinstance(m, nn.Linear) for m in net.modules()) == layers
    args = options(simclr, "--arch convnet --stem 7x7 --head mlp --dim 4 --seed 3".split())
    assert same(simclr.build(args).state_dict(), simclr.build(args).state_dict())
    assert len({simclr.build(args).head[-1].weight[0, 0].item() for args.seed in (3, 4)}) == 2
    resnet50 = simclr.SimCLR("resnet50", "7x7").backbone.state_dict()
    official = torchvision.models.resnet50().state_dict()
    assert {k: v.shape for k, v in resnet50.items()} == {
        k: v.shape for k, v in official.items() if not k.startswith("fc.")}


def test_encoder():
    """Four convolutions, narrow or wide; a ResNet whose 3x3 stem keeps every pixel of small images
    (SimCLR, Appendix B.9)."""
    for arch, widths, strides in (("convnet", (24, 48, 96, 96), (2, 2, 2, 1)),
                                  ("convnet_wide", (48, 96, 192, 384), (2, 2, 2, 2))):
        net = simclr.encoder(arch, "7x7")
        found = [m for m in net if isinstance(m, nn.Conv2d)]
        assert [m.out_channels for m in found] == [*widths] and net.dim == widths[-1]
        assert [m.stride[0] for m in found] == [*strides]
        assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) for m in found)
    x = torch.zeros(2, 3, 32, 32)
    for stem, side in (("3x3", 32), ("7x7", 8)):
        net, sides = simclr.encoder("resnet18", stem), []
        net.layer1.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))  # noqa: B023
        assert net(x).shape == (2, 512) and sides == [side] and net.conv1.bias is None


@pytest.mark.parametrize("arch", simclr.NETS["choices"])
@pytest.mark.parametrize("stem", ["3x3", "7x7"])
def test_the_printed_lines_rebuild_the_backbone(arch, stem):
    args = options(simclr, ["--arch", arch, "--stem", stem])
    with torch.device("meta"):
        exec(simclr.loading(args), names := {})
        names["net"].load_state_dict(simclr.encoder(arch, stem).state_dict())


# ==================================================================================================
# The step
# ==================================================================================================


def small(args):
    """SimCLR on next to nothing, with batch norm."""
    torch.manual_seed(args.seed)
    net = simclr.SimCLR(args.arch, dim=8)
    pool = nn.AdaptiveAvgPool2d((net.backbone.dim // 32, 4))
    net.backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), pool, nn.Flatten())
    return net


def three_steps(net, views, args, mistake=None):
    """Algorithm 1 with SGD, by hand: net after a step on each pair of views -> its tensors."""
    weights, steps, lr = list(net.parameters()), len(views), args.lr * 16 / 256
    v = [torch.zeros_like(w) for w in weights]
    for t, (x1, x2) in enumerate(views):
        if mistake == "a view against itself":
            x2 = x1
        h = net.backbone(torch.cat([x1, x2]))
        if mistake == "batch norm by view":
            h = torch.cat([net.backbone(x) for x in (x1, x2)])
        z1, z2 = (h if mistake == "h in place of z" else net.head(h)).chunk(2)
        tau = 1.0 if mistake == "no temperature" else args.temperature
        grads = torch.autograd.grad(variant(z1, z2, tau), weights, allow_unused=True)
        rate = lr * (1, 2, 2)[t] / 2  # two steps of warm-up; the cosine starts at its peak
        if mistake == "no warm-up":
            rate = lr * (1 + math.cos(math.pi * t / steps)) / 2
        for i, (w, g) in enumerate(zip(weights, grads)):
            v[i] = 0.9 * v[i] + (0 if g is None else g) + args.weight_decay * w.data
            w.data = w.data - rate * v[i]
    return net.state_dict()


def test_algorithm_1_is_what_runs(tmp_path):
    class Small(Watched):
        def place(self, net):
            return small(self.args)

    argv = "--lr 5 --weight-decay 0.01 --warmup 0.5 --temperature 0.3 --out".split()
    net, _, run = train(simclr, [*SHORT, *argv, tmp_path / "run"], Small)
    start, views = small(run.args), run.views
    assert len(views) == 3 and all(x.shape == (16, 3, 16, 16) for v in views for x in v)

    def agrees(mistake=None):
        by_hand = three_steps(copy.deepcopy(start), views, run.args, mistake)
        return all(close(a, by_hand[k], 2e-4) for k, a in net.state_dict().items()
                   if a.is_floating_point())

    assert agrees() and not close(net.head[3].weight.detach(), start.head[3].weight, 1e-2)
    for mistake in ("a view against itself", "batch norm by view", "h in place of z",
                    "no temperature", "no warm-up"):
        assert not agrees(mistake), mistake


def test_negatives_of_all_processes(tmp_path):
    """The step on the first of two processes; the other one's z1 and z2 are given."""
    others = draw(32, 8, dtype=torch.float32)

    class First(Watched):
        left = others

        def gather(self, x):
            theirs, self.left = self.left.split([len(x), len(self.left) - len(x)])
            return torch.cat([x, theirs])

    argv = [*SHORT, "--limit", 16, "--dim", 8, "--out", tmp_path / "run"]
    _, _, run = train(simclr, argv, First)
    z = simclr.build(run.args)(torch.cat(run.views[0]))[1]
    z1, z2 = (torch.cat(pair) for pair in zip(z.chunk(2), others.chunk(2)))
    assert close(run.rows[0]["loss"], variant(z1, z2, run.args.temperature).detach(), 1e-5)


def test_features_are_those_of_eval_mode(tmp_path, capsys):
    net, data, run = train(simclr, [*SHORT, "--limit", 32, "--out", tmp_path / "run"])
    before = copy.deepcopy(net.state_dict())
    simclr.evaluate(net, data, run.args, run)
    assert same(before, net.state_dict()) and net.training  # as batch norm's statistics were


# ==================================================================================================
# Its options
# ==================================================================================================


def test_flags(tmp_path):
    """Each runs to the end and makes another backbone than without it."""
    def made(flag):
        argv = [*SHORT, "--limit", 32, *flag.split(), "--out", tmp_path / "run"]
        net, _, _ = train(simclr, argv)
        assert all(v.isfinite().all() for v in net.state_dict().values())
        return net.backbone.state_dict(), len(net.head.state_dict())

    plain, tensors = made("")
    assert tensors == 8
    for flag, tensors in (("--head none", 0), ("--head linear", 2), ("--no-color", 8),
                          ("--no-crop", 8), ("--blur 1", 8), ("--optimizer lars", 8)):
        backbone, found = made(flag)
        assert found == tensors and not same(backbone, plain), flag


def test_another_head_or_stem_is_refused(tmp_path, capsys):
    """A checkpoint of a network with other options, whole or in part."""
    args = options(simclr, "--arch resnet18 --stem 3x3 --head mlp --dim 128".split())
    net = simclr.build(args)
    saved = {"state_dict": net.backbone.state_dict(), "meta": {"arch": "resnet18"}}
    torch.save(saved, tmp_path / "backbone.pt")
    argv = [*SHORT, "--arch", "resnet18", "--out", tmp_path / "run", "--init"]
    for stem in ("--stem 7x7", "--stem 3x3 --arch convnet"):
        error = refused(simclr, [*argv, tmp_path / "backbone.pt", *stem.split()], capsys)
        assert "backbone.pt holds another network" in error and "--arch resnet18" in error


def test_a_small_batch_is_warned_of(capsys):
    for size in (63, 64):
        simclr.check(options(simclr, ["--batch-size", size]))
        assert ("fewer than 64" in capsys.readouterr().out) == (size < 64)
