"""SimCLR against its slides (Algorithm 1), the paper and its own promises."""

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import simclr

ROOT = Path(simclr.__file__).parent
TINY = "--device cpu --workers 0 --limit 48 --batch-size 16 --image-size 16 --epochs 3".split()
LISTED = """method dataset epochs seed device versions linear_top1 knn_top1 head_linear_top1
    untrained_linear_top1 untrained_knn_top1 pixels_linear_top1 pixels_knn_top1 train_seconds
    total_seconds images_per_second peak_memory_mb verdict""".split()  # design, section 4


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, bound=1e-10):
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    return torch.allclose(a, b, rtol=0, atol=bound)


def same(a, b):
    """Nested dicts and lists of tensors and plain values, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def quiet(argv):
    """main(argv) -> its results and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        results = simclr.main(argv)
    return results, out.getvalue()


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


def small_net(kind):
    """A net with batch norm and its optimiser, made as in `train`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    make = simclr.LARS if kind == "lars" else torch.optim.SGD
    fused = {} if kind == "lars" else {"fused": kind == "sgd"}
    optimizer = make(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01, **fused)
    for p in net.parameters() if kind != "plain" else ():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return net, optimizer


def step_of(net, optimizer, scaler, seed, poison=None, restore=True):
    """One step on fixed data, poisoned or not -> what `update` says."""
    x, buffers = draw(6, 3, seed=seed, dtype=torch.float32), []
    if restore:
        buffers = [(b, b.clone()) for b in net.buffers() if b.is_floating_point()]
    if poison == "input":
        x[2, 1] = math.nan
    loss = net(x).square().mean()
    loss = loss * (math.inf if poison == "loss" else 1)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if poison == "gradient":
        net[3].weight.grad[1, 2] = math.inf
    return bool(simclr.update(loss, net, optimizer, scaler, buffers))


@pytest.mark.parametrize("kind", ["sgd", "lars"])
@pytest.mark.parametrize("poison", ["input", "loss", "gradient"])
def test_update_skips_what_is_not_finite(kind, poison):
    def held(*things):
        floating = {k: v for k, v in things[0].state_dict().items() if v.is_floating_point()}
        momentum = {i: s["momentum_buffer"] for i, s in things[1].state_dict()["state"].items()}
        return {k: v.clone() for k, v in {**floating, **momentum}.items()}

    off = torch.amp.GradScaler("cpu", enabled=False)
    net, optimizer = small_net(kind)
    for seed in range(3):  # in the very first step, and later
        before = held(net, optimizer)
        assert not step_of(net, optimizer, off, 10 + seed, poison)
        assert same(held(net, optimizer), before)
        assert step_of(net, optimizer, off, seed)
        assert not same(held(net, optimizer), before)
    other, optimizer_of_other = small_net(kind)
    for seed in range(3):
        step_of(other, optimizer_of_other, off, seed)
    assert same(held(net, optimizer), held(other, optimizer_of_other))
    if poison == "input":  # the test can fail: without `buffers` batch norm is spoilt
        step_of(net, optimizer, off, 0, poison, restore=False)
        assert net[1].running_mean.isnan().any()


@pytest.mark.parametrize("enabled", [False, True])
def test_update_is_plain_sgd_and_the_scale_halves(enabled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    net, optimizer = small_net("sgd")
    plain, optimizer_of_plain = small_net("plain")
    for seed in range(3):
        assert step_of(net, optimizer, scaler, seed)
        loss = plain(draw(6, 3, seed=seed, dtype=torch.float32)).square().mean()
        optimizer_of_plain.zero_grad()
        loss.backward()
        optimizer_of_plain.step()
        for a, b in zip(net.parameters(), plain.parameters()):
            assert close(a, b, 1e-6)
    before = [p.clone() for p in net.parameters()]
    for halvings in (1, 2):
        assert not step_of(net, optimizer, scaler, 3, "gradient")
        assert not enabled or scaler.get_scale() == 1024.0 / 2**halvings
    assert same(before, list(net.parameters()))


# ==================================================================================================
# Augmentation and model
# ==================================================================================================


def test_augmentation_is_the_papers():
    args = simclr.options(["--image-size", "16", "--strength", "0.5", "--blur", "0.5",
                           "--min-scale", "0.08"])
    assert simclr.crops(args) == [common.Crop(16, (0.08, 1.0), (3 / 4, 4 / 3), 2)]
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    y = simclr.augment(x, args)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and len(y.unique(dim=0)) > 50
    share = (y.amax(1) - y.amin(1)).flatten(1).amax(1).lt(1e-5).float().mean()
    assert 0.05 < share < 0.4  # a fifth is grey
    args.no_color, args.blur, args.no_crop = True, 0.0, True
    assert len(simclr.augment(x, args).unique(dim=0)) == 2  # mirrored or not
    assert simclr.crops(args)[0].ratio is None and simclr.crops(args)[0].count == 2


def test_model():
    x = draw(2, 3, 16, 16, dtype=torch.float32)
    for head, D, layers in (("none", 512, 0), ("linear", 5, 1), ("mlp", 5, 2)):
        net = simclr.SimCLR("resnet10", "3x3", head, 5)
        h, z = net(x)
        assert h.shape == (2, 512) and z.shape == (2, D)
        assert sum(isinstance(m, nn.Linear) for m in net.modules()) == layers
    args = simclr.options(["--arch", "resnet10", "--stem", "7x7", "--dim", "4", "--seed", "3"])
    assert same(simclr.build(args).state_dict(), simclr.build(args).state_dict())
    first = {simclr.build(args).head[-1].weight[0, 0].item() for args.seed in (3, 4)}
    assert len(first) == 2
    resnet50 = simclr.SimCLR("resnet50", "7x7").backbone.state_dict()
    official = torchvision.models.resnet50().state_dict()
    assert {k: v.shape for k, v in resnet50.items()} == {
        k: v.shape for k, v in official.items() if not k.startswith("fc.")}


# ==================================================================================================
# Evaluation
# ==================================================================================================


def blobs(n, spread, seed=0, scale=1.0):
    """n float32 points of three classes in 4 dimensions of very different size."""
    y = torch.arange(n) % 3
    x = torch.eye(3, 4, dtype=torch.float64)[y] + spread * draw(n, 4, seed=seed)
    return ((x + 2) * torch.tensor([1, 10, 0.1, 100]) * scale).float(), y


def test_knn():
    def by_hand(x, y, x_test, y_test, k, tau, votes=None):
        right = 0
        for q, target in zip(x_test.double().tolist(), y_test.tolist()):
            near = []
            for p, label in zip(x.double().tolist(), y.tolist()):
                near.append((sum(a * b for a, b in zip(p, q)) / math.hypot(*p) / math.hypot(*q),
                             label))
            near = sorted(near, reverse=True)[:k]
            vote = [sum((votes or math.exp(c / tau)) for c, label in near if label == j)
                    for j in range(3)]
            right += vote.index(max(vote)) == target
        return 100 * right / len(x_test)

    y, y_test = torch.arange(60) % 3, torch.arange(90) % 3
    x = (draw(3, 5)[y] + draw(60, 5, seed=1)).float()
    x_test = (draw(3, 5)[y_test] + draw(90, 5, seed=2)).float()
    for k, tau in ((1, 0.07), (5, 0.07), (20, 0.5), (500, 0.1)):
        bank = x, y, x_test, y_test, k, tau
        assert close(simclr.knn(*bank), by_hand(*bank))
        assert close(simclr.knn(x * 9, *bank[1:]), by_hand(*bank))  # cosine: scale is nothing
    assert by_hand(x, y, x_test, y_test, 500, 0.1) != by_hand(x, y, x_test, y_test, 500, 0.1, 1.0)
    far = 5 * torch.eye(3, 5)[y] + 0.1 * x, y, 5 * torch.eye(3, 5)[y_test] + 0.1 * x_test, y_test
    assert simclr.knn(*far, 20, 0.07) == 100
    noise = draw(600, 5, seed=3).float().split(300)
    assert 25 < simclr.knn(noise[0], torch.arange(300) % 3, noise[1], torch.arange(300) % 3,
                           20, 0.07) < 42


def newton(x, y, x_test, y_test, decay, mistake=None):
    """Top-1 of the exact minimum, found in float64 by Newton's method."""
    x, x_test = x.double(), x_test.double()
    if mistake != "not standardised":
        x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    if mistake == "no bias":
        x, x_test = F.pad(x, (0, 1)), F.pad(x_test, (0, 1))
    else:
        x, x_test = F.pad(x, (0, 1), value=1.0), F.pad(x_test, (0, 1), value=1.0)
    decay = {"decay times 10": 10 * decay, "no decay": 0}.get(mistake, decay)

    def objective(w):
        w = w.view(x.shape[1], 3)
        penalised = w if mistake == "bias decays" else w[:-1]
        return F.cross_entropy(x @ w, y) + decay / 2 * penalised.square().sum()

    w = torch.zeros(3 * x.shape[1], dtype=torch.float64)
    for _ in range(30):
        g = torch.autograd.functional.jacobian(objective, w)
        w = w - torch.linalg.pinv(torch.autograd.functional.hessian(objective, w)) @ g
    assert mistake or torch.autograd.functional.jacobian(objective, w).norm() < 1e-8
    return 100 * ((x_test @ w.view(-1, 3)).argmax(1) == y_test).double().mean().item()


def test_linear_probe():
    x, y = blobs(240, 0.5)
    keep = (y != 0) | (torch.arange(240) % 4 == 0)  # uneven classes: the bias matters
    x, y = x[keep], y[keep]
    x_test, y_test = blobs(6000, 0.5, seed=1)
    for decay in (1.0, 0.1, 1e-3):
        exact, got = (f(x, y, x_test, y_test, decay) for f in (newton, simclr.linear_probe))
        assert abs(exact - got) < 0.1, decay
    exact = newton(x, y, x_test, y_test, 0.1)
    for mistake in ("no bias", "bias decays", "decay times 10", "no decay", "not standardised"):
        assert abs(newton(x, y, x_test, y_test, 0.1, mistake) - exact) > 2, mistake
    with torch.no_grad():  # as evaluation calls it; separable data, features of any scale
        assert simclr.linear_probe(*blobs(90, 0.1), *blobs(300, 0.1, seed=1), 1e-3) == 100
    noise = draw(1200, 4, seed=3).float().split(600)
    assert 25 < simclr.linear_probe(noise[0], y := torch.arange(600) % 3, noise[1], y, 0.1) < 42


def health_of(h, z1, z2):
    """`health` on a network that answers with these: image k is grey of brightness k / 255."""
    calls = []

    def net(x):
        calls.append(0)
        i = (x[:, 0, 4, 4] * 255).round().long()
        return h[i], (z1, z2)[(len(calls) - 1) % 2][i]

    grey = torch.arange(len(h), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    images = common.Images(torch.zeros(len(h), dtype=torch.int64), grey,
                           torch.full((len(h), 2), 8))
    args = simclr.options("--device cpu --no-crop --no-color --image-size 8 --blur 0".split())
    data = SimpleNamespace(val=(images, torch.arange(len(h))))
    return simclr.health(net, data, args, common.setup(args.device))


def test_health():
    n, D = 200, 64
    h = draw(n, 10).float() * torch.logspace(0, -3, 10)
    z1 = F.normalize(draw(n, D, seed=1)).float()
    z2 = F.normalize(z1 + 0.05 * draw(n, D, seed=2).float())
    got, a, b = health_of(h, z1, z2), z1.double().numpy(), z2.double().numpy()
    assert close(got["alignment"], sum(((p - q) ** 2).sum() for p, q in zip(a, b)) / n, 1e-4)
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(n) for j in range(i)]
    assert close(got["uniformity"], math.log(sum(pairs) / len(pairs)), 1e-4)
    deviations = [math.sqrt(sum((v - c.mean()) ** 2 for v in c) / (n - 1)) for c in a.T]
    assert close(got["spread"], sum(deviations) / D * math.sqrt(D), 1e-4)
    for key, x in (("rank_h", h.double().numpy()), ("rank_z", a)):
        sigma = np.sqrt(np.linalg.eigvalsh(x.T @ x).clip(0))
        p = sigma / sigma.sum()
        rank = math.exp(-sum(q * math.log(q) for q in p if q > 0))
        assert close(got[key] / rank, 1.0, 1e-3), key
    assert got["verdict"].startswith("healthy")
    point = F.normalize(z1[:1] + 1e-3 * z2)
    angle = torch.linspace(0, 6, n)
    circle = F.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, D - 2))
    for z, verdict in ((point, "collapsed to a point"), (z1[:1].expand(n, -1), "collapsed to a"),
                       (circle, "dimensional collapse")):
        assert health_of(h, z, z)["verdict"].startswith(verdict)  # though h is as it was


# ==================================================================================================
# The command
# ==================================================================================================


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run -> its folder, results and output."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = "--device cpu --limit 200 --batch-size 32 --epochs 2 --out".split()
    return folder, *quiet([*argv, str(folder)])


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_run_writes_what_it_promises(finished):
    folder, results, out = finished
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "metrics.jsonl", "results.json", "last.pt", "backbone.pt", "curves.png",
        "views.png"}
    written = strict_json((folder / "results.json").read_text())
    assert not [k for k in LISTED if k not in written] and written == results
    assert (results["method"], results["dataset"], results["device"]) == ("simclr", "shapes", "cpu")
    tops = [v for k, v in results.items() if k.endswith("top1")]
    assert len(tops) == 8 and all(0 <= v <= 100 for v in tops) and max(tops) > 1
    rows = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(row["loss"] < 6 for row in rows)
    assert {"linear_top1", "knn_top1", "verdict"} <= rows[0].keys()
    options = strict_json((folder / "args.json").read_text())
    assert (options["batch_size"], options["limit"], options["arch"]) == (32, 200, "resnet10")
    for name in ("curves.png", "views.png"):
        assert np.asarray(Image.open(folder / name)).std() > 5
    backbone = torch.load(folder / "backbone.pt", weights_only=True)
    assert backbone.keys() == {"state_dict", "meta"} and backbone["meta"]["arch"] == "resnet10"
    for said in ("recipe shapes:", f"chance {math.log(63):.3f}", "12 steps", "untrained", "pixels",
                 results["verdict"]):
        assert said in out, said


def test_the_printed_lines_load_the_backbone(finished):
    folder, _, out = finished
    lines, names = out[out.index("\nimport torch\n"):], {}
    assert lines.strip() == simclr.loading(simclr.options(
        ["--arch", "resnet10", "--stem", "7x7"]), folder / "backbone.pt").strip()
    exec(lines, names)
    net = simclr.SimCLR("resnet10", "7x7")
    net.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["state"]["net"])
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert close(names["net"].eval()(x), net.eval()(x)[0], 1e-6)


def test_eval_gives_the_same_and_a_finished_folder_is_left_alone(finished):
    folder, results, _ = finished
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    argv = "--device cpu --limit 200 --batch-size 32 --out".split() + [str(folder)]
    again, _ = quiet([*argv, "--eval", str(folder / "backbone.pt")])
    for k in ("linear_top1", "knn_top1", "untrained_linear_top1", "pixels_knn_top1", "rank_h"):
        assert again[k] == pytest.approx(results[k], abs=1e-3), k
    assert again["train_seconds"] == 0
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}
    assert (folder.parent / "run-2" / "results.json").exists()


def test_torchvision_weights_in_and_timm_out(tmp_path):
    torch.manual_seed(0)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "official.pth")
    net = simclr.SimCLR("resnet18", "7x7")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        simclr.load_weights(net, tmp_path / "official.pth")
    assert "120 tensors loaded, missing 0, unexpected 0" in said.getvalue()
    assert all(torch.equal(v, weights[k]) for k, v in net.backbone.state_dict().items())
    argv = [*TINY, "--epochs", "1", "--arch", "resnet18", "--lr", "1e-6", "--eval-every", "0",
            "--out", str(tmp_path / "run")]
    quiet([*argv, "--init", str(tmp_path / "official.pth")])
    made = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)["state_dict"]
    assert close(made["conv1.weight"], weights["conv1.weight"], 1e-4)
    assert all(v.isfinite().all() for v in made.values())
    timm = pytest.importorskip("timm")
    other = timm.create_model("resnet18", num_classes=0)
    other.load_state_dict(made)  # strictly; num_classes=0 is without fc
    net.backbone.load_state_dict(made)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert close(other.eval()(x), net.backbone.eval()(x), 1e-5)


def test_from_an_empty_folder(tmp_path):
    for file in ("simclr.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    options = ["--help"], [*TINY, "--epochs", "1"]
    started = [subprocess.Popen([sys.executable, "simclr.py", *o], cwd=tmp_path, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for o in options]
    (usage, _), (out, err) = (p.communicate(timeout=120) for p in started)
    assert [p.returncode for p in started] == [0, 0], err
    groups = [usage.index(f"\n{g}:") for g in "run data method optimiser evaluation".split()]
    assert groups == sorted(groups) and "--temperature" in usage
    assert (tmp_path / "runs" / "simclr-shapes-s0" / "backbone.pt").exists()
    assert "net.load_state_dict" in out and "Traceback" not in err


def test_images_without_labels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 20, 3), dtype=np.uint8)
    for i, p in enumerate(pixels):
        Image.fromarray(p).save(tmp_path / f"{i:02}.png")
    results, out = quiet([*TINY, "--dataset", str(tmp_path), "--epochs", "1", "--arch", "resnet10",
                          "--limit", "40", "--out", str(tmp_path / "run")])
    assert "recipe small" in out and "verdict" in results and "rank_h" in results
    assert not [k for k in results if k.endswith("top1")]


# ==================================================================================================
# Stop and go on
# ==================================================================================================


def after(k, act, monkeypatch):
    """Call act() after k steps."""
    steps, update = [], simclr.update

    def counting(*args):
        done = update(*args)
        steps.append(0)
        if len(steps) == k:
            act()
        return done

    monkeypatch.setattr(simclr, "update", counting)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "waiting")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


class Pixels(nn.Module):
    """SimCLR with next to nothing for f: half precision is slow on CPUs."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x):
        return (h := self.backbone(x)), self.head(h)


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setattr(simclr, "build", lambda args: torch.manual_seed(args.seed) and Pixels())


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_resume_is_bitwise(tmp_path, monkeypatch, request, amp):
    if amp == "fp16":
        request.getfixturevalue("pixels")
    monkeypatch.setattr(simclr, "report", lambda *a: {"verdict": "not looked at"})
    argv = [*TINY, "--eval-every", "1" if amp == "off" else "0", "--amp", amp,
            "--optimizer", "sgd" if amp == "off" else "lars"]
    quiet([*argv, "--out", str(tmp_path / "whole")])
    whole = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert len(rows_of(tmp_path / "whole")) == 3
    for k in (2, 3, 9) if amp == "off" else (4,):  # within an epoch, at its end, at the very end
        parts, argv_k = tmp_path / f"parts{k}", [*argv, "--out", str(tmp_path / f"parts{k}")]
        with monkeypatch.context() as patch:
            after(k, terminate, patch)
            with pytest.raises(SystemExit) as stopped:
                quiet(argv_k)
        assert stopped.value.code == 128 + signal.SIGTERM
        saved = torch.load(parts / "last.pt", weights_only=True)
        assert saved["progress"]["step"] == k and not (parts / "results.json").exists()
        random.seed(k), np.random.seed(k), torch.manual_seed(k)  # nothing hangs on these
        quiet([*argv_k, "--resume"])
        resumed = torch.load(parts / "last.pt", weights_only=True)
        assert same(resumed["state"], whole["state"]), k
        assert rows_of(parts) == rows_of(tmp_path / "whole"), k
        assert not same(saved["state"], whole["state"]) or k == 9


def test_heads_flags_and_bf16_on_cpu(tmp_path):
    """At 32 pixels: at 16, where layer4 sees 1 x 1, the bf16 weight gradient of PyTorch 2.14's
    CPU convolution differs from call to call and is sometimes NaN."""
    for head, flag in (("none", "--no-color"), ("linear", "--no-crop")):
        _, out = quiet([*TINY, flag, "--epochs", "1", "--eval-every", "0", "--amp", "bf16",
                        "--image-size", "32", "--head", head, "--out", str(tmp_path / head)])
        row, = rows_of(tmp_path / head)
        assert 1 < row["loss"] < 9 and row["skipped"] == 0 and "bfloat16" in out


def test_fp16_on_cpu(tmp_path, pixels):
    """The first steps find the scale; an epoch without a single good step has no loss to show."""
    argv = [*TINY, "--eval-every", "0", "--amp", "fp16", "--batch-size"]
    quiet([*argv, "4", "--out", str(tmp_path / "run")])
    rows = rows_of(tmp_path / "run")
    assert all(0.5 < row["loss"] < 5 for row in rows) and rows[-1]["skipped"] == 0


def test_an_epoch_of_failures_has_no_loss(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(simclr, "nt_xent", lambda z1, z2, tau: (z1 - z2).sum() * math.nan)
    quiet([*TINY, "--epochs", "1", "--eval-every", "0", "--out", str(tmp_path / "run")])
    row, = rows_of(tmp_path / "run")
    assert row["skipped"] == 3 and row.get("loss") != 0  # 0 would be the best loss of all


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_run_that_keeps_failing_stops(tmp_path, monkeypatch, pixels, capsys, amp):
    argv = [*TINY, "--batch-size", "4", "--epochs", "8", "--amp", amp, "--eval-every", "0",
            "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        after(2, terminate, patch)
        with pytest.raises(SystemExit):
            quiet(argv)
    good = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(simclr, "nt_xent", lambda z1, z2, tau: (z1 - z2).sum() * math.nan)
    with pytest.raises(SystemExit) as stopped:
        quiet([*argv, "--resume"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(r"step 5[0-2]\b", error), error
    assert (tmp_path / "run" / "last.pt").read_bytes() == good


# ==================================================================================================
# Errors
# ==================================================================================================


def refused(argv, capsys):
    """The one sentence with which main(argv) ends."""
    with pytest.raises(SystemExit) as stopped:
        quiet([*TINY, *map(str, argv)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"error: [^\n]{15,}\n", error), error
    return error


@pytest.mark.parametrize("argv, names", [
    ("--epochs 0", "epochs"), ("--epochs many", "epochs"), ("--batch-size 1", "batch-size"),
    ("--temperature 0", "temperature"), ("--temperature nan", "temperature"),
    ("--lr inf", "lr"), ("--lr -1", "lr"), ("--min-scale 2", "min-scale"),
    ("--warmup 1.5", "warmup"), ("--head three", "head"),
    ("--arch vit", "arch"), ("--amp fp8", "amp"), ("--image-size 0", "image-size"),
    ("--no-such-option", "no-such-option"), ("--batch-size 4096", "batch-size"),
    ("--dataset nowhere", "nowhere"), ("--device tpu", "tpu"), ("--init none.pt", "none.pt"),
    ("--eval none.pt", "none.pt"), ("--dataset {empty}", "no images"), ("--resume", "last.pt"),
])
def test_wrong_options(argv, names, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    argv = argv.format(empty=tmp_path / "empty").split()
    assert names in refused([*argv, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_wrong_checkpoints(finished, tmp_path, monkeypatch, capsys):
    backbone, last = finished[0] / "backbone.pt", finished[0] / "last.pt"
    out = ["--out", tmp_path / "run"]
    for file in (backbone, last):
        for option in ("--init", "--eval"):
            assert file.name in refused([*out, option, file, "--arch", "resnet18"], capsys)
    assert "backbone.pt" in refused([*out, "--init", backbone, "--stem", "3x3"], capsys)
    assert "last.pt" in refused([*out, "--init", last, "--head", "none"], capsys)
    deeper = simclr.SimCLR("resnet18").backbone.state_dict()  # holds all that resnet10 has
    torch.save({"state_dict": deeper}, tmp_path / "deeper.pt")
    assert "deeper.pt" in refused([*out, "--init", tmp_path / "deeper.pt"], capsys)
    moco = torch.load(last, weights_only=True) | {"method": "moco"}
    torch.save(moco, tmp_path / "moco.pt")
    assert "moco" in refused([*out, "--init", tmp_path / "moco.pt"], capsys)
    (tmp_path / "cut.pt").write_bytes(last.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(np.float64, tmp_path / "code.pt")  # wants to run code
    torch.save(torch.zeros(2), tmp_path / "bare.pt")
    for name in ("cut.pt", "text.pt", "code.pt", "bare.pt"):
        assert name in refused([*out, "--init", tmp_path / name], capsys)
    with monkeypatch.context() as patch:
        after(1, terminate, patch)
        with pytest.raises(SystemExit):
            quiet([*TINY, *map(str, out)])
    for argv, names in (["--seed", 1], "seed"), (["--batch-size", 8], "batch_size"), (
            ["--lr", 0.01], "lr"), (["--arch", "resnet18"], "arch"), (["--no-color"], "no_color"):
        assert names in refused([*out, "--resume", *argv], capsys)
    kept = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save(kept | {"method": "moco", "args": kept["args"] | {"method": "moco"}},
               tmp_path / "run" / "last.pt")
    assert "moco" in refused([*out, "--resume"], capsys)
    for broken in ((tmp_path / "cut.pt").read_bytes(), backbone.read_bytes()):
        (tmp_path / "run" / "last.pt").write_bytes(broken)
        assert "last.pt" in refused([*out, "--resume"], capsys)
    assert "finished" in refused(["--resume", "--out", finished[0]], capsys)


# ==================================================================================================
# Two processes
# ==================================================================================================


def batch_and_net():
    torch.manual_seed(0)
    net = simclr.SimCLR("resnet10", "7x7", dim=8).double().eval()
    for name, b in net.named_buffers():  # running statistics away from 0 and 1
        if b.is_floating_point():
            b.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.1, 0.1)))
    return draw(6, 3, 16, 16), draw(6, 3, 16, 16, seed=1), net


def gradients(net, model, x1, x2, gathered):
    net.zero_grad()
    z1, z2 = model(torch.cat([x1, x2]))[1].chunk(2)
    loss = simclr.nt_xent(gathered(z1), gathered(z2), 0.2)
    loss.backward()
    return {"loss": loss.detach()} | {k: p.grad.clone() for k, p in net.named_parameters()}


def detached(z):
    parts = [torch.empty_like(z) for _ in range(2)]
    dist.all_gather(parts, z.detach())
    parts[dist.get_rank()] = z
    return torch.cat(parts)


def images_and_features():
    pixels = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    images = common.Images(torch.arange(11), pixels, torch.full((11, 2), 16))
    run = common.setup((args := simclr.options(["--device", "cpu", "--workers", "0"])).device)
    index = torch.tensor([3, 1, 4, 10, 5, 9, 2])
    net = batch_and_net()[2].float()
    return simclr.embed(lambda x: net(x[0]), [common.Crop(16, 1.0)], (images, index), args, run)


def two_processes(rank, port, folder):
    """What each of the two does; what it finds goes to folder/<rank>.pt."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")
    sys.stdout = open(os.devnull, "w")
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))  # what a process writes lands here
    found = {"features": images_and_features()}
    x1, x2, net = batch_and_net()
    model = nn.parallel.DistributedDataParallel(net)
    mine = slice(3 * rank, 3 * rank + 3)
    found["gather"] = gradients(net, model, x1[mine], x2[mine], simclr.Gather.apply)
    found["detached"] = gradients(net, model, x1[mine], x2[mine], detached)

    net, optimizer = small_net("sgd")  # only the loss of the second is not finite
    before = [p.clone() for p in net.parameters()]
    poison = "loss" if rank else None
    found["finite"] = step_of(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0, poison)
    found["untouched"] = same(before, list(net.parameters()))

    health, found["buffers"] = simclr.health, []

    def looking(net, *args):
        results = health(net, *args)
        found["buffers"].append({k: b.clone() for k, b in net.named_buffers()})
        return results

    simclr.health = looking
    argv = [*TINY, "--epochs", "2", "--out"]
    found["results"] = simclr.main([*argv, "whole"])
    simclr.report = lambda *a: {"verdict": "not looked at"}
    patch = pytest.MonkeyPatch()
    after(2, terminate if rank else lambda: None, patch)  # the signal reaches only the second
    try:
        simclr.main([*argv, "parts"])
    except SystemExit as stopped:
        found["code"] = stopped.code
    patch.undo()
    dist.barrier()
    if rank:
        shutil.copytree(folder / "0" / "parts", "parts")
    dist.barrier()
    simclr.main([*argv, "parts", "--resume"])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, (port, tmp_path), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    x1, x2, net = batch_and_net()
    one = gradients(net, net, x1, x2, nn.Identity())
    assert sum(g.abs().max() > 1e-3 for g in one.values()) > 20  # there is something to compare
    features = images_and_features()
    for found in both:
        assert all(close(found["gather"][k], one[k]) for k in one)
        assert close(found["detached"]["loss"], one["loss"])  # the value is right, and yet
        assert not close(found["detached"]["backbone.conv1.weight"],
                         one["backbone.conv1.weight"], 1e-4)
        assert [t.shape[0] for t in found["features"]] == [7, 7, 7]
        assert all(close(a, b, 1e-6) for a, b in zip(found["features"], features))
        assert torch.equal(found["features"][2], torch.tensor([3, 1, 4, 10, 5, 9, 2]))
        assert not found["finite"] and found["untouched"]
        assert found["code"] == 143
    tops = [{k: v for k, v in f["results"].items() if k.endswith("top1")} for f in both]
    assert len(tops[0]) == 8 and tops[0] == tops[1]
    assert (tmp_path / "0" / "whole" / "results.json").exists()
    assert not (tmp_path / "1" / "whole").exists()
    whole, parts = (torch.load(tmp_path / "0" / f / "last.pt", weights_only=True)["state"]
                    for f in ("whole", "parts"))
    assert same(whole["net"], parts["net"]) and same(whole["optimizer"], parts["optimizer"])
    # evaluation shares the images out: all processes need the same batch-norm statistics
    assert same(both[0]["buffers"], both[1]["buffers"])
