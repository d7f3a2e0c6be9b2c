"""How much of a file do its tests pin down? Changes to its losses and step, one at a time.

    python benchmarks/mutation.py simclr    writes the rows of simclr to benchmarks/mutation.csv

In the sections "Loss" and "EMA / queue / centre" and the block `# -- step`, each operator, number,
order of arguments or results, condition and detach is changed, and each statement without a result
is left out. The tests of the file run with the changed source in memory; a mutant is killed if one
of them fails. One that survives shows a missing test, or is in EQUIVALENT with the reason.
"""

import argparse
import ast
import copy
import csv
import functools
import multiprocessing
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mistakes  # noqa: E402

TABLE = ROOT / "benchmarks" / "mutation.csv"
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
         ast.Eq: ast.NotEq, ast.And: ast.Or, ast.Or: ast.And}

STEP = "algorithm or what_runs or processes or second_process or thaws or paths"  # tests of a step

ALIKE = "the two views are drawn alike, and the loss is symmetric"
ONE_TYPE = "all parameters have one dtype and device"
INDEX = "the choice has no gradient; detach saves memory"
BROADCAST = "(K,) is broadcast as (1, K) is"
NEAREST = "nearest = (x @ x.T).detach().fill_diagonal_(-2.0).argmax(1)"
EQUIVALENT = {  # (code, change) -> why no test can tell
    ("z = F.normalize(torch.cat([z1, z2]), dim=1)", "[z1, z2] -> ([z2, z1])"): ALIKE,
    ("x1, x2 = aug(views, args)", "(x1, x2) -> ((x2, x1))"): ALIKE,
    ("_, z = model(torch.cat([x1, x2]))", "[x1, x2] -> ([x2, x1])"): ALIKE,
    ("z1, z2 = z.float().chunk(2)", "(z1, z2) -> ((z2, z1))"): ALIKE,
    ("loss = nt_xent(run.gather(z1), run.gather(z2), args.temperature)",
     "nt_xent(run.gather(z1), run.gather(z2), args.temperature) -> "
     "nt_xent(run.gather(z2), run.gather(z1), args.temperature)"): ALIKE,
    ("weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)",
     "0 -> (1)"): ONE_TYPE,
    ("return m * center + (1 - m) * teacher.mean(0, keepdim=True)", "True -> (False)"): BROADCAST,
    ("Q -= gather(columns).logsumexp(0, keepdim=True) if gather else columns",
     "True -> (False)"): BROADCAST,
    ("random_keys = max(0.0, 1 - (step + 1) * N / K)",
     "max(0.0, 1 - (step + 1) * N / K) -> max(1 - (step + 1) * N / K, 0.0)"): "max is symmetric",
    ("for C, outputs in ((center, t), (center_patch[0], t_patch.flatten(0, 1))):",
     "((center, t), (center_patch[0], t_patch.flatten(0, 1))) -> "
     "(((center_patch[0], t_patch.flatten(0, 1)), (center, t)))"): "neither centre needs the other",
    (NEAREST, "1 -> (0)"): "cosines are symmetric",
    (NEAREST, "2.0 -> (4.0)"): "both are below all cosines",
    (NEAREST, "(x @ x.T).detach() -> (x @ x.T)"): "argmax has no gradient; detach saves memory",
    ("x = F.normalize(x, eps=1e-8)", "1e-08 -> (2e-08)"): "both guard against 0 / 0",
    ("return s.logsumexp(1) - torch.linalg.vecdot(q.detach(), s, dim=1)",
     "torch.linalg.vecdot(q.detach(), s, dim=1) -> torch.linalg.vecdot(s, q.detach(), dim=1)"):
        "a dot product is symmetric",
    ("n = max(1, math.ceil(keep * len(losses) - 1e-6))",
     "max(1, math.ceil(keep * len(losses) - 1e-06)) -> "
     "max(math.ceil(keep * len(losses) - 1e-06), 1)"): "max is symmetric",
    ("n = max(1, math.ceil(keep * len(losses) - 1e-6))", "1e-06 -> (2e-06)"):
        "both exceed the rounding error",
    ("kept_by_f = small_loss(losses_f.detach(), keep)",
     "losses_f.detach() -> (losses_f)"): INDEX,
    ("kept_by_g = small_loss(losses_g.detach(), keep)",
     "losses_g.detach() -> (losses_g)"): INDEX,
    ("certainty, y = weak_logits.detach().softmax(1).max(1)",
     "weak_logits.detach() -> (weak_logits)"): INDEX,
}


# ==================================================================================================
# Changes
# ==================================================================================================


def regions(source):
    """(name, nodes) of the losses, of the updates of the state, and of the step."""
    parts = re.split(r"^# ={50,}\n# (.+)\n# ={50,}\n", source, flags=re.M)
    pure = [node.name for section in ("Loss", "EMA / queue / centre")
            for node in ast.parse(parts[parts.index(section) + 1]).body
            if isinstance(node, ast.FunctionDef)]
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    for name in pure:
        yield name, [functions[name]]
    rows = source.split("\n")
    train = functions["train"]
    first, last = (next(i for i in range(train.lineno, len(rows)) if fence in rows[i])
                   for fence in ("# -- step", "# -- log and save"))
    yield "train", [node for node in ast.walk(train) if isinstance(node, ast.stmt)
                    and first < node.lineno - 1 and node.end_lineno <= last]


def changes(node):
    """What this node is replaced by, as text."""
    new = copy.deepcopy(node)
    match node:
        case ast.BinOp(op=ast.MatMult()):
            new.left, new.right = new.right, new.left
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            new.op = OTHER[type(op)]()
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            new.ops = [OTHER[type(op)]()]
        case ast.UnaryOp():
            new = new.operand
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=0 | 1 as value):
            new.value = 1 - value
        case ast.Constant(value=int(value) | float(value)):
            new.value = 2 * value
        case ast.Call(func=ast.Attribute(attr="detach")):
            new = new.func.value
        case ast.Call(func=ast.Attribute(attr="normalize")):
            new = new.args[0]
        case ast.Call(func=ast.Attribute(attr="mean" | "sum" as attr)):
            new.func.attr = {"mean": "sum", "sum": "mean"}[attr]
        case ast.List(elts=[_, _, *_]) | ast.Tuple(elts=[_, _, *_]) if not any(
                isinstance(n, ast.Slice) for n in node.elts):
            new.elts[:2] = new.elts[1::-1]
        case ast.IfExp():
            yield f"({ast.unparse(new.body)})"
            new = new.orelse
        case ast.If():
            new.test = ast.UnaryOp(ast.Not(), new.test)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Assign(targets=[ast.Subscript()]):
            new = ast.Pass()
        case _:
            new = None
    if new and ast.dump(new) != ast.dump(node):
        yield f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
    if isinstance(node, ast.Call):
        match node.args:
            case [ast.expr() as a, ast.expr() as b, *_] if not isinstance(b, ast.Starred):
                new = copy.deepcopy(node)
                new.args[:2] = [b, a]
                if ast.dump(a) != ast.dump(b):
                    yield ast.unparse(new)


def mutants(source):
    """(function, line, change, changed source) of every mutant."""
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    for name, nodes in regions(source):
        seen = {}
        for top in nodes:
            seen |= {id(n): n for n in ast.walk(top)}
        for node in seen.values():
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                node = node.decorator_list[0]
                yield name, node.lineno, "@torch.no_grad() left out", re.sub(
                    rf"@torch.no_grad\(\)\n(def {name}\()", r"\1", source)
                continue
            if not hasattr(node, "end_col_offset"):
                continue
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            for text in changes(node):
                text = text.replace("\n", "\n" + " " * node.col_offset)
                old = ast.unparse(node).split("\n")[0]
                yield (name, node.lineno, f"{old} -> {text.split(chr(10))[0]}",
                       source[:begin] + text + source[end:])


# ==================================================================================================
# Killing them
# ==================================================================================================


def killer(method, name, source, quick):
    """The test that fails with this source, or None. First the test that the function's docstring
    names, or those of steps, some in test_common.py; the whole file only if they pass."""
    file = f"tests/test_{method}.py"
    doc = re.search(rf"^def {name}\(.*?Test: (test_\w+)", source, re.M | re.S)
    stages = [(file, STEP if name == "train" else doc[1])]
    if name == "train":
        stages.append(("tests/test_common.py", f"{method} and (failed_step or half_precision)"))
    stages += [] if quick else [(file, "test")]
    for tests, which in stages:
        failed = mistakes.outcome({method: source}, [tests], f"-k={which}").failed
        if failed:
            return [*failed][0].split("::")[-1]


def judge(mutant, quick):
    """Its row of the table."""
    row, changed = mutant
    method, name, _, code, change = row
    reason = EQUIVALENT.get((code, change), "")
    test = killer(method, name, changed, quick or reason)
    result = "killed" if test else "equivalent" if reason else "survived"
    return [*row, result, test or reason]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=sorted(f.stem[5:] for f in ROOT.glob("tests/test_*.py")
                                                 if f.stem[5:] != "common"
                                                 and (ROOT / f"{f.stem[5:]}.py").exists()))
    parser.add_argument("--function", default="", help="only this one; nothing is written")
    parser.add_argument("--quick", action="store_true", help="nearest tests only; nothing written")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    source, rows = (ROOT / f"{args.method}.py").read_text(), []
    lines, found = source.split("\n"), []
    for name, line, change, changed in mutants(source):
        if args.function in ("", name):
            code = lines[line - 1].split("  #")[0].strip()
            found.append(([args.method, name, line, code, change], changed))
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for row in pool.imap(functools.partial(judge, quick=args.quick), found):
            rows.append(row)
            print(*row[1:], sep=" | ", flush=True)
    counts = {r: sum(row[5] == r for row in rows) for r in ("killed", "equivalent", "survived")}
    print(f"{args.method}: {len(rows)} mutants,", ", ".join(f"{n} {r}" for r, n in counts.items()))
    if args.function or args.quick:
        return
    others = list(csv.reader(TABLE.open()))[1:] if TABLE.exists() else []
    rows = sorted([row for row in others if row[0] != args.method] + rows, key=lambda row: row[0])
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["method", "function", "line", "code", "change", "result", "by"], *rows])


if __name__ == "__main__":
    main()
