"""BYOL against its slides, the paper's equation 2 and Algorithm 1, and its own promises."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tools
import torch
import torch.nn as nn
import torch.nn.functional as F
from tools import TINY, close, draw, refused, same

import byol
import common

SHORT = [*TINY, "--epochs", 1, "--eval-every", 0]

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
# EMA, schedules, LARS
# ==================================================================================================


def test_ema_update():
    def nets():
        torch.manual_seed(0)
        made = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double() for _ in range(2)]
        for t in (*made[1].parameters(), made[1][1].running_mean):
            nn.init.normal_(t)
        return made

    for m in (0.3, 0.9, torch.tensor(0.9, dtype=torch.float64), 0.0, 1.0):
        (xi, theta), (start, _) = nets(), nets()
        byol.ema_update(xi, theta, m)
        for a, before, new in zip(xi.parameters(), start.parameters(), theta.parameters()):
            assert close(a.detach(), (m * before + (1 - m) * new).detach(), 1e-14)
            assert not close(a.detach(), ((1 - m) * before + m * new).detach(), 1e-3)
            assert m not in (0, 1) or torch.equal(a, before if m else new)
        assert same(dict(xi.named_buffers()), dict(start.named_buffers()))


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


def test_m_start_follows_the_length_of_the_run():
    def found(epochs, batch, n):
        return byol.m_start(SimpleNamespace(epochs=epochs, batch_size=batch), n)

    for epochs, batch, n in ((12, 64, 4000), (20, 128, 5000)):
        assert 0.9 < found(epochs, batch, n) < 0.99
        assert close(found(epochs, batch, n) ** (epochs * n / batch / 20), 0.5)
    assert found(1, 64, 640) == 0.9 and found(200, 512, 50000) == 0.99


def test_lr_at():
    steps, warmup, peak = 20, 4, 0.3
    for t in range(steps):
        share = (t + 1) / 4 if t < 4 else (1 + math.cos(math.pi * (t - 4) / 16)) / 2
        assert close(byol.lr_at(t, steps, warmup, peak), peak * share, 1e-15)
    assert byol.lr_at(0, steps, 0, peak) == peak


def test_lars_equation():
    """v <- mu v + eta |w| / |g + wd w| (g + wd w), w <- w - lr v; one dimension: v <- mu v + g."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    lars = byol.LARS(net.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    w, b = (p.detach().numpy().copy() for p in net.parameters())
    v, u = np.zeros_like(w), np.zeros_like(b)
    for step in range(3):
        net.zero_grad()
        net(draw(5, 4, seed=step)).square().sum().backward()
        g = net.weight.grad.numpy() + 0.1 * w
        v = 0.9 * v + 0.001 * np.sqrt((w**2).sum()) / np.sqrt((g**2).sum()) * g
        u = 0.9 * u + net.bias.grad.numpy()
        w, b = w - 0.5 * v, b - 0.5 * u
        lars.step()
        assert close(net.weight.detach(), w) and close(net.bias.detach(), b)


# ==================================================================================================
# Augmentation and model
# ==================================================================================================


def test_augmentation_is_the_papers():
    """Table 6 of the paper: T in the first view, T' in the second."""
    large = {name: row[2] for name, row in byol.OPTIONS.items()}
    args = SimpleNamespace(**large | {"image_size": 60})
    assert byol.crops(args) == [common.Crop(60, (0.08, 1.0), (3 / 4, 4 / 3), 2)]

    def by_hand(x, blur, solarize):
        x = common.color_jitter(common.flip(x, 0.5), 0.4, 0.4, 0.2, 0.1, 0.8)
        return common.solarize(common.blur(common.grey(x, 0.2), (0.1, 2.0), 7, blur), solarize)

    x = torch.rand(16, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    common.reseed(1)
    expected = [by_hand(x, 1.0, 0.0), by_hand(x, 0.1, 0.2)]
    common.reseed(1)
    assert same(byol.augment([x, x], args), expected)


def test_model():
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    for predictor in (True, False):
        net = byol.BYOL("convnet", "3x3", 12, 5, predictor)
        for views in (1, 2):
            h, z, p = net(*[x] * views)
            assert h.shape == (4 * views, 96) and z.shape == p.shape == (4 * views, 5)
            assert torch.equal(z, p) != predictor
        for head, inputs in ((net.projector, 96), (net.predictor, 5))[: 1 + predictor]:
            first, _, _, last = head  # Section 3.3: no batch norm after the last layer
            assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
            assert (first.in_features, first.out_features) == (inputs, 12)
            assert first.bias is not None and last.bias is None and last.weight.shape == (5, 12)
        assert predictor or not list(net.predictor.parameters())
    args = SimpleNamespace(arch="convnet", stem="7x7", hidden=12, dim=4, no_predictor=None, seed=3)
    first = byol.build(args)
    assert same(first.state_dict(), byol.build(args).state_dict())
    args.seed = 4
    assert not close(byol.build(args).projector[3].weight.detach(),
                     first.projector[3].weight.detach(), 1e-3)


def test_batch_norm_sees_one_view_at_a_time():
    torch.manual_seed(0)
    net = byol.BYOL("convnet", "7x7", 12, 5).double()
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
        eta = flags.lr * len(x) / 256 * (1 + math.cos(math.pi * k / K)) / 2
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


class Compared(tools.Watched):
    """Notes after each step whether the target is the online network."""

    equal = ()

    def log(self, ok, **figures):
        theta, xi = (list(self.state[name].parameters()) for name in ("net", "net_ema"))
        self.equal = [*self.equal, same(theta, xi)]
        super().log(ok, **figures)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """flags -> the run of three steps and the untrained network."""

    def small(*_):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(2), nn.Flatten())
        net.dim = 32
        return net

    monkeypatch.setattr(byol, "encoder", small)  # the real one is slow on a CPU

    def run(flags=""):
        argv = [*SHORT, *"--optimizer sgd --lr 0.1 --weight-decay 0.01 --warmup 0".split(),
                *"--hidden 24 --dim 4 --m 0.5 --predictor-lr-scale 1".split(),
                *f"{flags} --out".split(), tmp_path / f"run{flags}"]
        _, _, made = tools.train(byol, argv, Compared)
        assert len(made.views) == 3 and not close(*made.views[0], 0.1)
        made.start = byol.build(made.args)
        return made

    return run


def distance(run, flags, mistake=None):
    """Between weights and statistics of both networks and those of the algorithm (the paper's
    target has no q)."""
    nets = algorithm_1(copy.deepcopy(run.start), run.views, flags, mistake)
    pairs = []
    for net, name in zip(nets, ("net", "net_ema")):
        for k, ours in run.state[name].state_dict().items():
            if ours.is_floating_point() and (name == "net" or not k.startswith("predictor")):
                pairs.append((ours, net.state_dict()[k]))
    assert len(pairs) > 20
    return max((a - b).abs().max().item() for a, b in pairs)


def test_algorithm(trained):
    run = trained()
    assert distance(run, run.args) < 1e-5
    for mistake in ("EMA before the step", "no stop-gradient", "the online network as target",
                    "a view against itself", "one direction only", "sum of both",
                    "one batch of both views", "target in eval mode", "tau of the next step",
                    "EMA of the buffers too", "z in place of the prediction"):
        assert distance(run, run.args, mistake) > 5e-4, mistake
    assert run.equal == [False] * 3


@pytest.mark.parametrize("flag", ["--no-predictor", "--m 0", "--no-stop-gradient",
                                  "--predictor-lr-scale 3", "--no-predictor --no-stop-gradient"])
def test_flags_change_the_algorithm(trained, flag):
    run = trained(flag)
    assert distance(run, run.args) < 1e-5
    plain = {"m": 0.5, "no_stop_gradient": None, "predictor_lr_scale": 1.0}
    if flag != "--no-predictor":  # the algorithm takes q from the network
        assert distance(run, SimpleNamespace(**vars(run.args) | plain)) > 5e-4
    assert run.equal == [flag == "--m 0"] * 3
    rest, of_q = run.state["optimizer"].param_groups
    assert of_q["lr"] == rest["lr"] * (3 if "scale" in flag else 1) > 0
    assert len(of_q["params"]) == (0 if "no-predictor" in flag else 5)
    assert len(of_q["params"]) + len(rest["params"]) == len(list(run.start.parameters()))
    batches = run.state["net_ema"].projector[1].num_batches_tracked
    assert batches == (0 if "no-stop-gradient" in flag else 6)  # two views in each of three steps


def test_lars_with_and_without_a_predictor(trained):
    for flags in ("", " --no-predictor"):
        run = trained(f"--optimizer lars --lr 9{flags}")
        for k, w in run.start.named_parameters():
            now = run.state["net"].get_parameter(k).detach()
            assert now.isfinite().all() and (w.ndim == 1 or not close(now, w.detach(), 1e-4)), k


# ==================================================================================================
# Warnings and health
# ==================================================================================================


@pytest.mark.parametrize("argv", ["--m 2", "--blur 0.5", "--blur 0.5 2", "--hidden 0",
                                  "--predictor-lr-scale 0", "--optimizer adam"])
def test_wrong_options(argv, capsys):
    assert argv.split()[0] in refused(byol, [*TINY, *argv.split()], capsys)


def test_check(capsys):
    def checked(**changed):
        args = {"batch_size": 32, "m": 0.0, "epochs": 3, "eval": None,
                "no_stop_gradient": False} | changed
        byol.check(SimpleNamespace(**args), per_epoch=3)
        return [line for line in capsys.readouterr().out.split("\n") if "warning" in line]

    assert checked() == [] == checked(m=0.46)  # half-lives of 0.03 and 0.89 of 9 steps
    assert "--m" in checked(m=0.48)[0] and "--batch-size" in checked(batch_size=31)[0]
    assert len(checked(m=1.0, batch_size=16)) == 2
    assert len(checked(m=1.0, no_stop_gradient=True)) == 0  # then there is no target
    assert checked(m=1.0, batch_size=16, eval="last.pt") == []  # nothing is trained


def test_collapsed_z_is_named(tmp_path):
    argv = [*SHORT, *"--hidden 128 --dim 64 --limit 100 --batch-size 100 --out".split()]
    net, data, run = tools.train(byol, [*argv, tmp_path / "run"])
    data.train.labels.fill_(-1)  # no probes
    data.val = data.train, torch.arange(100)
    start = copy.deepcopy(net)

    def figures(change):
        net.load_state_dict(start.state_dict())
        for m in net.modules():
            m.momentum = 1.0  # batch norm takes the statistics of this very batch
        with torch.no_grad():
            change(net.projector)
            net(data.train.pixels / 255)
        return SimpleNamespace(**byol.evaluate(net, data, run.args, run))

    def one_line(g):
        g[3].weight.copy_(draw(64, 1) @ draw(1, 128, seed=1))

    def constant(g):
        g[1].weight.zero_()
        g[1].bias.fill_(1.0)

    healthy, line, point = figures(lambda g: None), figures(one_line), figures(constant)
    assert healthy.verdict.startswith("healthy")
    assert point.verdict.startswith("collapsed to a point") and point.spread < 1e-3
    assert line.verdict.startswith("dimensional collapse") and line.rank_z < 1.5
    assert close(point.rank_h, healthy.rank_h, 1e-3)  # h is what it was: only z tells
