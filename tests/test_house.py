"""The rules of the house: one book, in one order, in one voice."""

import ast
import contextlib
import io
import re
import runpy
import sys
import tokenize

import pytest
from tools import METHODS, ROOT

CAPS = {"simclr": 230, "byol": 250, "moco": 290, "dino": 441, "ibot": 520, "dinov2": 607,
        "pretext": 565, "weak": 528, "common": 1211}  # lines of code
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in [*METHODS, "common"]}
README = (ROOT / "README.md").read_text()
BANNERS = ["Options", "Augmentation", "Model", "Loss", "EMA / queue / centre", "Training",
           "Evaluation", "Backbone"]
FENCES = ["model", "optimiser", "step", "log and save"]
FREE = """OPTIONS CPU crops augment MEAN STD build check train evaluate loading main VITS vit_small
    vit_base vit_large""".split()  # what each file has, in its own words
WORDS = r"\b(said|seen|caught|tally|unsure|teaching)\b"
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}
DEFINITIONS = ast.FunctionDef | ast.ClassDef
FILES = "|".join([*METHODS, "common"])
PATCHES = rf"mock\.patch|monkeypatch|setattr\((?:{FILES})\b|^ *(?:{FILES})\.\w+ = "


# ==================================================================================================
# The rules: source -> what is wrong with it
# ==================================================================================================


def bare(source):
    """The tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | DEFINITIONS) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def code_lines(source):
    """The numbers of the lines that hold code: no blanks, comments, docstrings."""
    held = {n for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type not in SKIPPED for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | DEFINITIONS) and ast.get_docstring(node) is not None:
            held -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return held


def size(source, cap, density=9):
    tree, lines = ast.parse(source), len(code_lines(source))
    nodes = sum(not isinstance(n, ast.Load | ast.Store | ast.Module) for n in ast.walk(tree))
    wrong = [f"{lines} lines of code"] if lines > cap else []
    wrong += [f"{nodes / lines:.1f} nodes a line"] if nodes > density * lines else []
    wrong += [f"{f.name} is long" for f in ast.walk(tree)
              if isinstance(f, ast.FunctionDef) and f.end_lineno - f.lineno >= 90]
    return wrong


def manner(source):
    """Tricks, and words that explain nothing."""
    code = "\n".join(row.split("#")[0] for row in source.split("\n"))
    wrong = re.findall(WORDS, code) + re.findall(r"-\(-", code)
    for node in ast.walk(ast.parse(source)):
        operands = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            operands = [node.left, node.right]
        truths = [n for n in operands if isinstance(n, ast.Compare | ast.BoolOp)
                  or isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not)]
        starred = isinstance(node, ast.Starred) and isinstance(node.value, ast.IfExp)
        if truths or starred:
            wrong.append(ast.unparse(node))
    return wrong


def imports(source, allowed):
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    allowed = allowed | set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy"}
    return sorted(found - allowed)


def frame(source):
    """Banners and fences in order, a step to be read at a glance, main last."""
    banners = re.findall(r"^# ={50,}\n# (.+)\n# ={50,}\n", source, re.M)
    wrong = [] if banners in (BANNERS, BANNERS[:-1]) else [f"banners {banners}"]
    found = {n.name: n for n in ast.parse(source).body if isinstance(n, DEFINITIONS)}
    train = ast.get_source_segment(source, found["train"]).split("\n")
    fences = [(row, m[1]) for row, text in enumerate(train)
              if (m := re.match(rf" *# -- ({'|'.join(FENCES)})", text))]
    if [name for _, name in fences] != FENCES:
        return [*wrong, f"fences {fences}"]
    step = [row for row in train[fences[2][0] + 1 : fences[3][0]] if row.strip()]
    wrong += ["step is long"] if len(step) > 30 else []
    main = ast.parse(source).body[-2]
    return wrong + ([] if getattr(main, "name", "") == "main" and len(main.body) <= 5 else ["main"])


def losses(source, tests):
    """Loss functions without source or test, long, or impure; named tests that are not there."""
    wrong = [f"no {t}" for t in re.findall(r"Test: (test_\w+)", source) if t not in tests]
    section = re.split(r"^# ={50,}\n# (.+)\n# ={50,}\n", source, flags=re.M)
    for node in ast.parse(section[section.index("Loss") + 1]).body:
        if isinstance(node, DEFINITIONS):
            doc = ast.get_docstring(node) or ""
            if not re.search(r"paper|slide|et al", doc, re.I) or "Test: test_" not in doc:
                wrong.append(f"{node.name} names no source or no test")
            if len(code_lines(ast.unparse(node))) > 26:
                wrong.append(f"{node.name} is long")
            names = {getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(node)}
            wrong += sorted(names & {"dist", "common", "autocast", "float", "cuda", "run"})
    return wrong


def drifted(sources):
    """Names that two files define in two ways."""
    first, wrong = {}, []
    for file, source in sources.items():
        for node in bare(source).body:
            targets = getattr(node, "targets", [node])
            for name in (getattr(t, "name", getattr(t, "id", None)) for t in targets):
                if name and name not in FREE:
                    other, tree = first.setdefault(name, (file, ast.dump(node)))
                    wrong += [f"{name} in {other} and {file}"] if tree != ast.dump(node) else []
    return wrong


# ==================================================================================================
# The files
# ==================================================================================================


@pytest.mark.parametrize("name", SOURCES)
def test_file(name, tmp_path, monkeypatch):
    source = SOURCES[name]
    # common's operations on images are formulas, more to a line than a method's code
    row = re.search(rf"^\| `{name}\.py` \| (\d+) \|", README, re.M)
    assert name == "common" or row, "README's table of the files has no row for it"
    assert name == "common" or int(row[1]) == len(code_lines(source))
    assert not size(source, CAPS[name], density=10.2 if name == "common" else 9)
    assert not manner(source)
    assert not imports(source, {"PIL", "tqdm", "matplotlib"} if name == "common" else {"common"})
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:  # importing runs nothing
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="imported")
    assert not out.getvalue() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_method(name):
    tests = (ROOT / "tests" / f"test_{name}.py").read_text()
    assert not frame(SOURCES[name])
    assert not losses(SOURCES[name], re.findall(r"^def (test_\w+)", tests, re.M))
    doc = ast.get_docstring(ast.parse(SOURCES[name]))
    for part in ("https://arxiv.org/abs/", "Slides:", "Symbols:", "departs from", "python "):
        assert part in doc, part


def test_copies_have_not_drifted():
    assert not drifted({name: SOURCES[name] for name in METHODS})


@pytest.mark.parametrize("path", [f.relative_to(ROOT) for folder in ("lessons", "benchmarks")
                                  for f in (ROOT / folder).glob("*.py")], ids=str)
def test_nothing_is_patched(path):
    assert not re.findall(PATCHES, (ROOT / path).read_text(), re.M)


# ==================================================================================================
# The rules can fail
# ==================================================================================================

RULE = "# " + "=" * 98
GOOD = f'''"""Doc."""
{RULE}
# Loss
{RULE}
def good(z):
    """Paper, equation 1. Test: test_good."""
    return z
{RULE}
# Training
{RULE}
def train(args):
    # -- model: net
    # -- optimiser
    for x in args:
        # -- step
        y = x
        # -- log and save
    return y
def main():
    train([])
if __name__ == "__main__":
    main()
'''


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def remarks(page):
    """Lines of commands with a remark, which zsh and cmd take for an argument."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    commands = "".join(block for language, block in blocks if not language)
    return re.findall(r"^.* #.*$", commands, re.M)


def test_commands_can_be_copied():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        assert not remarks(page.read_text()), page
    assert remarks("```\na\nb  # c\n```\n") and not remarks("```python\nb  # c\n```\n")


def test_the_rules_can_fail():
    assert not size(GOOD, 12) and size(GOOD, 9) == ["10 lines of code"]
    dense = "f(a, b)[c, d].e(f, g * h, (i, j, k, l, m, n))\n"
    assert size(GOOD + dense * 5, 99)[0].endswith("nodes a line")
    assert "train is long" in size(changed("y = x", "y = x" + "\n        y = 1" * 90), 999)
    for bad in ("y = 2 * (x > 1)", "y = z + (not x)", "y = -(-x // 2)", "seen = x", "tally = [x]",
                "y = [*([x] if z else [])]"):
        assert manner(changed("y = x", bad)), bad
    assert not manner(GOOD) and not manner(changed("y = x", "y = x * z  # as it is said"))
    assert imports("import os.path, moco\nfrom torch import nn\nfrom . import x", set()) == [
        ".", "moco"]
    banners = "".join(f"{RULE}\n# {name}\n{RULE}\n" for name in BANNERS)
    assert frame(GOOD) == ["banners ['Loss', 'Training']"]
    training = f"{RULE}\n# Training\n{RULE}\n"
    assert not frame(banners.replace(training, training + GOOD.split(training)[1]))
    for old, new, wrong in (("# -- step", "# step", "fences"), ("def main", "def other", "main"),
                            ("y = x", "y = x" + "\n        y = 1" * 30, "step is long")):
        assert frame(changed(old, new))[1].startswith(wrong)
    assert not losses(GOOD, {"test_good"}) and losses(GOOD, set()) == ["no test_good"]
    for old, new in (("Paper, e", "E"), ("Test: ", ""), ("return z", "return z.float()"),
                     ("return z", "z = 1" + "\n    z = 1" * 26)):
        assert len(losses(changed(old, new), {"test_good"})) == 1
    one = "A = 1\ndef f(x):\n    return x + 1\ndef augment(x):\n    return x\n"
    other = one.replace("return x\n", "return -x\n").replace("(x):\n", "(x):\n    'Doc.'\n")
    assert not drifted({"simclr": one, "moco": other})
    assert drifted({"simclr": one, "moco": one.replace("+ 1", "+ 2")}) == ["f in simclr and moco"]
    assert drifted({"simclr": one, "byol": "A = 2"}) == ["A in simclr and byol"]
    for bad in ("with mock.patch(x)", "    monkeypatch.setattr(a, b)", "setattr(moco, 'x', f)",
                "    dino.build = small"):
        assert re.search(PATCHES, bad, re.M)
    assert not re.search(PATCHES, "args.dino = 1\nx = dino.build(args)\nif dino.x == 1:", re.M)
