"""Every mistake of the museum is caught by the test that it names."""

import mistakes
import pytest
from mistakes import MISTAKES


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_mistake_is_caught(mistake):
    reports = mistakes.outcome({mistake.file[:-3]: mistakes.patched(mistake)}, [mistake.test])
    assert list(reports.failed) == [mistake.test]


def test_without_the_mistakes_all_pass():
    tests = sorted({m.test for m in MISTAKES})
    reports = mistakes.outcome({}, tests)
    assert not reports.failed and sorted(reports.passed) == tests
