"""An equation at the blackboard: three images, embeddings of two numbers, every step written out.

    python lessons/by_hand.py nt_xent        SimCLR: softmax over the other views
    python lessons/by_hand.py info_nce       MoCo: a queue of four keys
    python lessons/by_hand.py byol_loss      BYOL: distance of unit vectors
    python lessons/by_hand.py H              DINO: centre, temperatures, cross-entropy
    python lessons/by_hand.py sinkhorn_knopp DINOv2: three rounds of Sinkhorn-Knopp
    python lessons/by_hand.py koleo          DINOv2: distance to the nearest neighbour
    python lessons/by_hand.py attention_pool weak supervision: attention over a bag

The steps here use plain numbers. They are compared with the function that trains: with its result,
its results for fewer images or rounds, and its local variables. If one differs by more than 1e-6,
the program stops and names it.
"""

import argparse
import math
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import byol
import common
import dino
import dinov2
import moco
import simclr
import weak

X1, X2 = [[3, 4], [1, 0], [-1, 2]], [[4, 3], [2, -1], [-1, 1]]  # rows 1 to 3 of two views
DIGITS = 4

# ---- numbers, and the function that trains -------------------------------------------------------


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


class Variables(dict):
    """The local variables of a function, by name."""

    def __missing__(self, name):
        common.fail(f"the function that trains has no variable {name}, which is shown here")


def inside(function, *args):
    """function(*args) -> its result, and its variables when it returned."""
    kept = Variables()

    def watch(frame, event, _):
        if event == "return" and frame.f_code is function.__code__:
            kept.update(frame.f_locals)

    sys.setprofile(watch)
    try:
        result = function(*args)
    finally:
        sys.setprofile(None)
    return result, kept


def check(name, by_hand, shipped):
    """Compare numbers found here with the tensor of the function that trains."""
    a, b = tensor(by_hand), torch.as_tensor(shipped, dtype=torch.float64)
    if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=1e-6):
        common.fail(f"{name}: by hand {a.tolist()}, but the function has {b.tolist()}")


def number(x):
    return f"{x:.{DIGITS}f}"


def rows(name, matrix):
    print(f"\n{name}")
    for i, row in enumerate(matrix, 1):
        print(f"  {i}:  " + "  ".join(f"{number(x):>8}" for x in row))


def lengths(name, vectors):
    rows(f"{name}, and the length of each", [[*v, math.sqrt(dot(v, v))] for v in vectors])


def mean(name, values, shipped):
    result = sum(values) / len(values)
    check(name, result, shipped)
    print(f"\n{name} = ({' + '.join(map(number, values))}) / {len(values)} = {number(result)}")


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def unit(v):
    return [x / math.sqrt(dot(v, v)) for x in v]


def softmax(v):
    e = [math.exp(x) for x in v]
    return [x / sum(e) for x in e]


def contrast(name, scores, positive):
    """Prints and returns -log( e^positive / sum of e^scores )."""
    e = [math.exp(x) for x in scores]
    loss = -math.log(math.exp(positive) / sum(e))
    print(f"  {name} = -log( e^{number(positive)} / ({' + '.join(map(number, e))}) ) "
          f"= -log( {number(math.exp(positive))} / {number(sum(e))} ) = {number(loss)}")
    return loss


# ---- equations -----------------------------------------------------------------------------------


def nt_xent(tau=0.5):
    loss, own = inside(simclr.nt_xent, tensor(X1), tensor(X2), tau)
    lengths("z", X1 + X2)
    z = [unit(v) for v in X1 + X2]
    rows("z / |z|: rows 1 to 3 are first views, 4 to 6 second views of images 1 to 3", z)
    check("z", z, own["z"])
    s = [[dot(a, b) / tau for b in z] for a in z]
    rows(f"s = z . z' / {tau}", s)
    check("s", [[-math.inf if i == k else s[i][k] for k in range(6)] for i in range(6)], own["s"])
    print("\nl = -log( e^s of the positive / sum of e^s over k != i )")
    losses = []
    for i in range(6):
        j = (i + 3) % 6
        check("the positive", j, own["j"][i])
        others = [s[i][k] for k in range(6) if k != i]
        losses.append(contrast(f"l({i + 1}, {j + 1})", others, s[i][j]))
    mean("L", losses, loss)


def info_nce(tau=0.2):
    q, k = [unit(v) for v in X1], [unit(v) for v in X2]
    queue = [unit(v) for v in ([0, 1], [-1, 0], [1, -1], [1, 2])]
    columns = tensor(queue).T
    loss, own = inside(moco.info_nce, tensor(q), tensor(k), columns, tau)
    lengths("before they are normalised, queries", X1)
    lengths("and keys", X2)
    rows("queries q", q)
    rows("keys k: row n is from the same image as q_n", k)
    rows("the queue, one key per row", queue)
    l_pos = [[dot(a, b)] for a, b in zip(q, k)]
    l_neg = [[dot(a, b) for b in queue] for a in q]
    logits = [[x / tau for x in a + b] for a, b in zip(l_pos, l_neg)]
    rows(f"q . k, then q with each key of the queue, all / {tau}", logits)
    for name, value in (("l_pos", l_pos), ("l_neg", l_neg), ("logits", logits)):
        check(name, value, own[name])
    print("\nl = -log( e^first / sum of e^all )")
    losses = []
    for n in range(3):
        losses.append(contrast(f"l({n + 1})", logits[n], logits[n][0]))
        one = moco.info_nce(tensor(q[n : n + 1]), tensor(k[n : n + 1]), columns, tau)
        check(f"l({n + 1})", losses[n], one)
    mean("L", losses, loss)


def byol_loss():
    lengths("p", X1)
    lengths("z", X2)
    p, z = [unit(v) for v in X1], [unit(v) for v in X2]
    rows("p / |p|, predictions", p)
    rows("z / |z|, targets", z)
    print("\nl = |p / |p| - z / |z||^2, which is 2 - 2 cos")
    losses = []
    for n, (a, b) in enumerate(zip(p, z)):
        squares = [(x - y) ** 2 for x, y in zip(a, b)]
        losses.append(sum(squares))
        check("2 - 2 cos", sum(squares), 2 - 2 * dot(a, b))
        one = byol.byol_loss(tensor(X1[n : n + 1]), tensor(X2[n : n + 1]))
        check(f"l({n + 1})", losses[n], one)
        print(f"  l({n + 1}) = {' + '.join(map(number, squares))} = {number(losses[n])}"
              f" = 2 - 2 * {number(dot(a, b))}")
    mean("L", losses, byol.byol_loss(tensor(X1), tensor(X2)))


def H(tau_s=1.0, tau_t=0.5, m=0.9):
    t, s, center = X1, X2, [1.0, 0.5]
    loss, own = inside(dino.H, tensor(t), tensor(s), tensor([center]), tau_s, tau_t)
    rows("outputs t of the teacher", t)
    rows("outputs s of the student", s)
    rows("centre C", [center])
    sharp = [[(x - c) / tau_t for x, c in zip(row, center)] for row in t]
    rows(f"(t - C) / {tau_t}: centred, sharpened", sharp)
    p_t, p_s = [softmax(row) for row in sharp], [softmax([x / tau_s for x in row]) for row in s]
    rows("P_t = softmax of that", p_t)
    check("P_t", p_t, own["t"])
    rows(f"P_s = softmax of s / {tau_s}", p_s)
    print("\nH = -sum_k P_t log P_s")
    losses = []
    for n, (a, b) in enumerate(zip(p_t, p_s)):
        losses.append(-dot(a, map(math.log, b)))
        one = dino.H(tensor(t[n : n + 1]), tensor(s[n : n + 1]), tensor([center]), tau_s, tau_t)
        check(f"H({n + 1})", losses[n], one)
        terms = " - ".join(f"{number(x)} * {number(math.log(y))}" for x, y in zip(a, b))
        print(f"  H({n + 1}) = -{terms} = {number(losses[n])}")
    mean("H", losses, loss)
    average = [sum(column) / 3 for column in zip(*t)]
    new = [m * c + (1 - m) * x for c, x in zip(center, average)]
    check("the new centre", [new], dino.update_center(tensor([center]), tensor(t), m))
    rows(f"the next centre, {m} C + {1 - m:.1f} * mean of t", [new])


def sinkhorn_knopp(tau=2.0):
    Q = [[math.exp(x / tau) for x in row] for row in X2]
    rows("outputs of the teacher for three images, a column for each of two prototypes", X2)
    rows(f"Q = e^(output / {tau})", Q)
    for step in (1, 2, 3):
        sums = [sum(column) for column in zip(*Q)]
        Q = [[x / total for x, total in zip(row, sums)] for row in Q]
        rows(f"round {step}, columns: divided by {', '.join(map(number, sums))}", Q)
        sums = [sum(row) for row in Q]
        Q = [[x / total for x in row] for row, total in zip(Q, sums)]
        rows(f"round {step}, rows: divided by {', '.join(map(number, sums))}", Q)
        check(f"Q after round {step}", Q, dinov2.sinkhorn_knopp(tensor(X2), tau, step))
    check("Q", Q, dinov2.sinkhorn_knopp(tensor(X2), tau))
    print("\nrows sum to 1; columns to " + ", ".join(number(sum(c)) for c in zip(*Q)) +
          ", near 3 images / 2 prototypes = 1.5")


def koleo():
    loss, own = inside(dinov2.koleo, tensor(X1))
    lengths("x", X1)
    x = [unit(v) for v in X1]
    rows("x / |x|", x)
    check("x", x, own["x"])
    d = [[math.dist(a, b) for b in x] for a in x]
    rows("distances", d)
    print("\nl = -log of the distance to the nearest other (without the code's 1e-8)")
    losses = []
    for i in range(3):
        j = min((k for k in range(3) if k != i), key=d[i].__getitem__)
        check("the nearest", j, own["nearest"][i])
        losses.append(-math.log(d[i][j]))
        print(f"  l({i + 1}) = -log {number(d[i][j])} (to {j + 1}) = {number(losses[i])}")
    mean("L", losses, loss)


def attention_pool():
    V, w, padding = [[1.0, 0.5], [-0.5, 1.0]], [1.0, 2.0], [9.0, 9.0]
    mask = torch.tensor([[True, True, True, False]])
    (z, a), _ = inside(weak.attention_pool, tensor([X1 + [padding]]), mask, tensor(V), tensor(w))
    rows("a bag of three images, h; a fourth place is empty", X1)
    rows("V", V)
    rows("w", [w])
    hidden = [[math.tanh(dot(v, h)) for v in V] for h in X1]
    rows("tanh(V h)", hidden)
    e = [dot(w, v) for v in hidden]
    rows("e = w . tanh(V h)", [[x] for x in e])
    weights = softmax(e)
    rows("a = softmax of e over the three; the empty place has 0", [[x] for x in weights])
    check("a", [weights + [0.0]], a)
    pooled = [dot(weights, column) for column in zip(*X1)]
    check("z", [pooled], z)
    rows("z = sum of a h", [pooled])


EQUATIONS = {f.__name__: f for f in (nt_xent, info_nce, byol_loss, H, sinkhorn_knopp, koleo,
                                     attention_pool)}


def main(argv=None):
    p = common.Parser(description="\n\n".join(__doc__.split("\n\n")[:2]),
                      formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=EQUATIONS)
    EQUATIONS[p.parse_args(argv).name]()


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly in front of `| head`
    main()
