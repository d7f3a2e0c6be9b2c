"""What several tests use."""

import contextlib
import importlib
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common

ROOT = Path(common.__file__).parent
TINY = "--device cpu --workers 0 --limit 48 --batch-size 16 --image-size 16 --epochs 3".split()
PLAIN = "--arch vit_nano --local-crops 4".split()  # a ViT of linear patches, with multi-crop
METHODS = "pretext simclr moco byol dino ibot dinov2 weak".split()  # in reading order
every = pytest.mark.parametrize("name", METHODS)


def method(name):
    return importlib.import_module(name)


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


def options(file, argv):
    return common.options(file.__name__, file.__doc__, file.OPTIONS, [str(a) for a in argv])


def completed(file, argv=(), side=None, n=5000, device="cuda"):
    """args as a run on n images with this shorter side has them; None: the built-in set."""
    items = range(n)
    data = SimpleNamespace(side=side, parts={"train": (items, None)}, val=[None, items],
                           train=SimpleNamespace(labels=items), read=lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Data", lambda *_: data)
        patch.setattr(common, "write", lambda *_: None)
        run = SimpleNamespace(folder=Path(), device=torch.device(device), world=1)
        cpu = {} if file.__name__ == "weak" else file.CPU
        common.load_data(args := options(file, argv), file.OPTIONS, run, cpu)
    return args


def train(file, argv, kind=common.Run):
    """Training alone, in a run of this kind -> network, data, run (closed); nothing is printed."""
    args = options(file, argv)
    with contextlib.redirect_stdout(io.StringIO()), kind(args) as run:
        net, data = file.train(args, run)
    return net, data, run


class Watched(common.Run):
    """A run that keeps `state`, which goes to last.pt, and `views`, the augmented ones by step."""

    def restore(self, state):
        self.state, self.views = state, []
        super().restore(state)

    def compiled(self, f):
        if isinstance(f, torch.nn.Module):
            return f

        def augment(views, args):
            self.views.append(f(views, args))
            return [x.clone() for x in self.views[-1]]

        return augment


def fails(call, capsys):
    """The one sentence with which call() ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"error: [^\n]{15,}\n", error), error
    return error


def refused(method, argv, capsys):
    """The one sentence with which method.main(argv) ends."""
    return fails(lambda: quiet(method, argv), capsys)
