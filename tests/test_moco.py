"""MoCo against its slides (Algorithm 1), the papers and its own promises."""

import colorsys
import contextlib
import copy
import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tools
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tools import close, draw, lighten, quiet, refused, same

import common
import moco

TINY = [*tools.TINY, "--epochs", "1"]
ALONE = SimpleNamespace(world=1, rank=0)  # the only process


class Pixels(nn.Module):
    """MoCo with next to nothing for f, and without batch norm: a permutation does not matter."""

    def __init__(self, dim):
        super().__init__()
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8))
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(8, dim))

    def forward(self, x):
        return (h := self.backbone(x)), self.head(h)


@pytest.fixture
def pixels(monkeypatch):
    def build(args):
        torch.manual_seed(args.seed)
        return Pixels(args.dim)

    lighten(monkeypatch, moco, report=False)
    monkeypatch.setattr(moco, "build", build)


# ==================================================================================================
# Loss
# ==================================================================================================


def slide(q, k, queue, tau, j):
    """The slide's two forms, typed in, and their mean over the N queries, of vectors not yet unit:

        L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum_i exp(q . k_i / tau)) )

    with the negatives k_i, columns of the queue, and

        L_q = -log( exp(q . k+ / tau) / sum_{i=0}^K exp(q . k_i / tau) )

    with K + 1 keys, of which k+ is the one at place j. The last: k+ is none of the keys.
    """
    C, K = queue.shape
    sums = [0.0, 0.0, 0.0]
    for n in range(len(q)):
        a, b = q[n].tolist(), k[n].tolist()
        a = [v / math.sqrt(sum(w * w for w in a)) for v in a]
        positive = [v / math.sqrt(sum(w * w for w in b)) for v in b]
        negatives = [[queue[c, i].item() for c in range(C)] for i in range(K)]
        keys = negatives[:j] + [positive] + negatives[j:]

        def e(key, a=a):
            return np.exp(sum(a[c] * key[c] for c in range(C)) / tau)

        top = e(positive)
        sums[0] -= np.log(top / (top + sum(e(negatives[i]) for i in range(K))))
        sums[1] -= np.log(top / sum(e(keys[i]) for i in range(K + 1)))
        sums[2] -= np.log(top / sum(e(negatives[i]) for i in range(K)))
    return [total / len(q) for total in sums]


def variant(q, k, queue, tau, mistake=None):
    """InfoNCE by matrices, with one of the usual mistakes."""
    (N, C), K = q.shape, queue.shape[1]
    q, k = (q if mistake == "q not normalised" else F.normalize(q)), F.normalize(k)
    k = k if mistake == "gradient into k" else k.detach()
    if mistake == "queue read after the enqueue":
        queue = torch.cat([queue[:, N:], k.T], 1)
    if mistake == "rows of the queue as keys":
        queue = queue.reshape(K, C).T
    tau = {"not divided by tau": 1, "tau squared": tau**2}.get(mistake, tau)
    l_pos, l_neg = (q * k).sum(1) / tau, q @ queue / tau
    if mistake == "key of another image":
        l_pos = (q * k.roll(1, 0)).sum(1) / tau
    keys = [l_neg] if mistake == "positive left out" else [l_pos[:, None], l_neg]
    losses = torch.cat(keys, 1).logsumexp(1) - l_pos
    return losses.sum() if mistake == "sum over the queries" else losses.mean()


def test_info_nce_equation():
    def agrees(loss):
        for N, C, K, tau, seed in ((5, 3, 7, 0.2, 0), (2, 6, 4, 0.07, 1), (3, 4, 3, 0.5, 2)):
            q = 3 * draw(N, C, seed=seed).requires_grad_()
            k = draw(N, C, seed=seed + 7).requires_grad_()
            queue = F.normalize(draw(C, K, seed=seed + 9), dim=0)
            first, second, without = slide(q, k, queue, tau, j=seed)
            assert close(first, second, 1e-12) and abs(first - without) > 1e-2
            value = loss(q, k, queue, tau)
            of_q, of_k = torch.autograd.grad(value, (q, k), allow_unused=True)
            if not close(value.detach(), first) or of_k is not None or not of_q.abs().max() > 1e-4:
                return False
        return True

    assert agrees(variant)
    assert agrees(lambda q, k, *rest: moco.info_nce(F.normalize(q), F.normalize(k), *rest))
    for mistake in ("not divided by tau", "tau squared", "rows of the queue as keys",
                    "positive left out", "queue read after the enqueue", "q not normalised",
                    "gradient into k", "key of another image", "sum over the queries"):
        assert not agrees(lambda *given, m=mistake: variant(*given, m)), mistake
    q, k, queue = (F.normalize(draw(*shape, seed=s), dim=d) for *shape, s, d in (
        (3, 4, 0, 1), (3, 4, 1, 1), (4, 5, 2, 0)))
    assert torch.autograd.gradcheck(lambda x: moco.info_nce(x, k, queue, 0.2), q.requires_grad_())


def test_info_nce_closed_forms():
    for K in (1, 6):  # all equal
        point = F.normalize(draw(1, 4))
        loss = moco.info_nce(point.expand(3, 4), point.expand(3, 4), point.T.expand(4, K), 0.1)
        assert close(loss, math.log(1 + K))
    axes = torch.eye(4, dtype=torch.float64)  # the positive 1, three negatives 0
    assert close(moco.info_nce(axes[:1], axes[:1], axes[:, 1:], 0.5), math.log(math.exp(2) + 3) - 2)
    q, k = F.normalize(draw(2, 4)), F.normalize(draw(2, 4, seed=1))
    sharp = [moco.info_nce(q.to(t), k.to(t), -q.T.to(t), 1e-3)
             for t in (torch.float32, torch.float64)]
    assert close(sharp[0].double() / sharp[1], 1.0, 1e-4)  # exp(1000) would overflow


# ==================================================================================================
# EMA and queue
# ==================================================================================================


def averaged(m, n, update):
    """n updates of net_ema towards n networks -> net_ema, its start, the networks, in order."""
    nets = []
    for seed in range(n + 1):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
        for t in (*nets[-1].parameters(), nets[-1][1].running_mean):
            nn.init.normal_(t)
    net_ema = copy.deepcopy(nets[0])
    for i, net in enumerate(nets[1:]):
        update(net_ema, net, m(i) if callable(m) else m)
    return net_ema, *nets


def test_ema_update():
    def geometric(net_ema, *nets, m):
        """theta_n = m^n theta_0 + (1 - m) sum_{t=1}^n m^(n-t) theta_t"""
        n, found = len(nets) - 1, [list(f.parameters()) for f in nets]
        return all(close(p.detach(), m**n * found[0][i] + (1 - m) * sum(
            m ** (n - t) * found[t][i] for t in range(1, n + 1)).detach())
            for i, p in enumerate(net_ema.parameters()))

    def of_buffers(net_ema, net, m):
        moco.ema_update(net_ema, net, m)
        for b, new in zip(net_ema.buffers(), net.buffers()):
            b.copy_(m * b + (1 - m) * new)

    def buffers_stay(net_ema, first, *_):
        return same(dict(net_ema.named_buffers()), dict(first.named_buffers()))

    for m in (0.9, 0.3, torch.tensor(0.9, dtype=torch.float64)):
        made = averaged(m, 5, moco.ema_update)
        assert geometric(*made, m=float(m)) and buffers_stay(*made)
        assert not geometric(*made, m=1 - float(m)) and not geometric(made[0], *made[:0:-1], m=m)
    assert not buffers_stay(*averaged(0.9, 5, of_buffers))
    for m in (0, 0.0, torch.tensor(0.0)):
        made = averaged(m, 3, moco.ema_update)
        assert same(list(made[0].parameters()), list(made[-1].parameters()))
    for m in (1, 1.0, torch.tensor(1.0)):
        made = averaged(m, 3, moco.ema_update)
        assert same(made[0].state_dict(), made[1].state_dict())
        assert not same(made[0].state_dict(), made[-1].state_dict())
    skipped = averaged(lambda i: torch.where(torch.tensor(i != 1), 0.5, 1.0), 3, moco.ema_update)
    assert geometric(*skipped[:2], *skipped[2::2], m=0.5)  # as in a step that is not finite
    assert not any(p.grad_fn for p in skipped[0].parameters())


def test_queue():
    args = SimpleNamespace(seed=3, dim=5, queue=8)
    queue = moco.random_queue(args)
    assert queue.shape == (5, 8) and close(queue.norm(dim=0), torch.ones(8), 1e-6)
    assert torch.equal(queue, moco.random_queue(args)) and len(queue.unique(dim=1).T) == 8
    assert not torch.equal(queue, moco.random_queue(SimpleNamespace(**vars(args) | {"seed": 4})))

    def enqueued(queue, ptr, k):
        """By hand: key n goes into column (ptr + n) mod K."""
        queue = queue.clone()
        for n in range(len(k)):
            for c in range(len(queue)):
                queue[c, (ptr + n) % queue.shape[1]] = k[n, c]
        return queue, (ptr + len(k)) % queue.shape[1]

    ptr = torch.tensor(0)
    for seed, N in enumerate((3, 3, 3, 8, 1, 7)):  # wraps in the third, turns wholly in the fourth
        k, before, was = draw(N, 5, seed=seed).float(), queue.clone(), ptr.clone()
        for no in (False, torch.tensor(False)):
            broken = torch.full_like(k, math.nan)
            assert moco.dequeue_and_enqueue(queue, ptr, broken, no) == ptr
            assert torch.equal(queue, before)
        yes = (True, torch.tensor(True))[seed % 2]
        ptr = moco.dequeue_and_enqueue(queue, ptr, k, yes)
        expected = enqueued(before, was.item(), k)
        assert torch.equal(queue, expected[0]) and ptr.item() == expected[1], N
        assert (queue != before).any(0).sum() == N  # the others stay
    assert ptr == 25 % 8
    other = moco.random_queue(args)
    assert moco.dequeue_and_enqueue(other, 0, draw(3, 5).double()) == 3  # plain numbers, any dtype
    start, keys = moco.random_queue(args), draw(8, 5).float()
    queue, ptr = start.clone(), torch.tensor(0)
    for k in keys.split(2):  # a full turn: all keys, and nothing of what was there
        ptr = moco.dequeue_and_enqueue(queue, ptr, k)
    assert ptr == 0 and torch.equal(queue, keys.T)


# ==================================================================================================
# Shuffling batch norm
# ==================================================================================================


class Normed(nn.Module):
    """A network of batch norm alone, in training."""

    def __init__(self, splits):
        super().__init__()
        self.norm = moco.SplitBatchNorm2d(3, splits).double()

    def forward(self, x):
        return None, self.norm(x).flatten(1)


def statistics(x, y):
    """Mean and deviation (2, N, 3) by which y (N, 48) was normalised: y = (x - mean) / deviation
    in two pixels of an image and channel says both."""
    y = y.view_as(x)
    deviation = (x[..., 0, 0] - x[..., 1, 1]) / (y[..., 0, 0] - y[..., 1, 1])
    return torch.stack([x[..., 0, 0] - deviation * y[..., 0, 0], deviation])


def test_shuffled():
    x, order = draw(16, 3, 4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(order, order.argsort())
    alone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5).double())  # no image sees another

    def keys(f, order):
        return moco.shuffled(f, x, order, nn.Identity(), ALONE)

    got = keys(lambda x: (None, alone(x)), order)
    assert close(got, alone(x)) and not close(alone(x[order])[order], alone(x), 0.1)
    seen = {}
    for splits in (1, 2):
        net = Normed(splits)
        queries = statistics(x, net(x)[1])
        for name, p in (("shuffled", order), ("in order", torch.arange(16))):
            seen[splits, name] = (statistics(x, keys(net, p)) - queries).abs().amax((0, 2))
    # The leak: an image's query and key are normalised alike, as no other query and key are.
    assert max(seen[1, "in order"].max(), seen[2, "in order"].max(), seen[1, "shuffled"].max()) < (
        1e-6 < 0.01 < seen[2, "shuffled"].min())
    mine, where = statistics(x, keys(Normed(2), order)), order.argsort()
    for n in range(16):  # those of the split that the permutation has put it in
        part = x[order[:8] if where[n] < 8 else order[8:]]
        assert close(mine[0, n], part.mean((0, 2, 3)), 1e-6)
        assert close(mine[1, n], part.std((0, 2, 3), correction=0), 1e-4)  # up to eps


def test_split_batch_norm():
    x, start, r = 2 * draw(8, 3, 4, 4) + 1, draw(3, seed=1), draw(8, 3, 4, 4, seed=2)
    for splits in (1, 2, 4, 8):
        norm = moco.SplitBatchNorm2d(3, splits).double()
        for i, t in enumerate((norm.weight, norm.bias, norm.running_mean)):
            t.data.copy_(draw(3, seed=i + 5))
        norm.running_mean.copy_(start)
        parts = nn.BatchNorm2d(3).double()
        assert parts.load_state_dict(norm.state_dict()).missing_keys == []  # the same keys
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = norm(x1), torch.cat([parts(p) for p in x2.split(8 // splits)])
        assert close(y1, y2) and close(y1, parts(x)) == (splits == 1)
        parts.zero_grad()
        (y1 * r).sum().backward()
        (y2 * r).sum().backward()
        for a, b in ((x1, x2), (norm.weight, parts.weight), (norm.bias, parts.bias)):
            assert a.grad.abs().max() > 0.1 and close(a.grad, b.grad)
        # The later parts weigh a little more; all together as much as an ordinary step.
        a = 1 - 0.9 ** (1 / splits)
        w = [a * (1 - a) ** (splits - 1 - g) for g in range(splits)]
        assert close(sum(w), 0.1) and max(w) / min(w) < 1.1
        means, variances = zip(*((p.mean((0, 2, 3)), p.var((0, 2, 3)))
                                 for p in x.split(8 // splits)))
        new_mean, new_var = (sum(v * s for v, s in zip(w, t)) for t in (means, variances))
        assert close(norm.running_mean, 0.9 * start + new_mean)
        assert close(norm.running_var, 0.9 + new_var)
        assert close(new_mean, 0.1 * x.mean((0, 2, 3)), 0.01)
        norm.eval()
        parts.load_state_dict(norm.state_dict())
        assert close(norm(x), parts.eval()(x))


# ==================================================================================================
# Options and schedule
# ==================================================================================================


def test_lr_by():
    """v1, Section 4: 200 epochs, multiplied by 0.1 at 120 and 160; v2: half a cosine."""
    peak = 0.03
    for steps in (200, 1000, 15, 35, 7):
        for t in range(steps):
            by_hand = peak * (1 if 200 * t < 120 * steps else 0.1 if 200 * t < 160 * steps else .01)
            assert close(moco.lr_by("step", t, steps, peak), by_hand, 1e-15), t
            by_hand = peak / 2 * (1 + math.cos(t * math.pi / steps))
            assert close(moco.lr_by("cosine", t, steps, peak), by_hand, 1e-15), t
    assert moco.lr_by("cosine", 0, 9, peak) == peak and moco.lr_by("cosine", 9, 9, peak) < 1e-12
    assert [moco.lr_by("step", t, 5, 1) for t in range(5)] == pytest.approx([1, 1, 1, 0.1, 0.01])


def completed(*argv, side=None, n=4000):
    args = moco.options([str(a) for a in argv])
    with contextlib.redirect_stdout(io.StringIO()):
        moco.complete(args, side, n)
    return args


def test_queue_and_momentum_shrink_with_the_data():
    def given(**of_args):
        return SimpleNamespace(**of_args)

    for n, K in ((4000, 500), (10**6, 512), (300, 64), (520, 65)):
        assert moco.keys(512)(given(batch_size=64), n) == K
    for epochs, batch, n in ((12, 64, 4000), (20, 128, 5000)):
        m = moco.momentum(0.99)(given(epochs=epochs, batch_size=batch), n)
        assert 0.9 < m < 0.99 and close(m ** (epochs * n / batch / 20), 0.5)
    assert moco.momentum(0.99)(given(epochs=1, batch_size=64), 640) == 0.9
    assert moco.momentum(0.99)(given(epochs=200, batch_size=512), 50000) == 0.99
    args = completed()  # nothing given: they hang on what RECIPES say of the rest
    assert (args.queue, args.m) == (500, moco.momentum(0.99)(args, 4000))
    args = completed("--queue", 77, "--m", 0, "--epochs", 5)
    assert (args.queue, args.m, args.epochs) == (77, 0, 5)
    args = completed(side=400, n=1281167)  # ImageNet: the papers' own
    assert (args.queue, args.m, args.tau, args.lr, args.dim) == (65536, 0.999, 0.2, 0.03, 128)
    assert (args.arch, args.epochs, args.batch_size, args.weight_decay) == (
        "resnet50", 200, 256, 1e-4)


def test_v1_sets_what_is_not_given():
    def found(*argv):
        args = completed(*argv, side=400, n=1281167)
        return args.head, args.aug, args.schedule, args.tau

    v1, v2 = ("linear", "v1", "step", 0.07), ("mlp", "v2", "cosine", 0.2)
    assert found("--v1") == v1 and found() == v2
    for i, argv in enumerate((["--head", "mlp"], ["--aug", "v2"], ["--schedule", "cosine"],
                              ["--temperature", "0.2"])):
        expected = v1[:i] + (v2[i],) + v1[i + 1 :]
        assert found("--v1", *argv) == found(*argv, "--v1") == expected
    assert found("--head", "linear") == ("linear", *v2[1:])


def test_warnings(tmp_path, pixels):
    def said(*argv):
        _, out = quiet(moco, [*TINY, "--eval-every", "0", "--out", tmp_path / "run", *argv])
        return re.findall(r"^warning: (.*)", out, re.M), out

    calm, out = said("--queue", 48, "--m", 0.05)
    assert calm == [] and f"chance {math.log(49):.3f}" in out and "48 keys are 1 epochs" in out
    warnings, _ = said("--queue", 49, "--m", 0.05)
    assert len(warnings) == 1 and "--queue" in warnings[0]
    warnings, _ = said("--queue", 48, "--m", 0.2)  # 0.14 of one epoch
    assert len(warnings) == 1 and "--m" in warnings[0]
    assert len(said("--queue", 49, "--m", 1)[0]) == 2


@pytest.mark.parametrize("argv", [
    "--queue 15", "--bn-splits 3", "--bn-splits 16", "--bn-splits 32", "--queue 0",
    "--bn-splits 0", "--m 1.1", "--m -0.1", "--head none", "--aug v3",
    "--schedule constant", "--dim 0"])
def test_wrong_options(argv, tmp_path, capsys, pixels):
    argv = argv.split()
    assert argv[0] in refused(moco, [*TINY, *argv, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run" / "last.pt").exists()


# ==================================================================================================
# Augmentation and model
# ==================================================================================================


def test_augmentation_is_the_papers(monkeypatch):
    """v1, Section 3.3 and the released code; v2, Section 3 and the released code (--aug-plus)."""
    expected = {"v1": [("grey", 0.2), ("color_jitter", 0.4, 0.4, 0.4, 0.4, 1.0), ("flip", 0.5)],
                "v2": [("color_jitter", 0.4, 0.4, 0.4, 0.1, 0.8), ("grey", 0.2),
                       ("blur", 0.5, (0.1, 2.0), 23), ("flip", 0.5)]}
    done = []
    for name in ("flip", "color_jitter", "grey", "blur", "solarize"):
        monkeypatch.setattr(common, name, lambda x, *numbers, name=name, **named: done.append(
            (name, *numbers, *(named[k] for k in sorted(named)))) or x)
    for aug, operations in expected.items():
        args = completed("--aug", aug, side=400, n=10**6)
        assert moco.crops(args) == [common.Crop(224, (0.2, 1.0), (3 / 4, 4 / 3), 2)]
        done.clear()
        moco.augment([torch.zeros(2, 3, 224, 224)] * 2, args)
        assert done == 2 * operations  # both views alike


@pytest.mark.parametrize("aug, hue, jittered", [("v1", 0.4, 1.0), ("v2", 0.1, 0.8)])
def test_augmentation_draws_for_every_image(aug, hue, jittered):
    """Seen on 2000 images of one colour: neither brightness, contrast nor saturation turns it. A
    normal deviate is beyond 3.5 once in 2000 times."""
    n, colour = 2000, (0.5, 0.45, 0.4)
    common.reseed(0)
    x = torch.tensor(colour).view(3, 1, 1).expand(n, 3, 2, 2)
    for y in moco.augment([x, x], SimpleNamespace(aug=aug, blur=0.0)):
        assert close(y, y[..., :1, :1].expand_as(y), 1e-5) and 0 < y.min() and y.max() < 1
        pixel = y[:, :, 0, 0]
        coloured = pixel[pixel.amax(1) - pixel.amin(1) > 1e-4]
        assert abs(len(coloured) / n - 0.8) < 3.5 * math.sqrt(0.16 / n)
        turned = [colorsys.rgb_to_hsv(*p)[0] - colorsys.rgb_to_hsv(*colour)[0]
                  for p in coloured.tolist()]
        turned = torch.tensor(turned).add(0.5).remainder(1).sub(0.5).abs()
        assert 0.98 * hue < turned.max() < hue + 1e-3
        share = (turned > 1e-4).double().mean().item()  # of the jittered, all but 0.1 %
        deviation = math.sqrt(jittered * (1 - jittered) / len(turned))
        assert abs(share - jittered) < 3.5 * deviation + 5e-3
        brighter = coloured.amax(1) / 0.5
        assert 0.55 < brighter.min() < 0.7 and 1.3 < brighter.max() < 1.6


def test_model():
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    for head, layers in (("linear", [nn.Linear]), ("mlp", [nn.Linear, nn.ReLU, nn.Linear])):
        net = moco.MoCo("resnet10", "3x3", head, 5, bn_splits=2)
        h, q = net(x)
        assert h.shape == (4, 512) and q.shape == (4, 5)
        assert [type(m) for m in net.head] == layers  # no batch norm in it
        assert net.head[0].out_features == (5 if head == "linear" else 512)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 12 and {m.splits for m in norms} == {2}
    args = completed("--arch", "resnet10", "--dim", 4, "--seed", 3)
    assert same(moco.build(args).state_dict(), moco.build(args).state_dict())
    assert len({moco.build(args).head[0].weight[0, 0].item() for args.seed in (3, 4)}) == 2
    resnet18 = moco.MoCo("resnet18", "7x7", bn_splits=8).backbone.state_dict()
    official = torchvision.models.resnet18().state_dict()
    assert {k: v.shape for k, v in resnet18.items()} == {
        k: v.shape for k, v in official.items() if not k.startswith("fc.")}


def released(version, path):
    """A file laid out as the released ones (reference/recipes.md, 9.1) -> its f_q."""
    torch.manual_seed(0)
    f_q, f_k = (torchvision.models.resnet18(num_classes=6) for _ in range(2))
    for f in (f_q, f_k) if version == "v2" else ():
        f.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), f.fc)
    for name, b in f_q.named_buffers():  # running statistics away from 0 and 1
        if b.is_floating_point():
            b.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.1, 0.1)))
    weights = {f"module.encoder_{n}.{k}": v for n, f in (("q", f_q), ("k", f_k))
               for k, v in f.state_dict().items()}
    weights |= {"module.queue": F.normalize(torch.randn(6, 32), dim=0),
                "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    sgd = torch.optim.SGD(f_q.parameters(), 0.03, momentum=0.9).state_dict()
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": weights, "optimizer": sgd}, path)
    return f_q.eval()


def test_released_weights(tmp_path, capsys):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    for version, head, other in (("v1", "linear", "mlp"), ("v2", "mlp", "linear")):
        path = tmp_path / f"moco_{version}_200ep_pretrain.pth.tar"
        official, net = released(version, path), moco.MoCo("resnet18", "7x7", head, 6)
        moco.load_weights(net, path)
        tensors = 122 if version == "v1" else 124  # 120 of the backbone, and the head
        said = capsys.readouterr().out
        assert f"{tensors} tensors loaded, missing 0, unexpected 0" in said and "random" not in said
        with torch.no_grad():
            assert close(net.eval()(x)[1], official((x - mean) / std), 1e-5)
        own = {k: v for k, v in official.state_dict().items() if not k.startswith("fc.")}
        assert same(dict(net.backbone.state_dict()), own)
        argv = [*TINY, "--init", path, "--arch", "resnet18", "--dim", 6, "--out", tmp_path / "run"]
        assert path.name in refused(moco, [*argv, "--head", other], capsys)
    v1 = tmp_path / "moco_v1_200ep_pretrain.pth.tar"
    assert v1.name in refused(moco, [*argv, "--init", v1], capsys)  # the default is v2


# ==================================================================================================
# The run
# ==================================================================================================


def algorithm_1(f_q, views, queue, args, mistake=None):
    """The slide's Algorithm 1, transcribed; a forward pass ends with the normalisation."""
    bmm, mm, cat, zeros = torch.bmm, torch.mm, torch.cat, torch.zeros
    m, t, (C, K) = args.m, args.tau, queue.shape
    f_q = copy.deepcopy(f_q)
    f_k = copy.deepcopy(f_q)  # initialize
    velocity = [torch.zeros_like(p) for p in f_q.parameters()]

    def forward(f, x):
        return F.normalize(f(x)[1])

    def momentum_update():
        for p_k, p_q in zip(f_k.parameters(), f_q.parameters()):
            p_k.data = m * p_k.data + (1 - m) * p_q.data

    def enqueue_and_dequeue(queue, k):
        queue = cat([queue, k.T], dim=1)  # enqueue the current minibatch
        return queue[:, :-N] if mistake == "the newest keys dequeued" else queue[:, N:]

    for step, (x_q, x_k) in enumerate(views):  # load a minibatch x with N samples
        N = len(x_q)
        q = forward(f_q, x_q)  # queries: NxC
        k = forward(f_q if mistake == "f_q for the keys" else f_k, x_k)  # keys: NxC
        k = k.detach()  # no gradient to keys
        if mistake == "queue read after the enqueue":
            queue = enqueue_and_dequeue(queue, k)
        # positive logits: Nx1
        l_pos = bmm(q.view(N, 1, C), k.view(N, C, 1)).view(N, 1)
        # negative logits: NxK
        l_neg = mm(q.view(N, C), queue.view(C, K))
        # logits: Nx(1+K)
        logits = cat([l_pos, l_neg], dim=1)
        # contrastive loss, Eqn.(1)
        labels = zeros(N, dtype=torch.long)  # positives are the 0-th
        loss = nn.CrossEntropyLoss()(logits / t, labels)
        if mistake == "momentum update before the SGD update":
            momentum_update()
        # SGD update: query network
        rate = args.lr * N / 256 * (1 + math.cos(math.pi * step / len(views))) / 2
        grads = torch.autograd.grad(loss, list(f_q.parameters()))
        for v, p, g in zip(velocity, f_q.parameters(), grads):
            v.copy_(0.9 * v + g + args.weight_decay * p.data)
            p.data = p.data - rate * v
        # momentum update: key network
        if mistake not in ("momentum update before the SGD update", "no momentum update"):
            momentum_update()
        # update dictionary
        if mistake != "queue read after the enqueue":
            queue = enqueue_and_dequeue(queue, k)
    return f_q, f_k, queue


def test_algorithm_1(tmp_path, monkeypatch, pixels):
    argv = [*TINY, *"--queue 40 --m 0.6 --dim 4 --lr 4 --weight-decay 0.01 --eval-every 0 "
            "--out".split(), tmp_path / "run"]
    seen, augment = [], moco.augment

    def looking(views, args):
        seen.append(augment(views, args))
        return [x.clone() for x in seen[-1]]

    monkeypatch.setattr(moco, "augment", looking)
    quiet(moco, argv)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]
    views = [v for v in seen if len(v[0]) == 16]  # those of views.png are eight
    assert len(views) == 3 and not close(*views[0], 0.1)
    args = completed(*argv)
    net, start = moco.build(args), moco.random_queue(args)
    assert state["ptr"] == 3 * 16 % 40
    oldest_first = state["queue"].roll(-state["ptr"].item(), 1)

    def agrees(mistake=None):
        f_q, f_k, queue = algorithm_1(net, views, start, args, mistake)
        pairs = [(oldest_first, queue)]
        for name, f in (("net", f_q), ("net_ema", f_k)):
            assert state[name].keys() == f.state_dict().keys()
            pairs += [(w, state[name][k]) for k, w in f.state_dict().items()]
        return all(close(a, b, 1e-6) for a, b in pairs)

    assert agrees()
    moved = [(state["net"][k] - w).abs().max() for k, w in net.state_dict().items()]
    assert min(moved) > 1e-3  # there is something to compare
    for mistake in ("momentum update before the SGD update", "queue read after the enqueue",
                    "no momentum update", "f_q for the keys", "the newest keys dequeued"):
        assert not agrees(mistake), mistake


def test_verdict_says_that_the_queue_is_filling(tmp_path, pixels, monkeypatch):
    argv = [*TINY, *"--queue 80 --epochs 2 --eval-every 1 --out".split(), tmp_path / "run"]
    quiet(moco, argv)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    filling, full = (json.loads(line)["verdict"] for line in lines)
    assert filling.startswith("queue still filling (40% random keys), ")  # 32 of 80
    assert "queue" not in full and "q has spread" in full
    monkeypatch.setattr(moco, "report", moco.evaluate)
    results, out = quiet(moco, [*argv, "--eval", tmp_path / "run" / "last.pt"])
    assert "queue" not in results["verdict"] and "warning" not in out  # nothing is trained
