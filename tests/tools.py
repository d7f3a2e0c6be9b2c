"""What several tests use."""

import contextlib
import io
import re

import pytest
import torch

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


def train(file, argv):
    """Training alone -> network, data, run (closed); nothing is printed."""
    args = common.options(file.__name__, file.__doc__, file.OPTIONS, [str(a) for a in argv])
    with contextlib.redirect_stdout(io.StringIO()), common.Run(args) as run:
        net, data = file.train(args, run)
    return net, data, run


def refused(method, argv, capsys):
    """The one sentence with which method.main(argv) ends."""
    with pytest.raises(SystemExit) as stopped:
        quiet(method, argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"error: [^\n]{15,}\n", error), error
    return error
