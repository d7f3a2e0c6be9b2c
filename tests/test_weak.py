"""Weak labels against the equations of their papers, and what each task tells its networks."""

import contextlib
import copy
import csv
import io
import itertools
import math
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tools import TINY, close, completed, draw, fails, quiet, refused, same, train

import common
import weak

SHORT = [*TINY, *"--epochs 1 --eval-every 0 --limit 60".split()]
RUN = SimpleNamespace(device=torch.device("cpu"), world=1)


def mix(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(n, classes, accuracies, coverage, seed=0):
    """Votes (n, m) of independent sources with these accuracies, and the labels (n,)."""
    g = mix(seed)
    y = torch.randint(classes, (n,), generator=g)
    votes = []
    for accuracy in accuracies:
        wrong = (y + torch.randint(1, classes, (n,), generator=g)) % classes
        vote = torch.where(torch.rand(n, generator=g) < accuracy, y, wrong)
        votes.append(torch.where(torch.rand(n, generator=g) < coverage, vote, -1))
    return torch.stack(votes, 1), y


# ==================================================================================================
# Labelling: the label model
# ==================================================================================================


def by_hand(votes, P, mistake=None):
    """P(y | votes) of one image: all products, typed in."""
    joint = []
    for y in range(P.shape[1]):
        p = 1.0
        for i, vote in enumerate(votes):
            if mistake == "0 is taken for abstain" and vote == 0:
                vote = -1
            if mistake == "abstaining says nothing" and vote == -1:
                continue
            p *= float(P[i, y, 1 + vote])
        joint.append(p)
    return torch.tensor(joint, dtype=torch.double) / sum(joint)


def test_posterior_equation():
    """Over all patterns of votes: the posterior, and that the patterns' probabilities add up to 1;
    the table of Ratner's model, whose coverage does not matter."""
    m, C, alpha = 3, 3, [0.9, 0.6, 0.45]

    def ratner(beta):
        P = torch.empty(m, C, 1 + C, dtype=torch.double)
        for i, y, v in itertools.product(range(m), range(C), range(C)):
            P[i, y, 0] = 1 - beta
            P[i, y, 1 + v] = beta * (alpha[i] if v == y else (1 - alpha[i]) / (C - 1))
        return P

    made = weak.answers(torch.tensor(alpha, dtype=torch.double), C)
    assert close(made, ratner(0.5))
    patterns = torch.tensor([*itertools.product(range(-1, C), repeat=m)])
    free = draw(m, C, C + 1).softmax(2)
    for P, truth, mistakes in (
            (made, ratner(0.2), ["0 is taken for abstain"]),
            (free, free, ["0 is taken for abstain", "abstaining says nothing"])):
        by_pattern = torch.stack([by_hand(row.tolist(), truth) for row in patterns])
        assert close(weak.posterior(patterns, P), by_pattern)
        total = sum(math.prod(float(P[i, y, 1 + v]) for i, v in enumerate(row.tolist())) / C
                    for row in patterns for y in range(C))
        assert close(total, 1)
        for mistake in mistakes:
            other = torch.stack([by_hand(row.tolist(), truth, mistake) for row in patterns])
            assert not close(weak.posterior(patterns, P), other, 0.1), mistake


def test_majority():
    votes = torch.tensor([[0, 0, 2], [1, -1, 2], [-1, -1, -1], [2, -1, -1]])
    shares = [[1, 0, 0], [0, 0.5, 0.5], [1 / 3] * 3, [0, 0, 1]]
    assert close(weak.majority(votes, 3), shares)


@pytest.mark.parametrize("method, classes, bound", [
    ("em", 4, 0.02), ("em", 2, 0.02), ("triplets", 2, 0.02),
    ("by-class", 2, 0.07)])  # which is held near the majority
def test_planted_accuracies(method, classes, bound, monkeypatch):
    """Recovered, and the posterior is as certain as it is right; EM from the opposite finds the
    mirrored solution, which is as likely."""
    truth = torch.tensor([0.9, 0.8, 0.7, 0.65, 0.6])
    votes, y = planted(80000, classes, truth.tolist(), 0.8)
    accuracies, q = weak.label_model(votes, classes, method, steps=40)
    assert close(accuracies, truth, bound) and close(q.sum(1), torch.ones(len(q)))
    certainty, label = q.max(1)
    assert abs((label == y).double().mean() - certainty.mean()) < bound
    assert (label == y).double().mean() > weak.majority(votes, classes)[
        torch.arange(len(y)), y].mean()
    if classes == 2 and method == "em":
        votes_of = weak.majority
        monkeypatch.setattr(weak, "majority", lambda *given: votes_of(*given).flip(1))
        mirrored, other = weak.label_model(votes, classes, method, steps=40)
        assert close(mirrored, 1 - accuracies, 1e-3) and close(other, q.flip(1), 1e-3)
        assert not close(mirrored, truth, 0.1)


def likelihood(votes, accuracies, C):
    """log P(votes) of Ratner's model, but for the coverage."""
    total = 0.0
    for row in votes.tolist():
        joint = [math.prod(float(a) if v == y else float(1 - a) / (C - 1)
                           for a, v in zip(accuracies, row) if v >= 0) for y in range(C)]
        total += math.log(sum(joint) / C)
    return total


def climbs(path):
    return all(b >= a - 1e-9 for a, b in zip(path, path[1:])) and path[-1] > path[0] + 0.1


def test_em_never_loses_likelihood():
    C = 3
    votes, _ = planted(200, C, [0.9, 0.7, 0.5, 0.45], 0.6)
    path = [weak.label_model(votes, C, "em", steps)[0] for steps in range(1, 9)]
    assert climbs([likelihood(votes, accuracies, C) for accuracies in path])

    def mistaken(step):
        """EM with something wrong in it."""
        q, path = weak.majority(votes, C), []
        for _ in range(8):
            agreed = torch.stack([(q * F.one_hot(votes + 1, C + 1)[:, i, 1:]).sum()
                                  for i in range(votes.shape[1])])
            accuracies = step(agreed, (votes >= 0).sum(0))
            q = weak.posterior(votes, weak.answers(accuracies, C))
            path.append(likelihood(votes, accuracies, C))
        return path

    assert climbs(mistaken(lambda agreed, count: agreed / count))
    assert not climbs(mistaken(lambda agreed, count: agreed / len(votes)))  # of all images
    assert not climbs(mistaken(lambda agreed, count: 1 - agreed / count))


def test_triplets():
    """Exactly, where the votes are exactly independent: every pattern as often as it is likely."""
    right = [(3, 4), (7, 8), (5, 8), (1, 4)]  # the last one is wrong more often than right
    votes = []
    for pattern in itertools.product((True, False), repeat=len(right)):
        times = math.prod(a if good else b - a for good, (a, b) in zip(pattern, right))
        for y in (0, 1):
            votes += times * [[y if good else 1 - y for good in pattern]]
    votes, truth = torch.tensor(votes), torch.tensor([a / b for a, b in right])
    found = weak.triplets(votes)
    assert close(found, truth, 1e-6)
    mirrored = 0.5 + (found - 0.5).abs()  # always the positive root
    assert not close(mirrored, truth, 0.3)
    votes = torch.cat([votes, torch.full_like(votes, -1)])  # images nobody votes on
    assert close(weak.triplets(votes), truth, 1e-6)


def test_when_the_label_model_helps():
    """Better than the majority where accuracies differ, the same where they do not, and worse where
    a poor source is counted five times."""
    def right(votes, y, C=2):
        labels = weak.label_model(votes, C)[1], weak.majority(votes, C)
        return [label[torch.arange(len(y)), y].round().mean() for label in labels]

    model, majority = right(*planted(4000, 2, [0.95, 0.6, 0.6, 0.6, 0.6], 1.0))
    assert model > majority + 0.05
    model, majority = right(*planted(4000, 2, [0.7] * 5, 1.0))
    assert abs(model - majority) < 0.005
    votes, y = planted(4000, 2, [0.6] + [0.75] * 10, 1.0)
    before, _ = right(votes, y)
    copied = torch.cat([votes[:, :1].expand(-1, 5), votes], 1)
    after, majority = right(copied, y)
    assert after < majority - 0.05 < before


def test_rules_that_vote_for_one_class():
    """Whether such a rule abstains depends on the class, which Ratner's model leaves out."""
    g, C = mix(), 4
    y = torch.randint(C, (4000,), generator=g)
    votes = []
    for source in range(8):
        c = source % C
        chance = torch.where(y == c, 0.8, 0.3 if source < C else 0.1)
        votes.append(torch.where(torch.rand(len(y), generator=g) < chance, c, -1))
    votes = torch.stack(votes, 1)
    by_class, em = (weak.label_model(votes, C, method)[1] for method in ("by-class", "em"))
    share = weak.majority(votes, C)[torch.arange(len(y)), y].mean()
    assert (by_class.argmax(1) == y).double().mean() > share + 0.02
    assert (by_class.argmax(1) == y).double().mean() > (em.argmax(1) == y).double().mean()


# ==================================================================================================
# Labelling: rules and files
# ==================================================================================================


def picture(rows, cols, size=32):
    """A bright box on a grey ground."""
    x = torch.full((1, 3, size, size), 0.5)
    x[:, :, rows, cols] = 0.9
    return x


def test_measures():
    """Moments typed in; they do not change with place, size and lightness."""
    x = picture(slice(4, 10), slice(8, 26))
    x[:, :, 10:16, 8:12] = 0.9  # an L that hangs at the left
    found = {k: v.item() for k, v in weak.measures(x).items()}
    smooth = F.avg_pool2d(common.to_grey(x), 3, 1, 1)[0, 0]
    pixels = [(r, c) for r in range(32) for c in range(32) if smooth[r, c] > 0.6]
    r, c = np.array(pixels, float).T
    r, c = r - r.mean(), c - c.mean()
    height, width = np.sqrt((r**2).mean()), np.sqrt((c**2).mean())
    r, c = r / height, c / width
    truth = {"tall": height / width, "hangs": (r**3).mean(), "widens": (c**2 * r).mean(),
             "sides": (c**4).mean()}
    assert {k: found[k] for k in truth} == pytest.approx(truth, abs=1e-4)
    moved = weak.measures(x.roll((5, 3), (2, 3)) * 0.9 + 0.02)
    assert {k: v.item() for k, v in moved.items()} == pytest.approx(found, abs=1e-3)
    assert found.keys() == {row.split()[0] for row in weak.RULES.strip().splitlines()}


def test_stripes():
    """Texture: upright is positive, lying negative."""
    line = 0.1 * (torch.arange(32.0) * 1.2).sin()
    box = picture(slice(6, 26), slice(6, 26))
    upright, lying = box + line * (box > 0.8), box + line.view(-1, 1) * (box > 0.8)
    found = weak.measures(torch.cat([upright, lying]))["stripes"].flatten()
    assert found[0] > 0.4 and close(found[0], -found[1], 1e-3)


def test_rules(monkeypatch):
    """A rule votes from its lower bound, included, to its upper one, and abstains at -."""
    monkeypatch.setattr(common, "THINGS", dict.fromkeys(["ship", "mast"]))
    monkeypatch.setattr(weak, "RULES", "\n  tall ship 0.5 - 2.0 mast\n  sides mast\n")
    values = {"tall": torch.tensor([0.4, 0.5, 1.9, 2.0]).view(4, 1, 1, 1),
              "sides": torch.zeros(4, 1, 1, 1)}
    monkeypatch.setattr(weak, "measures", lambda x: values)
    assert weak.rules(None).tolist() == [[0, 1], [-1, 1], [-1, 1], [1, 1]]


def test_rules_on_the_built_in_set():
    """Every source does better than chance where it votes, some much better than others, and the
    label model is better than the majority."""
    made, y, *_ = common.toys(600, 32, 3)
    votes = weak.rules(made / 255)
    right = [(votes[v >= 0, i] == y[v >= 0]).double().mean() for i, v in enumerate(votes.T)]
    assert min(right) > 0.2 and max(right) > min(right) + 0.2
    voted = (votes >= 0).any(1)
    model, majority = (
        (q.argmax(1) == y)[voted].double().mean()
        for q in (weak.label_model(votes, 10, "by-class")[1], weak.majority(votes, 10)))
    assert 0.6 < majority < model - 0.05


def test_read_votes(tmp_path, capsys):
    path = tmp_path / "votes.csv"
    path.write_text("0,0,-1\n1,2,1\n2,-1,-1\n")
    assert weak.read_votes(path, range(3)).tolist() == [[0, -1], [2, 1], [-1, -1]]
    words = fails(lambda: weak.read_votes(path, ["3", "0", "./2", "a/b"]), capsys)
    assert "no line for 2 of 4 training images" in words and os.path.abspath("a/b") in words
    assert f"it has lines for {os.path.abspath('0')}, " in words
    path.write_text("0,,1\n")
    assert weak.read_votes(path, range(1)).tolist() == [[-1, 1]]
    for text in ("0,x\n1,1\n", "0,0,1\n1,2\n", "0,0.5\n1,1\n"):
        path.write_text(text)
        assert "cannot be read" in fails(lambda: weak.read_votes(path, range(2)), capsys), text
    for text in ("0,-2\n", "0,1000\n", "0\n"):
        path.write_text(text)
        assert "from 0 to 999" in fails(lambda: weak.read_votes(path, range(1)), capsys), text
    assert "cannot be read" in fails(lambda: weak.read_votes(tmp_path / "none.csv", [1]), capsys)


# ==================================================================================================
# Bags
# ==================================================================================================


def bag_of(d=4, k=5, lengths=(5, 2, 1)):
    """h (bags, k, d), mask (bags, k), V, w, U."""
    mask = torch.arange(k) < torch.tensor(lengths).unsqueeze(1)
    return draw(len(lengths), k, d), mask, draw(3, d, seed=1), draw(3, seed=2), draw(3, d, seed=3)


def test_attention_pool_equation():
    """z = sum a_k h_k over the images that are there, and the usual mistakes."""
    def variant(h, mask, V, w, U=None, mistake=None):
        z, weights = [], []
        for bag, there in zip(h, mask):
            e = []
            for h_k in bag:
                u = torch.tanh(V @ h_k)
                e.append(w @ (u if U is None else u * torch.sigmoid(U @ h_k)))
            e = torch.stack(e).exp()
            if mistake != "softmax over padding":
                e = torch.where(there, e, 0)
            a = e / e.sum()
            if mistake == "padding is left out afterwards":
                a = torch.where(there, (e.exp() / e.exp().sum()), 0)
            z.append(sum(a_k * h_k for a_k, h_k in zip(a, bag)))
            weights.append(a)
        return torch.stack(z), torch.stack(weights)

    h, mask, V, w, U = bag_of()
    for gate in (None, U):
        found, truth = weak.attention_pool(h, mask, V, w, gate), variant(h, mask, V, w, gate)
        assert all(map(close, found, truth)) and close(found[1].sum(1), torch.ones(3))
        for mistake in ("softmax over padding", "padding is left out afterwards"):
            assert not close(found[0], variant(h, mask, V, w, gate, mistake)[0], 1e-3), mistake
    assert torch.autograd.gradcheck(
        lambda h, V, w, U: weak.attention_pool(h, mask, V, w, U),
        [t.requires_grad_() for t in (h, V, w, U)])


@pytest.mark.parametrize("pool", ["attention", "gated", *weak.POOLS])
def test_order_and_padding_of_a_bag_do_not_matter(pool):
    torch.manual_seed(0)
    bag = weak.Bag(4, pool).double()
    h, mask, *_ = bag_of()
    out = bag(h[mask], mask)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = bag(h[:, order][mask[:, order]], mask[:, order])
    assert close(shuffled[:, 0], out[:, 0])
    assert close(shuffled[:, 1:][mask[:, order]], out[:, 1:][:, order][mask[:, order]])
    more = bag(h[mask], F.pad(mask, (0, 3)))
    assert close(more[:, 0], out[:, 0]) and close(more[:, 1:6][mask], out[:, 1:][mask])
    if pool not in weak.POOLS:  # what stands in the places without an image does not matter
        filled = torch.where(mask.unsqueeze(2), h, 1e3)
        z = [weak.attention_pool(t, mask, bag.V, bag.w[0], bag.U)[0] for t in (h, filled)]
        assert close(*z)
        pad = weak.attention_pool(h, mask, bag.V, bag.w[0], bag.U)[1][~mask]
        assert (pad == 0).all() and (bag.U is not None) == (pool == "gated")


def test_pools():
    """Maximum, mean and noisy-or of the images that are there; the last one also where a plain
    formula overflows."""
    s, (_, mask, *_) = draw(3, 5), bag_of()
    for i in range(3):
        row = s[i][mask[i]]
        truth = {"max": row.max(), "mean": row.mean(),
                 "noisy-or": torch.logit(1 - (1 - row.sigmoid()).prod())}
        for name, value in truth.items():
            assert close(weak.POOLS[name](s, mask)[i], value), name
    assert close(weak.noisy_or(torch.full((1, 4), 300.0), torch.ones(1, 4).bool()), [1200], 1e-3)
    assert weak.noisy_or(s.float(), mask).isfinite().all()
    assert not close(weak.noisy_or(s, torch.ones_like(mask)), weak.noisy_or(s, mask), 0.1)


def test_bag_loss_equation():
    """The mean over what is there, for bags in one column and for images in rows with padding."""
    s, y = draw(2, 3).requires_grad_(), torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()

    def variant(mistake=None):
        total = 0.0
        for i, j in itertools.product(range(2), range(3)):
            p = 1 / (1 + math.exp(-s[i, j].item()))
            p = p if y[i, j] else 1 - p
            total -= math.log(p) * (1 if mistake == "padding is there" else mask[i, j].item())
        return total / (6 if mistake else 5)

    assert close(weak.bag_loss(s, y, mask), variant())
    for mistake in ("padding is there", "divided by all places"):
        assert abs(weak.bag_loss(s, y, mask).item() - variant(mistake)) > 1e-2, mistake
    assert not close(weak.bag_loss(s, ~y, mask), variant(), 1e-2)
    assert torch.autograd.gradcheck(lambda s: weak.bag_loss(s, y, mask), [s])


def test_cut_bags():
    """Every image is in one bag, bags have size / 2 to size images, the last one what is left."""
    index = torch.arange(100, 197)
    bags = weak.cut_bags(index, 10, 3)
    there = bags >= 0
    assert torch.equal(bags[there].sort().values, index)
    lengths = there.sum(1)
    assert lengths[:-1].min() == 5 and lengths.max() == 10 and lengths[:-1].unique().numel() > 3
    assert (there == (torch.arange(bags.shape[1]) < lengths.unsqueeze(1))).all()
    assert not torch.equal(bags[0], weak.cut_bags(index, 10, 4)[0])
    assert torch.equal(bags, weak.cut_bags(index, 10, 3))


def test_auc():
    """Pairs of one row alone, without padding."""
    s, y = draw(5, 6), torch.arange(30).view(5, 6) % 3 == 0
    mask = torch.arange(6) < torch.tensor([6, 5, 4, 3, 2]).unsqueeze(1)
    pairs = [float(s[r, i] > s[r, j]) for r in range(5) for i in range(6) for j in range(6)
             if y[r, i] and not y[r, j] and mask[r, i] and mask[r, j]]
    assert 5 < len(pairs) and close(weak.auc(s, y, mask), 100 * np.mean(pairs))
    assert weak.auc(y.double(), y, mask) == 100 and weak.auc(-y.double(), y, mask) == 0
    apart = y + 10.0 * torch.arange(5).view(5, 1)  # attention is not compared between bags
    assert weak.auc(apart, y, mask) == 100


# ==================================================================================================
# Noisy labels
# ==================================================================================================


def test_keep_rate():
    """R(T) = 1 - min(T tau / T_k, tau)."""
    assert [weak.keep_rate(T, 0.4, 5) for T in range(8)] == pytest.approx(
        [1, 0.92, 0.84, 0.76, 0.68, 0.6, 0.6, 0.6], abs=1e-12)
    assert weak.keep_rate(0, 0.5, 10) == 1 and weak.keep_rate(10, 0.5, 10) == 0.5


def test_transition():
    """Exactly the matrices of the paper's two kinds of noise."""
    pair = [[0.55, 0.45, 0, 0, 0], [0, 0.55, 0.45, 0, 0], [0, 0, 0.55, 0.45, 0],
            [0, 0, 0, 0.55, 0.45], [0.45, 0, 0, 0, 0.55]]
    symmetric = torch.full((5, 5), 0.125).fill_diagonal_(0.5)
    assert close(weak.transition("pair", 0.45, 5), pair, 1e-12)
    assert close(weak.transition("symmetric", 0.5, 5), symmetric, 1e-12)
    uniform = torch.full((5, 5), 0.1) + 0.5 * torch.eye(5)  # also over the class itself
    assert not close(weak.transition("symmetric", 0.5, 5), uniform, 0.01)


def algorithm_1(x, y, f, g, keep, lr, mistake=None):
    """A step of co-teaching, typed in: both networks, weights and all -> new weights."""
    def losses(w):
        return [-math.log(math.exp(row[c]) / sum(math.exp(v) for v in row))
                for row, c in zip((x @ w).tolist(), y.tolist())]

    def smallest(values):
        count = math.ceil(round(keep * len(values), 9))
        count = int(keep * len(values)) if mistake == "rounded down" else count
        order = sorted(range(len(values)), key=values.__getitem__)
        return order[-count:] if mistake == "the largest" else order[:count]

    def step(w, kept):
        w = w.clone().requires_grad_()
        loss = sum(-(x[i] @ w).log_softmax(0)[y[i]] for i in kept) / len(kept)
        loss = loss / len(kept) if mistake == "divided twice" else loss
        loss.backward()
        return (w - lr * w.grad).detach()

    by_f, by_g = smallest(losses(f)), smallest(losses(g))
    if mistake == "for oneself":
        by_f, by_g = by_g, by_f
    return step(f, by_g), step(g, by_f)


def test_coteaching_is_algorithm_1():
    x, y, keep, lr = draw(9, 4), torch.arange(9) % 3, 0.7, 0.5  # 6.3 images: 7
    f, g = draw(4, 3, seed=1), draw(4, 3, seed=2)

    def ours():
        weights = [w.clone().requires_grad_() for w in (f, g)]
        losses = [F.cross_entropy(x @ w, y, reduction="none") for w in weights]
        of_f, of_g = weak.coteaching_losses(*losses, keep)
        alone = torch.autograd.grad(of_f, weights, retain_graph=True, allow_unused=True)
        assert alone[0] is not None and alone[1] is None
        (of_f + of_g).backward()
        return [(w - lr * w.grad).detach() for w in weights]

    assert all(map(close, ours(), algorithm_1(x, y, f, g, keep, lr)))
    for mistake in ("for oneself", "divided twice", "rounded down", "the largest"):
        other = algorithm_1(x, y, f, g, keep, lr, mistake)
        assert not any(map(lambda a, b: close(a, b, 1e-4), ours(), other)), mistake
    for n, keep, count in ((20, 0.55, 11), (20, 1 - 0.45, 11), (7, 0.5, 4), (64, 0.8, 52),
                           (7, 0, 1)):
        assert len(weak.small_loss(draw(n), keep)) == count


# ==================================================================================================
# Few labels
# ==================================================================================================


def test_noise_aware_loss_equation():
    s, q = draw(5, 4).requires_grad_(), draw(5, 4, seed=1).softmax(1)
    total = 0.0
    for i in range(5):
        p = np.exp(s[i].detach().numpy())
        total -= sum(q[i, y].item() * math.log(p[y] / p.sum()) for y in range(4))
    assert close(weak.noise_aware_loss(s, q), total / 5)
    hard = F.cross_entropy(s, q.argmax(1))  # labels taken as certain
    assert abs(hard - total / 5) > 0.01
    assert torch.autograd.gradcheck(lambda s: weak.noise_aware_loss(s, q), [s])
    assert weak.noise_aware_loss(s, torch.zeros_like(q)) == 0  # unknown labels


def test_fixmatch_equation():
    """The mean over all images, and no gradient to the weak view."""
    a, b, threshold = 3 * draw(40, 4), draw(40, 4, seed=1), 0.8

    def variant(weak_logits, strong_logits, mistake=None):
        total, accepted = 0.0, 0
        for q, p in zip(weak_logits, strong_logits):
            q, p = q.exp() / q.exp().sum(), p.exp() / p.exp().sum()
            label = int(q.argmax())
            if mistake == "soft targets":
                total = total - (q * p.log()).sum() * (q.max() >= threshold)
            elif q.max() >= threshold:
                total = total - (q if mistake == "of the weak view" else p)[label].log()
            accepted += int(q.max() >= threshold)
        return total / (accepted if mistake == "mean of the accepted" else 40)

    def gradients(f):
        views = [t.clone().requires_grad_() for t in (a, b)]
        loss = f(*views)
        return loss.detach(), *torch.autograd.grad(loss, views, allow_unused=True)

    loss, to_weak, to_strong = gradients(lambda *v: weak.fixmatch_loss(*v, threshold))
    truth, _, gradient = gradients(variant)
    assert 8 < sum(float(q.softmax(0).max()) >= threshold for q in a) < 32
    assert close(loss, truth) and close(to_strong, gradient)
    assert to_weak is None or (to_weak == 0).all()
    for mistake in ("mean of the accepted", "soft targets", "of the weak view"):
        other, moved, _ = gradients(lambda *v: variant(*v, mistake))  # noqa: B023
        assert abs(other - truth) > 1e-3, mistake
        if mistake == "soft targets":  # the gradient through the target
            assert moved.abs().max() > 1e-3
    assert close(weak.fixmatch_loss(b, b, 0.0), F.cross_entropy(b, b.argmax(1)))  # Lee 2013
    assert weak.fixmatch_loss(a, b, 1.01) == 0
    assert weak.fixmatch_loss(torch.zeros(4, 2), draw(4, 2), 0.5) > 0  # certainty 0.5 is enough


def few(flags="", n=40, classes=4):
    """args, data and the task pseudo on n images with labels 0, 1, 2, 3, 0, ..."""
    args = completed(weak, ["--task", "pseudo", *flags.split()])
    args.classes = classes
    labels = torch.arange(n) % classes
    train = SimpleNamespace(labels=labels)
    data = SimpleNamespace(fit=(train, torch.arange(n)), train=train, per_epoch=4)
    return args, data, weak.pseudo(args, data, RUN)


def test_views(monkeypatch):
    """One crop of an image, for noisy all of it; for pseudo a weak and a strong one, of which the
    strong one alone has its colours changed."""
    for task, scales in (("labeling", [(0.5, 1.0)]), ("noisy", [1.0]),
                         ("pseudo", [(0.75, 1.0), (0.5, 1.0)])):
        args = completed(weak, ["--task", task, "--strength", 0.5])
        assert [crop.scale for crop in weak.crops(args)] == scales, task
        x = torch.rand(1, 3, 8, 8, generator=mix()).expand(64, -1, -1, -1)
        torch.manual_seed(0)
        kinds = [len(view.unique(dim=0)) for view in weak.augment([x] * len(scales), args)]
        assert kinds[0] == 2 and all(kind > 30 for kind in kinds[1:]), task
    assert all(crop.ratio == (3 / 4, 4 / 3) for crop in weak.crops(args))
    drawn = []  # the numbers of SimCLR, times the strength
    monkeypatch.setattr(common, "color_jitter", lambda x, *given, p: drawn.append((*given, p)) or x)
    weak.augment([x, x], args)
    assert drawn == [(0.4, 0.4, 0.4, 0.1, 0.8)]
    args.strength = 0.0
    assert [len(view.unique(dim=0)) for view in weak.augment([x, x], args)] == [2, 2]


def test_few_labels():
    args, data, task = few("--labels 3 --mu 3 --batch-size 16")
    parts, *_ = task
    (rows, count), (rest, others) = parts
    assert (count, others) == (4, 12) and len(rest) == 40
    assert data.train.labels[rows.flatten()].bincount().tolist() == [3] * 4
    _, _, other = few("--labels 3 --mu 3 --batch-size 16 --seed 1")
    assert not torch.equal(other[0][0][0], rows)


def test_images_without_labels_are_used():
    """As in STL-10: FixMatch takes them for the rest, of the ceiling they are left out."""
    args = completed(weak, "--task pseudo --labels 2 --mu 3 --batch-size 16".split())
    labels, args.classes = torch.tensor([0, 1] * 6 + [-1] * 20), 2
    data = SimpleNamespace(train=SimpleNamespace(labels=labels), fit=(None, torch.arange(10)))
    ((rows, _), (rest, _)), inputs, losses = weak.pseudo(args, data, RUN)
    assert rows.max() < 10 and sorted(rest.flatten().tolist()) == [*range(10), *range(12, 32)]
    index = torch.tensor([0, 1, 2, 3, *range(12, 24)])
    s = [draw(28, 2), draw(4, 2), draw(16, 2)]
    every = losses(s, index, 0)[0][2]
    assert close(every, F.cross_entropy(s[2][:4], labels[:4]))


def test_fixmatch_is_one_batch():
    """Labelled, weak and strong views go through the network together, the few labels through
    another one alone: batch norm's statistics are those of what a network learns from."""
    args, data, task = few("--labels 3 --mu 3 --batch-size 8 --threshold 0.4")
    views, index = [draw(8, 3, 4, 4), draw(8, 3, 4, 4, seed=1)], torch.arange(8) + 3
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)).double()
            for _ in range(3)]
    y = data.train.labels[index]
    _, inputs, losses = task
    given, mask = inputs(views, index)
    found, _ = losses([net(x) for net, x in zip(nets, given)], index, 0)

    def typed_in(mistake=None):
        own, alone, every = nets
        (x, u), v = views[0].split([2, 6]), views[1][2:]
        if mistake == "three batches":
            s, weak_u, strong = own(x), own(u), own(v)
        else:
            s, weak_u, strong = own(torch.cat([x, u, v])).split([2, 6, 6])
        q = weak_u.detach().softmax(1)
        terms = F.cross_entropy(strong, q.argmax(1), reduction="none") * (q.max(1)[0] >= 0.4)
        of_few = alone(views[0])[:2] if mistake == "few labels, all images" else alone(x)
        return [F.cross_entropy(s, y[:2]) + terms.sum() / 6, F.cross_entropy(of_few, y[:2]),
                F.cross_entropy(every(views[0]), y)]

    assert mask is None and all(map(close, found, typed_in()))
    assert not close(found[0], typed_in("three batches")[0], 1e-3)
    assert not close(found[1], typed_in("few labels, all images")[1], 1e-3)


# ==================================================================================================
# Tasks and runs
# ==================================================================================================


def test_lr_at():
    steps, warmup, peak = 100, 10, 2.0
    rate = [weak.lr_at(t, steps, warmup, peak) for t in range(steps + 1)]
    for t in range(steps + 1):
        cosine = peak * (1 + math.cos(math.pi * (t - 10) / 90)) / 2
        assert close(rate[t], (t + 1) / 10 * peak if t < 10 else cosine, 1e-12), t
    assert weak.lr_at(0, 10, 0, peak) == peak


def epoch(parts, number=0, first=0, world=1, rank=0, per_epoch=6):
    """The index of every step of an epoch, and that the views are those images."""
    n = 24
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4)
    images = common.Images(torch.zeros(n, dtype=torch.long), pixels, torch.full((n, 2), 4))
    batches = weak.Batches(SimpleNamespace(train=images, per_epoch=per_epoch), parts)
    run = SimpleNamespace(device=torch.device("cpu"), world=world, rank=rank,
                          args=SimpleNamespace(workers=0))
    steps = []
    for (x,), index in batches.epoch(number, first, 0, [common.Crop(4, 1.0)], run, 7):
        assert torch.equal(index, batches.index)
        assert close(x[:, 0, 0, 0] * 255, index[index >= 0], 1e-4)
        steps.append(index)
    return torch.stack(steps)


def test_batches():
    """Rows of each part in turn, none twice before all were drawn; the same when an epoch begins
    later, and dealt out to processes."""
    few, rest = torch.tensor([[3], [4], [5], [6]]), torch.arange(7, 24).unsqueeze(1)
    parts = [(few, 2), (rest, 4)]
    whole = epoch(parts)
    assert whole.shape == (6, 6)
    for start in (0, 2, 4):  # two steps have all of few once
        assert whole[start : start + 2, :2].flatten().sort().values.tolist() == [3, 4, 5, 6]
    drawn = whole[:, 2:].flatten()
    assert drawn[:17].unique().numel() == 17 and drawn.min() == 7
    assert torch.equal(epoch(parts, first=2), whole[2:])
    assert not torch.equal(epoch(parts, number=1), whole)
    dealt = [epoch(parts, world=2, rank=r) for r in (0, 1)]
    assert all(part.shape == (6, 3) and (part[:, 0] < 7).all() for part in dealt)
    together = torch.cat(dealt, 1)
    assert torch.equal(together.sort(1).values, whole.sort(1).values)
    bags = torch.tensor([[0, 1, -1], [2, -1, -1], [3, 4, 5]])
    rows = epoch([(bags, 1)], per_epoch=3)
    assert sorted(rows.tolist()) == sorted(bags.tolist())


def test_a_broken_file_is_not_learned_under_its_label(monkeypatch):
    """In its place another image is read, of which the index then says which."""
    monkeypatch.setattr(common, "batches", lambda *_: [("views", torch.tensor([7, 1, 2]))])
    bags = SimpleNamespace(train=None, per_epoch=1)
    batches = weak.Batches(bags, [(torch.tensor([[0, 1, -1, 2]]), 1)])
    run = SimpleNamespace(device=torch.device("cpu"), world=1, rank=0,
                          args=SimpleNamespace(workers=0))
    ((_, index),) = batches.epoch(0, 0, 0, [], run, 7)
    assert index.tolist() == [7, 1, -1, 2] == batches.index.tolist()


def test_what_bags_are_told(capsys):
    """Bags by their labels, the last network image by image."""
    args = completed(weak, "--task bags --positive 1 --bag-size 4 --batch-size 8".split())
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 2, 2, 0, 0])
    data = SimpleNamespace(fit=(None, torch.arange(10)), train=SimpleNamespace(labels=labels))
    parts, inputs, losses = weak.bags(args, data, RUN)
    (rows, count), = parts
    assert count == 2
    index = rows[:2].flatten()
    given, mask = inputs([None], index)
    s = [draw(2, 1 + rows.shape[1], seed=seed) for seed in range(3)]
    found, _ = losses(s, index, 0)
    assert given == [None] * 3 and mask.sum() == (index >= 0).sum()
    of_bag = [[1 in labels[row[row >= 0]].tolist()] for row in rows[:2]]
    of_bag = torch.tensor(of_bag).flatten().double()
    truth = [F.binary_cross_entropy_with_logits(s[i][:, 0], of_bag) for i in (0, 1)]
    y = (labels[index[index >= 0]] == 1).double()
    truth.append(F.binary_cross_entropy_with_logits(s[2][:, 1:][mask], y))
    assert all(map(close, found, truth))
    assert not close(found[0], F.binary_cross_entropy_with_logits(s[0][:, 0], 1 - of_bag), 1e-2)
    for label in (1, 2):
        data.train.labels = torch.full((10,), label)
        assert "of one kind" in fails(lambda: weak.bags(args, data, RUN), capsys)


def test_what_noisy_networks_are_told():
    """A share of the labels is wrong, the same in every run with a seed; the log's precision is of
    what f keeps; the fourth network gets true labels."""
    args = completed(weak, "--task noisy --rate 0.4 --keep-warmup 2".split())
    n, args.classes = 4000, 5
    labels = torch.arange(n) % 5
    data = SimpleNamespace(fit=(None, torch.arange(n)), train=SimpleNamespace(labels=labels),
                           per_epoch=10)
    losses, again = (weak.noisy(args, data, RUN)[2] for _ in range(2))
    index = torch.arange(n)
    s = [draw(n, 5, seed=seed) for seed in range(4)]
    found, _ = losses(s, index, 25)  # epoch 2: 60 % are kept
    assert same(found, again(s, index, 25)[0])
    hot = [100.0 * F.one_hot(labels, 5).double()] * 4
    _, start = losses(hot, index, 0)
    assert abs(start["precision"] - 0.6) < 0.03  # all are kept
    assert losses(hot, index, 25)[1]["precision"] > 0.97  # those that f answers as labelled
    assert close(found[3], F.cross_entropy(s[3], labels))
    assert abs(found[2] - F.cross_entropy(s[2], labels)) > 1e-3  # told wrong ones
    half = [s[0] + 3 * F.one_hot(labels, 5), hot[1], *s[2:]]  # g knows which labels are wrong
    assert losses(half, index, 25)[0][0] < losses(half, index, 0)[0][0] - 0.5


FIGURES = {
    "labeling": "label_model_accuracy majority_accuracy truth_accuracy",
    "bags": "bags_auc mean_auc images_auc bags_image_auc mean_image_auc images_image_auc",
    "noisy": "coteaching_accuracy peer_accuracy plain_accuracy clean_accuracy "
             "best_val_coteaching_accuracy best_val_plain_accuracy",
    "pseudo": "pseudo_accuracy few_accuracy all_accuracy",
}


@pytest.mark.parametrize("task, more", [
    ("labeling", ""), ("bags", "--bag-size 4"), ("bags", "--bag-size 4 --pool gated"),
    ("noisy", "--eval-every 1"), ("pseudo", "--labels 2"), ("pseudo", "--strength 0.5")])
def test_a_run(task, more, tmp_path, monkeypatch):
    """Every network moves, each by its own loss, and the figures of all are there, those of every
    evaluation as curves, too."""
    drawn = {}
    monkeypatch.setattr(common, "curves", lambda path, rows, panels: drawn.update(panels))
    argv = [*SHORT, "--task", task, *more.split(), "--out", tmp_path / "run"]
    results, out = quiet(weak, argv)
    for k in FIGURES[task].split():
        assert 0 <= results[k] <= 100 and f"  {k.replace('_', ' ')} " in out
    if task == "noisy":
        assert set(drawn["validation, %"]) == set(FIGURES[task].split()[:4])
    *_, floor, ceiling = weak.NETWORKS[task]
    assert out.count(f"floor: {floor}, ceiling: {ceiling}") >= 1
    args = completed(weak, argv[:-2])
    args.classes = 10
    start, saved = weak.build(args).state_dict(), torch.load(tmp_path / "run" / "last.pt",
                                                            weights_only=True)["state"]["net"]
    names = [k for k in start if k.endswith("weight")]
    assert all(not torch.equal(start[k], saved[k]) for k in names)
    assert sum(k.endswith("backbone.0.weight") for k in names) == len(weak.NETWORKS[task])


def test_terms_and_rate_of_a_step(tmp_path, monkeypatch):
    """The log names each network's loss, and AdamW has the rate that stands there."""
    drawn = []

    def noisy(*given):
        parts, inputs, losses = weak.noisy(*given)

        def recorded(*outputs):
            terms, figures = losses(*outputs)
            drawn.append(torch.stack(terms).detach())
            return terms, figures
        return parts, inputs, recorded

    monkeypatch.setitem(weak.TOLD, "noisy", noisy)
    argv = [*SHORT, "--task", "noisy", "--out", tmp_path / "run"]
    _, _, run = train(weak, argv)
    _, *others = weak.NETWORKS["noisy"]
    logged = torch.tensor([run.rows[0][name] for name in ("loss", *others)])
    assert close(logged, torch.stack(drawn).mean(0), 1e-5)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["optimizer"]
    peak = run.args.lr * run.args.batch_size / 256
    assert saved["param_groups"][0]["lr"] == run.rows[0]["lr"] < peak / 2


@pytest.mark.parametrize("flags, classes, warned", [
    ("", 10, False), ("--rate 0.9", 10, True), ("--rate 0.89", 10, False), ("", 2, True),
    ("--noise pair", 10, True), ("--noise pair --rate 0.45", 10, False)])
def test_labels_that_say_nothing(flags, classes, warned, capsys):
    args = completed(weak, ["--task", "noisy", *flags.split()])
    args.classes = classes
    weak.check(args, SimpleNamespace(numbers={}), RUN)
    assert ("as frequent as the right one" in capsys.readouterr().out) == warned


def test_networks_share_nothing(tmp_path):
    """What one network is told does not change the others: with other noise the one that gets the
    true labels is the same, bit for bit."""
    nets = []
    for rate in (0.2, 0.6):
        argv = [*SHORT, "--task", "noisy", "--rate", rate, "--out", tmp_path / str(rate)]
        net, _, _ = train(weak, argv)
        nets.append(copy.deepcopy(net).state_dict())
    changed = {k for k in nets[0] if not torch.equal(nets[0][k], nets[1][k])}
    assert changed and not any("clean" in k for k in changed)
    assert any("plain" in k for k in changed) and any("peer" in k for k in changed)


@pytest.mark.parametrize("task", weak.NETWORKS)
def test_resume(task, tmp_path):
    """Bit for bit, also where a task has drawn bags, wrong labels or few ones."""
    argv = [*SHORT, "--epochs", 2, "--bag-size", 4, "--task", task, "--out"]

    class Stopping(common.Run):
        def save(self, state):
            self.signal = 15 if self.step == self.per_epoch else 0
            super().save(state)

    train(weak, [*argv, tmp_path / "whole"])
    with pytest.raises(SystemExit):
        train(weak, [*argv, tmp_path / "parts"], Stopping)
    train(weak, [*argv, tmp_path / "parts", "--resume"])
    whole, parts = (torch.load(tmp_path / k / "last.pt", weights_only=True) for k in
                    ("whole", "parts"))
    assert same(whole["state"], parts["state"]) and whole["progress"]["step"] == 6


def test_votes_from_a_file(tmp_path, monkeypatch):
    """The votes of an image are those beside its name, whatever the order, the header, the spelling
    of the path, and lines of other files. --embed writes the answers beside the features."""
    folder, seen = tmp_path / "a photo, or two", {}
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.full((20, 20, 3), 6 * i, np.uint8)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    rows = [[f"./{folder.name}/{i}.png", i % 3, -1, (i + i % 2) % 3] for i in range(40)]
    path = tmp_path / "votes.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["image", *"abc"], [], *rows[::-1], ["other.png", "x"]])
    model = weak.label_model
    monkeypatch.setattr(weak, "label_model", lambda votes, *rest: (
        seen.update(votes=votes), model(votes, *rest))[1])
    _, out = quiet(weak, [*TINY, "--dataset", folder, "--votes", path, "--limit", 30, "--out",
                          tmp_path / "run", "--embed", tmp_path / "h.npz"])
    assert re.search(r"are right \(%\): \d+ nan \d+\n", out) and "no source votes" not in out
    saved = np.load(tmp_path / "h.npz")
    i = [int(os.path.basename(name).removesuffix(".png")) for name in saved["name"]]
    assert sorted(i) != i and len(i) == 30
    assert seen["votes"].tolist() == [rows[j][1:] for j in i]
    assert saved["p"].shape == (30, 3)
    assert close(torch.tensor(saved["p"]).sum(1), torch.ones(30), 1e-5)


def test_classes_that_votes_alone_have_named(tmp_path):
    """A run on images without labels is tested on a set that has some."""
    images, _, *_ = common.toys(60, 20, 0)
    for i, image in enumerate(images):
        for place in (tmp_path / "photos", tmp_path / "labelled" / "train" / str(i % 3)):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.byte().permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    path = tmp_path / "votes.csv"
    path.write_text("".join(f"{tmp_path}/photos/{i}.png,{i % 3},{i % 3}\n" for i in range(60)))
    quiet(weak, [*TINY, "--votes", path, "--dataset", tmp_path / "photos", "--out",
                 tmp_path / "run"])
    results, out = quiet(weak, [*TINY, "--eval", tmp_path / "run" / "last.pt", "--dataset",
                                tmp_path / "labelled", "--out", tmp_path / "eval"])
    assert 0 <= results["label_model_accuracy"] <= 100 and "truth_accuracy" not in results
    assert re.search(r"\n\d test images, %; floor: majority, ceiling: none\n", out)
    shutil.rmtree(tmp_path / "labelled" / "train" / "1")
    results, out = quiet(weak, [*TINY, "--eval", tmp_path / "run" / "last.pt", "--dataset",
                                tmp_path / "labelled", "--out", tmp_path / "eval"])
    assert "other classes" in out and "label_model_accuracy" not in results
    path.write_text("".join(f"{tmp_path}/photos/{i}.png,{i % 2 * 2}\n" for i in range(60)))
    _, out = quiet(weak, [*TINY, "--votes", path, "--dataset", tmp_path / "photos", "--out",
                          tmp_path / "two"])
    assert "warning: no source votes for class 1 (the first is 0)\n" in out
    quiet(weak, [*TINY, "--eval", tmp_path / "run" / "last.pt", "--dataset", tmp_path / "photos",
                 "--embed", tmp_path / "h.npz", "--out", tmp_path / "eval"])
    assert np.load(tmp_path / "h.npz")["p"].shape == (48, 3)


def test_few_labels_and_many_images_without(tmp_path):
    """--task pseudo on a folder in which only some images have a class."""
    images, labels, *_ = common.toys(90, 20, 0)
    for i, (image, label) in enumerate(zip(images, labels % 2)):
        place = tmp_path / "images" / "train" / ("ab"[label] if i < 30 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.byte().permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    results, out = quiet(weak, [*TINY, "--task", "pseudo", "--mu", 3, "--labels", 100, "--dataset",
                                tmp_path / "images", "--limit", 90, "--out", tmp_path / "run"])
    told = r"labels used: (\d+) of (\d+) \(--labels 100 for each class\); images: (\d+)"
    used, few, every = map(int, re.search(told, out).groups())
    assert "60 training images without a label" in out and 20 < few < 30
    assert used == few == every - 60
    assert 0 <= results["pseudo_accuracy"] <= 100


def test_all_networks_start_alike(tmp_path, capsys):
    """From a backbone, which --eval does not take for a classifier, nor a file of other classes;
    from a last.pt each network goes on from its own."""
    class Starting(common.Run):
        def restore(self, state):
            nets = [state["net"], *state["net"].others.values()]
            self.start = [copy.deepcopy(net.backbone.state_dict()) for net in nets]
            super().restore(state)

    quiet(weak, [*SHORT, "--task", "noisy", "--out", tmp_path / "run"])
    argv = [*SHORT, "--out", tmp_path / "next"]
    backbone = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)["state_dict"]
    start = train(weak, [*argv, "--init", tmp_path / "run" / "backbone.pt"], Starting)[2].start
    assert len(start) == 3 and all(same(dict(f), backbone) for f in start)
    file = tmp_path / "run" / "last.pt"
    _, _, run = train(weak, [*argv, "--task", "noisy", "--init", file], Starting)
    saved = torch.load(file, weights_only=True)["state"]["net"]
    others = [f"others.{k}.backbone" for k in weak.NETWORKS["noisy"][1:]]
    for net, start in zip(["backbone", *others], run.start):
        own = {k: v for k, v in saved.items() if k.startswith(f"{net}.")}
        assert same({f"{net}.{k}": v for k, v in start.items()}, own)
    results, _ = quiet(weak, [*argv, "--eval", tmp_path / "run" / "backbone.pt"])
    assert not any(k.endswith("accuracy") for k in results)
    for i in range(6):
        (tmp_path / "images" / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8))
        photo.save(tmp_path / "images" / "train" / "ab"[i % 2] / f"{i}.png")
    quiet(weak, [*SHORT, "--out", tmp_path / "rules"])
    argv += ["--eval", tmp_path / "rules" / "last.pt"]
    assert 0 <= quiet(weak, argv)[0]["label_model_accuracy"] <= 100
    results, out = quiet(weak, [*argv, "--dataset", tmp_path / "images"])
    assert "other classes" in out and not any(k.endswith("accuracy") for k in results)


@pytest.mark.parametrize("votes, words", [
    ([-1, -1, -1], "one class at most"), ([0, -1, 0], "one class at most"),
    ([0, 1, -1], "never on the same")])
def test_votes_that_say_nothing(votes, words, tmp_path, capsys):
    """Neither images that are left over, nor shares of classes that are no number."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.fromarray(np.full((20, 20, 3), 12 * i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "votes.csv").write_text("".join(
        f"{file},{','.join(map(str, votes))}\n" for file in folder.iterdir()))
    argv = [*TINY[:4], "--image-size", 16, "--dataset", folder, "--votes", tmp_path / "votes.csv",
            "--label-model", "triplets", "--out", tmp_path / "run"]
    assert words in refused(weak, argv, capsys)


@pytest.mark.parametrize("flags, words", [
    ("--task bags --positive 10", "--positive has to be one of them"),
    ("--task bags --bag-size 20", "hold 20 images"), ("--task pseudo --mu 16", "hold 17 images"),
    ("--label-model triplets", "not 5 and 10"), ("--votes none.csv", "none.csv"),
    ("--dataset {folder} --task noisy", "makes weak labels from true ones"),
    ("--dataset {folder}", "needs --votes FILE")])
def test_what_cannot_work_is_refused(flags, words, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(20):
        pixels = (torch.rand(20, 20, 3, generator=mix(i)) * 255).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    flags = [flag.format(folder=tmp_path / "images") for flag in flags.split()]
    argv = [*SHORT, *flags, "--out", tmp_path / "run"]
    assert words in refused(weak, argv, capsys)


@pytest.mark.parametrize("task", ["bags", "noisy"])
def test_no_network_learns_from_what_is_held_out(task):
    args = completed(weak, f"--task {task} --positive 1 --bag-size 4 --batch-size 8".split())
    labels, args.classes = torch.arange(20) % 5, 5
    data = SimpleNamespace(fit=(None, torch.arange(5, 15)), train=SimpleNamespace(labels=labels))
    ((rows, _),), *_ = weak.TOLD[task](args, data, RUN)
    assert {*rows.flatten().tolist()} - {-1} == {*range(5, 15)}


def test_what_is_classified(tmp_path):
    """Every network by itself, on whole images, of the validation or of the test split, in
    evaluation mode; then it goes on training as it was."""
    argv = [*SHORT, "--epochs", 9, "--lr", 0.03, "--out", tmp_path / "run"]
    net, data, run = train(weak, argv)
    for test, (images, index) in ((False, data.val), (True, data.test)):
        before = copy.deepcopy(net.state_dict())
        with contextlib.redirect_stdout(io.StringIO()):
            results = weak.evaluate(net, data, run.args, run, test)
        assert same(before, net.state_dict()) and net.training
        x, whole = images.pixels[index] / 255, copy.deepcopy(net).eval()
        for name, each in zip(weak.NETWORKS["labeling"], [whole, *whole.others.values()]):
            right = each.head(each.backbone(x)).argmax(1) == images.labels[index]
            assert close(results[f"{name}_accuracy"], 100 * right.double().mean(), 1e-4), name


def test_scores_of_bags(tmp_path):
    """Bag by bag: whether it is positive, and where the image is that makes it so."""
    net, data, run = train(weak, [*SHORT, *"--task bags --bag-size 4 --positive 1 --out".split(),
                                  tmp_path / "run"])
    images, index = data.test
    index = index[(images.labels[index] == 1).long().argsort()]  # the last ones are positive
    found = weak.scores(net.eval(), (images, index), run.args, run)
    y = (images.labels[index] == 1).tolist()
    h, bags, right = net.backbone(images.pixels[index] / 255), [], []
    for row in weak.cut_bags(torch.arange(len(y)), 4, run.args.seed).tolist():
        row = [i for i in row if i >= 0]
        bag, *each = net.head(h[row], torch.ones(1, len(row), dtype=torch.bool))[0].tolist()
        right += [a > b for i, a in zip(row, each) for j, b in zip(row, each) if y[i] and not y[j]]
        bags.append((bag, any(y[i] for i in row)))
    ordered = [a > b for a, has in bags for b, also in bags if has and not also]
    assert 5 < len(ordered) and close(found["bags_auc"], 100 * np.mean(ordered))
    assert close(found["bags_image_auc"], 100 * np.mean(right))


def test_a_tie_is_not_in_order():
    y = torch.arange(6).view(1, 6) < 3
    assert weak.auc(torch.zeros(1, 6), y, y | True) == 0  # of a network with one answer for all


def test_verdict_and_best_evaluation(tmp_path, monkeypatch):
    """h is judged, which has no negative values: a smaller spread is healthy."""
    net, data, run = train(weak, [*SHORT, "--task", "noisy", "--out", tmp_path / "run"])
    given = []

    def health(h, z1, z2, *_, **rule):
        given.append((torch.equal(h, z1), torch.equal(z1, z2), rule))
        return {"verdict": ""}

    monkeypatch.setattr(common, "health", health)
    monkeypatch.setattr(weak, "scores", lambda *_: {"plain_accuracy": 50.0})
    run.rows = [{"plain_accuracy": accuracy} for accuracy in (70.0, 90.0, 40.0)]
    results = weak.evaluate(net, data, run.args, run, test=True)
    assert given == [(True, False, {"name": "h", "least": 0.02})]
    assert (results["plain_accuracy"], results["best_val_plain_accuracy"]) == (50, 90)


def test_weight_decay(tmp_path):
    argv = [*SHORT, "--weight-decay", 0.3, "--out", tmp_path / "run"]
    train(weak, argv)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["optimizer"]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.3]


def test_pools_of_floor_and_ceiling():
    net = weak.build(completed(weak, "--task bags --pool noisy-or".split()))
    pools = [each.head.pooled for each in (net, *net.others.values())]
    assert pools == [weak.POOLS[name] for name in ("noisy-or", "mean", "max")]


def test_by_class_is_held_near_the_majority():
    """A step of EM, typed in: what a source has answered to each class, the same under the majority
    vote as a prior, and one of each."""
    votes, _ = planted(300, 3, [0.8, 0.7, 0.6, 0.6], 0.8)
    q = weak.majority(votes, 3)
    P = torch.ones(4, 3, 4, dtype=torch.double)  # with steps=1 both counts are the majority's
    for shares, row in zip(q, votes.tolist()):
        for i, vote in enumerate(row):
            P[i, :, 1 + vote] += 2 * shares
    _, found = weak.label_model(votes, 3, "by-class", steps=1)
    assert close(found, weak.posterior(votes, P / P.sum(2, keepdim=True)))
