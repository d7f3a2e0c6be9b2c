"""What several tests use."""

import contextlib
import importlib
import io
import math
import os
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
unix = pytest.mark.skipif(os.name == "nt", reason="needs signals, links or paths of Linux or macOS")


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
                           train=SimpleNamespace(labels=items), read=lambda *_: None,
                           labelled=False, probed=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Data", lambda *_: data)
        patch.setattr(common, "write", lambda *_: None)
        run = SimpleNamespace(folder=Path(), device=torch.device(device), world=1)
        common.load_data(args := options(file, argv), file.OPTIONS, run, file.CPU)
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


def beit_blocks(H, W, ratio, draws, least, mistake=None):
    """BEiT's Algorithm 1 as iBOT bounds it, with sets of patches: rectangles of area s between
    `least` and what is left, aspect r log-uniform in [0.3, 1 / 0.3], sides sqrt(s r), sqrt(s / r),
    anywhere; ten attempts for each, one that hides too much or nothing new does not count."""
    hidden, attempts = set(), 0
    most = 9 if mistake == "nine attempts" else 10
    while attempts < most and (left := ratio * H * W - len(hidden)) >= 1:
        u = next(draws)
        s = least + u[0] * (left - least)
        r = math.exp(math.log(0.3) + u[1] * (math.log(1 / 0.3) - math.log(0.3)))
        r = {"all squares": 1.0, "height and width swapped": 1 / r}.get(mistake, r)
        h, w = round(math.sqrt(s * r)), round(math.sqrt(s / r))
        attempts += 1
        if h < H and w < W:
            top, start = math.floor(u[2] * (H - h + 1)), math.floor(u[3] * (W - w + 1))
            block = {(top + i, start + j) for i in range(h) for j in range(w)}
            new = len(block) if mistake == "what is hidden counted twice" else len(block - hidden)
            if block - hidden and new <= left:
                hidden, attempts = hidden | block, most * (mistake == "one block")
    return torch.tensor([[(i, j) in hidden for j in range(W)] for i in range(H)])


def blocks_agree(make, mistake=None, least=None):
    """Whether make, a block_mask, gives BEiT's blocks, patch for patch, from the same numbers."""
    for H, W in ((14, 14), (16, 16), (7, 12), (4, 4), (12, 5), (2, 2)):
        ratios = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0] * 6, dtype=torch.float64)
        masks = make(H, W, ratios, torch.Generator().manual_seed(H))
        generator = torch.Generator().manual_seed(H)
        rounds = [torch.rand(42, 4, generator=generator).tolist() for _ in range(200)]
        area = (min(H, W) // 3) ** 2 if least is None else least
        for i, (mask, ratio) in enumerate(zip(masks, ratios.tolist())):
            draws = (numbers[i] for numbers in rounds)
            if not torch.equal(mask, beit_blocks(H, W, ratio, draws, area, mistake)):
                return False
    return True
