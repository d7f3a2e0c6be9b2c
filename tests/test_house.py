"""The house rules of the method files (design, section 3): one book, in one order, in one voice."""

import ast
import contextlib
import io
import re
import runpy
import sys
import textwrap
import tokenize
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CAPS = {"pretext": 705, "simclr": 410, "moco": 460, "byol": 430, "dino": 630, "ibot": 695,
        "dinov2": 760, "common": 551}  # lines of code
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in CAPS
           if (ROOT / f"{name}.py").exists()}
METHODS = [name for name in SOURCES if name != "common"]  # in reading order
BANNERS = ["Options", "Augmentation", "Model", "Loss", "EMA / queue / centre", "Training",
           "Evaluation"]
BLOCKS = ["setup", "data", "model", "optimiser", "step", "log", "save"]
SHARED = ["setup", "data", "log", "save"]  # the same text in every file
FREE = ["augment", "crops", "options", "build", "RECIPES", "train", "load_weights", "verdict",
        "loading", "KEPT"]  # and vit_*, VITS in dinov2
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
TESTS = set(re.findall(r"^def (test_\w+)", "\n".join(
    f.read_text() for f in Path(__file__).parent.glob("test_*.py")), re.M))


# ==================================================================================================
# The checkers: source -> what is wrong with it, or what it holds
# ==================================================================================================


def tokens(source):
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def code_lines(source):
    """How many lines hold code: no blanks, no comments, no docstrings."""
    held = {n for t in tokens(source) if t.type not in SKIPPED
            for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | DEFINITIONS) and ast.get_docstring(node) is not None:
            held -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(held)


def crammed(source):
    """Lines over 100 characters and statements chained with a semicolon."""
    long = [f"line {n} is long" for n, line in enumerate(source.split("\n"), 1) if len(line) > 100]
    return long + [f"line {t.start[0]} has a ;" for t in tokens(source) if t.string == ";"]


def sections(source):
    """Title -> text, for every banner: a rule, # Title, a rule."""
    parts = re.split(r"^# ={50,}\n# (.+)\n# ={50,}\n", source, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def imports(source):
    """The packages it imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def runs(source):
    """What importing it would run: all but docstring, imports, definitions, assignments, main."""
    quiet = ast.Import | ast.ImportFrom | DEFINITIONS | ast.Assign | ast.AnnAssign
    wrong = []
    for i, node in enumerate(ast.parse(source).body):
        text = ast.unparse(node).split("\n")[0]
        guarded = isinstance(node, ast.Try) and all(
            isinstance(n, quiet) for n in node.body + [n for h in node.handlers for n in h.body])
        if not (isinstance(node, quiet) or guarded or text == "if __name__ == '__main__':"
                or i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            wrong.append(text)
    return wrong


def names(source):
    """Top-level name -> its tree: functions, classes and assigned names."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, DEFINITIONS):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            found |= {t.id: ast.dump(node) for t in node.targets if isinstance(t, ast.Name)}
    return found


def drifted(sources):
    """Names that two files define in two ways."""
    seen, wrong = {}, []
    for file, source in sources.items():
        free = FREE + ["vit_*", "VITS"] * (file == "dinov2")
        for name, tree in names(source).items():
            if not any(fnmatch(name, pattern) for pattern in free):
                first, other = seen.setdefault(name, (file, tree))
                wrong += [f"{name} in {first} and {file}"] * (other != tree)
    return wrong


def blocks(source):
    """Fence -> text of the block of train, without its margin."""
    train = next(n for n in ast.parse(source).body
                 if isinstance(n, ast.FunctionDef) and n.name == "train")
    text = "\n".join(source.split("\n")[train.lineno : train.end_lineno])
    parts = re.split(r"^( *)# -- (\w+)\n", text + "\n", flags=re.M)
    return dict(zip(parts[2::3], (textwrap.dedent(text).rstrip() for text in parts[3::3])))


def drifted_blocks(sources):
    """Fenced blocks that have to be the same text and are not."""
    seen, wrong = {}, []
    for file, source in sources.items():
        for fence, text in blocks(source).items():
            if fence in SHARED:
                first, other = seen.setdefault(fence, (file, text))
                wrong += [f"{fence} in {first} and {file}"] * (other != text)
    return wrong


def branches_in_step(source):
    """Ifs of the step block that ask for precision, rank or logging."""
    tree = ast.parse(blocks(source)["step"])
    tests = [ast.unparse(n.test) for n in ast.walk(tree) if isinstance(n, ast.If | ast.IfExp)]
    return [t for t in tests if re.search(r"amp|dtype|half|fp16|rank|world|log|scaler", t)]


def loss_faults(source, tests):
    """Functions of the Loss section without source or test, too long, or impure."""
    wrong = []
    for node in ast.parse(sections(source)["Loss"]).body:
        if not isinstance(node, DEFINITIONS):
            continue
        doc = ast.get_docstring(node) or ""
        named = re.findall(r"\btest_\w+", doc)
        if not re.search(r"paper|slide|equation|eq\.|section", doc, re.I):
            wrong.append(f"{node.name} names no source")
        if "Test: " not in doc or not named or set(named) - tests:
            wrong.append(f"{node.name} names no existing test")
        if code_lines(ast.unparse(node)) > 26:
            wrong.append(f"{node.name} is over 25 lines")
        used = {n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node)
                if isinstance(n, ast.Attribute | ast.Name)}
        wrong += [f"{node.name} uses {name}" for name in sorted(
            used & {"dist", "common", "autocast", "float", "cuda", "distributed"})]
    return wrong


# ==================================================================================================
# The files
# ==================================================================================================


@pytest.mark.parametrize("name", SOURCES)
def test_caps(name):
    assert code_lines(SOURCES[name]) <= CAPS[name] and not crammed(SOURCES[name])


@pytest.mark.parametrize("name", METHODS)
def test_sections_and_blocks_in_order(name):
    source = SOURCES[name]
    assert list(sections(source)) == BANNERS
    found = [fence for fence in blocks(source) if fence in BLOCKS]
    assert found == BLOCKS and "\nstate = {" in "\n" + blocks(source)["model"]
    assert len(blocks(source)["step"].split("\n")) <= 36 and not branches_in_step(source)
    assert ast.parse(source).body[-2].name == "main"
    for title in ("Model", "Loss", "EMA / queue / centre"):  # can be pasted anywhere
        assert "common" not in {n.id for n in ast.walk(ast.parse(sections(source)[title]))
                                if isinstance(n, ast.Name)}


@pytest.mark.parametrize("name", METHODS)
def test_docstring(name):
    doc = ast.get_docstring(ast.parse(SOURCES[name])) or ""
    for part in ("arxiv.org/abs/", "Slides:", "Symbols", "Departures"):
        assert part in doc, part


@pytest.mark.parametrize("name", SOURCES)
def test_imports(name):
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy"}
    allowed |= {"PIL", "tqdm", "matplotlib"} if name == "common" else {"common"}
    assert not imports(SOURCES[name]) - allowed


@pytest.mark.parametrize("name", SOURCES)
def test_importing_runs_nothing(name, tmp_path, monkeypatch):
    assert not runs(SOURCES[name])
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="imported")
    assert not out.getvalue() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_losses_name_source_and_test(name):
    assert not loss_faults(SOURCES[name], TESTS)


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_has_its_tests(name):
    assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_copies_have_not_drifted():
    methods = {name: SOURCES[name] for name in METHODS}
    assert METHODS and not drifted(methods) and not drifted_blocks(methods)


# ==================================================================================================
# The checkers can fail
# ==================================================================================================

RULE = "# " + "=" * 98
LOSS = f'''{RULE}
# Loss
{RULE}
def good(z):
    """Paper, equation 1. Test: test_good."""
    return z
'''
TRAIN = '''
def train(args):
    # -- setup
    a = 1
    # -- model
    state = {}
    for x in a:
        # -- step
        y = x
        # -- log
        if y:
            print(y)
    # -- save
    return a
'''


def test_line_counts():
    source = '"""Doc\n\nstring."""\n\n# comment\nx = """one\n\nthree"""  # four\n\ny = (1,\n 2)\n'
    assert code_lines(source) == 5
    assert code_lines('def f():\n    """Doc."""\n    return 1\n') == 2
    assert crammed("x = 1\n" + "y" * 101) == ["line 2 is long"]
    assert crammed("x = 1; y = 2\nz = ';'\n") == ["line 1 has a ;"]


def test_imports_and_side_effects_are_seen():
    assert imports("import os.path\ndef f():\n    from moco import x\n") == {"os", "moco"}
    assert imports("from . import moco\n") == {"."}
    assert not runs('"""Doc."""\nimport os\ntry:\n    import tqdm\nexcept ImportError:\n'
                    "    tqdm = None\nx: int = 1\nif __name__ == '__main__':\n    x()\n")
    for line in ("print(1)", "for i in x:\n    y = i", "if x:\n    y = 1", "x += 1", "'text'",
                 "try:\n    print(1)\nexcept ValueError:\n    x = 1"):
        assert runs('"""Doc."""\n' + line) == [line.split("\n")[0]]


def test_drift_is_seen():
    one = "A = 1\ndef f(x):\n    return x + 1\ndef augment(x):\n    return x\n"
    assert not drifted({"simclr": one, "moco": one.replace("return x\n", "return -x\n")})
    assert not drifted({"simclr": one, "moco": one.replace("x + 1", "x + 1  # a comment")})
    assert drifted({"simclr": one, "moco": one.replace("+ 1", "+ 2")}) == ["f in simclr and moco"]
    assert drifted({"simclr": one, "byol": "A = 2\n"}) == ["A in simclr and byol"]
    vit = "def vit_small():\n    return 1\n"
    assert not drifted({"dino": vit, "dinov2": vit.replace("1", "2")})
    assert drifted({"dino": vit, "ibot": vit.replace("1", "2")}) == ["vit_small in dino and ibot"]


def test_blocks_are_seen():
    assert list(blocks(TRAIN)) == ["setup", "model", "step", "log", "save"]
    assert blocks(TRAIN)["log"] == "if y:\n    print(y)"
    moved = TRAIN.replace("state = {}", "state = {1: 2}").replace("y = x", "y = 2 * x")
    assert not drifted_blocks({"simclr": TRAIN, "moco": moved})
    for fence, old, new in (("setup", "a = 1", "a = 2"), ("log", "print(y)", "print(-y)"),
                            ("save", "return a", "return -a")):
        changed = {"simclr": TRAIN, "moco": TRAIN.replace(old, new)}
        assert drifted_blocks(changed) == [f"{fence} in simclr and moco"]
    assert not branches_in_step(TRAIN)
    for test in ("args.amp == 'fp16'", "run.rank == 0", "run.dtype"):
        assert branches_in_step(TRAIN.replace("y = x", f"y = x if {test} else 1")) == [test]


def test_sections_and_losses_are_seen():
    assert list(sections(LOSS)) == ["Loss"] and not loss_faults(LOSS, {"test_good"})
    assert list(sections(LOSS + LOSS.replace("# Loss", "# Model"))) == ["Loss", "Model"]
    bad = "good names no existing test"
    assert loss_faults(LOSS, set()) == [bad]
    assert loss_faults(LOSS.replace("Test: ", ""), {"test_good"}) == [bad]
    assert loss_faults(LOSS.replace("Paper, equation 1.", ""), {"test_good"}) == [
        "good names no source"]
    assert loss_faults(LOSS.replace("return z", "return z.float()"), {"test_good"}) == [
        "good uses float"]
    assert loss_faults(LOSS + "    z = 1\n" * 25, {"test_good"}) == ["good is over 25 lines"]
