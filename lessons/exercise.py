"""Learn by doing: a method's file without the body of one function, which you write.

    python lessons/exercise.py simclr nt_xent      writes exercises/16_simclr_nt_xent.py
    python -m pytest exercises                     says what is wrong with it, in a sentence
    python lessons/exercise.py --all               a course: one exercise per file, easy ones first
    python -m pytest exercises -x                  the first that is not right yet
    python lessons/exercise.py --list

The docstring of the function says what it does, mostly as an equation. Your function gets the
same random inputs as ours and as versions of ours with a known mistake (tests/mistakes.py): if the
first call where it differs from ours gives what one of these gives, gradients and changed inputs
included, you have made that mistake. Otherwise you are told what the call gives, and which test
failed.
"""

import ast
import contextlib
import copy
import importlib
import inspect
import itertools
import re
import shlex
import signal
import sys
import threading
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import mistakes
from mistakes import MISTAKES, ROOT

import common
from lessons import shared

COURSE = """simclr lr_at, byol m_at, dino cosine, dino tau_at, weak keep_rate, byol ema_update,
    dino update_center, byol byol_loss, pretext rotate, pretext cross_entropy,
    pretext classification, pretext masked_l2, pretext cpc_loss, moco info_nce,
    moco dequeue_and_enqueue, simclr nt_xent, dino entropy, dino H, dino dino_loss,
    pretext rebalance, pretext soft_cross_entropy, ibot patch_loss, ibot ibot_loss,
    dinov2 distillation, dinov2 class_loss, dinov2 masked_loss, dinov2 mean_entropy, dinov2 koleo,
    dinov2 sinkhorn_knopp, dinov2 targets, weak noise_aware_loss, weak fixmatch_loss,
    weak transition, weak small_loss, weak coteaching_losses, weak bag_loss, weak attention_pool,
    weak posterior, weak triplets, simclr LARS.step, moco SplitBatchNorm2d.forward"""
COURSE = [tuple(exercise.split()) for exercise in COURSE.split(",")]
NAMES = {f"{i:02}_{m}_{f.replace('.', '_')}": (m, f) for i, (m, f) in enumerate(COURSE, 1)}
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


def unit(*shape, seed=0):
    """Rows of length 1 that require a gradient."""
    return F.normalize(plain(*shape, seed=seed), dim=1).requires_grad_()


def net(seed):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    made(plain(5, 3, seed=seed))  # other running statistics for every seed
    return made


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
    return [*tensors(out), norm.running_mean, norm.running_var]


OBJECTS = {"LARS.step": run_lars, "SplitBatchNorm2d.forward": run_split_norm}


def times(*rest):
    """Arguments of a schedule at some of its 20 steps."""
    return [(step, 20, *rest) for step in (0, 1, 4, 5, 9, 10, 13, 19)]


MASK = torch.tensor([[True, False, True, True, False], [False] * 5, [True] + [False] * 4])
STUDENT, TEACHER = [z(4, 6, seed=i) for i in range(3)], [z(4, 6, seed=i + 3) for i in range(2)]
BOTH = [plain(1, 1, 6, seed=9)[0], 0.1, 0.05]  # centre, tau_s, tau_t
PATCHES = [[z(3, 5, 6, seed=i), z(3, 5, 6, seed=i + 1)] for i in (20, 30)]
THERE = torch.arange(5) < torch.tensor([[5], [2], [1]])  # which places of three bags hold an image
VOTES = ((plain(200, 1) > 0) ^ (plain(200, 4, seed=1) < torch.tensor([-1, -1, -0.5, 0.7]))).long()
VOTES[plain(200, 4, seed=2) > 1] = -1  # abstains
RIGHT = plain(4, 5).argmax(1)  # labels for these logits
HALF_RIGHT = (RIGHT + torch.tensor([0, 0, 1, 2])) % 5
INPUTS = {  # by function: arguments of some calls
    "lr_at": times(5, 0.3) + times(0, 0.3),
    "m_at": times(0.9) + times(0.0),
    "cosine": times(0.04, 0.4),
    "tau_at": times(0.07, 0.3) + times(0.02, 0.3) + times(0.07, 0.0),
    "ema_update": [(net(0), net(1), 0.9), (net(0), net(1), torch.tensor(0.3))],
    "update_center": [(plain(1, 6), plain(4, 6, seed=1), 0.9)],
    "dequeue_and_enqueue": [(plain(3, 8), 2, plain(4, 3)), (plain(3, 8), 6, plain(4, 3))],
    "byol_loss": [(z(4, 3), z(4, 3, seed=1)), (z(4, 3), z(4, 3, seed=1), False)],
    "rotate": [(plain(2, 3, 4, 4),), (plain(2, 3, 4, 4), False)],
    "cross_entropy": [(z(4, 5), HALF_RIGHT), (z(4, 5), q(4, 5, seed=2))],
    "classification": [(z(4, 5), HALF_RIGHT)],
    "masked_l2": [(z(2, 3, 4, 4), z(2, 3, 4, 4, seed=1), plain(2, 1, 4, 4, seed=2) > 0)],
    "cpc_loss": [(z(4, 3), z(4, 3, seed=1))],
    "soft_cross_entropy": [(z(2, 5, 3, 3), plain(2, 5, 3, 3, seed=2).softmax(1), q(5, seed=1))],
    "rebalance": [(q(5),), (q(5), 0.2)],
    "info_nce": [(unit(4, 3), unit(4, 3, seed=1), unit(8, 3, seed=2).detach().T, 0.2)],
    "nt_xent": [(z(4, 3), z(4, 3, seed=1), 0.5), (z(4, 3), z(4, 3, seed=1), 1e-3),
                (z(5, 3), z(5, 3, seed=1), 0.5)],
    "H": [(z(4, 6), z(4, 6, seed=1), *BOTH)],
    "entropy": [(z(4, 6), BOTH[0], 0.5)],
    "dino_loss": [(STUDENT, TEACHER, *BOTH)],
    "patch_loss": [(z(3, 5, 6), z(3, 5, 6, seed=1), MASK, plain(1, 1, 6, seed=2), 0.5, 0.3)],
    "ibot_loss": [(STUDENT, TEACHER, *PATCHES, [MASK, MASK.flip(0)], BOTH[0],
                   plain(1, 1, 6, seed=2), 0.5, 0.3, 0.2)],
    "distillation": [(z(4, 6), q(4, 6, seed=1).requires_grad_(), 0.5)],
    "class_loss": [(STUDENT, [q(4, 6, seed=7), q(4, 6, seed=8)], 0.5)],
    "masked_loss": [(z(4, 6), q(4, 6, seed=1), 2 * q(4), 0.5)],
    "koleo": [(z(5, 3),)],
    "sinkhorn_knopp": [(z(5, 4), 0.5), (z(5, 4), 1e-3), (z(5, 4), 0.5, 2),
                       (z(5, 4), 0.5, 3, lambda x: torch.cat([x, x.flip(1)]))],
    "targets": [(z(5, 4), plain(1, 4), 0.5, how, *gather) for how, *gather in (
        ("sinkhorn",), ("center",), ("sinkhorn", lambda x: torch.cat([x, x.flip(1)])))],
    "mean_entropy": [(q(4, 6),), (torch.eye(4).double(),)],
    "keep_rate": [(epoch, 0.4, 5) for epoch in (0, 1, 3, 5, 9)],
    "transition": [("symmetric", 0.5, 4), ("pair", 0.45, 5)],
    "noise_aware_loss": [(z(4, 5), q(4, 5, seed=1))],
    "bag_loss": [(z(3, 5), plain(3, 5, seed=1) > 0, THERE)],
    "attention_pool": [(z(3, 5, 4), THERE, z(3, 4, seed=1), z(3, seed=2), *U)
                       for U in ((), (z(3, 4, seed=3),))],
    "posterior": [(torch.tensor([[0, -1, 2], [1, 1, -1], [-1, 0, 0]]), q(3, 3, 4))],
    "triplets": [(VOTES,)],
    "small_loss": [(plain(9), 0.7), (plain(20), 0.55), (plain(9), 0.0)],
    "coteaching_losses": [(z(9), z(9, seed=1), 0.7)],
    "fixmatch_loss": [((3 * plain(8, 4)).requires_grad_(), z(8, 4, seed=1), 0.8)],
}

# ---- what a function does to them ----------------------------------------------------------------


class Call(NamedTuple):
    """One call of a function."""

    text: str  # "lr_at(0, 20, 5, 0.3)"
    kind: str  # "a tensor or number", ...
    gives: list  # tensors
    types: list  # their dtypes
    gradients: list  # (argument, tensor), of the sum of what it gives; None: no gradient, or 0
    leaves: list  # (argument, tensor, whether it is another one than before)


def tensors(x):
    """All numbers in x, in order."""
    if isinstance(x, dict):
        x = [x[k] for k in sorted(x)]
    if isinstance(x, list | tuple):
        return [t for part in x for t in tensors(part)]
    if isinstance(x, nn.Module):
        return [t.detach() for t in x.state_dict().values()]
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, int | float):
        return [torch.tensor(x, dtype=torch.double)]
    return []  # a generator, a function


def kind_of(x):
    """What a function returns, in words."""
    if x is None:
        return "nothing"
    if isinstance(x, torch.Tensor | int | float):
        return "a tensor or number"
    if isinstance(x, dict):
        return f"a dict with the keys {', '.join(map(str, sorted(x)))}"
    if isinstance(x, list | tuple):
        other = {kind_of(part) for part in x} - {"a tensor or number"}
        return f"a tuple of {len(x)}" + (f" with {', '.join(sorted(other))}" if other else "")
    return f"a {type(x).__module__}.{type(x).__name__}".replace("builtins.", "")


def shown(name, x):
    """An argument in the text of a call."""
    if isinstance(x, torch.Tensor) and x.ndim:
        return f"{name} {tuple(x.shape)}"
    return name if isinstance(x, torch.Tensor | nn.Module | list) or callable(x) else repr(x)


def call(module, function, given):
    """Call the function of this module with copies of these arguments -> Call."""
    if function in OBJECTS:
        out = OBJECTS[function](module)
        return Call(function, "", [*map(numbers, out)], [], [], [])
    f, args = getattr(module, function), copy.deepcopy(given)
    named = [*zip(inspect.signature(f).parameters, args)]
    text = f"{function}({', '.join(shown(name, x) for name, x in zip(dict(named), given))})"
    try:
        result = f(*args)
    except BaseException as error:
        error.call = text
        raise
    out = tensors(result)
    inputs = [(name, t) for name, x in named for t in tensors(x) if t.requires_grad]
    total = sum(t.sum() for t in out if t.requires_grad)
    found = [None] * len(inputs)
    if isinstance(total, torch.Tensor):
        found = torch.autograd.grad(total, [t for _, t in inputs], allow_unused=True)
    gradients = [(name, None if g is None or not g.any() else numbers(g))
                 for (name, _), g in zip(inputs, found)]
    leaves = [(name, numbers(t), not close(numbers(t), numbers(old)))
              for (name, x), before in zip(named, given)
              for t, old in zip(tensors(x), tensors(before))]
    types = [t.dtype for t in out]
    return Call(text, kind_of(result), [*map(numbers, out)], types, gradients, leaves)


def numbers(t):
    return t.detach().double()


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


class Missing(Exception):
    """The file has no such function."""


@contextlib.contextmanager
def fenced(seconds):
    """End what takes longer with a TimeoutError, where signals can, and put PyTorch's settings
    back."""

    def stop(number, frame):
        raise TimeoutError(f"it does not end within {seconds} seconds")

    alarm = hasattr(signal, "SIGALRM")
    alarm = alarm and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if alarm else None
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    if alarm:
        signal.alarm(seconds)
    try:
        yield
    finally:
        if alarm:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


@cache
def outcome(source, function):
    """-> a Call for each of its inputs and None, or None and the error that stopped it."""
    module = {}
    try:
        with fenced(60):
            exec(compile(source, "exercise", "exec"), module)
            if function.split(".")[0] not in module:
                raise Missing
            module = SimpleNamespace(**module)
            return [call(module, function, args) for args in INPUTS.get(function, [()])], None
    except (Exception, SystemExit) as error:  # a learner's code may do anything
        return None, error


# ---- what is wrong -------------------------------------------------------------------------------


def fault(mine, ours):
    """How a call of the learner's function differs from that of ours: words, or None."""
    if mine.kind != ours.kind:
        return f"returns {mine.kind} instead of {ours.kind}"
    for x, y in zip(mine.gives, ours.gives):
        if x.shape != y.shape:
            return f"gives the shape {tuple(x.shape)} instead of {tuple(y.shape)}"
    for x, y in zip(mine.gives, ours.gives):
        if not close(x, y):
            return f"gives {apart(x, y)}"
    for (name, x), (_, y) in zip(mine.gradients, ours.gradients):
        if y is None and x is not None:
            return f"gives a gradient to {name}, which should get none"
        if x is None and y is not None:
            return f"gives no gradient to {name}, which should get one"
    for (name, x), (_, y) in zip(mine.gradients, ours.gradients):
        if x is not None and not close(x, y):
            return f"gives the right value, but to {name} the gradient {apart(x, y)}"
    for (name, x, changed), (_, y, should_change) in zip(mine.leaves, ours.leaves):
        if changed != should_change:
            return f"{'changes' if changed else 'does not change'} its argument {name} in place"
        if not close(x, y):
            return f"leaves its argument {name} with {apart(x, y)}"
    return None


def apart(x, y):
    """The first numbers that differ, and how they are related, if all are."""
    i = (~torch.isclose(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)).nonzero()[0].tolist()
    a, b, digits = x[tuple(i)].item(), y[tuple(i)].item(), 4
    while digits < 17 and f"{a:.{digits}g}" == f"{b:.{digits}g}":
        digits += 1
    text = f"{a:.{digits}g} instead of {b:.{digits}g}" + (f" at {i}" if i else "")
    large = y.abs() > 1e-6
    factor = (x[large] / y[large]).median().item() if large.any() else 1.0
    if not close(x, factor * y):
        return text
    if abs(factor + 1) < 1e-6:
        return f"{text}: the sign is wrong"
    if abs(factor - 2) < 1e-6 or abs(factor - 0.5) < 1e-6:
        return f"{text}: a factor of 2"
    for n, words in ((factor, "times as much: a sum for a mean?"),
                     (1 / (factor or 1), "times too little: a mean for a sum?")):
        if x.ndim == 0 and 2.5 < n < 1e6 and abs(n - round(n)) < 1e-5:
            return f"{text}: {round(n)} {words}"
    return text


def exchanged(found, method, function):
    """Words for two numbers among the arguments that were taken for each other in all calls, or
    None."""
    if function in OBJECTS:
        return None
    module, inputs = importlib.import_module(method), INPUTS[function]
    names = [*inspect.signature(getattr(module, function)).parameters]
    places = [i for i, x in enumerate(inputs[0]) if type(x) is float]
    for i, j in itertools.combinations(places, 2):
        alike = []
        for mine, given in zip(found, inputs):
            swapped = [*given]
            swapped[i], swapped[j] = given[j], given[i]
            ours = call(module, function, swapped)
            alike.append(not fault(mine, ours._replace(leaves=mine.leaves)))
        if all(alike):
            return f"takes {names[i]} for {names[j]}"
    return None


def both(source, method, function):
    """The calls of the function in this source, and those of ours."""
    sources = source, (ROOT / f"{method}.py").read_text()
    return [*zip(*(outcome(text, function)[0] for text in sources))]


def diagnose(source, method, function):
    """What is known to be wrong with the function in this source: a sentence, or None."""
    found, error = outcome(source, function)
    if blank(method, function) in source:
        return f"{function} is still to be written"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno or 1} is not Python: {error.msg}"
    if isinstance(error, Missing):
        return f"the file has no {function.split('.')[0]}"
    if error:
        return stopped(error, function)
    wrong = [i for i, calls in enumerate(both(source, method, function)) if fault(*calls)]
    known = [m for m in MISTAKES if m.function == function] if wrong else []
    known.sort(key=lambda m: m.file != f"{method}.py")
    for last in [len(found), *(i + 1 for i in wrong[:1])]:  # alike in all calls, or up to here
        for mistake in known:
            theirs, _ = outcome(mistakes.patched(mistake), function)
            if theirs and not any(map(fault, found[:last], theirs)):
                return mistake.name
    return None


def difference(source, method, function):
    """Where the function in this source first differs from ours: a sentence, or None."""
    calls = both(source, method, function)
    for mine, ours in calls:
        if words := fault(mine, ours):
            swap = exchanged([mine for mine, _ in calls], method, function)
            return f"{ours.text} {swap or words}"
    for mine, ours in calls:
        for a, b in zip(mine.types, ours.types):
            if a != b and torch.double in (a, b):
                return f"{ours.text} gives {a} instead of {b}".replace("torch.", "")
    return None


def stopped(error, function):
    """The line of the exercise at which it stopped, the error, and the call."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == "exercise"]
    message = " ".join(str(error).split())
    text = f"stops with {type(error).__name__}" + (f": {message}" if message else "")
    text = text if len(text) < 200 else text[:200] + " ..."
    if frames and frames[-1].name == "<module>":
        return f"line {frames[-1].lineno} {text}"
    where = f"line {frames[-1].lineno}: " if frames else ""
    return f"{where}{getattr(error, 'call', function)} {text}"


def gives_the_same(mine, ours):
    """Whether two calls give the same numbers, whatever they do to gradients and inputs."""
    mine, ours = (c._replace(gradients=[], leaves=[]) for c in (mine, ours))
    return fault(mine, ours) is None


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
    return [f for f in sorted(Path(folder).glob("*.py")) if f.stem in NAMES]


def grade(file):
    """What is wrong with the exercise in this file: a sentence, or None if its tests pass."""
    try:
        source = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        return "the file is not in UTF-8"
    method, function = NAMES[file.stem]
    if known := diagnose(source, method, function):
        return known
    different = difference(source, method, function)
    try:
        with fenced(300):
            reports = mistakes.outcome({method: source}, tests_of(method, function))
    except TimeoutError as error:
        return f"in the tests {error}"
    for test, why in reports.failed.items():
        return f"{test.split('::')[-1]} fails: {different or failing_line(why, method, function)}"
    calls = both(source, method, function)
    if function != "small_loss" and not all(gives_the_same(*pair) for pair in calls):
        return f"the tests pass, but {different}"  # small_loss may be in any order
    return None


def failing_line(why, method, function):
    """The statement of a test at which it failed, or the line of the exercise at which it stopped
    there, and the error. why: pytest's short form."""
    error = next((line[1:].strip() for line in why.splitlines() if line.startswith("E ")), "")
    frames = re.findall(r"^(\S+):(\d+): in .*\n((?:    .*\n)*)", why, re.M)
    own = [number for file, number, _ in frames if file == f"<{method}>"]
    if own:
        return f"line {own[-1]}: {function} stops there with {error}"
    lines = [line.strip() for file, _, code in frames if "test_" in file
             for line in code.splitlines() if line.strip(" ^~")]
    place = f"`{lines[-1]}`" if lines else "this test"
    text = f"your function agrees with ours, but not in {place}"
    return text if error in ("", "AssertionError") else f"{text}: {error}"


def write(folder, name, again):
    """Write an exercise to folder/name.py, unless there is work in it -> the file."""
    method, function = NAMES[name]
    source = HEADER.format(function, method, name) + blank(method, function)
    file = Path(folder) / f"{name}.py"
    if file.exists() and file.read_text("utf-8", "replace") != source and not again:
        print(f"{file} has work in it and is kept; --again overwrites it")
    else:
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
    chosen = [name for name, exercise in NAMES.items()
              if args.all or exercise == (args.method, args.function)]
    if not chosen:
        common.fail("which exercise? give METHOD FUNCTION, as in --list, or --all")
    shared.folder(args.out)
    for name in chosen:
        file = write(args.out, name, args.again)
        tests = ", ".join(tests_of(*NAMES[name]))
        print(f"{file}: write {NAMES[name][1]}; graded by {tests}")
    print(f"python -m pytest {shlex.quote(args.out)}" + " -x" * args.all)


if __name__ == "__main__":
    main()
