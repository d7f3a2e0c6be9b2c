"""Every mistake of the museum is caught by the test that it names."""

import ast
import sys

import mistakes
import pytest
import tools
from mistakes import MISTAKES, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import mutation  # noqa: E402


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_mistake_is_caught(mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # not in requirements.txt
    reports = mistakes.outcome({mistake.file[:-3]: mistakes.patched(mistake)}, [mistake.test])
    assert [*reports.failed] == [mistake.test]


def test_without_them_all_pass():
    """Of every file the first that is named, run in the same way; the suite runs all of them."""
    tests = sorted({m.file: m.test for m in reversed(MISTAKES)}.values())
    reports = mistakes.outcome({}, tests)
    assert not reports.failed and sorted(reports.passed) == tests


def test_the_page_is_the_list():
    """`python tests/mistakes.py` writes it."""
    assert (ROOT / "lessons" / "museum.md").read_text() == mistakes.museum()
    assert len({m.name for m in MISTAKES}) == len(MISTAKES)
    for m in MISTAKES:
        assert m.name.startswith(("your ", "you ")) and m.saw.endswith(".")


def test_mutants():
    """benchmarks/mutation.py changes every loss and the step, and knows a change that kills."""
    for method in tools.METHODS:
        source = (ROOT / f"{method}.py").read_text()
        found = [*mutation.mutants(source)]
        assert {name for name, *_ in found} == {name for name, _ in mutation.regions(source)}
        assert all(changed != source for *_, changed in found)
        ast.parse(found[-1][-1])
    source = (ROOT / "simclr.py").read_text()
    changed = source.replace("/ tau  #", "* tau  #")
    assert mutation.killer("simclr", "nt_xent", changed, quick=True) == "test_nt_xent_equation"
    assert mutation.killer("simclr", "nt_xent", source, quick=True) is None
