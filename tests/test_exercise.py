"""Exercises: our bodies pass, and each planted mistake gets its name."""

import re
import shlex
import signal
import subprocess
import sys

import pytest
from mistakes import MISTAKES, ROOT, patched
from tools import fails, quiet

from lessons import exercise

KNOWN = [m for m in MISTAKES if m.function in {function for _, function in exercise.COURSE}]


def body_of(method, function):
    """What `blank` takes out, and that it is all that it takes out."""
    before, after = exercise.blank(method, function).split(" raise NotImplementedError\n")
    full = (ROOT / f"{method}.py").read_text()
    assert full.startswith(before) and full.endswith(after)
    return full[len(before) : len(full) - len(after)]


def filled(file, body):
    file.write_text(file.read_text().replace(" raise NotImplementedError\n", body))


@pytest.mark.parametrize("method, function", exercise.COURSE)
def test_our_body_passes(method, function):
    empty, full = exercise.blank(method, function), (ROOT / f"{method}.py").read_text()
    assert len(body_of(method, function).splitlines()) >= 1
    assert exercise.diagnose(full, method, function) is None
    assert exercise.difference(full, method, function) is None
    assert exercise.diagnose(empty, method, function) == f"{function} is still to be written"
    assert exercise.tests_of(method, function)


@pytest.mark.parametrize("mistake", KNOWN, ids=[m.name for m in KNOWN])
def test_mistake_is_named(mistake):
    found = exercise.diagnose(patched(mistake), mistake.file[:-3], mistake.function)
    assert found == mistake.name


def test_mistakes_of_another_file_are_known():
    """dino.py has the EMA of byol.py."""
    wrong = (ROOT / "dino.py").read_text().replace("as_tensor(1 - m,", "as_tensor(m,")
    found = exercise.diagnose(wrong, "dino", "ema_update")
    assert found in [m.name for m in KNOWN if m.function == "ema_update"]


@pytest.mark.parametrize("method", sorted({method for method, _ in exercise.COURSE}))
def test_every_loss_is_an_exercise(method):
    section = re.split(r"^# ={50,}\n# (.+)\n# ={50,}\n", (ROOT / f"{method}.py").read_text(),
                       flags=re.M)
    losses = re.findall(r"^def (\w+)", section[section.index("Loss") + 1], re.M)
    assert losses and set(losses) <= {function for _, function in exercise.COURSE}


def test_pytest_says_what_is_wrong(tmp_path):
    """A right body, a planted mistake, another mistake, and none."""
    folder = tmp_path / "exercises"
    for method, function in (("simclr", "nt_xent"), ("byol", "byol_loss"), ("moco", "info_nce"),
                             ("dinov2", "koleo")):
        _, out = quiet(exercise, [method, function, "--out", folder])
        assert f"tests/test_{method}.py::test_{function}_equation" in out
        assert f"python -m pytest {shlex.quote(str(folder))}" in out
    filled(folder / "16_simclr_nt_xent.py", body_of("simclr", "nt_xent"))
    wrong = body_of("byol", "byol_loss").replace("z.detach() if stop_gradient else z", "z")
    filled(folder / "08_byol_byol_loss.py", wrong)
    doubled = body_of("moco", "info_nce").replace("return ", "return 2 * ")
    filled(folder / "14_moco_info_nce.py", doubled)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", str(folder)], text=True,
                         capture_output=True, cwd=tmp_path)
    said = dict(re.findall(r"^_+ test_exercise\[\d+_(\w+)\] _+\n(.+)\n", run.stdout, re.M))
    assert run.returncode == 1, run.stdout
    assert said.keys() == {"byol_byol_loss", "moco_info_nce", "dinov2_koleo"}, run.stdout
    assert said["byol_byol_loss"] == "your target gets a gradient"
    assert said["dinov2_koleo"] == "koleo is still to be written"
    assert re.fullmatch(r"test_info_nce_equation fails: info_nce\(q \(4, 3\), k \(4, 3\), queue "
                        r"\(3, 8\), 0.2\) gives (\S+) instead of (\S+): a factor of 2",
                        said["moco_info_nce"])


@pytest.mark.parametrize("name, body, words", [
    ("simclr lr_at", "return (", "is not Python"),
    ("simclr lr_at", "return x", "lr_at(0, 20, 5, 0.3) stops with NameError: "),
    ("simclr lr_at", "raise SystemExit", "lr_at(0, 20, 5, 0.3) stops with SystemExit"),
    ("simclr lr_at", "return peak / warmup", "lr_at(0, 20, 0, 0.3) stops with ZeroDivisionError: "),
    ("simclr lr_at", "pass", "lr_at(0, 20, 5, 0.3) returns nothing instead of a tensor or number"),
    ("simclr lr_at", "return torch.zeros(2)", "gives the shape (2,) instead of ()"),
    ("simclr lr_at", "return peak / 5, 5", "returns a tuple of 2 instead of a tensor or number"),
    ("simclr lr_at", "return peak * step / 5", "lr_at(0, 20, 5, 0.3) gives 0 instead of 0.06"),
    ("simclr nt_xent", "s = torch.cat([z1, z2])\n    s = F.normalize(s, dim=1)\n"
     "    s = (s @ s.T / tau).exp()\n    n = len(z1)\n    p = torch.arange(2 * n).roll(n)\n"
     "    j = torch.eye(2 * n)[p].bool()\n    rest = ~j & ~torch.eye(2 * n).bool()\n"
     "    return -(s[j] / (s * rest).sum(1)).log().mean()",
     "your loss leaves the positive out of the denominator"),
    ("dino H", "t = F.softmax((t.detach() - center) / tau_s, dim=1)\n"
     "    return -(t * F.log_softmax(s / tau_t, dim=1)).sum(1).mean()", "takes tau_s for tau_t"),
    ("dino H", "t = F.softmax((t - center) / tau_t, dim=1)\n"
     "    return -(t * F.log_softmax(s / tau_s, dim=1)).sum(1).mean()",
     "gives a gradient to t, which should get none"),
    ("dino H", "t = F.softmax((t - center) / tau_t, dim=1).detach()\n"
     "    return (t * F.log_softmax(s / tau_s, dim=1)).sum(1).mean()", "the sign is wrong"),
    ("dino H", "return H(t, s, center, tau_s, tau_t)", "line 2"),
    ("dino H", "t = F.softmax((t.detach() - center) / tau_t, dim=1)\n"
     "    return -(t * F.log_softmax(s.detach() / tau_s, dim=1)).sum(1).mean()",
     "gives no gradient to s, which should get one"),
    ("byol byol_loss", "z = F.normalize(z.detach() if stop_gradient else z, dim=1)\n"
     "    return F.mse_loss(F.normalize(p, dim=1), z)", "3 times too little: a mean for a sum?"),
    ("byol byol_loss", "z = F.normalize(z.detach() if stop_gradient else z, dim=1)\n"
     "    return (F.normalize(p, dim=1) - z).square().sum(1).mean(0, keepdim=True)",
     "gives the shape (1,) instead of ()"),
    ("byol ema_update", "net_ema.load_state_dict(net.state_dict())",
     "leaves its argument net_ema with "),
    ("byol ema_update", "return net", "returns "),
    ("weak bag_loss", "return 1 - y", "mask (3, 5)) stops with "),
    ("weak transition", "import numpy\n    return numpy.eye(classes)",
     "returns a numpy.ndarray instead of a tensor or number"),
    ("weak transition", "right = torch.eye(classes)\n"
     "    wrong = right.roll(1, 1) if kind == 'pair' else (1 - right) / (classes - 1)\n"
     "    return (1 - rate) * right + rate * wrong",
     "gives float32 instead of float64"),
    ("pretext classification", "return cross_entropy(logits, y), 1.0",
     "instead of a dict with the keys accuracy, loss"),
    ("simclr nt_xent", "z = F.normalize(torch.cat([z1, z2]), dim=1)\n    s = z @ z.T / tau\n"
     "    s.fill_diagonal_(-math.inf)\n    return F.cross_entropy(s, torch.arange(len(s)))",
     "gives inf instead of "),
    ("dino tau_at", "share = min(1.0, step / (warmup * steps)) if warmup else 1.0\n"
     "    return tau_t + (1 - share) * (0.04 - tau_t)", "tau_at(0, 20, 0.02, 0.3) gives 0.04 "),
    ("pretext rebalance", "w = 1 / (0.5 * p + 0.5 / len(p))\n    return w / (p * w).sum()",
     "rebalance(p (5,), 0.2) gives "),
])
def test_sentences(tmp_path, name, body, words):
    """A wrong answer that is no planted mistake, or not in the words of one."""
    exercise.main([*name.split(), "--out", str(tmp_path)])
    file, = exercise.files(tmp_path)
    filled(file, f" {body}\n")
    text = exercise.grade(file)
    if words.startswith("line 2"):
        assert re.match(r"line \d+: H\(t .*\) stops with RecursionError: ", text)
    else:
        assert words in text and "still to be written" not in text
    assert "\n" not in text and len(text) < 250


def test_other_right_answers_pass(tmp_path):
    """Ours, and answers that are written in another way."""
    for name, body in (
            ("dinov2 targets", None),
            ("byol byol_loss", "z = z.detach() if stop_gradient else z\n    "
             "return (2 - 2 * F.cosine_similarity(p, z)).mean()"),
            ("weak small_loss", "n = max(1, math.ceil(round(keep * len(losses), 6)))\n    "
             "return losses.argsort()[:n].sort().values")):
        method, function = name.split()
        exercise.main([method, function, "--out", str(tmp_path / function)])
        file, = exercise.files(tmp_path / function)
        filled(file, f" {body}\n" if body else body_of(method, function))
        assert exercise.grade(file) is None


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="nothing can stop it on Windows")
def test_what_does_not_end_is_stopped():
    with pytest.raises(TimeoutError, match="within 1 seconds"), exercise.fenced(1):
        while True:
            pass


def test_course(tmp_path, capsys):
    exercise.main(["--all", "--out", str(tmp_path)])
    found = exercise.files(tmp_path)
    assert len(found) == len(exercise.COURSE) and found[0].name == "01_simclr_lr_at.py"
    assert exercise.grade(found[1]) == "m_at is still to be written"
    work = found[0].read_text().replace("raise NotImplementedError", "return peak")
    found[0].write_text(work)
    found[1].unlink()
    capsys.readouterr()
    exercise.main(["--all", "--out", str(tmp_path)])  # what is missing comes back
    assert "has work in it and is kept" in capsys.readouterr().out
    assert found[0].read_text() == work and found[1].exists()
    exercise.main(["simclr", "lr_at", "--out", str(tmp_path), "--again"])
    assert exercise.grade(found[0]) == "lr_at is still to be written"
    for argv in ([], ["simclr"], ["simclr", "train"], ["weak", "nt_xent"]):
        assert "--list" in fails(lambda argv=argv: exercise.main(argv), capsys)


def test_table_of_the_slides():
    """The numbers of the exercises in lessons/README.md: every one once, beside its file."""
    text = (ROOT / "lessons" / "README.md").read_text()
    found = {}
    for file, numbers in re.findall(r"^\|[^|]+\| `(\w+)\.py` \|.*\| ([\d, -]+) \|$", text, re.M):
        for part in numbers.split(", "):
            first, *last = map(int, part.split("-"))
            found |= dict.fromkeys(range(first, *(n + 1 for n in last or [first])), file)
    assert found == {n: file for n, (file, _) in enumerate(exercise.COURSE, 1)}
