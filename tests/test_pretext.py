"""Pretext tasks against the equations of their papers, and what each makes of an image."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tools import TINY, Watched, close, completed, draw, options, refused, same, train

import common
import pretext

SHORT = [*TINY, *"--epochs 1 --eval-every 0".split()]
each_task = pytest.mark.parametrize("task", pretext.TASKS)


def built(task, flags="", size=32):
    return pretext.build(completed(
        pretext, ["--task", task, "--image-size", size, *flags.split()]))


def images(n=3, size=32):
    return draw(n, 3, size, size, dtype=torch.float32).sigmoid()


def places(size=32):
    """An image of which every pixel says where it is: channel 0 its row, 1 its column."""
    line = torch.arange(float(size)).expand(size, size)
    return torch.stack([line.T, line, 0 * line]).unsqueeze(0)


# ==================================================================================================
# Losses
# ==================================================================================================


def fails(variant, mistakes, truth, *inputs):
    assert close(variant(*inputs), truth)
    for mistake in mistakes:
        assert abs(variant(*inputs, mistake) - truth) > 1e-4, mistake


def test_cross_entropy_equation():
    """RotNet, equations 2 and 3: loss(X_i) = -1/K sum_y log F^y(X_i | y), F^y the y-th of the K
    probabilities, its mean over i; here L = -1/n sum_i log F^y_i(X_i)."""

    def variant(logits, y, mistake=None):
        p = logits.softmax(0 if mistake == "softmax over the batch" else 1)
        p = p.gather(1, y.unsqueeze(1))
        p = 1 - p if mistake == "another class" else p
        p = p.exp() if mistake == "no logarithm" else p
        return -p.log().sum() / (1 if mistake == "sum" else len(y))

    logits, y = 2 * draw(5, 4), torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for i in range(5):
        parts = [math.exp(logits[i, c]) for c in range(4)]
        total -= math.log(parts[y[i]] / sum(parts))
    fails(variant, ("softmax over the batch", "another class", "no logarithm", "sum"), total / 5,
          logits, y)
    assert close(pretext.cross_entropy(logits, y), total / 5)
    on_a_grid = logits.T.reshape(1, 4, 5, 1)  # five places of one image
    assert close(pretext.cross_entropy(on_a_grid, y.view(1, 5, 1)), total / 5)
    assert close(pretext.cross_entropy(torch.zeros(5, 7), y), math.log(7), 1e-6)
    assert torch.autograd.gradcheck(lambda t: pretext.cross_entropy(t, y), logits.requires_grad_())
    logits, Z = draw(2, 5, 3, 2), draw(2, 5, 3, 2, seed=1).softmax(1)  # shares of classes
    total = -sum(Z[i] * logits.log_softmax(1)[i] for i in itertools.product(
        range(2), range(5), range(3), range(2)))
    assert close(pretext.cross_entropy(logits, Z), total / 12)


def test_classification():
    logits, y = torch.eye(4)[:3], torch.tensor([0, 1, 3])
    figures = pretext.classification(logits, y)
    assert close(figures["accuracy"], 2 / 3, 1e-6)
    assert close(figures["loss"], pretext.cross_entropy(logits, y))


def test_soft_cross_entropy_equation():
    """Zhang et al. 2016, equations 2 and 3: L = -sum_hw v(Z_hw) sum_q Z_hwq log Y_hwq, v(Z_hw) =
    w_q*, q* = argmax_q Z_hwq; here its mean over images and places."""

    def variant(logits, Z, w, mistake=None):
        Y = logits.softmax(2 if mistake == "softmax over places" else 1)
        v = w[(Y if mistake == "weight of the answer" else Z).argmax(1)]
        v = torch.einsum("nqhw,q->nhw", Z, w) if mistake == "mean weight" else v
        v = torch.ones_like(v) if mistake == "no weights" else v
        target = F.one_hot(Z.argmax(1), 5).movedim(3, 1) if mistake == "hard bins" else Z
        terms = v * -(target * Y.log()).sum(1)
        if mistake == "divided by the weights":
            return terms.sum() / v.sum()
        return terms.sum() if mistake == "sum" else terms.mean()

    logits, Z, w = draw(2, 5, 3, 2), draw(2, 5, 3, 2, seed=1).softmax(1), draw(5, seed=2).exp()
    total = 0.0
    for n, h, k in itertools.product(range(2), range(3), range(2)):
        bottom = sum(math.exp(logits[n, q, h, k]) for q in range(5))
        star = max(range(5), key=lambda q: Z[n, q, h, k].item())
        for q in range(5):
            total -= w[star] * Z[n, q, h, k] * math.log(math.exp(logits[n, q, h, k]) / bottom)
    fails(variant, ("softmax over places", "weight of the answer", "mean weight", "no weights",
                    "hard bins", "divided by the weights", "sum"), total / 12, logits, Z, w)
    assert close(pretext.soft_cross_entropy(logits, Z, w), total / 12)
    assert close(pretext.soft_cross_entropy(0 * Z, Z, torch.ones(5)), math.log(5))
    assert torch.autograd.gradcheck(lambda t: pretext.soft_cross_entropy(t, Z, w),
                                    logits.requires_grad_())


def test_rebalance_equation():
    """Zhang et al. 2016, equation 4: w ~ ((1 - lambda) p + lambda / Q)^-1, sum_q p_q w_q = 1."""

    def variant(p, mistake=None, mix=0.5):
        Q = len(p)
        w = 1 / ((1 - mix) * p + (mix if mistake == "1 for 1 / Q" else mix / Q))
        w = 1 / p if mistake == "not mixed" else 1 / w if mistake == "not inverted" else w
        return w[1] / (w.mean() if mistake == "mean of 1 over bins" else (p * w).sum())

    p = draw(6).softmax(0)
    raw = [1 / (0.5 * p[q].item() + 0.5 / 6) for q in range(6)]
    mean = sum(p[q].item() * raw[q] for q in range(6))
    fails(variant, ("not mixed", "not inverted", "mean of 1 over bins", "1 for 1 / Q"),
          raw[1] / mean, p)
    assert close(pretext.rebalance(p), [r / mean for r in raw])
    assert close(pretext.rebalance(p, 0.2)[1], variant(p, mix=0.2))
    assert not close(variant(p, mix=0.2), variant(p, mix=0.8))
    assert close(pretext.rebalance(torch.full((9,), 1 / 9)), torch.ones(9), 1e-6)
    empty = pretext.rebalance(torch.tensor([1.0, 0.0]))  # a bin without a pixel
    assert empty.isfinite().all() and empty[1] > empty[0]


def test_masked_l2_equation():
    """Pathak et al. 2016, equation 1: L = |M (x - F((1 - M) x))|^2, M is 1 in the hole; here its
    mean over what is in the hole."""

    def variant(answer, x, M, mistake=None):
        M = ~M if mistake == "outside the hole" else M
        apart = (answer - x) * (1 if mistake == "everywhere" else M)
        apart = apart.abs() if mistake == "no square" else apart.square()
        count = M.numel() if mistake == "mean over the image" else M.sum()
        return apart.sum() / ((1 if mistake == "channels summed" else 3) * count)

    answer, x, M = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1), draw(2, 1, 4, 5, seed=2) > 0.3
    total, count = 0.0, 0
    for n, c, i, j in itertools.product(range(2), range(3), range(4), range(5)):
        if M[n, 0, i, j]:
            total, count = total + (x[n, c, i, j] - answer[n, c, i, j]).item() ** 2, count + 1
    fails(variant, ("outside the hole", "everywhere", "no square", "mean over the image",
                    "channels summed"), total / count, answer, x, M)
    assert close(pretext.masked_l2(answer, x, M), total / count)
    everywhere = torch.ones_like(M)
    assert close(pretext.masked_l2(answer, x, everywhere), F.mse_loss(answer, x))
    assert torch.autograd.gradcheck(lambda t: pretext.masked_l2(t, x, M), answer.requires_grad_())


def test_cpc_equation():
    """van den Oord et al. 2018, equations 3 and 4: f(x, c) = exp(z^T W c), L = -E log( f(x_i, c_i)
    / sum_j f(x_j, c_i) ), x_i the positive sample of c_i among all x_j; pred is W c."""

    def variant(pred, z, mistake=None):
        if mistake == "unit vectors":
            pred, z = F.normalize(pred), F.normalize(z)
        s = (z @ pred.T) if mistake == "contexts as negatives" else pred @ z.T
        if mistake == "the next row as positive":
            s = s.roll(-1, 1)
        positive = s.diagonal()
        if mistake == "positive left out of the denominator":
            s = s.masked_fill(torch.eye(len(s)).bool(), -math.inf)
        losses = s.logsumexp(1) - positive
        return losses.sum() if mistake == "sum" else losses.mean()

    pred, z = draw(6, 3), draw(6, 3, seed=1)
    total = 0.0
    for i in range(6):
        f = [math.exp(sum(z[j, d] * pred[i, d] for d in range(3))) for j in range(6)]
        total -= math.log(f[i] / sum(f))
    fails(variant, ("unit vectors", "contexts as negatives", "the next row as positive",
                    "positive left out of the denominator", "sum"), total / 6, pred, z)
    assert close(pretext.cpc_loss(pred, z), total / 6)
    assert close(pretext.cpc_loss(pred, z[:1].expand(6, 3)), math.log(6))
    assert pretext.cpc_loss(40 * torch.eye(6), torch.eye(6)) < 1e-6
    assert torch.autograd.gradcheck(pretext.cpc_loss, (pred.requires_grad_(), z.requires_grad_()))


def test_byol_loss_equation():
    """Grill et al. 2020, equation 2: |q/|q| - z'/|z'||^2 = 2 - 2 <q, z'> / (|q| |z'|), its mean."""

    def variant(p, z, mistake=None):
        p = p if mistake == "p is no unit vector" else F.normalize(p, dim=1)
        z = z if mistake == "z is no unit vector" else F.normalize(z, dim=1)
        squares = (p - z).square()
        return squares.mean() if mistake == "mean over D" else squares.sum(1).mean()

    p, z = draw(4, 3), 3 * draw(4, 3, seed=1)
    total = 0.0
    for n in range(4):
        dot = sum(a * b for a, b in zip(p[n].tolist(), z[n].tolist()))
        total += 2 - 2 * dot / (math.hypot(*p[n].tolist()) * math.hypot(*z[n].tolist()))
    fails(variant, ("p is no unit vector", "z is no unit vector", "mean over D"), total / 4, p, z)
    assert close(pretext.byol_loss(p, z), total / 4)
    assert close(pretext.byol_loss(p, 5 * p), 0.0) and close(pretext.byol_loss(p, -p), 4.0)
    assert close(pretext.byol_loss(torch.eye(3), torch.eye(3).roll(1, 0)), 2.0)
    p, z = p.requires_grad_(), z.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: pretext.byol_loss(t, z.detach()), p)
    pretext.byol_loss(p, z).backward()
    assert z.grad is None and p.grad.abs().max() > 0
    assert torch.autograd.gradcheck(lambda a, b: pretext.byol_loss(a, b, False), (p, z))


def test_lr_at():
    steps, warmup, peak = 100, 10, 2.0
    rate = [pretext.lr_at(t, steps, warmup, peak) for t in range(steps + 1)]
    for t in range(steps + 1):
        cosine = peak * (1 + math.cos(math.pi * (t - 10) / 90)) / 2
        assert close(rate[t], (t + 1) / 10 * peak if t < 10 else cosine, 1e-12), t
    assert pretext.lr_at(0, 10, 0, peak) == peak


# ==================================================================================================
# What goes in and what is asked: predictive tasks
# ==================================================================================================


def test_four_rotations_are_the_identity():
    x = images(5)
    turned, y = pretext.rotate(x)
    parts = turned.chunk(4)
    assert turned.shape == (20, 3, 32, 32) and y.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert torch.equal(parts[0], x)
    for r in range(4):  # each is the one before turned once more, the fourth the first again
        assert torch.equal(pretext.rotate(parts[r])[0].chunk(4)[1], parts[(r + 1) % 4])
        assert r == 0 or not torch.equal(parts[r], x)
    assert torch.equal(parts[1][:, :, 31 - 4, 7], x[:, :, 7, 4])  # to the left
    assert torch.equal(parts[2], x.flip(2, 3))


def test_only_exact_turns_leave_no_trace():
    def sharpness(flags):
        turned, _ = built("rotation", flags).input_and_target(images(20))
        return turned.diff(dim=2).square().mean((1, 2, 3)).view(4, -1).mean(1)

    exact, traces = sharpness(""), sharpness("--without exact")
    assert (exact / exact[0] - 1).abs().max() < 0.05
    assert (traces[1:] < 0.6 * traces[0]).all() and close(traces[0], exact[0])


def test_shade_hides_where_the_light_comes_from():
    common.reseed(0)
    x = torch.full((2000, 3, 8, 8), 0.5)
    shaded = pretext.shade(x, 0.3)
    lines = shaded[:, 0], shaded[:, 0].mT  # along the rows, along the columns
    slope = [(t[:, -1] - t[:, 0]).mean(1) / 2 for t in lines]
    for s in slope:
        assert s.min() < -0.29 and s.max() > 0.29 and s.abs().max() < 0.3 and s.mean().abs() < 0.02
    assert abs(torch.corrcoef(torch.stack(slope))[0, 1]) < 0.1
    assert close(shaded.mean((1, 2, 3)), torch.full((2000,), 0.5), 1e-5)
    assert torch.equal(pretext.shade(x, 0.0), x)


def test_tiles_lie_where_they_should():
    x = places()
    t = pretext.tiles(x, size=8, stride=12)
    assert t.shape == (1, 9, 3, 8, 8)
    for i in range(9):
        top, left = 12 * (i // 3), 12 * (i % 3)
        assert torch.equal(t[0, i], x[0, :, top : top + 8, left : left + 8])
    common.reseed(0)
    many = pretext.tiles(x.expand(500, -1, -1, -1), 8, 10, jitter=2)
    moved = many[:, :, :2, 0, 0] - pretext.tiles(x, 8, 10)[:, :, :2, 0, 0]
    assert set(moved.flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert len(moved.unique(dim=0)) > 400 and (moved[:, 0] != moved[:, 1]).any()  # own draws
    assert torch.equal(many[:, :, 0, 7], many[:, :, 0, :1].squeeze(2) + 7)  # whole tiles
    wide = pretext.tiles(x.expand(200, -1, -1, -1), 8, 12, jitter=3)
    assert wide[:, :, :2].min() == 0 and wide[:, :, :2].max() == 31  # stay inside


class Corners(nn.Module):
    """In place of f: a tile of `places` -> its corner."""

    def forward(self, t):
        return t[:, :2, 0, 0]


@pytest.mark.parametrize("flags, least, most", [
    ("", 4 - 2, 4 + 2), ("jitter", 4, 4), ("gap", -2, 2), ("gap jitter", 0, 0)])
def test_the_label_of_a_patch_belongs_to_its_offset(flags, least, most):
    net = built("patch", f"--without color norm {flags}")  # pixels stay as they are
    t, y = net.input_and_target(places().expand(50, -1, -1, -1))
    corner = t.unflatten(0, (50, 9))[:, :, :2, 0, 0]  # (M, 9, 2) row, column
    net.backbone, net.head = Corners(), nn.Identity()
    pairs = net(t)  # (16M, 4): first and second corner
    assert len(pairs) == len(y) == 16 * 50 and sorted(set(y.tolist())) == list(range(8))
    step = {0: (-1, -1), 1: (-1, 0), 2: (-1, 1), 3: (0, -1), 4: (0, 1), 5: (1, -1), 6: (1, 0),
            7: (1, 1)}  # label -> where the second lies of the first
    gaps = []
    for pair, label in zip(pairs.tolist(), y.tolist()):
        for first, second, way in zip(pair[:2], pair[2:], step[label]):
            distance = (second - first) * way
            assert distance > 0 or way == 0 and abs(second - first) <= 2
            gaps += [distance - 8] if way else []
    assert least <= min(gaps) and max(gaps) <= most
    middle = {tuple(c) for c in corner[:, 4].tolist()}
    assert {tuple(p[:2]) for p in pairs[:400].tolist()} == middle  # from the centre, then to it
    assert {tuple(p[2:]) for p in pairs[400:].tolist()} == middle


def test_colours_are_dropped_and_tiles_standardised():
    common.reseed(0)
    x = images(900, 8)
    y = pretext.drop_colors(x, 2 / 3)
    dropped = (y == y[:, :1]).flatten(1).all(1)
    assert abs(dropped.float().mean() - 2 / 3) < 0.06 and torch.equal(y[~dropped], x[~dropped])
    copies = (y[dropped] == x[dropped]).flatten(2).all(2).float()  # of one channel each
    assert (copies.sum(1) == 1).all() and copies.mean(0).min() > 0.25
    assert torch.equal(pretext.drop_colors(x, 0.0), x)
    t = pretext.standardise(x)
    deviation = t.std((2, 3), correction=0)
    assert t.mean((2, 3)).abs().max() < 1e-5 and (deviation - 1).abs().max() < 0.02
    assert close(pretext.standardise(0.5 * x + 0.3), t, 0.05)  # brightness and contrast are gone
    assert pretext.standardise(torch.ones(1, 3, 4, 4)).abs().max() == 0
    for task in ("patch", "jigsaw"):
        t, _ = built(task).input_and_target(images())
        assert t.mean((2, 3)).abs().max() < 1e-5 and (t == t[:, :1]).flatten(1).all(1).any()
        t, _ = built(task, "--without color norm").input_and_target(images())
        assert 0 < t.min() and t.max() < 1 and not (t == t[:, :1]).flatten(1).all(1).any()


def test_jigsaw_permutations():
    """Noroozi & Favaro, Algorithm 1, replayed over all 9!: the next one is as far from its nearest
    as any, and of those the furthest on average."""
    n = 12
    orders = pretext.jigsaw_permutations(n, 0)
    assert orders.shape == (n, 9) and orders.sort(1).values.equal(torch.arange(9).expand(n, 9))
    every = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.int8)
    own, total, nearest = (orders.unsqueeze(1) != orders).sum(2), 0, torch.tensor(9)
    for i in range(1, n):
        distance = (every != orders[i - 1].to(torch.int8)).sum(1)
        total, nearest = total + distance, nearest.minimum(distance)
        assert own[i, :i].min() == nearest.max()
        assert own[i, :i].sum() == total[nearest == nearest.max()].max()
    others = ~torch.eye(n).bool()
    random = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:n]]
    random = (random.unsqueeze(1) != random).sum(2)[others]
    assert own[others].min() >= 7 > random.min() and own[others].sum() > random.sum()
    assert orders[:9, 0].unique().numel() == 9  # all 9 apart is possible
    assert pretext.jigsaw_permutations(5, 0).equal(orders[:5])
    assert not pretext.jigsaw_permutations(5, 4).equal(orders[:5])


def test_a_permutation_undone_gives_the_image_back():
    net, x = built("jigsaw", "--without gap jitter color norm"), images(6)
    common.reseed(0)
    t, y = net.input_and_target(x)
    t, middle = t.unflatten(0, (6, 9)), x[:, :, 4:28, 4:28]
    assert (y >= 0).all() and (y < 24).all() and len(y.unique()) > 1

    def undone(order):
        back = torch.zeros_like(middle)
        for m, place in itertools.product(range(6), range(9)):
            i, j = divmod(order[m, place].item(), 3)
            back[m, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = t[m, place]
        return back

    assert torch.equal(undone(net.orders[y]), middle)
    assert not torch.equal(undone(net.orders[y].argsort(1)), middle)  # the way there, once more
    answer, chance = net(t.flatten(0, 1)), net.chance
    assert answer.shape == (6, 24) and chance == {"loss": math.log(24), "accuracy": 1 / 24}


# ==================================================================================================
# What goes in and what is asked: reconstructive tasks
# ==================================================================================================


def test_denoising_hides_a_quarter_and_asks_for_all():
    x = images(40)
    noisy, (target, counts) = built("denoising").input_and_target(x)
    black = (noisy == 0).all(1)
    assert torch.equal(target, x) and counts.all() and counts.shape == (40, 1, 32, 32)
    assert abs(black.float().mean() - 0.25) < 0.01  # 40,960 draws: 4.7 standard deviations
    assert torch.equal(noisy, x * ~black.unsqueeze(1)) and not torch.equal(black[0], black[1])
    clean, _ = built("denoising", "--without noise").input_and_target(x)
    assert torch.equal(clean, x)


def test_inpainting_cuts_out_a_quarter():
    x = images(200)
    cut, (target, hole) = built("inpainting").input_and_target(x)
    assert torch.equal(target, x) and (hole.sum((1, 2, 3)) == 16 * 16).all()
    rows, columns = hole.any(3).squeeze(1), hole.any(2).squeeze(1)
    assert (rows.sum(1) == 16).all() and (columns.sum(1) == 16).all()  # a square
    assert torch.equal(cut * ~hole, x * ~hole)
    inside = 255 * cut.movedim(1, 3)[hole.squeeze(1)]
    assert close(inside, torch.tensor([[123, 117, 104]]).expand_as(inside), 1e-3)
    top, left = rows.byte().argmax(1), columns.byte().argmax(1)
    assert {0, 16} <= {*top.tolist()} and {0, 16} <= {*left.tolist()} and (top != left).any()
    _, (_, middle) = built("inpainting", "--without place").input_and_target(x)
    assert middle[:, :, 8:24, 8:24].all() and middle.sum() == 200 * 256


def test_lab():
    """Primaries as scikit-image's rgb2lab has them; grey has no colour."""
    known = {(1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0), (1, 0, 0): (53.241, 80.092, 67.203),
             (0, 1, 0): (87.735, -86.183, 83.179), (0, 0, 1): (32.297, 79.188, -107.860)}
    for rgb, lab in known.items():
        found = pretext.rgb_to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1))
        assert close(found.flatten(), lab, 0.02), rgb
    grey = torch.linspace(0, 1, 50).view(1, 1, 50, 1).expand(1, 3, 50, 1).double()
    L, *ab = pretext.rgb_to_lab(grey).unbind(1)
    assert (L.diff(dim=1) > 0).all() and max(t.abs().max() for t in ab) < 1e-3


def test_bins_soft_encode_to_one():
    bins = pretext.ab_bins().double()
    assert bins.shape == (261, 2) and (bins % 10 == 0).all() and len(bins.unique(dim=0)) == 261
    colours = pretext.rgb_to_lab(draw(1, 3, 50, 50).sigmoid())[0, 1:].flatten(1).T
    assert (torch.cdist(colours, bins).amin(1) <= 50**0.5 + 1e-6).all()  # each in a cell
    ab = 40 * draw(2, 2, 3, 4)
    Z = pretext.soft_encode(ab, bins)
    assert Z.shape == (2, 261, 3, 4) and close(Z.sum(1), torch.ones(2, 3, 4))
    for n, i, j in itertools.product(range(2), range(3), range(4)):
        distance = [math.dist(ab[n, :, i, j].tolist(), b) for b in bins.tolist()]
        near = sorted(range(261), key=lambda q: distance[q])[:5]
        weight = {q: math.exp(-distance[q] ** 2 / (2 * 5**2)) for q in near}
        expected = [weight.get(q, 0) / sum(weight.values()) for q in range(261)]
        assert close(Z[n, :, i, j], expected)
    exact = bins[[3, 100]].T.view(1, 2, 2, 1)
    assert pretext.soft_encode(exact, bins).argmax(1).flatten().tolist() == [3, 100]


def test_colorization_gets_lightness_and_is_asked_for_colour():
    net, x = built("colorization"), images(4)
    light, Z = net.input_and_target(x)
    lab = pretext.rgb_to_lab(x)
    assert light.shape == x.shape and close(light, (lab[:, :1] / 100).expand_as(x), 1e-6)
    assert Z.shape == (4, 261, 8, 8)
    for i, j in ((0, 0), (3, 7)):
        mean = lab[:, 1:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((2, 3))
        code = pretext.soft_encode(mean[..., None, None], net.bins)
        assert close(Z[:, :, i, j], code[..., 0, 0], 1e-4)
    red_or_grey = torch.full((10, 3, 32, 32), 0.5)
    red_or_grey[0, 0] = 1.0
    assert (net.weight == 1).all()
    net.rebalance_bins(red_or_grey)
    often, rare = (net.input_and_target(red_or_grey[i : i + 1])[1][0, :, 0, 0].argmax()
                   for i in (1, 0))
    assert net.weight[rare] > 1.5 * net.weight[often]
    share = net.input_and_target(red_or_grey)[1].mean((0, 2, 3))
    assert close((share * net.weight).sum(), 1.0, 1e-5)


def test_split_brain_halves_know_nothing_of_each_other():
    for flags, leaks in (("", False), ("--without split", True)):
        net, x = built("splitbrain", flags).eval(), images(2)
        halves, (Z, light) = net.input_and_target(x)
        assert halves.shape == (2, 6, 32, 32) and light.shape == (2, 8, 8)
        halves.requires_grad_()
        for answers, own in ((slice(0, 261), slice(0, 3)), (slice(261, 361), slice(3, 6))):
            (grad,) = torch.autograd.grad(net(halves)[:, answers].square().sum(), halves)
            other = [c for c in range(6) if c not in range(6)[own]]
            assert grad[:, own].abs().max() > 0 and grad[:, other].abs().max() == 0
        L, a, b = (pretext.rgb_to_lab(x) / torch.tensor([100.0, 50, 50]).view(3, 1, 1)).unbind(1)
        expected = [L, a, b, L, a, b] if leaks else [L, L, L, a, b, 0 * L]
        assert close(halves.detach(), torch.stack(expected, 1), 1e-6)
        over = 100 * F.adaptive_avg_pool2d(L, 8) - light
        assert -1e-3 < over.min() and over.max() < 1 + 1e-3  # the bin holds the lightness
    whole, half = pretext.encoder("convnet", "7x7"), pretext.encoder("convnet", "7x7")
    pretext.halve(half)
    count = [sum(p.numel() for p in n[3:].parameters() if p.ndim > 1) for n in (whole, half)]
    assert count[0] == 2 * count[1]
    loss = net.loss(torch.zeros(2, 361, 8, 8), (Z, light))["loss"]
    assert close(loss, math.log(261) + math.log(100), 1e-5)


# ==================================================================================================
# Contrastive, and on to BYOL
# ==================================================================================================


def test_cpc_predicts_from_above_what_is_below():
    for flags, below, shared in (("", (3, 4), 0), ("gap", (1, 2), 4)):
        net = built("cpc", f"--without color {flags}").eval()
        t, _ = net.input_and_target(places().expand(2, -1, -1, -1))
        assert t.shape == (98, 3, 8, 8) and net.rows_below == below
        top = t.unflatten(0, (2, 7, 7))[:, :, :, 0, 0, 0]
        assert torch.equal(top[0, :, 3], 4.0 * torch.arange(7))  # half a patch further each
        assert max(0, 8 - 4 * below[0]) == shared  # rows of pixels that both have
        answer = net(t / 31)  # (2, 3, 7, 7, 64): z and two predictions
        assert close(answer[:, 0].flatten(0, 2), net.to_z(net.backbone(t / 31)), 1e-5)
        total = 0.0
        for k, pred in zip(below, answer.unbind(1)[1:]):
            rows = [(m, r, c) for m in range(2) for r in range(7 - k) for c in range(7)]
            pred = torch.stack([pred[m, r, c] for m, r, c in rows])
            z = torch.stack([answer[m, 0, r + k, c] for m, r, c in rows])  # k rows further down
            total += pretext.cpc_loss(pred, z).item() / 2
        assert close(net.loss(answer, None)["loss"], total, 1e-5)
    x = images(2)
    pixels = pretext.tiles(x, 8, 4, rows=7).flatten(0, 1).requires_grad_()
    pred = net(pixels)[:, 1]
    for r in range(5):
        (grad,) = torch.autograd.grad(pred[0, r].square().sum(), pixels, retain_graph=True)
        used = grad.unflatten(0, (2, 7, 7)).flatten(3).abs().sum((2, 3)) > 0
        assert used[0].tolist() == [max(0, r - 3) <= i <= r for i in range(7)]  # none below
        assert not used[1].any()


def test_cpc_batch_norm_leaks():
    """What one patch shows changes the features of others, unless it is layer norm."""
    for flags, leaks in (("", False), ("--without norm", True)):
        net, t = built("cpc", flags).train(), images(98, 8)
        other = t.clone()
        other[0] = 1 - other[0]
        with torch.no_grad():
            before, after = net.backbone(t), net.backbone(other)
        assert not close(before[0], after[0], 1e-3)
        assert close(before[1:], after[1:], 1e-5) != leaks


def test_cpc_chance_and_drop():
    net = built("cpc", "--batch-size 5")
    assert close(net.loss(torch.zeros(10, 3, 7, 7, 64), None)["loss"], net.chance["loss"], 1e-5)
    assert close(net.chance["loss"], (math.log(2 * 5 * 7 * 4) + math.log(2 * 5 * 7 * 3)) / 2)
    common.reseed(0)
    t, _ = net.input_and_target(images(20))
    dropped = (t == t[:, :1]).flatten(1).all(1).float().mean()
    assert abs(dropped - 0.8) < 0.06


def test_view_cannot_collapse():
    x, net = images(16), built("view")
    before = copy.deepcopy(net.random_net.state_dict())
    for k, w in net.random_net[0].named_parameters():
        assert torch.equal(w, net.backbone.get_parameter(k)), k  # f as it was at first
    inputs, _ = net.input_and_target(x)
    answer = net(inputs)
    p1, p2, z1, z2 = answer
    assert torch.equal(inputs, x) and answer.shape == (4, 8, 128)
    constant = draw(1, 128, dtype=torch.float32).expand(8, 128)
    loss = net.loss(torch.stack([constant, constant, z1, z2]), None)["loss"]
    assert close(loss, 2.0, 0.05) and z1.std(0).mean() > 0.5  # targets differ: no way out
    assert close(net.loss(torch.stack([z2, z1, z1, z2]), None)["loss"], 0.0, 1e-6)  # the other one
    assert net.loss(torch.stack([z1, z2, z1, z2]), None)["loss"] > 0.1
    net.loss(answer, None)["loss"].backward()
    assert all(p.grad is None for p in net.random_net.parameters())
    assert net.backbone[0].weight.grad.abs().max() > 0
    assert all(torch.equal(before[k], p) for k, p in net.random_net.named_parameters())
    net = built("view", "--without fixed")
    p1, p2, z1, z2 = net(inputs)
    assert torch.equal(z1, p1) and torch.equal(z2, p2)
    collapsed = net.loss(constant.expand(4, 8, 128), None)["loss"]
    assert close(collapsed, 0.0, 1e-6)  # perfect


# ==================================================================================================
# Every task
# ==================================================================================================


@each_task
def test_model(task):
    """Features, answer and loss; the printed lines rebuild the backbone."""
    args = completed(pretext, ["--task", task, "--image-size", 24, "--batch-size", 3])
    net, x = pretext.build(args), images(6, 24)
    assert same(net.state_dict(), pretext.build(args).state_dict())
    h, z = pretext.features(net, x, args)
    assert h.shape == (6, 96) and z.shape == (6, {"cpc": 64, "view": 128}.get(task, 96))
    assert torch.equal(h, z) != (task in ("cpc", "view"))
    inputs, target = net.input_and_target(x)
    figures = net.loss(net(inputs), target)
    figures["loss"].backward()
    assert net.backbone[0].weight.grad.abs().max() > 0
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    if task not in ("denoising", "inpainting"):  # there it depends on the data
        chance = net.loss(net.blind(target), target) if hasattr(net, "blind") else net.chance
        assert [*figures] == [*chance]
    exec(pretext.loading(args), names := {})
    names["net"].load_state_dict(net.backbone.state_dict())
    view = pretext.standardise(x) if task in ("patch", "jigsaw") else x
    view = inputs if task in ("colorization", "splitbrain") else view
    assert close(names["net"].eval()(view), pretext.features(net.eval(), x, args)[0], 1e-5)
    assert ("see features" in pretext.loading(args)) == (view is not x)


def crops_of(data, run):
    """Two views of every image, as the chance is of."""
    every = (data.train, torch.arange(len(data.train.labels)))
    return common.embed(lambda x: x, every, pretext.crops(run.args), run)[:2]


@pytest.mark.parametrize("task", ["colorization", "splitbrain"])
def test_the_best_answer_that_does_not_look(task, tmp_path):
    """Its loss is the chance; no other answer that is the same for all images and places is better,
    equal logits least of all."""
    argv = [*SHORT, *"--limit 22 --batch-size 11 --task".split(), task, "--out", tmp_path / "run"]
    net, data, run = train(pretext, argv)
    _, target = net.input_and_target(torch.cat(crops_of(data, run)))
    answer = net.blind(target)
    assert close(net.loss(answer, target)["loss"], run.chance["loss"], 1e-5)
    one = answer[:1, :, :1, :1].clone().requires_grad_()
    assert torch.equal(one.detach().expand_as(answer), answer)
    net.loss(one.expand_as(answer), target)["loss"].backward()
    assert one.grad.abs().max() < 1e-5
    assert net.loss(torch.zeros_like(answer), target)["loss"] > run.chance["loss"] + 0.5


def test_views_of_a_resumed_run_are_those_of_a_whole_one(tmp_path):
    class Stopping(common.Run):
        def save(self, state):
            self.signal = 15 if self.step == self.per_epoch else 0
            super().save(state)

    argv = [*TINY, *"--epochs 2 --eval-every 0 --task denoising --out".split()]
    train(pretext, [*argv, tmp_path / "whole"])
    with pytest.raises(SystemExit):
        train(pretext, [*argv, tmp_path / "parts"], Stopping)
    stopped = (tmp_path / "parts" / "views.png").read_bytes()
    train(pretext, [*argv, tmp_path / "parts", "--resume"])
    resumed = (tmp_path / "parts" / "views.png").read_bytes()
    assert stopped != resumed == (tmp_path / "whole" / "views.png").read_bytes()


def test_grey_images_have_no_colours(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for i in range(24):
        grey = torch.full((3, 20, 20), i / 24)
        torchvision.utils.save_image(grey, tmp_path / "set" / f"{i}.png")
    argv = [*SHORT, "--dataset", tmp_path / "set", "--batch-size", 11, "--out", tmp_path / "run"]
    assert "are grey" in refused(pretext, [*argv, "--task", "colorization"], capsys)


@each_task
def test_a_run(task, tmp_path):
    """Two steps; the picture of the task; the chance of a mean image."""
    argv = [*SHORT, *"--limit 22 --batch-size 11 --task".split(), task, "--out", tmp_path / "run"]
    net, data, run = train(pretext, argv)
    (row,) = run.rows
    assert row["skipped"] == 0 and math.isfinite(row["loss"]) and "loss" in run.chance
    assert (run.folder / "views.png").stat().st_size > 1000 and net.training
    start = pretext.build(run.args)
    assert not torch.equal(net.backbone[0].weight, start.backbone[0].weight)
    if task in ("denoising", "inpainting"):
        x = torch.cat(crops_of(data, run)).double()
        assert close(run.chance["loss"], (x - x.mean(0)).square().mean(), 1e-5)
    if task == "colorization":
        assert net.weight.std() > 0.1


def test_rebalancing_can_be_taken_away(tmp_path):
    argv = "--limit 22 --batch-size 11 --task colorization --without rebalance --out".split()
    net, _, _ = train(pretext, [*SHORT, *argv, tmp_path / "run"])
    assert (net.weight == 1).all()


def by_hand(net, views, mistake=None):
    """RotNet's step, typed in: all four turns of every view, plain SGD with momentum 0.9."""
    weights = [*net.backbone.parameters(), *net.head.parameters()]
    v = [torch.zeros_like(w) for w in weights]
    for k, x in enumerate(views):
        total = 0.0
        turned = [torch.rot90(x, r, (2, 3)) for r in range(4)]
        if mistake == "one turn of each":
            turned = turned[1:2]
        turned = torch.cat(turned).contiguous(memory_format=torch.channels_last)  # or it rounds
        logits = net.head(net.backbone(turned))  # in another order, and three steps multiply that
        for i in range(len(logits)):
            r = i % 4 if mistake == "labels by image" else i // len(x)
            total = total - logits[i].log_softmax(0)[r] / len(logits)
        eta = 4 / 256 * (1 + math.cos(math.pi * k / len(views))) / 2
        for j, (w, g) in enumerate(zip(weights, torch.autograd.grad(total, weights))):
            v[j] = 0.9 * v[j] + g + 0.01 * w.data
            w.data = w.data - eta * v[j]
    return net.state_dict()


def test_rotnet_is_what_runs(tmp_path):
    argv = ("--limit 12 --batch-size 4 --optimizer sgd --lr 1 --weight-decay 0.01 --warmup 0 "
            "--out").split()
    net, _, run = train(pretext, [*SHORT, *argv, tmp_path / "run"], Watched)
    views = [torch.cat(v) for v in run.views]
    assert len(views) == 3 and views[0].shape == (8, 3, 16, 16)
    for mistake in (None, "one turn of each", "labels by image"):
        start = pretext.build(run.args).to(memory_format=torch.channels_last)
        theirs = by_hand(start, views, mistake)
        agree = all(close(theirs[k], v, 1e-3) for k, v in net.state_dict().items()
                    if v.is_floating_point())
        assert agree == (mistake is None), mistake


def test_pictures(tmp_path, monkeypatch):
    """Views, what goes in, and the answer where it is an image; the network stays as it is."""
    drawn = []
    monkeypatch.setattr(common, "picture", lambda path, columns: drawn.append(columns))  # no file
    parts = {"rotation": 5, "jigsaw": 2, "inpainting": 3, "splitbrain": 3, "view": 2}
    for task, columns in parts.items():
        args = completed(pretext, ["--task", task, "--batch-size", 16, "--image-size", 16])
        pixels = (255 * images(12, 16)).byte()
        data = SimpleNamespace(train=common.Images(
            torch.zeros(12), pixels, torch.full((12, 2), 16)))
        run = SimpleNamespace(folder=tmp_path, device=torch.device("cpu"), args=args)
        net = pretext.build(args)
        before = copy.deepcopy(net.state_dict())
        pretext.show_task(net, data, args, run)
        assert same(before, net.state_dict()) and net.training
        assert len(drawn[-1]) == 1 + 3 * columns, task
        assert all(c.shape[:2] == (8, 3) and c.isfinite().all() for c in drawn[-1])
    x, upright, turned = drawn[0][1:4]
    assert torch.equal(x, upright) and torch.equal(turned, x.rot90(1, (2, 3)))


# ==================================================================================================
# Its options
# ==================================================================================================


def test_augmentation(monkeypatch):
    args = completed(pretext, "--task view".split())
    assert pretext.crops(args) == [common.Crop(32, (0.5, 1.0), (3 / 4, 4 / 3), 2)]
    done = []
    for name in ("flip", "color_jitter", "grey"):  # to see their numbers
        monkeypatch.setattr(common, name, lambda x, *numbers, name=name, **named: done.append(
            (name, *numbers, *named.values())) or x)
    x = images(2)
    pretext.augment([x], args)
    assert done == [("flip", 0.5), ("color_jitter", 0.4, 0.4, 0.2, 0.1, 0.8), ("grey", 0.2)]
    done.clear()
    assert torch.equal(*pretext.augment([x], completed(pretext, ["--task", "patch"])), x)
    assert done == [("flip", 0.5)]
    assert not torch.equal(*pretext.augment([x], completed(pretext)), x)  # rotation: shade
    assert torch.equal(*pretext.augment([x], completed(pretext, ["--shade", 0])), x)


def test_defaults_by_task(capsys):
    def found(task, side):
        args = completed(pretext, ["--task", task], side)
        return args.batch_size, args.optimizer, args.lr, args.shade

    assert found("rotation", None) == (16, "adamw", 2e-2, 0.3)
    assert found("patch", None) == (32, "adamw", 8e-3, 0.0)
    assert found("rotation", 32) == (64, "sgd", 0.4, 0.0)
    assert found("cpc", 32) == (128, "adamw", 2e-3, 0.0)
    assert found("jigsaw", 500) == (128, "sgd", 0.1, 0.0)
    assert found("cpc", 500) == (32, "adamw", 1e-3, 0.0)
    assert found("rotation", 500) == (64, "sgd", 0.1, 0.0)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        options(pretext, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(rotation 0.02, others 0.008 | rotation 0.4, others 0.002 |" in text


@pytest.mark.parametrize("argv, names", [
    ("--task maze", "--task"), ("--without gap", "guards of rotation are exact"),
    ("--task patch --without gap fixed", "without fixed"), ("--without", "--without"),
    ("--permutations 1", "--permutations"), ("--shade 2", "--shade"), ("--optimizer lars", "lars"),
])
def test_wrong_options(argv, names, tmp_path, capsys):
    assert names in refused(pretext, [*SHORT, "--out", tmp_path / "run", *argv.split()], capsys)
    assert not (tmp_path / "run" / "args.json").exists()


def test_a_small_batch_is_warned_of(capsys):
    for task, size, warned in (("view", 31, True), ("view", 32, False), ("rotation", 8, False)):
        args = completed(pretext, ["--task", task, "--batch-size", size])
        pretext.check(args)
        assert ("warning: fewer than 32" in capsys.readouterr().out) == warned


def test_weights_of_others(tmp_path, capsys):
    """torchvision's ResNet and the backbone of another task fit; its last.pt and an f that is built
    otherwise do not."""
    def load(task, weights):
        args = completed(pretext, ["--task", task, "--arch", "resnet18"])
        args.init, net = tmp_path / "file.pt", pretext.build(args)
        torch.save(weights, args.init)
        common.load_weights(net, args)
        return net.backbone.state_dict()

    official = torchvision.models.resnet18().state_dict()
    assert all(torch.equal(v, official[k]) for k, v in load("patch", official).items())
    other = pretext.build(completed(pretext, ["--arch", "resnet18", "--seed", 1]))
    weights = other.backbone.state_dict()
    assert same(load("patch", {"state_dict": weights}), weights)
    assert capsys.readouterr().out.count("the head stays random") == 2
    run = {"method": "pretext", "state": {"net": other.state_dict()}}
    for task, file in (("patch", run), ("splitbrain", official), ("cpc", official)):
        with pytest.raises(SystemExit):
            load(task, file)
        assert "another network" in capsys.readouterr().err


def test_verdict(tmp_path, monkeypatch):
    """Only cpc and view compare vectors z; elsewhere z is h, and a smaller spread is healthy."""
    def health(h, z1, z2, *_, **rule):  # to see the rule
        return rule | {"verdict": "", "dim": z1.shape[1]}

    monkeypatch.setattr(common, "health", health)
    found = {}
    for task in ("rotation", "cpc", "view"):
        args = completed(pretext, ["--task", task, "--image-size", 16, "--workers", 0])
        part = common.Images(torch.zeros(12), (255 * images(12, 16)).byte(),
                             torch.full((12, 2), 16)), torch.arange(12)
        data = SimpleNamespace(val=part, labelled=False)
        run = common.Run(options(pretext, ["--device", "cpu", "--out", tmp_path / task]))
        found[task] = pretext.evaluate(pretext.build(args), data, args, run)
    assert found["rotation"] == {"name": "h", "least": 0.02, "verdict": "", "dim": 96}
    assert found["cpc"] == {"name": "z", "least": 0.02, "verdict": "", "dim": 64}
    assert found["view"] == {"name": "z", "least": 0.1, "verdict": "", "dim": 128}
    z, pred = draw(6, 3), draw(6, 3, seed=1)  # and this is why it may be small for cpc
    assert close(pretext.cpc_loss(pred, z), pretext.cpc_loss(pred, z + 100))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay(optimizer, tmp_path):
    argv = "--limit 22 --batch-size 11 --weight-decay 0.3 --optimizer".split()
    train(pretext, [*SHORT, *argv, optimizer, "--out", tmp_path / "run"])
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["optimizer"]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.3]
