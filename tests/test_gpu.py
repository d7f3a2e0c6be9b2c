"""A whole run on a GPU that is not there.

PyTorch's fake tensors have a device, a type and a shape, and no values: tensors of two devices do
not mix, as on CUDA. What a GPU computes and how fast is not tested. Two things wait for a GPU and
must not happen in a step, or it runs out of work: to read a value (also: a size that depends on
values), and to copy from the host without non_blocking. Two things a Mac's GPU (MPS) cannot do.
"""

import contextlib
import copy
import io
from unittest import mock

import pytest
import torch
from tools import METHODS, method, options
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

pytestmark = pytest.mark.skipif(  # 2.6 asks for a driver, 2.11 does not
    torch.__version__ < (2, 11), reason="fake CUDA tensors need a newer PyTorch")
N = 32  # images and batch; the first half of them also for the probes


class Waits(TorchDispatchMode):
    """Raises where the host would wait for the GPU, while `forbidden`."""

    forbidden = False
    scaled = False  # by a GradScaler, which computes in float64

    def read(self, value):
        """A stand-in for a method of tensors that returns a value."""
        def method(tensor):
            assert not (self.forbidden and tensor.is_cuda), "the step reads a value of the GPU"
            return value(tensor)
        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        doubles = [t for t in tree_leaves(out) if torch.is_tensor(t) and t.dtype == torch.float64]
        assert self.scaled or not any(t.is_cuda for t in doubles), f"{func}: MPS has no float64"
        assert "sort" not in str(func) or args[0].ndim < 5, "MPS sorts up to four dimensions"
        if self.forbidden and torch.is_tensor(out) and out.is_cuda:
            host = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.ndim
                    and not t.is_cuda]
            assert not host or kwargs.get("non_blocking"), f"{func} waits for the GPU to copy"
        return out


def backward(loss):
    """A gradient for all that loss depends on: the engine wants a driver."""
    todo, done = [loss.grad_fn], set()
    while todo:
        if (node := todo.pop()) and node not in done:
            done.add(node)
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


def nothing(*given):
    pass


def nested(shape):
    return [nested(shape[1:]) for _ in range(shape[0])] if shape else 1.0


class Data(common.Data):
    """Labelled fake images on the GPU, in a step of which nothing may wait."""

    waits = None

    def read(self, size, device, *how):
        pixels = torch.zeros(N, 3, size, size, dtype=torch.uint8, device=device)
        sizes = torch.full((N, 2), size, device=device)
        self.how, self.train = (*how, 0), common.Images(torch.arange(N) % 10, pixels, sizes)
        self.fit = self.val = self.test = self.train, torch.arange(N // 2)

    def epoch(self, *given):
        for item in super().epoch(*given):
            self.waits.forbidden = True
            yield item
            self.waits.forbidden = False


def unwaiting(cut, waits):
    """Crop.cut, in which nothing may wait either."""
    def watched(*given):
        before, waits.forbidden = waits.forbidden, True
        view = cut(*given)
        waits.forbidden = before
        return view
    return watched


def outside(f):
    """f, computed on the host with values; a list of tensors then goes to the GPU."""
    def real(*given):
        *rest, run = given
        host = run
        if isinstance(run, common.Run):
            host = copy.copy(run)
            host.device = torch.device("cpu")
        with unset_fake_temporarily():
            made = f(*rest, host)
        if isinstance(made, list):
            made = [common.to_device(t, run.device) for t in made]
        return made
    return real


def on_a_gpu(name, flags, dtype, folder, **replaced):
    """A step and, where there is no flag, an evaluation. replaced: functions of the file."""
    file, waits, generator = method(name), Waits(), torch.Generator  # of the CPU, not of the GPU
    argv = f"--device cpu --batch-size {N} --epochs 1 --eval-every 0 {flags} --out".split()
    # networks and masks are made on the host, where fake tensors have no values to draw
    hosted = [k for k in ("build", "draw_masks", "stratified_masks") if hasattr(file, k)]
    values = {"item": lambda t: 0.5 if t.is_floating_point() else 1, "__int__": lambda t: 9,
              "__float__": lambda t: 0.5, "__bool__": lambda t: True,
              "tolist": lambda t: nested(t.shape)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        run = stack.enter_context(common.Run(options(file, [*argv, str(folder)])))
        run.device, run.dtype, run.every = torch.device("cuda", 0), dtype, 10
        waits.scaled = dtype == torch.float16
        for patch in (
            mock.patch.multiple(common, Data=Data, show_views=nothing, write=nothing),
            mock.patch.object(Data, "waits", waits),
            mock.patch.object(common.Crop, "cut", unwaiting(common.Crop.cut, waits)),
            mock.patch.multiple(file, **{k: outside(getattr(file, k)) for k in hosted}, **replaced),
            mock.patch.multiple(torch, _fused_sgd_=fused, _fused_adamw_=fused,
                                Generator=lambda *_: generator()),
            mock.patch.multiple(torch.Tensor, backward=backward),
            mock.patch.multiple(torch.nn.Module, to=move),
            mock.patch.multiple(FakeTensor, create=True,
                                **{k: waits.read(value) for k, value in values.items()}),
            mock.patch.multiple(FakeTensorMode, create=True, __deepcopy__=lambda mode, _: mode),
            mock.patch("torch.optim.LBFGS.step", lambda self, closure: closure()),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            FakeTensorMode(allow_non_fake_inputs=True), waits,
        ):
            stack.enter_context(patch)
        net, data = file.train(run.args, run)
        if not flags:
            results = file.evaluate(net, data, run.args, run, test=name == "simclr")
            assert results["linear_top1"] == 50


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name, flags, half", [(name, flags, half) for name, flags, half in [
    ("simclr", "", "bfloat16"), ("moco", "", "float16"), ("byol", "--optimizer lars", "bfloat16"),
    ("dino", "", "bfloat16"), ("ibot", "--local-crops 1", "float16"),
    ("dinov2", "--local-crops 1", "bfloat16"),
    ("dinov2", "--local-crops 0 --centering ema", "float16"), ("pretext", "", "bfloat16"),
    *(("pretext", f"--task {k}", "bfloat16") for k in "patch splitbrain inpainting cpc".split()),
] if name in METHODS])
def test_run(name, flags, half, tmp_path):
    on_a_gpu(name, flags, getattr(torch, half), tmp_path / "run")


@pytest.mark.parametrize("mistake, error", [
    (lambda s: s * s.max().item(), "reads a value"),
    (lambda s: s * float(s.mean() > 0), "reads a value"),
    (lambda s: s[s > 0], "nonzero"),
    (lambda s: s * s.new_tensor([2.0]), "waits for the GPU to copy"),
    (lambda s: s + torch.ones(s.shape[1]), "the same device|two different devices"),
    (lambda s: s.double(), "MPS has no float64"),
    (lambda s: s.view(1, 1, 1, *s.shape).sort(0)[0], "MPS sorts up to four"),
])
def test_mistakes_show(mistake, error, tmp_path):
    """Each of them in NT-Xent's place."""
    def nt_xent(z1, z2, tau):
        return mistake(z1 - z2).square().mean()

    with pytest.raises(Exception, match=error):
        on_a_gpu("simclr", "", torch.bfloat16, tmp_path / "run", nt_xent=nt_xent)


def test_mistakes_in_crops_show(tmp_path, monkeypatch):
    def boxes(*given, made=common.random_boxes):
        return made(*given)[:, [0, 1, 2, 3]]

    monkeypatch.setattr(common, "random_boxes", boxes)
    with pytest.raises(AssertionError, match="waits for the GPU to copy"):
        on_a_gpu("simclr", "", torch.bfloat16, tmp_path / "run")
