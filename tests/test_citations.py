"""Every citation is in citations.csv, with its source and what that says there.

Cited are equations, sections, tables, figures, algorithms and appendices of papers, and headings
and sentences of the slides, quoted after "Slides:" or "slide", or in the README's table beside
them. In citations.csv a citation has the name of its paper, if that stands before it, and one
number. An entry is looked up, never remembered.
"""

import csv
import re
from collections import Counter

from tools import METHODS, ROOT

PAPERS = "slide|v1|v2|SimCLR|BYOL|SimSiam|DINO|BEiT|RotNet|Pathak|Zhang|Grill|van den Oord"
NAME = rf"(?:\b({PAPERS})(?:'s paper|'s| et al\.)?(?: \d{{4}})?,? )?"
NUMBER = r"(?:[A-Z]\.)?\d+(?:\.\d+)*|[A-Z]\b"
CITED = re.compile(rf"{NAME}\b([Ee]quation|Section|Table|Figure|Algorithm|Appendix)s? "
                   rf"((?:{NUMBER})(?:(?:, | and )(?:{NUMBER}))*)")
SHORT = re.compile(r"\b(?:[Ee]qn?|[Ff]ig|[Ss]ec|[Tt]ab|[Aa]lg|[Aa]pp)s?\. ?(?:\d|[A-Z]\b)")
SOURCE = re.compile(r"slides|arXiv \d{4}\.\d{4,5}, .*")
FILES = [f"{name}.py" for name in [*METHODS, "common"]] + ["README.md"]
FILES += [f"lessons/{f.name}" for f in sorted((ROOT / "lessons").glob("*.py"))]


def citations(text):
    """-> {"equation 1", "DINO Section 5.3", 'slide "How does DINO work?"', ...}"""
    quoted = re.findall(r"^\| (\w[^|]*?) \|.*`test_", text, re.M)  # README: a row that names a test
    for part in re.findall(r"Slides:(.*?)(?:\bPapers?[:,]|\n\n|$)", text, re.S):
        quoted += re.findall('"([^"]+)"', part)
    text = re.sub(r"\s*\n\s*(# )?", " ", text)  # comments have several lines, too
    quoted += re.findall(r'\bslides? "([^"]+)"', text)
    found = {f'slide "{" ".join(words.split())}"' for words in quoted}
    for name, kind, numbers in CITED.findall(text):
        kind = kind.replace("Eq", "eq")
        found |= {f"{name} {kind} {number}".strip() for number in re.findall(NUMBER, numbers)}
    return found


def wrong(texts, rows):
    """Texts by file, rows of the table -> what does not fit."""
    found = {(file, c) for file, text in texts.items() for c in citations(text)}
    listed = Counter((file, row["citation"]) for row in rows for file in row["files"].split())
    faults = [f"{file}: {c} is not in the table" for file, c in sorted(found - listed.keys())]
    faults += [f"{file} does not cite {c}" for file, c in sorted(listed.keys() - found)]
    faults += [f"{file}: {c} is twice in the table" for (file, c), n in listed.items() if n > 1]
    faults += [f"{file}: {short} in full" for file in texts for short in SHORT.findall(texts[file])]
    for row in rows:
        number = "" if '"' in row["citation"] else row["citation"].split()[-1]
        place = row["source"].removeprefix("slides").split(",")[-1].split()
        if not SOURCE.fullmatch(row["source"]) or place and number not in place:
            faults.append(f"{row['citation']}: {row['source']} is another place or none")
        if len(row["says"].split()) < 3:
            faults.append(f"{row['citation']}: what does it say?")
    return faults


def table():
    with open(ROOT / "tests" / "citations.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_citation_is_in_the_table():
    assert not wrong({file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}, table())


TEXT = '''"""Slides: "A heading", "Another
one". Paper: Section 4.1, "not of the slides", Figures 5 and B.6.

f (DINO's paper, equation 3; slide "How does
it work?"), (Zhang et al. 2016, equations 2 and 3), Appendix G.3, (v1, Section 3.3).
"""
OPTIONS = {"a": (1, "as in Table 2")}  # slide Algorithm 1, and in Section
# 5: equation, Table x, Appendix
'''
ROWS = [{"files": "a.py b.py", "citation": "DINO equation 3",
         "source": "arXiv 2104.14294, equation 3", "says": "the sum over pairs"},
        {"files": "a.py", "citation": 'slide "Why?"', "source": "slides", "says": "heading of it"}]


def test_the_rules_can_fail():
    assert citations(TEXT) == {
        'slide "A heading"', 'slide "Another one"', 'slide "How does it work?"', "Section 4.1",
        "Figure 5", "Figure B.6", "DINO equation 3", "Zhang equation 2", "Zhang equation 3",
        "Appendix G.3", "v1 Section 3.3", "Table 2", "slide Algorithm 1", "Section 5"}
    assert citations("| Why? | it | `test_why` |\n| No | it |\n") == {'slide "Why?"'}
    texts = {"a.py": 'DINO, equation 3; slide "Why?"', "b.py": "DINO's equation 3"}
    assert not wrong(texts, ROWS)
    for change in ({"b.py": "equation 3"}, {"b.py": "DINO, equation 4"}, {"b.py": ""},
                   {"a.py": 'DINO, equation 3; slide "How?"'}, {"c.py": "Table 2"},
                   {"c.py": "Fig. 2"}):
        assert wrong(texts | change, ROWS), change
    assert wrong(texts, [*ROWS, ROWS[1]])
    for key, value in (("source", "arXiv 2104.14294, equation 4"), ("source", "memory"),
                       ("source", "arXiv 2104.14294"), ("says", "")):
        assert len(wrong(texts, [ROWS[0] | {key: value}, ROWS[1]])) == 1, (key, value)
