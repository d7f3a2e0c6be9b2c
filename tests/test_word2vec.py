"""The lesson on word2vec: its equation, its optimum, its windows, and what it shows."""

import csv
import itertools
import math

import pytest
import torch
from tools import close, draw, fails, quiet

import moco
from lessons import word2vec


def equation_4(v, u, u_noise, mistake=None):
    """v2's equation 4, with its sign turned, typed in for one pair (lists of numbers)."""
    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b))

    noise = [log_sigmoid((1 if mistake == "no minus" else -1) * dot(v, n)) for n in u_noise]
    total = sum(noise) / (len(noise) if mistake == "mean of the noise" else 1)
    return -log_sigmoid(dot(u if mistake == "no centre" else v, u)) - total


def test_sgns_equation():
    v, u, u_noise = draw(4, 3), draw(4, 3, seed=1), draw(4, 5, 3, seed=2)
    loss = word2vec.sgns_loss(v, u, u_noise)

    def by_hand(mistake=None):
        rows = zip(v.tolist(), u.tolist(), u_noise.tolist())
        return torch.tensor([equation_4(*row, mistake) for row in rows], dtype=torch.float64)

    assert close(loss, by_hand())
    for mistake in ("no minus", "mean of the noise", "no centre"):
        assert not close(loss, by_hand(mistake), 1e-3), mistake
    assert close(word2vec.sgns_loss(v, 0 * u, 0 * u_noise), [6 * math.log(2)] * 4)
    inputs = [t.requires_grad_() for t in (v, u, u_noise)]
    assert torch.autograd.gradcheck(word2vec.sgns_loss, inputs)


def expected_loss(x, table, noise, k):
    """The sum of sgns_loss over all pairs, its mean over the noise, for scores x (V, V) that are
    free of each other: v is a row of x, u one-hot."""
    V = len(x)
    one = torch.eye(V, dtype=x.dtype)
    w, c = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T
    positive = word2vec.sgns_loss(x[w], one[c], one[:0].expand(len(w), 0, V))  # no noise, k = 0
    loss = 0.0
    for n in range(V):  # the noise is word n, one draw of k
        both = word2vec.sgns_loss(x[w], one[c], one[n].expand(len(w), 1, V))
        loss = loss + noise[n] * (positive + k * (both - positive))
    return (table[w, c] * loss).sum()


def test_gradient_is_zero():
    """At log( #(w, c) / (k #(w) P_n(c)) ), and at PMI - log k for noise of power 1 alone."""
    table, k = draw(6, 6).abs() + 0.1, 5
    counts = table.sum(0)
    for power in (0.75, 1.0):
        noise = word2vec.noise_of(counts, power)

        def slope(x, noise=noise):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(expected_loss(x, table, noise, k), x)[0].abs().max()

        at_pmi = slope(word2vec.pmi(table) - math.log(k))
        assert slope(word2vec.closed_form(table, noise, k)) < 1e-12
        assert (at_pmi < 1e-12) if power == 1 else (at_pmi > 1e-2)
        assert slope(word2vec.pmi(table)) > 1e-2


def test_info_nce_has_the_same_optimum():
    """Of one positive and k words of noise, all draws weighted; a constant a word changes nothing,
    one a context does."""
    V, k = 3, 2
    table = draw(V, V).abs() + 0.1
    noise, one = word2vec.noise_of(table.sum(0)), torch.eye(V, dtype=torch.float64)
    x = word2vec.closed_form(table, noise, k)

    def slope(scores):
        scores = scores.clone().requires_grad_()
        total = 0.0
        for w, c, *n in itertools.product(range(V), repeat=2 + k):
            loss = moco.info_nce(scores[w : w + 1], one[c : c + 1], one[n].T, tau=1.0)
            total = total + table[w, c] * noise[n].prod() * loss
        return torch.autograd.grad(total, scores)[0].abs().max()

    constant = draw(V, 1, seed=1)
    assert slope(x) < 1e-12 and slope(x + constant) < 1e-12
    assert slope(x + constant.T) > 1e-3


def test_windows():
    """A window of 1 to 3 words on both sides, at most, in the paragraph, each as often."""
    ids, paragraph = torch.arange(9), torch.tensor([0] * 6 + [1] * 3)
    found = torch.zeros(9, 9)
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        found[word2vec.pairs(ids, paragraph, torch.ones(9), 3, generator)] += 1 / 600
    expected = torch.zeros(9, 9)
    for w, c in itertools.product(range(9), repeat=2):
        if paragraph[w] == paragraph[c] and 0 < abs(w - c) <= 3:
            expected[w, c] = (4 - abs(w - c)) / 3
    assert close(word2vec.pair_counts(ids, paragraph, 3), expected, 1e-6)
    assert close(found, expected, 0.1) and not (found[expected == 0]).any()
    keep = torch.ones(9)
    keep[1] = 0  # dropped before the windows are cut: 0 and 2 are neighbours now
    near = {tuple(p) for seed in range(20) for p in torch.stack(word2vec.pairs(
        ids, paragraph, keep, 1, torch.Generator().manual_seed(seed)), 1).tolist()}
    assert (0, 2) in near and (2, 0) in near and not any(1 in p for p in near)


def test_subsampling_and_noise():
    counts = torch.tensor([8000.0, 1900.0, 99.0, 1.0])
    keep = word2vec.keep_rate(counts, 1e-2)
    for f, rate in zip((counts / 10000).tolist(), keep.tolist()):
        assert rate == pytest.approx(1 - max(0, 1 - math.sqrt(1e-2 / f)), abs=1e-6)
    noise = word2vec.noise_of(counts)
    assert noise.sum() == pytest.approx(1) and (noise[0] / noise[3]).item() == pytest.approx(
        8000**0.75, rel=1e-5)


def test_texts():
    words, ids, paragraph = word2vec.tokenize(["Red red, RED.\n\ngreen red", "red green"], least=2)
    assert words == ["red", "green"] and ids.tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert paragraph.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert sum(len(text) for text in word2vec.documentation()) > 500_000
    pytest.importorskip("timm")
    assert len(word2vec.glosses()) > 20_000


def test_neighbours_by_counts():
    """a and b stand before the same words, c before others."""
    table = torch.tensor([[0, 0, 0, 9, 3.0], [0, 0, 0, 6, 2], [0, 0, 0, 1, 8], [9, 6, 1, 0, 0],
                          [3, 2, 8, 0, 0]])
    for x in (table, word2vec.ppmi_svd(table, 3)):
        assert word2vec.nearest(x, torch.tensor([0, 1]), 1).tolist() == [[1], [0]]


def test_what_it_shows(tmp_path):
    """Full rank comes to the closed form; the grammar is found; neighbours are written."""
    text = "\n\n".join(f"the {a} fox eats a {b} hen" for a in ("red", "old", "big", "shy")
                       for b in ("fat", "wet") for _ in range(12))
    (tmp_path / "text.txt").write_text(text)
    argv = ["--text", tmp_path / "text.txt", "--words", "fox", "red", "--dim", 4, "--epochs", 1,
            "--seeds", 1, "--out", tmp_path]
    (s, x, other, found, rows), _ = quiet(word2vec, argv)
    assert (s - x).square().mean().sqrt() < 0.15 < 0.2 < (s - other).square().mean().sqrt()
    assert found[0]["SGNS"] > max(95, found[0]["PPMI-SVD"], found[0]["counts"])
    with open(tmp_path / "word2vec.csv") as file:
        assert list(csv.DictReader(file)) == rows
    assert [row["word"] for row in rows] == ["fox", "red"]
    assert all(len(row[k].split()) == 5 for row in rows for k in ("SGNS", "PPMI-SVD"))
    assert (tmp_path / "word2vec.png").stat().st_size > 5000


def test_what_it_cannot_use(tmp_path, capsys):
    (tmp_path / "few.txt").write_text("one two " * 30)
    for argv in (["--text", "no/such/file"], ["--text", str(tmp_path / "few.txt")]):
        assert "--text" in fails(lambda argv=argv: word2vec.main(argv), capsys)
