"""The museum of bugs: known ways in which implementations of these methods went wrong, each as a
patch of a line or two and the test that must fail with it. lessons/museum.md is written from this."""

import ast
import contextlib
import io
import linecache
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Mistake(NamedTuple):
    name: str  # what the learner did, in the second person
    file: str  # "simclr.py"
    function: str  # "nt_xent", "Class.method", or "train"
    old: str  # occurs exactly once in that function's source
    new: str
    test: str  # "tests/test_simclr.py::test_name", which must fail
    saw: str  # what one saw
    record: str  # "owner/repository#number", a commit or a paper; "": none found


MISTAKES = [
    Mistake("your loss counts each view's similarity with itself", "simclr.py", "nt_xent",
            "    s.fill_diagonal_(-math.inf)  # k != i\n", "",
            "tests/test_simclr.py::test_nt_xent_equation",
            "The loss stays near its value of chance: each view is its own nearest neighbour.", ""),
    Mistake("your loss takes the neighbouring row for the positive", "simclr.py", "nt_xent",
            ".roll(len(z1))", ".bitwise_xor(1)",
            "tests/test_simclr.py::test_nt_xent_equation",
            "Other images are drawn together, their own views are pushed apart.", ""),
    Mistake("your loss divides by the temperature twice", "simclr.py", "nt_xent",
            "z.T / tau ", "z.T / tau**2 ",
            "tests/test_simclr.py::test_nt_xent_equation",
            "The best temperature comes out as the square root of the paper's.", ""),
    Mistake("your loss does not normalise the embeddings", "simclr.py", "nt_xent",
            "F.normalize(torch.cat([z1, z2]), dim=1)", "torch.cat([z1, z2])",
            "tests/test_simclr.py::test_nt_xent_equation",
            "The loss falls by longer vectors, or is NaN.", ""),
    Mistake("your queries and keys are divided by no temperature", "moco.py", "info_nce",
            "torch.cat([l_pos, l_neg], dim=1) / tau", "torch.cat([l_pos, l_neg], dim=1)",
            "tests/test_moco.py::test_info_nce_equation",
            "The loss hardly falls below its value of chance.", ""),
    Mistake("you update the momentum encoder in the wrong direction", "moco.py", "ema_update",
            "1 - m,", "m,",
            "tests/test_moco.py::test_ema_update",
            "The keys follow at once, and are no longer consistent over the queue.", ""),
    Mistake("your target gets a gradient", "byol.py", "byol_loss",
            "z.detach() if stop_gradient else z", "z",
            "tests/test_byol.py::test_byol_loss_equation",
            "The loss falls to 0 within a few steps: all images get the same vector.", ""),
    Mistake("you weight the target the wrong way round", "byol.py", "ema_update",
            "1 - m,", "m,",
            "tests/test_byol.py::test_ema_update",
            "The target is nearly the online network itself, and learning is unstable.", ""),
    Mistake("you take the teacher's centre off the student", "dino.py", "H",
            "F.log_softmax(s / tau_s, dim=1)", "F.log_softmax((s - center) / tau_s, dim=1)",
            "tests/test_dino.py::test_h_equation",
            "Student and teacher agree on one output for all images.", ""),
    Mistake("your student and teacher see the same view", "dino.py", "dino_loss",
            "t_sum - t[j] if j < len(t) else t_sum", "t_sum",
            "tests/test_dino.py::test_dino_loss_equation",
            "The loss falls well while the features stay poor.", ""),
    Mistake("your centre forgets the past in place of the present", "dino.py", "update_center",
            "m * center + (1 - m) * teacher", "(1 - m) * center + m * teacher",
            "tests/test_dino.py::test_center",
            "The centre jumps from batch to batch, the entropy of the teacher with it.", ""),
    Mistake("your Sinkhorn iteration ends with the columns in place of the rows", "dinov2.py",
            "sinkhorn_knopp",
            "        Q -= Q.logsumexp(1, keepdim=True)\n    return",
            "        Q -= Q.logsumexp(1, keepdim=True)\n    Q -= Q.logsumexp(0, keepdim=True)\n    return",
            "tests/test_dinov2.py::test_sinkhorn_equation",
            "The targets are no distributions, the loss is off by a factor.", ""),
    Mistake("your KoLeo term finds each image nearest to itself", "dinov2.py", "koleo",
            ".detach().fill_diagonal_(-2.0)", ".detach()",
            "tests/test_dinov2.py::test_koleo_equation",
            "The term is a constant 18 without a useful gradient.", ""),
]


def span(source, function):
    """Where the source of "name" or "Class.name" begins and ends in that of its file."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    lines = source.splitlines(keepends=True)
    return len("".join(lines[:first])), len("".join(lines[: node.end_lineno]))


def patched(mistake):
    """The source of the mistake's file with the mistake in it."""
    source = (ROOT / mistake.file).read_text()
    start, end = span(source, mistake.function)
    if source[start:end].count(mistake.old) != 1:
        raise ValueError(f"{mistake.old!r} is not exactly once in {mistake.function}")
    return source[:start] + source[start:end].replace(mistake.old, mistake.new) + source[end:]


@contextlib.contextmanager
def in_memory(sources):
    """Import these {name: source} in place of the files of that name, and all others anew."""
    before = dict(sys.modules)
    ours = [name for name, module in before.items()
            if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "tests")]
    for name in ours:
        del sys.modules[name]
    try:
        for name, source in sources.items():
            module = types.ModuleType(name)
            module.__file__ = str(ROOT / f"{name}.py")
            shown = f"<{name}>"  # for inspect.getsource
            linecache.cache[shown] = len(source), None, source.splitlines(keepends=True), shown
            sys.modules[name] = module
            exec(compile(source, shown, "exec"), module.__dict__)
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name not in ours and Path(getattr(sys.modules[name], "__file__", None) or "/").parent in (ROOT, ROOT / "tests"):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in ours})


class Reports:
    """A plugin of pytest that keeps how each test went."""

    def __init__(self):
        self.failed, self.passed = {}, []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext
        elif report.when == "call":
            self.passed.append(report.nodeid)


def outcome(sources, tests, *flags):
    """Run these tests with these sources in memory -> the Reports."""
    reports = Reports()
    quiet = "-q -x --assert=plain --tb=line -p no:cacheprovider -p no:faulthandler".split()
    with in_memory(sources), contextlib.redirect_stdout(io.StringIO()) as out:
        code = pytest.main([*quiet, f"--rootdir={ROOT}", *flags, *(str(ROOT / t) for t in tests)], [reports])
    if code not in (0, 1):
        raise RuntimeError(out.getvalue())
    return reports
