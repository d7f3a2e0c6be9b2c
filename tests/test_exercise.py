"""Exercises: our bodies pass, and each planted mistake gets its name."""

import re
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
    """A right body, a planted mistake, another mistake, and none, in files named as the methods."""
    folder = tmp_path / "exercises"
    for method, function in (("simclr", "nt_xent"), ("byol", "byol_loss"), ("moco", "info_nce"),
                             ("dinov2", "koleo")):
        _, out = quiet(exercise, [method, function, "--out", folder])
        assert f"tests/test_{method}.py::test_{function}_equation" in out
        assert f"python -m pytest {folder}" in out
    filled(folder / "simclr.py", body_of("simclr", "nt_xent"))
    wrong = body_of("byol", "byol_loss").replace("z.detach() if stop_gradient else z", "z")
    filled(folder / "byol.py", wrong)
    doubled = body_of("moco", "info_nce").replace("return ", "return 2 * ")
    filled(folder / "moco.py", doubled)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", str(folder)], text=True,
                         capture_output=True, cwd=tmp_path)
    said = dict(re.findall(r"^_+ test_exercise\[(\w+)\] _+\n(.+)\n", run.stdout, re.M))
    assert run.returncode == 1 and said.keys() == {"byol", "moco", "dinov2"}, run.stdout
    assert said["byol"] == "your target gets a gradient"
    assert said["dinov2"] == "koleo is still to be written"
    assert re.fullmatch(r"test_info_nce_equation fails: info_nce gives \S+ .*ours gives .*",
                        said["moco"])


def test_a_body_that_is_no_python_or_stops_or_is_of_another_shape():
    source = exercise.blank("simclr", "lr_at")

    def with_body(body):
        return source.replace(" raise NotImplementedError", body), "simclr", "lr_at"

    assert "is not Python" in exercise.diagnose(*with_body(" return ("))
    assert "stops with NameError: " in exercise.diagnose(*with_body(" return x"))
    for body, words in ((" return torch.zeros(2)", "gives 0, 0 of shape (2,) where ours gives"),
                        (" return peak / 5, 5", "gives 5 of shape () where ours leaves")):
        assert exercise.diagnose(*with_body(body)) is None
        assert words in exercise.difference(*with_body(body))


def test_course(tmp_path, capsys):
    exercise.main(["--all", "--out", str(tmp_path)])
    found = exercise.files(tmp_path)
    assert len(found) == len(exercise.COURSE) and found[0].name == "01_simclr_lr_at.py"
    assert exercise.grade(found[1]) == "ema_update is still to be written"
    work = found[0].read_text().replace("raise NotImplementedError", "return peak")
    found[0].write_text(work)
    again = ["--all", "--out", str(tmp_path)]
    assert "--again" in fails(lambda: exercise.main(again), capsys)
    assert found[0].read_text() == work
    exercise.main([*again, "--again"])
    assert exercise.grade(found[0]) == "lr_at is still to be written"
    for argv in ([], ["simclr"], ["simclr", "train"], ["weak", "nt_xent"]):
        assert "--list" in fails(lambda argv=argv: exercise.main(argv), capsys)
