"""What several tests use."""

import contextlib
import io

import torch


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
