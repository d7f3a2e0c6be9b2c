"""BYOL against its slides, the paper's equation 2 and Algorithm 1, and its own promises."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tools import TINY, close, draw, lighten, quiet, refused, same

import byol
import common

SHORT = [*TINY, "--epochs", "1", "--eval-every", "0"]

# ==================================================================================================
# Loss
# ==================================================================================================


def equation_2(p, z):
    """The paper's equation 2, typed in, and its mean over the N images: with the unit vectors
    P = p / |p| and Z = z / |z|, L = 1 / N sum_n sum_d (P_nd - Z_nd)^2, and as it goes on there,
    L = 1 / N sum_n [ 2 - 2 <p_n, z_n> / (|p_n| |z_n|) ] -> both.
    """
    distances, cosines = 0.0, 0.0
    for p_n, z_n in zip(p.tolist(), z.tolist()):
        P, Z = math.sqrt(sum(a * a for a in p_n)), math.sqrt(sum(b * b for b in z_n))
        distances += sum((a / P - b / Z) ** 2 for a, b in zip(p_n, z_n))
        cosines += 2 - 2 * sum(a * b for a, b in zip(p_n, z_n)) / (P * Z)
    return distances / len(p), cosines / len(p)


def variant(p, z, mistake=None):
    """BYOL's loss by its cosines, with one of the usual mistakes."""
    if mistake == "not normalised":
        return (p - z).square().sum(1).mean()
    if mistake == "mean over the D elements":
        return F.mse_loss(F.normalize(p), F.normalize(z))
    if mistake == "normalised over the batch":
        return (F.normalize(p, dim=0) - F.normalize(z, dim=0)).square().sum(1).mean()
    if mistake == "distance without the square":
        return (F.normalize(p) - F.normalize(z)).norm(dim=1).mean()
    if mistake == "sum over the batch":
        return (2 - 2 * F.cosine_similarity(p, z)).sum()
    sign = -1 if mistake == "cosine with the wrong sign" else 1
    return 2 - 2 * sign * F.cosine_similarity(p, z).mean()


def test_byol_loss_equation():
    for N, D, seed in ((5, 3, 0), (2, 8, 1), (7, 2, 2)):
        p, z = draw(N, D, seed=seed), 3 * draw(N, D, seed=seed + 9)
        distances, cosines = equation_2(p, z)
        assert close(distances, cosines, 1e-12)
        assert close(byol.byol_loss(p, z), distances) and close(variant(p, z), distances)
        for mistake in ("not normalised", "mean over the D elements", "normalised over the batch",
                        "distance without the square", "sum over the batch",
                        "cosine with the wrong sign"):
            assert abs(variant(p, z, mistake) - distances) > 1e-3, mistake
    p, z = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: byol.byol_loss(a, z), p)
    assert torch.autograd.gradcheck(lambda a, b: byol.byol_loss(a, b, stop_gradient=False), (p, z))
    both = torch.autograd.grad(byol.byol_loss(p, z), (p, z), allow_unused=True)
    without = torch.autograd.grad(byol.byol_loss(p, z, stop_gradient=False), (p, z))
    assert both[1] is None and close(both[0], without[0])
    assert without[1].abs().max() > 0.01  # what goes on without the stop-gradient


def test_byol_loss_closed_forms():
    p, turned = draw(6, 4), draw(6, 4) @ torch.tensor(  # each vector with one at a right angle
        [[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]], dtype=torch.float64)
    for z, loss in ((p, 0), (turned, 2), (-p, 4), (p + turned, 2 - math.sqrt(2))):
        assert close(byol.byol_loss(p, z), loss)
    scale, z = draw(6, 1, seed=2).abs() + 0.1, draw(6, 4, seed=1)
    assert close(byol.byol_loss(scale * p, 7 * z), byol.byol_loss(p, z))
    assert byol.byol_loss(torch.zeros(2, 3), torch.ones(2, 3)).isfinite()


# ==================================================================================================
# EMA
# ==================================================================================================


def test_m_at():
    """Section "Implementation details": tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2."""
    for base, K in ((0.996, 1000), (0.9, 7), (0.5, 3)):
        m = [byol.m_at(k, K, base) for k in range(K + 1)]
        for k in range(K + 1):
            assert close(m[k], 1 - (1 - base) * (math.cos(math.pi * k / K) + 1) / 2, 1e-15)
        assert close(m[0], base, 1e-15) and m[K] == 1 and m == sorted(m) and len(set(m)) == K + 1
    assert close(byol.m_at(500, 1000, 0.996), 0.998, 1e-12)
    assert {byol.m_at(k, 9, 0.0) for k in range(10)} == {0.0}  # not a step towards 1
    assert {byol.m_at(k, 9, 1.0) for k in range(10)} == {1.0}


def test_m_follows_the_length_of_the_run():
    def by_default(epochs, batch, n):
        return byol.momentum(0.99)(SimpleNamespace(epochs=epochs, batch_size=batch), n)

    for epochs, batch, n in ((12, 64, 4000), (20, 128, 5000)):
        m, steps = by_default(epochs, batch, n), epochs * n / batch
        assert 0.9 < m < 0.99 and close(m ** (steps / 20), 0.5)
    assert by_default(1, 64, 640) == 0.9 and by_default(200, 512, 50000) == 0.99
    args = byol.options([])
    byol.complete(args, None, 4000)  # nothing given: m hangs on what RECIPES say of the rest
    assert args.m == by_default(args.epochs, args.batch_size, 4000)
    args = byol.options(["--m", "0", "--epochs", "5"])
    byol.complete(args, None, 4000)
    assert (args.m, args.epochs) == (0, 5)


# ==================================================================================================
# Augmentation and model
# ==================================================================================================


def test_augmentation_is_the_papers(monkeypatch):
    """Table 6 of the paper: T in the first view, T' in the second."""
    args = byol.options([])
    byol.complete(args, 500, 10**6)
    assert byol.crops(args) == [common.Crop(224, (0.08, 1.0), (3 / 4, 4 / 3), 2)]
    done = []
    with monkeypatch.context() as patch:
        for name in ("flip", "color_jitter", "grey", "blur", "solarize"):
            patch.setattr(common, name, lambda x, *numbers, name=name, **named: done.append(
                (name, *numbers, *(named[k] for k in sorted(named)))) or x)
        byol.augment([torch.zeros(2, 3, 224, 224)] * 2, args)
    alike = [("flip", 0.5), ("color_jitter", 0.4, 0.4, 0.2, 0.1, 0.8), ("grey", 0.2)]
    assert done == [*alike, ("blur", 1.0, (0.1, 2.0), 23), ("solarize", 0.0),
                    *alike, ("blur", 0.1, (0.1, 2.0), 23), ("solarize", 0.2)]


def test_augmentation_differs_between_the_views(monkeypatch):
    """Counted on 2000 images; a normal deviate is beyond 3.5 once in 2000 times."""
    n, args = 2000, SimpleNamespace(blur=[1.0, 0.1], solarize=0.2)

    def share(x, seen):
        changed = (seen - x).abs().flatten(1).amax(1) > 1e-3
        return changed.float().mean().item()

    def near(got, p):
        return abs(got - p) < 3.5 * math.sqrt(p * (1 - p) / n) + 1e-9

    common.reseed(0)
    with monkeypatch.context() as patch:
        for name in ("flip", "color_jitter", "grey"):
            patch.setattr(common, name, lambda x, *_, **__: x)
        bright = torch.full((n, 3, 4, 4), 0.75)  # blur leaves a constant as it is
        first, second = (share(bright, y) for y in byol.augment([bright] * 2, args))
        assert first == 0 and near(second, 0.2)
        dark = torch.zeros(n, 3, 40, 40)  # nothing to solarize
        dark[:, :, ::2] = 0.4
        visible = 1 - 0.17 / 1.9  # of the sigmas in [0.1, 2], those over 0.27 change it by 1e-3
        first, second = (share(dark, y) for y in byol.augment([dark] * 2, args))
        assert near(first, visible) and near(second, 0.1 * visible)
    grey = torch.full((n, 3, 4, 4), 0.5)  # of the jitter it shows brightness alone
    args = SimpleNamespace(blur=[0.0, 0.0], solarize=0.0)
    for y in byol.augment([grey] * 2, args):
        assert near(share(grey, y), 0.8 * (1 - 1e-3 / 0.2))
        assert 0.3 - 1e-6 <= y.min() < 0.302 and 0.698 < y.max() <= 0.7 + 1e-6


def test_model():
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    for predictor in (True, False):
        net = byol.BYOL("resnet10", "3x3", 12, 5, predictor)
        for views in (1, 2):
            h, z, p = net(*[x] * views)
            assert h.shape == (4 * views, 512) and z.shape == p.shape == (4 * views, 5)
            assert torch.equal(z, p) != predictor
        for head, inputs in ((net.projector, 512), (net.predictor, 5))[: 1 + predictor]:
            first, norm, relu, last = head  # Section 3.3: no batch norm after the last layer
            assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
            assert (first.in_features, first.out_features) == (inputs, 12)
            assert first.bias is not None and last.bias is None and last.weight.shape == (5, 12)
        assert predictor or not list(net.predictor.parameters())
    args = byol.options("--arch resnet10 --stem 7x7 --hidden 12 --dim 4 --seed 3".split())
    assert same(byol.build(args).state_dict(), byol.build(args).state_dict())
    assert len({byol.build(args).projector[0].weight[0, 0].item() for args.seed in (3, 4)}) == 2
    resnet18 = byol.BYOL("resnet18", "7x7", 8, 8).backbone.state_dict()
    official = torchvision.models.resnet18().state_dict()
    assert {k: v.shape for k, v in resnet18.items()} == {
        k: v.shape for k, v in official.items() if not k.startswith("fc.")}
    large = byol.RECIPES["large"]
    assert (large["arch"], large["hidden"], large["dim"]) == ("resnet50", 4096, 256)


def test_batch_norm_sees_one_view_at_a_time():
    torch.manual_seed(0)
    net = byol.BYOL("resnet10", "7x7", 12, 5).double()
    x1, x2 = draw(6, 3, 16, 16), 0.3 * draw(6, 3, 16, 16, seed=1) + 0.5  # another light
    one_by_one, at_once = copy.deepcopy(net), copy.deepcopy(net)
    both = net(x1, x2)
    parts = one_by_one(x1), one_by_one(x2)
    for got, a, b, mixed in zip(both, *parts, at_once(torch.cat([x1, x2]))):
        assert close(got, torch.cat([a, b])) and not close(got, mixed, 1e-2)
    assert same(net.state_dict(), one_by_one.state_dict())  # and the running statistics
    with torch.no_grad():  # only the batch norm tells the views apart
        mixed = net.eval()(torch.cat([x1, x2]))
        assert all(close(a, b) for a, b in zip(net(x1, x2), mixed))


# ==================================================================================================
# The step
# ==================================================================================================


def algorithm_1(net, views, flags, mistake=None):
    """Algorithm 1 of the paper's Appendix A, typed in: theta is net, xi its copy, the views are
    t(x) and t'(x) of every step. Plain SGD in place of LARS; both directions are averaged.

        for k = 1 to K:
            z1, z2 <- g_theta(f_theta(t(x_i))), g_theta(f_theta(t'(x_i)))
            z1', z2' <- g_xi(f_xi(t'(x_i))), g_xi(f_xi(t(x_i)))
            l_i <- -2 ( <q(z1), z1'> / (|q(z1)| |z1'|) + <q(z2), z2'> / (|q(z2)| |z2'|) )
            theta <- optimizer(theta, 1 / N sum_i grad_theta l_i, eta_k)
            xi <- tau_k xi + (1 - tau_k) theta
    """
    K, kept = len(views), copy.deepcopy(net)
    theta = [*net.backbone.parameters(), *net.projector.parameters(), *net.predictor.parameters()]
    followed, v = list(kept.parameters()), [torch.zeros_like(w) for w in theta]

    def average(k):
        tau = 1 - (1 - flags.m) * (math.cos(math.pi * k / K) + 1) / 2 if flags.m else 0.0
        for xi, w in zip(followed, net.parameters()):
            xi.data = tau * xi.data + (1 - tau) * w.data

    def g_f(n, x):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        return n.projector(n.backbone((x - mean) / std))

    for k, (x, x_) in enumerate(views):
        eta = flags.lr * 16 / 256 * (1 + math.cos(math.pi * k / K)) / 2
        if mistake == "one batch of both views":
            z1, z2 = g_f(net, torch.cat([x, x_])).chunk(2)
        else:
            z1, z2 = g_f(net, x), g_f(net, x_)
        if flags.no_stop_gradient:
            z1_, z2_ = z2, z1
        else:
            if mistake == "target in eval mode":
                kept.eval()
            z2_, z1_ = (g_f(kept, v).detach() for v in (x, x_))
        if mistake == "the online network as target":
            z1_, z2_ = z2.detach(), z1.detach()
        if mistake == "no stop-gradient":
            z1_, z2_ = z2, z1
        if mistake == "a view against itself":
            z1_, z2_ = z2_, z1_
        q1, q2 = net.predictor(z1), net.predictor(z2)
        if mistake == "z in place of the prediction":
            q1, q2 = z1, z2
        total = 0.0
        for i in range(len(x)):
            first = (q1[i] @ z1_[i]) / (q1[i].norm() * z1_[i].norm())
            second = (q2[i] @ z2_[i]) / (q2[i].norm() * z2_[i].norm())
            second = second * (mistake != "one direction only")
            total = total - 2 * (first + second) / (1 if mistake == "sum of both" else 2)
        grads = torch.autograd.grad(total / len(x), theta, allow_unused=True)
        if mistake == "EMA before the step":
            average(k)
        for j, (w, g) in enumerate(zip(theta, grads)):
            of_q = any(w is p for p in net.predictor.parameters())
            v[j] = 0.9 * v[j] + (0 if g is None else g) + flags.weight_decay * w.data
            w.data = w.data - eta * (flags.predictor_lr_scale if of_q else 1) * v[j]
        if mistake != "EMA before the step":
            average(k + (mistake == "tau of the next step"))
        if mistake == "EMA of the buffers too":
            for b, new in zip(kept.buffers(), net.buffers()):
                b.copy_(new)
    return net, kept


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """flags -> what byol.main makes of them in three steps: the untrained network, the views of
    every step, `state` of last.pt, whether the target was the online network after each step."""

    def run(flags=""):
        argv = [*SHORT, *"--optimizer sgd --lr 0.1 --weight-decay 0.01 --m 0.5".split(),
                *f"--hidden 24 --dim 4 {flags} --out".split(), tmp_path / f"run{flags}"]
        seen, equal, augment, ema_update = [], [], byol.augment, byol.ema_update

        def looking(views, args):
            seen.append(augment(views, args))
            return [x.clone() for x in seen[-1]]

        def comparing(net_ema, net, m):
            ema_update(net_ema, net, m)
            equal.append(same(list(net_ema.parameters()), list(net.parameters())))

        with monkeypatch.context() as patch:
            lighten(patch, byol, report=False)
            patch.setattr(byol, "augment", looking)
            patch.setattr(byol, "ema_update", comparing)
            results, _ = quiet(byol, argv)
            args = byol.options([str(a) for a in argv])
            net = byol.build(args)
        state = torch.load(f"{results['out']}/last.pt", weights_only=True)["state"]
        views = [v for v in seen if len(v[0]) == 16]  # those of views.png are eight
        assert len(views) == len(equal) == 3 and not close(*views[0], 0.1)
        return SimpleNamespace(net=net, views=views, state=state, equal=equal, args=args)

    return run


def agree(run, flags, mistake=None):
    """Whether weights and statistics of both networks are those of the algorithm (the paper's
    target has no q)."""
    net, kept = algorithm_1(copy.deepcopy(run.net), run.views, flags, mistake)
    theirs = [*net.state_dict().values(),
              *kept.backbone.state_dict().values(), *kept.projector.state_dict().values()]
    ours = [*run.state["net"].values(), *(t for k, t in run.state["net_ema"].items()
                                          if not k.startswith("predictor"))]
    assert len(theirs) == len(ours) > 20 and all(t.isfinite().all() for t in theirs)
    return all(close(a, b, 1e-6) for a, b in zip(theirs, ours) if a.is_floating_point())


def test_algorithm(shipped):
    run = shipped()
    assert agree(run, run.args)
    for mistake in ("EMA before the step", "no stop-gradient", "the online network as target",
                    "a view against itself", "one direction only", "sum of both",
                    "one batch of both views", "target in eval mode", "tau of the next step",
                    "EMA of the buffers too", "z in place of the prediction"):
        assert not agree(run, run.args, mistake), mistake
    assert run.equal == [False] * 3


@pytest.mark.parametrize("flag", ["--no-predictor", "--m 0", "--no-stop-gradient",
                                  "--predictor-lr-scale 3", "--no-predictor --no-stop-gradient"])
def test_flags_change_the_algorithm(shipped, flag):
    run = shipped(flag)
    assert agree(run, run.args)
    if flag != "--no-predictor":  # the algorithm takes q from the network
        assert not agree(run, byol.options("--lr 0.1 --weight-decay 0.01 --m 0.5".split()))
    assert run.equal == [flag == "--m 0"] * 3
    rest, of_q = run.state["optimizer"]["param_groups"]
    assert of_q["lr"] == rest["lr"] * (3 if "scale" in flag else 1) > 0
    assert len(of_q["params"]) == (0 if "no-predictor" in flag else 5)
    assert len(of_q["params"]) + len(rest["params"]) == len(list(run.net.parameters()))
    looked = run.state["net_ema"]["projector.1.num_batches_tracked"]
    assert looked == (0 if "no-stop-gradient" in flag else 6)  # two views in each of three steps


def test_lars_with_and_without_a_predictor(shipped):
    for flags in ("", " --no-predictor"):
        run = shipped(f"--optimizer lars --lr 9{flags}")
        for k, w in run.net.named_parameters():  # biases before batch norm have no gradient
            now = run.state["net"][k]
            assert now.isfinite().all() and (w.ndim == 1 or not close(now, w.detach(), 1e-4)), k


# ==================================================================================================
# What is said
# ==================================================================================================


@pytest.mark.parametrize("argv, names", [
    ("--m 2", "--m:"), ("--m -0.1", "--m:"), ("--m nan", "--m:"), ("--blur 0.5", "--blur"),
    ("--blur 0.5 2", "--blur"), ("--solarize 1.5", "--solarize"), ("--hidden 0", "--hidden"),
    ("--dim 0", "--dim"), ("--predictor-lr-scale 0", "--predictor-lr-scale"),
    ("--predictor-lr-scale inf", "--predictor-lr-scale"), ("--optimizer adam", "--optimizer"),
])
def test_wrong_options(argv, names, tmp_path, capsys):
    assert names in refused(byol, [*SHORT, *argv.split(), "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_warnings(tmp_path, monkeypatch):
    def printed(*argv):
        _, out = quiet(byol, [*SHORT, "--out", tmp_path / "run", *argv])
        return out

    lighten(monkeypatch, byol, report=False)
    out = printed("--m", "0.99", "--warmup", "0.5")
    for warning in ("a batch under 32", "half-life is over a tenth", "over a third of the run"):
        assert f"warning: {warning}" in out or f"warning: the target's {warning}" in out
    assert "half-life of the target 23 epochs" in out and "chance 2.000" in out  # 69 steps of 3
    assert "warning:" not in printed("--m", "0", "--batch-size", "48")


def test_collapsed_z_is_named():
    args = byol.options([*TINY, *"--arch resnet10 --stem 7x7 --hidden 128 --min-scale 0.5 "
                         "--dim 64 --blur 0 0 --solarize 0".split()])
    data = common.Data("shapes", limit=200)
    data.read(16, "cpu", 1.0, 0)
    data = SimpleNamespace(val=(data.train, torch.arange(200)))

    def said(change):
        net = byol.build(args)
        for m in net.modules():
            m.momentum = 1.0  # batch norm takes the statistics of this very batch
        with torch.no_grad():
            change(net.projector)
            net(data.val[0].pixels / 255)
        found = byol.health({"net": net.eval()}, data, args, common.setup("cpu"))
        return SimpleNamespace(**found)

    def one_line(g):
        g[3].weight.copy_(draw(64, 1) @ draw(1, 128, seed=1))

    def constant(g):
        g[1].weight.zero_()
        g[1].bias.fill_(1.0)

    healthy, line, point = said(lambda g: None), said(one_line), said(constant)
    assert healthy.verdict.startswith("healthy")
    assert point.verdict.startswith("collapsed to a point") and point.spread < 1e-3
    assert line.verdict.startswith("dimensional collapse") and line.rank_z < 1.5
    assert close(point.rank_h, healthy.rank_h, 1e-3)  # h is what it was: only z tells
