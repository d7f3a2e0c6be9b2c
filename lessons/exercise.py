"""Learn by doing: a method's file without the body of one function, which you write.

    python lessons/exercise.py simclr nt_xent      writes exercises/simclr.py
    python -m pytest exercises                     says what is wrong with it, in a sentence
    python lessons/exercise.py --all               a course: one exercise per file, easiest first
    python lessons/exercise.py --list

The docstring of the function says what it does, mostly as an equation. Your function gets the
same random inputs as versions with a known mistake (tests/mistakes.py): if it returns what one of
them returns, gradients and changed inputs included, you have made that mistake. Otherwise you are
told which test failed, and what your function and ours give.
"""

import ast
import copy
import re
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import mistakes
from mistakes import MISTAKES, ROOT

import common
from lessons import shared

COURSE = """simclr lr_at, byol ema_update, byol m_at, dino update_center, moco dequeue_and_enqueue,
    byol byol_loss, pretext rotate, pretext cross_entropy, pretext classification,
    pretext masked_l2, pretext cpc_loss, pretext rebalance, pretext soft_cross_entropy,
    moco info_nce, simclr nt_xent, simclr LARS.step,
    moco SplitBatchNorm2d.one_by_one, dino tau_at, dino cosine, dino entropy, dino H,
    dino dino_loss, ibot patch_loss, ibot ibot_loss, ibot block_mask, ibot draw_masks,
    dinov2 distillation,
    dinov2 class_loss, dinov2 masked_loss, dinov2 mean_entropy, dinov2 koleo,
    dinov2 sinkhorn_knopp, dinov2 targets, weak keep_rate, weak transition, weak noise_aware_loss,
    weak bag_loss, weak attention_pool, weak posterior, weak triplets, weak small_loss,
    weak coteaching_losses, weak fixmatch_loss"""
COURSE = [tuple(exercise.split()) for exercise in COURSE.split(",")]
HEADER = "# Exercise: write {} of {}.py, then python -m pytest exercises -k {}\n"

GRADER = '''"""Written by lessons/exercise.py: runs the tests of the exercises in this folder."""
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]  # exercises shadow no module
sys.path.append({root!r})
from lessons import exercise


@pytest.mark.parametrize("file", exercise.files(HERE), ids=lambda file: file.stem)
def test_exercise(file):
    fault = exercise.grade(file)
    if fault:
        pytest.fail(fault, pytrace=False)
'''

# ---- inputs of each function ---------------------------------------------------------------------


def z(*shape, seed=0):
    """Random numbers that require a gradient, the same in each call."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()


def plain(*shape, seed=0):
    return z(*shape, seed=seed).detach()


def q(*shape, seed=0):
    return plain(*shape, seed=seed).softmax(-1)


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def run_lars(module):
    """Three steps on a matrix and a bias -> both."""
    w = [plain(4, 3).requires_grad_(), plain(4, seed=1).requires_grad_()]
    optimizer = module.LARS(w, 0.5, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        for p in w:
            p.grad = plain(*p.shape, seed=step + 2)
        optimizer.step()
    return [p.detach() for p in w]


def run_split_norm(module):
    """Two calls with four parts each and one in eval mode -> outputs and statistics."""
    norm = module.SplitBatchNorm2d(3, 4).double()
    out = [norm(plain(8, 3, 2, 2, seed=step) + step) for step in range(2)]
    out.append(norm.eval()(plain(8, 3, 2, 2)))
    return [*map(torch.Tensor.detach, out), norm.running_mean, norm.running_var]


OBJECTS = {"LARS.step": run_lars, "SplitBatchNorm2d.one_by_one": run_split_norm}


def times(*rest):
    """Arguments of a schedule at some of its 20 steps."""
    return [(step, 20, *rest) for step in (0, 1, 4, 5, 9, 10, 13, 19)]


MASK = torch.tensor([[True, False, True, True, False], [False] * 5, [True] + [False] * 4])
STUDENT, TEACHER = [z(4, 6, seed=i) for i in range(3)], [z(4, 6, seed=i + 3) for i in range(2)]
BOTH = [plain(1, 1, 6, seed=9)[0], 0.1, 0.05]  # centre, tau_s, tau_t
PATCHES = [[z(3, 5, 6, seed=i), z(3, 5, 6, seed=i + 1)] for i in (20, 30)]
MASKING = SimpleNamespace(seed=0, batch_size=4, mask_crops=0.5, mask_ratio=[0.1, 0.5],
                          random_masks=False, image_size=28, patch_size=4)
THERE = torch.arange(5) < torch.tensor([[5], [2], [1]])  # which places of three bags hold an image
VOTES = ((plain(200, 1) > 0) ^ (plain(200, 4, seed=1) < torch.tensor([-1, -1, -0.5, 0.7]))).long()
INPUTS = {  # by function: arguments of some calls
    "lr_at": times(5, 0.3) + times(0, 0.3),
    "m_at": times(0.9) + times(0.0),
    "cosine": times(0.04, 0.4),
    "tau_at": times(0.07, 0.3) + times(0.02, 0.3) + times(0.07, 0.0),
    "ema_update": [(net(0), net(1), 0.9), (net(0), net(1), torch.tensor(0.3))],
    "update_center": [(plain(1, 6), plain(4, 6, seed=1), 0.9)],
    "dequeue_and_enqueue": [(plain(3, 8), 2, plain(4, 3)), (plain(3, 8), 6, plain(4, 3))],
    "byol_loss": [(z(4, 3), z(4, 3, seed=1)), (z(4, 3), z(4, 3, seed=1), False)],
    "rotate": [(plain(2, 3, 4, 4),)],
    "cross_entropy": [(z(4, 5), torch.tensor([0, 3, 1, 4])), (z(4, 5), q(4, 5))],
    "classification": [(z(4, 5), torch.tensor([0, 3, 1, 4]))],
    "masked_l2": [(z(2, 3, 4, 4), z(2, 3, 4, 4, seed=1), plain(2, 1, 4, 4, seed=2) > 0)],
    "cpc_loss": [(z(4, 3), z(4, 3, seed=1))],
    "soft_cross_entropy": [(z(2, 5, 3, 3), plain(2, 5, 3, 3).softmax(1), q(5, seed=1))],
    "rebalance": [(q(5),), (q(5), 0.2)],
    "info_nce": [(z(4, 3), z(4, 3, seed=1), plain(3, 8, seed=2), 0.2)],
    "nt_xent": [(z(4, 3), z(4, 3, seed=1), 0.5), (z(4, 3), z(4, 3, seed=1), 1e-3)],
    "H": [(z(4, 6), z(4, 6, seed=1), *BOTH)],
    "entropy": [(z(4, 6), BOTH[0], 0.5)],
    "dino_loss": [(STUDENT, TEACHER, *BOTH)],
    "patch_loss": [(z(3, 5, 6), z(3, 5, 6, seed=1), MASK, plain(1, 1, 6, seed=2), 0.5, 0.3)],
    "ibot_loss": [(STUDENT, TEACHER, *PATCHES, [MASK, MASK.flip(0)], BOTH[0],
                   plain(1, 1, 6, seed=2), 0.5, 0.3, 0.2)],
    "block_mask": [(7, 9, ratio, torch.Generator().manual_seed(i))
                   for i, ratio in enumerate((0.3, 0.5, torch.tensor([[0.3, 0.5]])))],
    "distillation": [(z(4, 6), q(4, 6, seed=1).requires_grad_(), 0.5)],
    "class_loss": [(STUDENT, [q(4, 6), q(4, 6, seed=1)], 0.5)],
    "masked_loss": [(z(4, 6), q(4, 6, seed=1), q(4), 0.5)],
    "koleo": [(z(5, 3),)],
    "sinkhorn_knopp": [(z(5, 4), 0.5), (z(5, 4), 1e-3), (z(5, 4), 0.5, 2),
                       (z(5, 4), 0.5, 3, lambda x: torch.cat([x, x.flip(1)]))],
    "targets": [(z(5, 4), plain(1, 4), 0.5, how) for how in ("sinkhorn", "center")],
    "mean_entropy": [(q(4, 6),)],
    "draw_masks": [(5, MASKING, SimpleNamespace(rank=rank, world=2)) for rank in range(2)],
    "keep_rate": [(epoch, 0.4, 5) for epoch in (0, 1, 3, 5, 9)],
    "transition": [("symmetric", 0.5, 4), ("pair", 0.45, 5)],
    "noise_aware_loss": [(z(4, 5), q(4, 5, seed=1))],
    "bag_loss": [(z(3, 5), plain(3, 5, seed=1) > 0, THERE)],
    "attention_pool": [(z(3, 5, 4), THERE, z(3, 4, seed=1), z(3, seed=2), *U)
                       for U in ((), (z(3, 4, seed=3),))],
    "posterior": [(torch.tensor([[0, -1, 2], [1, 1, -1], [-1, 0, 0]]), q(3, 3, 4))],
    "triplets": [(VOTES,)],
    "small_loss": [(plain(9), 0.7), (plain(20), 0.55)],
    "coteaching_losses": [(z(9), z(9, seed=1), 0.7)],
    "fixmatch_loss": [((3 * plain(8, 4)).requires_grad_(), z(8, 4, seed=1), 0.8)],
}

# ---- what a function does to them ----------------------------------------------------------------


def tensors(x):
    """All numbers in x, in order."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [t for part in x for t in tensors(part)]
    if isinstance(x, nn.Module):
        return [t.detach() for t in x.state_dict().values()]
    if isinstance(x, torch.Tensor | int | float):
        return [torch.as_tensor(x)]
    return []  # a generator, a function


def results(module, function):
    """What the function of this module returns, its gradients, and the inputs afterwards: pairs of
    a verb and numbers."""
    if function in OBJECTS:
        return [("leaves", x) for x in OBJECTS[function](module)]
    found = []
    for args in copy.deepcopy(INPUTS[function]):
        out = getattr(module, function)(*args)
        leaves = [t for t in tensors(args) if t.requires_grad]
        total = sum(t.sum() for t in tensors(out) if t.requires_grad)
        grads = []
        if isinstance(total, torch.Tensor):
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found += [("gives", t) for t in tensors(out)] + [("has the gradient", t) for t in grads]
        found += [("leaves the input", t) for t in tensors(args)]
    return [(verb, t.detach().double()) for verb, t in found]


@cache
def outcome(source, function):
    """-> results and None, or None and the error that stopped the function."""
    module = {}
    try:
        exec(compile(source, "exercise", "exec"), module)
        return results(SimpleNamespace(**module), function), None
    except Exception as error:  # a learner's code may do anything
        return None, error


def agree(a, b):
    """Whether verbs, shapes and numbers are the same, NaN included."""
    same = partial(torch.allclose, rtol=1e-6, atol=1e-6, equal_nan=True)
    return len(a) == len(b) and all(
        v == w and x.shape == y.shape and same(x, y) for (v, x), (w, y) in zip(a, b))


def diagnose(source, method, function):
    """What is known to be wrong with the function in this source: a sentence, or None."""
    found, error = outcome(source, function)
    if isinstance(error, NotImplementedError):
        return f"{function} is still to be written"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} is not Python: {error.msg}"
    if error:
        return f"{function} stops with {type(error).__name__}: {error}".splitlines()[0]
    if difference(source, method, function):
        known = [m for m in MISTAKES if m.function == function]
        for mistake in sorted(known, key=lambda m: m.file != f"{method}.py"):
            wrong, _ = outcome(mistakes.patched(mistake), function)
            if wrong and agree(found, wrong):
                return mistake.name
    return None


def difference(source, method, function):
    """Where the function in this source differs from ours: a sentence, or None."""
    found, _ = outcome(source, function)
    ours, _ = outcome((ROOT / f"{method}.py").read_text(), function)
    for a, b in zip(found, ours):
        if not agree([a], [b]):
            return f"{function} {shown(*a)} where ours {shown(*b)}"
    return None if len(found) == len(ours) else f"{function} returns other values than ours"


def shown(verb, x):
    """A few of the numbers of a tensor."""
    numbers = ", ".join(f"{v:.4g}" for v in x.flatten()[:3].tolist())
    return f"{verb} {numbers}{', ...' if x.numel() > 3 else ''} of shape {tuple(x.shape)}"


# ---- files ---------------------------------------------------------------------------------------


@cache
def blank(method, function):
    """The source of a method without the body of one function; its docstring stays."""
    source = (ROOT / f"{method}.py").read_text()
    node = ast.parse(source)
    for name in function.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == name)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    lines = source.splitlines(keepends=True)
    stop = " " * body[0].col_offset + "raise NotImplementedError\n"
    return "".join([*lines[: body[0].lineno - 1], stop, *lines[node.end_lineno :]])


@cache
def tests_of(method, function):
    """The tests that grade a function: those of its docstring and of its known mistakes."""
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    node = next(n for n in tree.body if getattr(n, "name", "") == function.split(".")[0])
    named = re.findall(r"Test: (test_\w+)", ast.get_docstring(node))
    tests = [f"tests/test_{method}.py::{name}" for name in named]
    tests += [m.test for m in MISTAKES if (m.file, m.function) == (f"{method}.py", function)]
    return list(dict.fromkeys(tests))


def files(folder):
    """The exercises of a folder."""
    return [f for f in sorted(Path(folder).glob("*.py")) if f.read_text().startswith("# Exercise")]


def grade(file):
    """What is wrong with the exercise in this file: a sentence, or None if its tests pass."""
    source = file.read_text()
    function, method = re.match(HEADER.format(r"(\S+)", r"(\w+)", ".+"), source).groups()
    if fault := diagnose(source, method, function):
        return fault
    reports = mistakes.outcome({method: source}, tests_of(method, function))
    for test, why in reports.failed.items():
        fault = difference(source, method, function) or why.strip().splitlines()[-1]
        return f"{test.split('::')[-1]} fails: {fault}"
    return None


def write(folder, name, method, function, again):
    """Write an exercise to folder/name.py."""
    source = HEADER.format(function, method, name) + blank(method, function)
    file = Path(folder) / f"{name}.py"
    if file.exists() and file.read_text() != source and not again:
        common.fail(f"{file} has work in it: --again overwrites it")
    common.write(file, source)
    common.write(Path(folder) / "test_exercises.py", GRADER.format(root=str(ROOT)))
    return file


def main(argv=None):
    p = common.Parser(description=__doc__.split("\n")[0])
    p.add_argument("method", nargs="?", help="simclr, moco, ...")
    p.add_argument("function", nargs="?", help="nt_xent, ...")
    p.add_argument("--all", action="store_true", help="write all exercises, one per file")
    p.add_argument("--list", action="store_true", help="list all exercises and write none")
    p.add_argument("--again", action="store_true", help="overwrite what is there")
    p.add_argument("--out", default="exercises", help="folder (exercises)")
    args = p.parse_args(argv)
    if args.list:
        return print("\n".join(map(" ".join, COURSE)))
    chosen = [(args.method, args.method, args.function)]
    if args.all:
        chosen = [(f"{i:02}_{m}_{f.replace('.', '_')}", m, f) for i, (m, f) in enumerate(COURSE, 1)]
    elif (args.method, args.function) not in COURSE:
        common.fail("which exercise? give METHOD FUNCTION, as in --list, or --all")
    shared.folder(args.out)
    for name, method, function in chosen:
        file = write(args.out, name, method, function, args.again)
        print(f"{file}: write {function}; graded by {', '.join(tests_of(method, function))}")
    print(f"python -m pytest {args.out}")


if __name__ == "__main__":
    main()
