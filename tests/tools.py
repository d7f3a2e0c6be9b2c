"""What several tests use."""

import contextlib
import io
import re

import pytest
import torch
import torch.nn as nn

import common

TINY = "--device cpu --workers 0 --limit 48 --batch-size 16 --image-size 16 --epochs 3".split()


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


def quiet(method, argv):
    """method.main(argv) -> its results and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        results = method.main([str(a) for a in argv])
    return results, out.getvalue()


def refused(method, argv, capsys):
    """The one sentence with which method.main(argv) ends."""
    with pytest.raises(SystemExit) as stopped:
        quiet(method, argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"error: [^\n]{15,}\n", error), error
    return error


def small_resnet(arch, stem, norm_layer=nn.BatchNorm2d):
    """Next to nothing, with batch norm: (N, 3, S, S) -> (N, 32)."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm_layer(8), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.dim = 32
    return net


def lighten(patch, method, report=True):
    """A stand-in for the ResNet, a linear probe that is none, no curves, and without report no
    figures at the end: what takes the time of a small run and is the same in every file."""
    if hasattr(method, "resnet"):
        patch.setattr(method, "resnet", small_resnet)
    patch.setattr(method, "linear_probe", lambda x, y, x_test, y_test, decay: x.mean().item())
    patch.setattr(common, "curves", lambda *_: None)
    if not report:
        patch.setattr(method, "report", lambda *_: {"verdict": "not looked at"})
