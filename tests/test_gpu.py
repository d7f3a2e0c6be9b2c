"""A whole run on a GPU that is not there.

PyTorch's fake tensors have a device, a type and a shape, and no values: tensors of two devices do
not mix, as on CUDA. What a GPU computes and how fast is not tested. Two things wait for a GPU and
must not happen in a step, or it runs out of work: to read a value (also: a size that depends on
values), and to copy from the host without non_blocking.
"""

import contextlib
import importlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tools import quiet
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

N, BATCH = 64, 32  # images, the first half of them also for the probes


class Waits(TorchDispatchMode):
    """Raises where the host would wait for the GPU, while `forbidden`."""

    forbidden = False

    def read(self, value):
        """A stand-in for a method of tensors that returns a value."""
        def method(tensor):
            assert not (self.forbidden and tensor.is_cuda), "the step reads a value of the GPU"
            return value(tensor)
        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.forbidden and torch.is_tensor(out) and out.is_cuda:
            host = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.ndim
                    and not t.is_cuda]
            assert not host or kwargs.get("non_blocking"), f"{func} waits for the GPU to copy"
        return out


def backward(loss):
    """A gradient for all that loss depends on: the engine wants a driver."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        if (node := todo.pop()) and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)


def move(net, device, memory_format=torch.preserve_format):
    """Module.to, which cannot exchange parameters for fake ones."""
    for part in net.modules():
        for k, p in part._parameters.items():
            if p is not None:
                form = memory_format if p.ndim == 4 else torch.preserve_format
                moved = p.detach().to(device, memory_format=form)
                part._parameters[k] = torch.nn.Parameter(moved, p.requires_grad)
        for k, b in part._buffers.items():
            part._buffers[k] = b if b is None else b.to(device)
    return net


def fused(*given, **more):
    """The fused optimisers have no fake form: all they get has to be on the GPU."""
    assert all(t.is_cuda for t in tree_leaves((given, more)) if torch.is_tensor(t))


def nested(shape):
    return [nested(shape[1:]) for _ in range(shape[0])] if shape else 1.0


class Data:
    """Stands in for common.Data: labelled fake images on the GPU."""

    side, labelled = None, True

    def __init__(self, waits):
        self.waits = waits

    def __len__(self):
        return N

    def read(self, size, device, *_):
        pixels = torch.zeros(N, 3, size, size, dtype=torch.uint8, device=device)
        sizes = torch.full((N, 2), size, device=device)
        self.train = common.Images(torch.arange(N) % 10, pixels, sizes)
        self.fit = self.val = self.test = self.train, torch.arange(N // 2)

    def epoch(self, number, first, batch, crops, run, seed):
        made = common.batches(self.train, torch.arange(N), batch, crops, run.device, 0, (0, number))
        for item in made:
            self.waits.forbidden = True
            yield item
            self.waits.forbidden = False


def on_a_gpu(method, flags="", dtype=torch.bfloat16, **replaced):
    """A run of two steps and an evaluation -> its results. replaced: functions of the method."""
    method, waits, stop = importlib.import_module(method), Waits(), common.Stop()
    stop.signal = 0
    run = SimpleNamespace(device=torch.device("cuda", 0), name="a GPU", rank=0, world=1,
                          dtype=dtype, autocast=partial(torch.autocast, "cuda", dtype))

    def outside(f):  # computed on the host, with values
        def real(*given):
            with unset_fake_temporarily():
                return f(*given)
        return real

    on_host = [k for k in ("build", "draw_masks", "stratified_masks") if hasattr(method, k)]
    nothing = dict.fromkeys("write save curves picture".split(), lambda *_: None)
    generator = torch.Generator  # of the CPU in place of the GPU
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.multiple(common, **nothing, Data=lambda *_: Data(waits),
                                setup=lambda *_: run, run_folder=lambda *_: Path("nowhere"),
                                peak_memory_mb=lambda *_: 0),
            mock.patch.multiple(method, **{k: outside(getattr(method, k)) for k in on_host},
                                **replaced),
            mock.patch.multiple(torch, _fused_sgd_=fused, _fused_adamw_=fused,
                                Generator=lambda *_: generator()),
            mock.patch.multiple(torch.Tensor, backward=backward),
            mock.patch.multiple(torch.nn.Module, to=move),
            mock.patch.multiple(FakeTensor, create=True, item=waits.read(
                lambda t: 0.5 if t.is_floating_point() else 1), __int__=waits.read(lambda t: 9),
                tolist=waits.read(lambda t: nested(t.shape)), __bool__=waits.read(lambda t: True)),
            mock.patch.multiple(FakeTensorMode, create=True, __deepcopy__=lambda mode, _: mode),
            mock.patch("torch.optim.LBFGS.step", lambda self, closure: closure()),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            FakeTensorMode(allow_non_fake_inputs=True), waits,
        ):
            stack.enter_context(patch)
        args = ["--batch-size", BATCH, "--epochs", 1, "--eval-every", 0, *flags.split()]
        return quiet(SimpleNamespace(main=lambda argv: method.train(method.options(argv), stop)),
                     args)[0]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("method, flags, dtype", [
    ("simclr", "--optimizer lars", torch.bfloat16), ("moco", "", torch.float16),
    ("byol", "", torch.bfloat16), ("dino", "--local-crops 1", torch.bfloat16),
    ("ibot", "--local-crops 1", torch.float16), ("dinov2", "--local-crops 1", torch.bfloat16),
    ("dinov2", "--local-crops 0 --centering ema", torch.float16), ("pretext", "", torch.bfloat16),
    *(("pretext", f"--task {task}", torch.bfloat16)
      for task in ("patch", "splitbrain", "inpainting", "cpc"))])
def test_run(method, flags, dtype):
    assert on_a_gpu(method, flags, dtype)["linear_top1"] == 50


@pytest.mark.parametrize("mistake, error", [
    (lambda s: s * s.max().item(), "reads a value"),
    (lambda s: s * float(s.mean() > 0), "_local_scalar_dense"),
    (lambda s: s[s > 0], "nonzero"),
    (lambda s: s * s.new_tensor([2.0]), "waits for the GPU to copy"),
    (lambda s: s + torch.ones(s.shape[1]), "the same device"),
])
def test_mistakes_are_seen(mistake, error):
    """Each of them in NT-Xent's place."""
    def nt_xent(z1, z2, tau):
        return mistake(z1 - z2).square().mean()

    with pytest.raises(Exception, match=error):
        on_a_gpu("simclr", nt_xent=nt_xent)
