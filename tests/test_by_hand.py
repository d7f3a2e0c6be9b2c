"""The blackboard's numbers are those of NumPy in float64, and another loss is noticed."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mistakes import MISTAKES, patched
from tools import ROOT, fails, quiet

import byol
import dino
import dinov2
import moco
import simclr
from lessons import by_hand

A, B = np.array([[3.0, 4], [1, 0], [-1, 2]]), np.array([[4.0, 3], [2, -1], [-1, 1]])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def nt_xent():
    s = unit(np.concatenate([A, B])) @ unit(np.concatenate([A, B])).T / 0.5
    e = np.exp(s) - np.diag(np.exp(np.diag(s)))
    losses = np.log(e.sum(1)) - s[np.arange(6), (np.arange(6) + 3) % 6]
    return [unit(A), unit(B), s, e.sum(1), losses, losses.mean()]


def info_nce():
    queue = unit(np.array([[0.0, 1], [-1, 0], [1, -1], [1, 2]]))
    q, k = unit(A), unit(B)
    logits = np.concatenate([np.einsum("nc,nc->n", q, k)[:, None], q @ queue.T], 1) / 0.2
    losses = -np.log(softmax(logits)[:, 0])
    return [q, k, queue, logits, np.exp(logits), losses, losses.mean()]


def byol_loss():
    losses = 2 - 2 * np.einsum("nd,nd->n", unit(A), unit(B))
    return [unit(A), unit(B), losses, losses.mean()]


def H():
    t, s, center = softmax((A - [1, 0.5]) / 0.5), softmax(B), np.array([1, 0.5])
    losses = -(t * np.log(s)).sum(1)
    return [(A - center) / 0.5, t, s, np.log(s), losses, losses.mean(),
            0.9 * center + 0.1 * A.mean(0)]


def sinkhorn_knopp():
    Q = np.exp(B / 2)
    found = [Q]
    for _ in range(3):
        found += [Q.sum(0), Q / Q.sum(0)]
        Q = Q / Q.sum(0)
        found += [Q.sum(1), Q / Q.sum(1, keepdims=True)]
        Q = Q / Q.sum(1, keepdims=True)
    return [*found, Q.sum(0)]


def koleo():
    x = unit(A)
    d = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    losses = -np.log((d + 9 * np.eye(3)).min(1))
    return [x, d, losses, losses.mean()]


def attention_pool():
    e = np.tanh(A @ np.array([[1, 0.5], [-0.5, 1]]).T)
    a = softmax((e @ [1.0, 2.0])[None])[0]
    return [e, e @ [1.0, 2.0], a, a @ A]


@pytest.mark.parametrize("expected", [nt_xent, info_nce, byol_loss, H, sinkhorn_knopp, koleo,
                                      attention_pool], ids=lambda f: f.__name__)
def test_numbers(expected):
    _, out = quiet(by_hand, [expected.__name__])
    printed = re.findall(r"-?\d+\.\d{4}", out)
    printed = {number.lstrip("-") for number in printed}
    for values in expected():
        for value in np.ravel(values):
            assert f"{abs(value):.4f}" in printed, (value, out)
    assert set(by_hand.EQUATIONS) == {"nt_xent", "info_nce", "byol_loss", "H", "sinkhorn_knopp",
                                      "koleo", "attention_pool"}


SHOWN = {name: name for name in by_hand.EQUATIONS} | {"update_center": "H"}
# not in the numbers that are shown: a gradient, large inputs, several processes
UNSEEN = "gradient|overflow|each process alone"
PLANTED = [m for m in MISTAKES if m.function in SHOWN and not re.search(UNSEEN, m.name)]


@pytest.mark.parametrize("mistake", PLANTED, ids=[m.name for m in PLANTED])
def test_a_mistake_is_noticed(mistake, monkeypatch, capsys):
    exec(compile(patched(mistake), mistake.file, "exec"), wrong := {"__name__": "wrong"})
    module = importlib.import_module(mistake.file[:-3])
    monkeypatch.setattr(module, mistake.function, wrong[mistake.function])
    fails(lambda: quiet(by_hand, [SHOWN[mistake.function]]), capsys)


@pytest.mark.parametrize("module, function", [
    (simclr, "nt_xent"), (moco, "info_nce"), (byol, "byol_loss"), (dino, "H"),
    (dino, "update_center"), (dinov2, "sinkhorn_knopp"), (dinov2, "koleo")])
def test_another_result_is_noticed(module, function, monkeypatch, capsys):
    """With the same variables inside."""
    ours = getattr(module, function)

    def inside(other, *args):
        result, own = look_inside(ours if other is scaled else other, *args)
        return (scaled(*args) if other is scaled else result), own

    def scaled(*args):
        return ours(*args) * 1.001

    look_inside = by_hand.inside
    monkeypatch.setattr(module, function, scaled)
    monkeypatch.setattr(by_hand, "inside", inside)
    assert "by hand" in fails(lambda: quiet(by_hand, [SHOWN[function]]), capsys)


def test_a_variable_inside_is_noticed(capsys):
    """Checked are the variables of the function, not its result alone."""
    def loss(x):
        doubled = 2 * x
        return doubled / 2

    result, own = by_hand.inside(loss, torch.ones(1))
    assert "no variable halved" in fails(lambda: own["halved"], capsys)
    assert result == 1 and own["doubled"] == 2
    by_hand.check("doubled", [2.0], own["doubled"])
    assert "by hand" in fails(lambda: by_hand.check("doubled", [1.0], own["doubled"]), capsys)
    assert "by hand" in fails(lambda: by_hand.check("doubled", 2.0, own["doubled"]), capsys)


def test_by_hand_as_a_program():
    """lessons/weak.py beside it is not taken for weak.py."""
    argv = [sys.executable, "lessons/by_hand.py", "attention_pool"]
    run = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0 and "sum of a h" in run.stdout, run.stderr
