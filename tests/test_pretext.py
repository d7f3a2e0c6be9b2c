"""Pretext tasks against the equations of their papers, and what each makes of an image."""

import contextlib
import io
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tools import TINY, close, draw, lighten, quiet, refused, same

import common
import pretext

SHORT = [*TINY, "--epochs", "1", "--eval-every", "0"]
each_task = pytest.mark.parametrize("task", pretext.TASKS)


def options(task, flags="", size=32):
    args = pretext.options(["--task", task, "--image-size", str(size), *flags.split()])
    with contextlib.redirect_stdout(io.StringIO()):
        pretext.complete(args, None, 4000)
    return args


def built(task, flags="", size=32):
    return pretext.build(options(task, flags, size))


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
        right = p.gather(1, y.unsqueeze(1))
        right = 1 - right if mistake == "another class" else right
        right = right.exp() if mistake == "no logarithm" else right
        return -right.log().sum() / (1 if mistake == "sum" else len(y))

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
    assert close(pretext.accuracy(torch.eye(4), torch.tensor([0, 1, 3, 3])), 3 / 4)


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

    def variant(p, mistake=None):
        Q = len(p)
        w = 1 / (0.5 * p + (0.5 if mistake == "1 for 1 / Q" else 0.5 / Q))
        w = 1 / p if mistake == "not mixed" else 1 / w if mistake == "not inverted" else w
        return w[1] / (w.mean() if mistake == "mean of 1 over bins" else (p * w).sum())

    p = draw(6).softmax(0)
    raw = [1 / (0.5 * p[q].item() + 0.5 / 6) for q in range(6)]
    mean = sum(p[q].item() * raw[q] for q in range(6))
    fails(variant, ("not mixed", "not inverted", "mean of 1 over bins", "1 for 1 / Q"),
          raw[1] / mean, p)
    assert close(pretext.rebalance(p), [r / mean for r in raw])
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
        right = s.diagonal()
        if mistake == "positive left out of the denominator":
            s = s.masked_fill(torch.eye(len(s)).bool(), -math.inf)
        losses = s.logsumexp(1) - right
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


# ==================================================================================================
# What is made of an image: reconstructive tasks
# ==================================================================================================


def test_denoising_hides_a_quarter_and_asks_for_all():
    x = images(40)
    (seen,), (asked, counts) = built("denoising").head.make(x)
    black = (seen == 0).all(1)
    assert torch.equal(asked, x) and counts.all() and counts.shape == (40, 1, 32, 32)
    assert abs(black.float().mean() - 0.25) < 0.01  # 40,960 draws: 4.7 standard deviations
    assert torch.equal(seen, x * ~black.unsqueeze(1)) and not torch.equal(black[0], black[1])
    (seen,), _ = built("denoising", "--without noise").head.make(x)
    assert torch.equal(seen, x)


def test_inpainting_cuts_out_a_quarter():
    x = images(200)
    (seen,), (asked, hole) = built("inpainting").head.make(x)
    assert torch.equal(asked, x) and (hole.sum((1, 2, 3)) == 16 * 16).all()
    rows, columns = hole.any(3).squeeze(1), hole.any(2).squeeze(1)
    assert (rows.sum(1) == 16).all() and (columns.sum(1) == 16).all()  # a square
    assert torch.equal(seen * ~hole, x * ~hole)
    inside = 255 * seen.movedim(1, 3)[hole.squeeze(1)]
    assert close(inside, torch.tensor([[123, 117, 104]]).expand_as(inside), 1e-3)
    top, left = rows.byte().argmax(1), columns.byte().argmax(1)
    assert {0, 16} <= {*top.tolist()} and {0, 16} <= {*left.tolist()} and (top != left).any()
    _, (_, middle) = built("inpainting", "--without place").head.make(x)
    assert middle[:, :, 8:24, 8:24].all() and middle.sum() == 200 * 256


def test_lab_and_back():
    """Primaries as scikit-image's rgb2lab has them; grey has no colour; the way back."""
    known = {(1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0), (1, 0, 0): (53.241, 80.092, 67.203),
             (0, 1, 0): (87.735, -86.183, 83.179), (0, 0, 1): (32.297, 79.188, -107.860)}
    for rgb, lab in known.items():
        found = pretext.rgb_to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1))
        assert close(found.flatten(), lab, 0.02), rgb
    grey = torch.linspace(0, 1, 50).view(1, 1, 50, 1).expand(1, 3, 50, 1).double()
    L, *ab = pretext.rgb_to_lab(grey).unbind(1)
    assert (L.diff(dim=1) > 0).all() and max(t.abs().max() for t in ab) < 1e-3
    x = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, :2], x[1, :, :2] = 0, 1  # black and white
    assert close(pretext.lab_to_rgb(pretext.rgb_to_lab(x)), x, 1e-7)
    outside = torch.tensor([50.0, 200.0, 0.0]).view(1, 3, 1, 1)
    assert 0 <= pretext.lab_to_rgb(outside).min() <= pretext.lab_to_rgb(outside).max() <= 1
    pixels = images(2).requires_grad_()
    pretext.rgb_to_lab(pixels).sum().backward()
    assert pixels.grad.isfinite().all()


def test_bins_soft_encode_to_one():
    bins = pretext.ab_bins()
    assert bins.shape == (261, 2) and (bins % 10 == 0).all() and len(bins.unique(dim=0)) == 261
    colours = pretext.rgb_to_lab(draw(1, 3, 50, 50).sigmoid())[0, 1:].flatten(1).T
    assert (torch.cdist(colours, bins).amin(1) <= 50**0.5 + 1e-6).all()  # each in a cell
    ab = 40 * draw(2, 2, 3, 4)
    Z = pretext.soft_encode(ab, bins)
    assert Z.shape == (2, 261, 3, 4) and close(Z.sum(1), torch.ones(2, 3, 4))
    for n, i, j in itertools.product(range(2), range(3), range(4)):
        apart = [math.dist(ab[n, :, i, j].tolist(), b) for b in bins.tolist()]
        near = sorted(range(261), key=lambda q: apart[q])[:5]
        weight = {q: math.exp(-apart[q] ** 2 / (2 * 5**2)) for q in near}
        for q in range(261):
            assert close(Z[n, q, i, j], weight.get(q, 0) / sum(weight.values()))
    exact = bins[[3, 100]].T.view(1, 2, 2, 1)
    assert pretext.soft_encode(exact, bins).argmax(1).flatten().tolist() == [3, 100]


def test_colorization_sees_lightness_and_is_asked_for_colour():
    head, x = built("colorization").head, images(4)
    (seen,), (Z,) = head.make(x)
    lab = pretext.rgb_to_lab(x)
    assert seen.shape == x.shape and close(seen, (lab[:, :1] / 100).expand_as(x), 1e-6)
    assert Z.shape == (4, 261, 8, 8)
    for i, j in ((0, 0), (3, 7)):
        mean = lab[:, 1:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((2, 3))
        code = pretext.soft_encode(mean[..., None, None], head.bins)
        assert close(Z[:, :, i, j], code[..., 0, 0], 1e-4)
    red_or_grey = torch.full((10, 3, 32, 32), 0.5)
    red_or_grey[0, 0] = 1.0
    head.measure(red_or_grey)
    often, rare = (head.make(red_or_grey[i : i + 1])[1][0][0, :, 0, 0].argmax() for i in (1, 0))
    assert head.weight[rare] > 1.5 * head.weight[often]
    head = built("colorization", "--without rebalance").head
    head.measure(red_or_grey)
    assert (head.weight == 1).all()


def test_split_brain_halves_see_nothing_of_each_other():
    for flags, leaks in (("", False), ("--without split", True)):
        net, x = built("splitbrain", flags).eval(), images(2)
        (seen,), (Z, light) = net.head.make(x)
        assert seen.shape == (2, 6, 32, 32) and light.shape == (2, 8, 8)
        seen.requires_grad_()
        for part, own in ((0, slice(0, 3)), (1, slice(3, 6))):
            (grad,) = torch.autograd.grad(net.head(net.backbone, seen)[part].square().sum(), seen)
            other = [c for c in range(6) if c not in range(6)[own]]
            assert grad[:, own].abs().max() > 0 and grad[:, other].abs().max() == 0
        channels = pretext.rgb_to_lab(x) / torch.tensor([100.0, 50, 50]).view(3, 1, 1)
        L, ab = channels[:, 0], channels[:, 1:]
        assert torch.equal(seen[:, 0], L) and torch.equal(seen[:, 4 if leaks else 3], ab[:, 0])
        assert torch.equal(seen[:, 1], ab[:, 0] if leaks else L)
        assert torch.equal(seen[:, 5], ab[:, 1] if leaks else 0 * L)
        over = 100 * F.adaptive_avg_pool2d(L, 8) - light
        assert -1e-3 < over.min() and over.max() < 1 + 1e-3  # the bin holds the lightness
    whole = pretext.resnet("resnet10", "7x7")
    half = pretext.resnet("resnet10", "7x7")
    pretext.halve(half)
    count = [sum(p.numel() for p in n.layer4.parameters() if p.ndim > 1) for n in (whole, half)]
    assert count[0] == 2 * count[1]
    loss = net.head.loss([torch.zeros_like(Z), torch.zeros(2, 100, 8, 8)], [Z, light], None)
    assert close(loss, [math.log(261) + math.log(100)], 1e-5)


# ==================================================================================================
# What is made of an image: predictive tasks
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
    def sharpness(t):
        return t.diff(dim=2).square().mean((1, 2, 3)).view(4, -1).mean(1)

    exact, cue = (sharpness(built("rotation", flags).head.make(images(20))[0][0])
                  for flags in ("", "--without exact"))
    assert (exact / exact[0] - 1).abs().max() < 0.05
    assert (cue[1:] < 0.6 * cue[0]).all() and close(cue[0], exact[0])


def test_shade_hides_where_the_light_comes_from():
    common.reseed(0)
    x = torch.full((2000, 3, 8, 8), 0.5)
    seen = pretext.shade(x, 0.3)
    lines = seen[:, 0], seen[:, 0].mT  # along the rows, along the columns
    slope = [(t[:, -1] - t[:, 0]).mean(1) / 2 for t in lines]
    for s in slope:
        assert s.min() < -0.29 and s.max() > 0.29 and s.abs().max() < 0.3 and s.mean().abs() < 0.02
    assert abs(torch.corrcoef(torch.stack(slope))[0, 1]) < 0.1
    assert close(seen.mean((1, 2, 3)), torch.full((2000,), 0.5), 1e-5)
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


@pytest.mark.parametrize("flags, least, most", [("", 4 - 2, 4 + 2), ("--without jitter", 4, 4),
                                                ("--without gap", -2, 2),
                                                ("--without gap jitter", 0, 0)])
def test_the_label_of_a_patch_belongs_to_its_offset(flags, least, most):
    head = built("patch", flags).head
    head.on = [g for g in head.on if g in ("gap", "jitter")]  # pixels stay as they are
    (t,), (y,) = head.make(places().expand(50, -1, -1, -1))
    corner = t.unflatten(0, (50, 9))[:, :, :2, 0, 0]  # (M, 9, 2) row, column

    class Corners(nn.Module):  # in place of f: a tile -> its corner
        def forward(self, t):
            return t[:, :2, 0, 0]

    head.answer = nn.Identity()
    (pairs,) = head(Corners(), t)  # (16M, 4): first and second corner
    assert len(pairs) == len(y) == 16 * 50 and sorted(set(y.tolist())) == list(range(8))
    step = {0: (-1, -1), 1: (-1, 0), 2: (-1, 1), 3: (0, -1), 4: (0, 1), 5: (1, -1), 6: (1, 0),
            7: (1, 1)}  # label -> where the second lies of the first
    gaps = []
    for pair, label in zip(pairs.tolist(), y.tolist()):
        for first, second, way in zip(pair[:2], pair[2:], step[label]):
            apart = (second - first) * way if way else 0
            assert apart > 0 or way == 0 and abs(second - first) <= 2
            gaps += [apart - 8] * (way != 0)
    assert least <= min(gaps) and max(gaps) <= most
    middle = {tuple(c) for c in corner[:, 4].tolist()}
    assert {tuple(p[:2]) for p in pairs[:400].tolist()} == middle  # from the centre, then to it
    assert {tuple(p[2:]) for p in pairs[400:].tolist()} == middle


def test_colours_are_dropped_and_tiles_standardised():
    common.reseed(0)
    x = images(900, 8)
    seen = pretext.drop_colors(x, 2 / 3)
    dropped = (seen == seen[:, :1]).flatten(1).all(1)
    assert abs(dropped.float().mean() - 2 / 3) < 0.06 and torch.equal(seen[~dropped], x[~dropped])
    copies = (seen[dropped] == x[dropped]).flatten(2).all(2).float()  # of one channel each
    assert (copies.sum(1) == 1).all() and copies.mean(0).min() > 0.25
    assert torch.equal(pretext.drop_colors(x, 0.0), x)
    t = pretext.standardise(x)
    deviation = t.std((2, 3), correction=0)
    assert t.mean((2, 3)).abs().max() < 1e-5 and (deviation - 1).abs().max() < 0.02
    assert close(pretext.standardise(0.5 * x + 0.3), t, 0.05)  # brightness and contrast are gone
    assert pretext.standardise(torch.ones(1, 3, 4, 4)).abs().max() == 0
    for task in ("patch", "jigsaw"):
        (t,), _ = built(task).head.make(images())
        assert t.mean((2, 3)).abs().max() < 1e-5 and (t == t[:, :1]).flatten(1).all(1).any()
        (t,), _ = built(task, "--without color norm").head.make(images())
        assert 0 < t.min() and t.max() < 1 and not (t == t[:, :1]).flatten(1).all(1).any()


def test_jigsaw_permutations():
    """Noroozi & Favaro, Algorithm 1, replayed over all 9!: the next one is as far from its nearest
    as any, and of those the furthest on average."""
    orders = pretext.jigsaw_permutations(30, 0)
    assert orders.shape == (30, 9) and orders.sort(1).values.equal(torch.arange(9).expand(30, 9))
    every = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.int8)
    own, total, nearest = (orders.unsqueeze(1) != orders).sum(2), 0, torch.tensor(9)
    for i in range(1, 30):
        apart = (every != orders[i - 1].to(torch.int8)).sum(1)
        total, nearest = total + apart, nearest.minimum(apart)
        assert own[i, :i].min() == nearest.max()
        assert own[i, :i].sum() == total[nearest == nearest.max()].max()
    others = ~torch.eye(30).bool()
    random = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:30]]
    random = (random.unsqueeze(1) != random).sum(2)[others]
    assert own[others].min() >= 7 > random.min() and own[others].sum() > random.sum()
    assert pretext.jigsaw_permutations(9, 0)[:, 0].unique().numel() == 9  # all 9 apart is possible
    assert pretext.jigsaw_permutations(5, 3).equal(pretext.jigsaw_permutations(5, 3))
    assert not pretext.jigsaw_permutations(5, 3).equal(pretext.jigsaw_permutations(5, 4))


def test_a_permutation_undone_gives_the_image_back():
    head, x = built("jigsaw").head, images(6)
    head.on = []  # tiles side by side, as they are
    common.reseed(0)
    (t,), (y,) = head.make(x)
    t = t.unflatten(0, (6, 9))
    middle = x[:, :, 4:28, 4:28]
    assert (y >= 0).all() and (y < 24).all() and len(y.unique()) > 1
    for m in range(6):
        undone = torch.zeros(3, 24, 24)
        for place in range(9):
            i, j = divmod(head.orders[y[m], place].item(), 3)
            undone[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = t[m, place]
        assert torch.equal(undone, middle[m])
    back = pretext.permute(t, head.orders[y].argsort(1))
    assert torch.equal(back, pretext.tiles(x, 8, 8)) and not torch.equal(t, back)
    wrong = pretext.permute(t, head.orders[y])  # the same order twice is not its inverse
    assert not torch.equal(wrong, back)


# ==================================================================================================
# Contrastive, and on to BYOL
# ==================================================================================================


def test_cpc_predicts_from_above_what_it_has_not_seen():
    for flags, below, shared in (("", (3, 4), 0), ("gap", (1, 2), 4)):
        net = built("cpc", f"--without color {flags}").eval()
        (t,), _ = net.head.make(places().expand(2, -1, -1, -1))
        assert t.shape == (98, 3, 8, 8) and net.head.below == below
        top = t.unflatten(0, (2, 7, 7))[:, :, :, 0, 0, 0]
        assert torch.equal(top[0, :, 3], 4.0 * torch.arange(7))  # half a patch further each
        assert max(0, 8 - 4 * below[0]) == shared  # rows of pixels that both have
        answer = net.head(net.backbone, t / 31)
        for k, pred, z in zip(below, answer[::2], answer[1::2]):
            assert pred.shape == z.shape == (2 * (7 - k) * 7, 64)
            own = net.head.project(net.backbone(t / 31)).unflatten(0, (2, 7, 7))
            n = 49 - 7 * k  # row r, column c of image m: its positive is k rows further down
            for m, r, c in ((0, 0, 0), (1, 7 - k - 1, 6), (1, 0, 3)):
                assert close(z[m * n + 7 * r + c], own[m, r + k, c], 1e-5)
    x = images(2)
    pixels = pretext.tiles(x, 8, 4, rows=7).flatten(0, 1).requires_grad_()
    net = built("cpc", "--without color").eval()
    pred = net.head(net.backbone, pixels)[0].unflatten(0, (2, 4, 7))  # k = 3
    for r in range(4):
        (grad,) = torch.autograd.grad(pred[0, r].square().sum(), pixels, retain_graph=True)
        seen = grad.unflatten(0, (2, 7, 7)).flatten(3).abs().sum((2, 3)) > 0
        assert seen[0].tolist() == [max(0, r - 3) <= i <= r for i in range(7)]  # none below
        assert not seen[1].any()


def test_cpc_batch_norm_leaks():
    """What one patch sees changes the features of others, unless it is layer norm."""
    for flags, leaks in (("", False), ("--without norm", True)):
        net, t = built("cpc", flags).train(), images(98, 8)
        other = t.clone()
        other[0] = 1 - other[0]
        with torch.no_grad():
            before, after = net.backbone(t), net.backbone(other)
        assert not close(before[0], after[0], 1e-3)
        assert close(before[1:], after[1:], 1e-5) != leaks


def test_cpc_chance_and_drop():
    args = options("cpc", "--batch-size 5")
    head = pretext.build(args).head
    sizes = 2 * 5 * 7 * 4, 2 * 5 * 7 * 3
    answer = [torch.zeros(n, 64) for n in sizes for _ in range(2)]
    loss, hits = head.loss(answer, [], nn.Identity())
    assert close(loss, head.chance["loss"], 1e-5)
    assert close(head.chance["loss"], (math.log(sizes[0]) + math.log(sizes[1])) / 2)
    assert close(hits, head.chance["accuracy"], 1e-6)
    (t,), _ = head.make(images(20))
    dropped = (t == t[:, :1]).flatten(1).all(1).float().mean()
    assert abs(dropped - 0.8) < 0.06


def test_view_cannot_collapse():
    x = images(16)
    net = built("view")
    before = [p.clone() for p in net.head.target.parameters()]
    seen, _ = net.head.make(x)
    p1, p2, z1, z2 = net(*seen, ask=True)
    assert torch.equal(torch.cat(seen), x) and not z1.requires_grad and p1.requires_grad
    assert p1.shape == z2.shape == (8, 128)
    constant = draw(1, 128, dtype=torch.float32).expand(8, 128)
    loss = net.head.loss([constant, constant, z1, z2], [], None)
    assert close(loss, [2.0], 0.05) and z1.std(0).mean() > 0.5  # targets differ: no way out
    swapped = net.head.loss([z2, z1, z1, z2], [], None)  # each view predicts the other one
    assert close(swapped, [0.0], 1e-6) and net.head.loss([z1, z2, z1, z2], [], None) > 0.1
    net.head.loss([p1, p2, z1, z2], [], None).backward()
    assert all(p.grad is None for p in net.head.target.parameters())
    assert net.backbone.conv1.weight.grad.abs().max() > 0
    assert same(before, list(net.head.target.parameters()))
    net = built("view", "--without fixed")
    p1, p2, z1, z2 = net(*seen, ask=True)
    assert z1 is p1 and z2 is p2
    assert close(net.head.loss([constant] * 4, [], None), [0.0], 1e-6)  # the collapse is perfect


# ==================================================================================================
# Every task
# ==================================================================================================


@each_task
def test_model(task, tmp_path):
    """h, z, the answers and what they cost; backbone.pt as the printed lines load it."""
    args = options(task, "--batch-size 3", size=24)
    net, x = pretext.build(args), images(6, 24)
    assert same(net.state_dict(), pretext.build(args).state_dict())
    h, z = net(x)
    assert h.shape == (6, 512) and z.shape == (6, {"cpc": 64, "view": 128}.get(task, 512))
    assert torch.equal(h, z) != (task in ("cpc", "view"))
    net.head.measure(x)
    seen, asked = net.head.make(x)
    terms = net.head.loss(net(*seen, ask=True), asked, nn.Identity())
    assert len(terms) == len(net.head.chance) and [*net.head.chance][0] == "loss"
    terms[0].backward()
    assert terms.isfinite().all() and net.backbone.conv1.weight.grad.abs().max() > 0
    net.eval()
    with torch.no_grad():
        columns = net.head.show(net.backbone, x)
        assert all(c.ndim == 4 and c.shape[1] == 3 and c.isfinite().all() for c in columns)
        torch.save({"state_dict": net.backbone.state_dict()}, tmp_path / "backbone.pt")
        text = pretext.loading(args, tmp_path / "backbone.pt")
        exec(text, names := {})
        assert close(names["net"].eval()(net.head.see(x)), net(x)[0], 1e-5)
        changed = not torch.equal(net.head.see(x), x) if net.head.see(x).shape == x.shape else True
        assert ("its input is" in text) == changed


@each_task
def test_a_run(task, tmp_path, monkeypatch):
    lighten(monkeypatch, pretext)
    results, _ = quiet(pretext, [*SHORT, "--task", task, "--out", tmp_path / "run"])
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1 and '"skipped": 0' in rows[0]
    assert results["task"] == task and results["verdict"]
    assert (tmp_path / "run" / "views.png").stat().st_size > 1000
    again, _ = quiet(pretext, [*SHORT, "--task", task, "--out", tmp_path / "again", "--eval",
                               tmp_path / "run" / "last.pt"])
    assert again["knn_top1"] == results["knn_top1"] and again["verdict"] == results["verdict"]


@pytest.mark.parametrize("task", ["jigsaw", "inpainting", "colorization"])
def test_draws_of_the_task_are_resumed(task, tmp_path, monkeypatch):
    lighten(monkeypatch, pretext, report=False)
    argv = [*TINY, "--task", task, "--epochs", "2", "--eval-every", "0", "--out"]
    quiet(pretext, [*argv, tmp_path / "whole"])
    agreed, steps = common.Stop.agreed, []

    def stop_after_four(stop, device):
        steps.append(0)
        stop.signal = 15 * (len(steps) == 4)
        return agreed(stop, device)

    with monkeypatch.context() as patch:
        patch.setattr(common.Stop, "agreed", stop_after_four)
        with pytest.raises(SystemExit):
            quiet(pretext, [*argv, tmp_path / "parts"])
    quiet(pretext, [*argv, tmp_path / "parts", "--resume"])
    whole, parts = (torch.load(tmp_path / k / "last.pt", weights_only=True)["state"]
                    for k in ("whole", "parts"))
    assert same(whole, parts)


def test_algorithm(tmp_path, monkeypatch):
    """RotNet's step, typed in: all four turns of every view, plain SGD with momentum 0.9."""

    def by_hand(net, views, mistake=None):
        weights = [*net.backbone.parameters(), *net.head.parameters()]
        v = [torch.zeros_like(w) for w in weights]
        for k, x in enumerate(views):
            total = 0.0
            turned = [torch.rot90(x, r, (2, 3)) for r in range(4)]
            if mistake == "one turn of each":
                turned = turned[1:2]
            h = net.backbone(torch.cat(turned))
            logits = net.head.answer(h)
            for i in range(len(logits)):
                r = i % 4 if mistake == "labels by image" else i // len(x)
                total = total - logits[i].log_softmax(0)[r] / len(logits)
            eta = 2 * 16 / 256 * (1 + math.cos(math.pi * k / len(views))) / 2
            for j, (w, g) in enumerate(zip(weights, torch.autograd.grad(total, weights))):
                v[j] = 0.9 * v[j] + g + 0.01 * w.data
                w.data = w.data - eta * v[j]
        return net

    seen, augment = [], pretext.augment
    argv = [*SHORT, *"--optimizer sgd --lr 2 --weight-decay 0.01 --warmup 0 --out".split(),
            tmp_path / "run"]
    with monkeypatch.context() as patch:
        lighten(patch, pretext, report=False)
        patch.setattr(pretext, "augment", lambda *a: seen.append(augment(*a)) or seen[-1])
        quiet(pretext, argv)
        args = pretext.options([str(a) for a in argv])
        pretext.complete(args, None, 48)
        nets = {m: pretext.build(args) for m in (None, "one turn of each", "labels by image")}
    views = [torch.cat(v) for v in seen if len(v[0]) == 16]
    assert len(views) == 3 and len(views[0]) == 32
    ours = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["net"]
    for mistake, net in nets.items():
        theirs = by_hand(net, views, mistake).state_dict()
        agree = all(close(theirs[k], ours[k], 1e-5) for k in ours if "num_batches" not in k)
        assert agree == (mistake is None), mistake


def test_a_still_network_is_pictured_as_it_is(tmp_path, monkeypatch):
    """views.png is drawn before each epoch and after the last, and leaves the network alone."""
    lighten(monkeypatch, pretext, report=False)
    drawn = []
    monkeypatch.setattr(common, "picture", lambda path, columns: drawn.append(columns))
    quiet(pretext, [*TINY, "--task", "denoising", "--epochs", "2", "--eval-every", "0", "--out",
                    tmp_path / "run"])
    assert len(drawn) == 3 and all(len(c) == 8 for columns in drawn for c in columns)
    x, seen, answers = zip(*drawn)
    assert same(x[0], x[2]) and same(seen[0], seen[2])
    assert not close(answers[0], answers[1], 1e-4) and not close(answers[1], answers[2], 1e-4)


def test_augmentation(monkeypatch):
    args = options("view")
    assert pretext.crops(args) == [common.Crop(32, (0.5, 1.0), (3 / 4, 4 / 3), 2)]
    done = []
    for name in ("flip", "color_jitter", "grey"):
        monkeypatch.setattr(common, name, lambda x, *numbers, name=name, **named: done.append(
            (name, *numbers, *named.values())) or x)
    pretext.augment([images(2)], args)
    assert done == [("flip", 0.5), ("color_jitter", 0.4, 0.4, 0.2, 0.1, 0.8), ("grey", 0.2)]
    done.clear()
    x = images(2)
    assert torch.equal(*pretext.augment([x], options("patch")), x) and done == [("flip", 0.5)]
    assert not torch.equal(*pretext.augment([x], options("rotation")), x)  # shade
    assert torch.equal(*pretext.augment([x], options("rotation", "--shade 0")), x)


@pytest.mark.parametrize("argv, names", [
    ("--task maze", "--task"), ("--without gap", "rotation has exact"),
    ("--task patch --without gap fixed", "without fixed"), ("--without", "--without"),
    ("--permutations 1", "--permutations"), ("--shade 2", "--shade"), ("--optimizer lars", "lars"),
])
def test_wrong_options(argv, names, tmp_path, capsys):
    assert names in refused(pretext, [*SHORT, "--out", tmp_path / "run", *argv.split()], capsys)
    assert not (tmp_path / "run").exists()


def test_another_task_is_not_resumed_or_loaded(tmp_path, monkeypatch, capsys):
    lighten(monkeypatch, pretext, report=False)
    quiet(pretext, [*SHORT, "--out", tmp_path / "run"])
    argv = [*SHORT, "--task", "patch", "--out", tmp_path / "other"]
    assert "another network" in refused(
        pretext, [*argv, "--init", tmp_path / "run" / "last.pt"], capsys)
    _, said = quiet(pretext, [*argv, "--init", tmp_path / "run" / "backbone.pt"])
    assert "the head stays random" in said
    (tmp_path / "run" / "results.json").unlink()
    assert "task" in refused(pretext, [*argv[:-1], tmp_path / "run", "--resume"], capsys)


def test_verdict():
    shape = (1000, 512)

    def said(task, spread, rank):
        return pretext.verdict({"spread": spread, "rank_z": rank}, shape, options(task), None)

    for task, name in (("rotation", "h"), ("view", "z")):
        assert said(task, 0.5, 100).startswith("healthy") and f" {name} has" in said(task, 0.5, 100)
        assert said(task, 0.5, 10).startswith("dimensional collapse")
        assert said(task, 0.01, 100).startswith("collapsed to a point")
    assert said("rotation", 0.07, 100).startswith("healthy")
    assert said("view", 0.07, 100).startswith("collapsed to a point")
    z, pred = draw(6, 3), draw(6, 3, seed=1)  # and this is why it may be small for cpc
    assert close(pretext.cpc_loss(pred, z), pretext.cpc_loss(pred, z + 100))
    assert " z has" in said("cpc", 0.07, 100) and said("cpc", 0.07, 100).startswith("healthy")
