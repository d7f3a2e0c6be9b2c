"""Every mistake of the museum is caught by the test that it names."""

import mistakes
import pytest
from mistakes import MISTAKES, ROOT


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_mistake_is_caught(mistake):
    reports = mistakes.outcome({mistake.file[:-3]: mistakes.patched(mistake)}, [mistake.test])
    assert [*reports.failed] == [mistake.test]


def test_without_them_all_pass():
    tests = sorted({m.test for m in MISTAKES})
    reports = mistakes.outcome({}, tests)
    assert not reports.failed and sorted(reports.passed) == tests


def test_the_page_is_the_list():
    """`python tests/mistakes.py` writes it."""
    assert (ROOT / "lessons" / "museum.md").read_text() == mistakes.museum()
    assert len({m.name for m in MISTAKES}) == len(MISTAKES)
    for m in MISTAKES:
        assert m.name.startswith(("your ", "you ")) and m.saw.endswith(".")
