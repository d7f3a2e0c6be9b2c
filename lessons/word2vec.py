"""word2vec, the ancestor of contrastive learning: skip-gram with negative sampling (SGNS).

Slides: "SSL: Cognitive Principles", where contrastive learning begins with word2vec. Mikolov et
al. 2013, https://arxiv.org/abs/1301.3781 (v1: skip-gram, windows) and
https://arxiv.org/abs/1310.4546 (v2: negative sampling, subsampling).

A word w has to tell the words c near it from k words of noise:

    L = -log s(v_w . u_c) - sum_{i=1}^k log s(-v_w . u_i),   i ~ P_n(c) ~ #(c)^0.75,  s the sigmoid

The pair corresponds to two views of an image, the noise to the other images, v . u to q . k.
With enough dimensions the gradient is zero where every v_w . u_c is

    x(w, c) = log( #(w, c) / (k #(w) P_n(c)) )                                     closed_form

That is PMI - log k only if the noise is P_n(c) = #(c) / |D|, as Levy and Goldberg 2014 assume.

InfoNCE has the same optimum up to a constant per word. Its softmax asks which of k + 1 words is not
noise, so the best score is log( p(c|w) / P_n(c) ), and adding a constant to all scores of a word
changes nothing; SGNS fixes that constant at -log k:

    x_InfoNCE(w, c) = x(w, c) + log k + a(w),   any a(w);   p(c|w) = #(w, c) / #(w)

Shown: (1) SGNS of full rank on ten words converges to x, not to PMI - log k; (2) in a grammar where
words of a class occur in the same positions, the nearest neighbour of a word is of its class more
often than by counts of neighbours or by an SVD of their positive PMI (PPMI) in as many dimensions,
16 (with 8, the number of classes, the SVD finds them, too); (3) neighbours of some words in
Python's documentation, next to those by SVD, which are as good or better on so little text.

    python lessons/word2vec.py                      37 s of one CPU core
    python lessons/word2vec.py --text glosses       timm's WordNet on ImageNet's classes
    python lessons/word2vec.py --text FILE --words red green

Writes lessons/word2vec.csv, the neighbours, and lessons/word2vec.png, which is (1).

Where it departs from the released word2vec.c: one step is taken per batch of pairs, with the sum of
their gradients; noise that happens to be the positive stays noise (there it is left out, which
moves x); subsampling is v2's (there: another formula); windows end with a paragraph.
"""

import math
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from lessons import shared

WORDS = {"python": "list string file error true number class returns first",
         "glosses": "dog bird car red water small wood tree blue"}


def documentation():
    """Python's language reference, and the triple-quoted strings of its library, most of them
    docstrings: the same texts in each run."""
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages"}.isdisjoint(file.relative_to(library).parts):
            source = file.read_text(encoding="utf-8", errors="ignore")
            texts += re.findall(r'"""(.+?)"""', source, re.S)
    return texts


def glosses():
    """WordNet's definition of each of ImageNet's 21,841 classes, from timm."""
    try:
        import timm
    except ImportError:
        common.fail("--text glosses needs timm: pip install timm")
    path = Path(timm.__file__).parent / "data/_info/imagenet_synset_to_definition.txt"
    return [line.split("\t")[1] for line in path.read_text(encoding="utf-8").splitlines()]


def tokenize(texts, most=5000, least=20):
    """-> the `most` most frequent words that occur at least `least` times; for each word of the
    texts that is among them, its number there (n,) and that of its paragraph (n,)."""
    paragraphs = [re.findall(r"[a-z]+", p.lower()) for t in texts for p in t.split("\n\n")]
    found = Counter(word for p in paragraphs for word in p).most_common(most)
    words = [word for word, count in found if count >= least]
    number = {word: i for i, word in enumerate(words)}
    ids = [(number[word], i) for i, p in enumerate(paragraphs) for word in p if word in number]
    return words, *torch.tensor(ids).T.reshape(2, -1)


def keep_rate(counts, t):
    """(V,) -> (V,): the share of a word that subsampling keeps, sqrt(t / f) (v2, equation 5)."""
    return (t * counts.sum() / counts).sqrt().clamp(max=1)


def noise_of(counts, power=0.75):
    """(V,) -> (V,): P_n (v2, Section 2.2)."""
    return counts**power / (counts**power).sum()


def pairs(ids, paragraph, keep, window, draw):
    """Training pairs of one pass: ids, paragraph (n,), keep (V,) -> w, c (P,).

    Words are dropped before windows are cut, so the others reach further; each word draws its
    window from 1 to `window` (v1, Section 3.2), so a distance d counts (window + 1 - d) / window.
    """
    kept = torch.rand(len(ids), generator=draw) < keep[ids]
    ids, paragraph = ids[kept], paragraph[kept]
    reach = torch.randint(1, window + 1, ids.shape, generator=draw)
    w, c = [], []
    for d in range(1, window + 1):
        together = paragraph[:-d] == paragraph[d:]
        after, before = together & (reach[:-d] >= d), together & (reach[d:] >= d)
        w += [ids[:-d][after], ids[d:][before]]
        c += [ids[d:][after], ids[:-d][before]]
    return torch.cat(w), torch.cat(c)


def sgns_loss(v, u, u_noise):
    """The loss above (v2, equation 4): v, u (B, D), u_noise (B, k, D) -> (B,).

    At the start, where u is 0, it is (k + 1) ln 2. Test: test_sgns_equation.
    """
    positive = (v * u).sum(1)  # (B,)
    negative = (v.unsqueeze(1) * u_noise).sum(2)  # (B, k)
    return -F.logsigmoid(positive) - F.logsigmoid(-negative).sum(1)


def train(ids, paragraph, dim=64, k=5, window=5, t=1e-4, epochs=8, lr=0.05, batch=1024, seed=0):
    """Tables v, u (V, dim) by SGD, whose rate falls linearly; t None: no subsampling."""
    draw = torch.Generator().manual_seed(seed)
    counts = ids.bincount()
    keep = keep_rate(counts, t) if t else torch.ones(len(counts))
    noise = noise_of(counts)
    v = (torch.rand(len(counts), dim, generator=draw) - 0.5) / dim
    u = torch.zeros(len(counts), dim)
    for epoch in range(epochs):
        w, c = pairs(ids, paragraph, keep, window, draw)
        order = torch.randperm(len(w), generator=draw).split(batch)
        total = 0.0
        for step, i in enumerate(order):
            rate = lr * (1 - (epoch + step / len(order)) / epochs)
            n = noise.multinomial(len(i) * k, replacement=True, generator=draw).view(-1, k)
            rows = [table.requires_grad_() for table in (v[w[i]], u[c[i]], u[n])]
            loss = sgns_loss(*rows).sum()
            grads = torch.autograd.grad(loss, rows)
            v.index_add_(0, w[i], grads[0], alpha=-rate)
            u.index_add_(0, c[i], grads[1], alpha=-rate)
            u.index_add_(0, n.flatten(), grads[2].flatten(0, 1), alpha=-rate)
            total += loss.item()
    print(f"{len(counts):,} words, {len(w):,} pairs a pass, loss {total / len(w):.3f} "
          f"(at the start {(k + 1) * math.log(2):.3f})")
    return v, u


def pair_counts(ids, paragraph, window=5):
    """#(w, c) (V, V), the mean over drawn windows, without subsampling."""
    size = int(ids.max()) + 1
    table = torch.zeros(size, size)
    for d in range(1, window + 1):
        together = paragraph[:-d] == paragraph[d:]
        left, right = ids[:-d][together], ids[d:][together]
        share = torch.tensor((window + 1 - d) / window)
        table.index_put_((left, right), share, accumulate=True)
        table.index_put_((right, left), share, accumulate=True)
    return table


def closed_form(table, noise, k):
    """x(w, c) (V, V) of pair counts (V, V) and P_n (V,). Test: test_gradient_is_zero."""
    return (table / (k * table.sum(1, keepdim=True) * noise)).log()


def pmi(table):
    """log( #(w, c) |D| / (#(w) #(c)) ): (V, V) -> (V, V)."""
    return closed_form(table, table.sum(0) / table.sum(), 1)


def ppmi_svd(table, dim):
    """U S^0.5 of positive PMI (Levy and Goldberg 2014): (V, V) -> (V, dim)."""
    torch.manual_seed(0)
    U, S, _ = torch.svd_lowrank(pmi(table).clamp(min=0).nan_to_num(), dim, niter=4)
    return U * S.sqrt()


def nearest(x, i, n):
    """The n rows of x (V, D) with the largest cosine to rows i (m,), without themselves: (m, n)."""
    x = F.normalize(x, dim=1)
    s = x[i] @ x.T
    s[torch.arange(len(i)), i] = -2.0
    return s.topk(min(n, len(x) - 1)).indices


def ten_words(n=2000):
    """A text over ten words, 0 the most frequent, each drawn given the one before it."""
    draw = torch.Generator().manual_seed(0)
    after = (torch.rand(10, 10, generator=draw).square() + 0.05) / torch.arange(1, 11)
    ids = [0]
    while len(ids) < n:
        ids.append(after[ids[-1]].multinomial(1, generator=draw).item())
    return torch.tensor(ids), torch.zeros(n, dtype=torch.long)


def full_rank(epochs=100):
    """All v . u (10, 10) of ten words after training, x(w, c), and PMI - log k."""
    ids, paragraph = ten_words()
    v, u = train(ids, paragraph, dim=10, t=None, epochs=epochs, lr=0.006, batch=256)
    table, k = pair_counts(ids, paragraph), 5
    return v @ u.T, closed_form(table, noise_of(ids.bincount()), k), pmi(table) - math.log(k)


def grammar(seed, sentences=100, classes=8, size=6, fillers=4):
    """Sentences of eight words, each of the class after that of the word before, each followed by
    three of a few frequent words that mean nothing -> ids, paragraph, class of the other words."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(classes, (sentences, 1), generator=draw)
    kind = (first + torch.arange(8)) % classes
    word = kind * size + torch.randint(size, kind.shape, generator=draw)
    filler = classes * size + torch.randint(fillers, (*kind.shape, 3), generator=draw)
    ids = torch.cat([word.unsqueeze(2), filler], 2)
    paragraph = torch.arange(sentences).repeat_interleave(8 * 4)
    return ids.flatten(), paragraph, torch.arange(classes).repeat_interleave(size)


def of_its_class(x, kind):
    """Share in % of words whose nearest neighbour is of their class; a filler is of none."""
    j = nearest(x, torch.arange(len(kind)), 1)[:, 0]
    kinds = torch.cat([kind, torch.full((len(x) - len(kind),), -1)])
    return 100 * (kinds[j] == kind).float().mean().item()


def planted(seed, dim=16):
    """-> by method: the share in % of words whose nearest neighbour is of their class."""
    ids, paragraph, kind = grammar(seed)
    v, _ = train(ids, paragraph, dim, t=1e-2, epochs=30, batch=128, seed=seed)
    table = pair_counts(ids, paragraph)
    found = {"SGNS": v, "PPMI-SVD": ppmi_svd(table, dim), "counts": table}
    return {name: of_its_class(x, kind) for name, x in found.items()}


def draw_scores(whole, s, x, other):
    for ax, truth, name in zip(whole.subplots(1, 2), (x, other), ("x(w, c)", "PMI - log k")):
        ax.plot([s.min(), s.max()], [s.min(), s.max()], "k", linewidth=0.5)
        ax.plot(truth.flatten(), s.flatten(), ".", alpha=0.7)
        ax.set(xlabel=name, ylabel="v . u after training")


def main(argv=None):
    p = common.Parser(description=__doc__.split("\n")[0])
    p.add_argument("--text", default="python", help="python, glosses or a text file (python)")
    p.add_argument("--words", nargs="+", help="words whose neighbours are shown")
    p.add_argument("--dim", **common.FROM_1, default=64, help="D, width of a vector (64)")
    p.add_argument("--epochs", **common.FROM_1, default=8, help="passes over the text (8)")
    p.add_argument("--seeds", **common.FROM_1, default=3, help="number of grammars (3)")
    p.add_argument("--out", type=shared.folder, default=Path(__file__).parent,
                   help="folder of CSV and PNG")
    args = p.parse_args(argv)
    if args.text in WORDS:
        texts = documentation() if args.text == "python" else glosses()
    else:
        try:
            texts = [Path(args.text).read_text(encoding="utf-8")]
        except (OSError, UnicodeError) as error:
            common.fail(f"--text {args.text}: {error}")
    words, ids, paragraph = tokenize(texts)
    if len(words) < args.dim:
        common.fail(f"--text {args.text} has {len(words)} frequent words, fewer than --dim")
    shown = args.words or [w for w in WORDS.get(args.text, "").split() if w in words] or words[:9]
    if missing := set(shown) - set(words):
        common.fail(f"--words: {', '.join(sorted(missing))} is too rare in this text")

    print("1. ten words, full rank")
    s, x, other = full_rank()
    for name, truth in (("x(w, c)", x), ("PMI - log k", other)):
        print(f"   root mean square of v . u - ({name}): {(s - truth).square().mean().sqrt():.3f}")
    shared.figure(f"{args.out}/word2vec.png", (8, 4), draw_scores, s, x, other)

    print("2. a grammar: nearest neighbour of the word's class, in % (chance 10)")
    found = [planted(seed) for seed in range(args.seeds)]
    for name in found[0]:
        print(f"   {name}: " + ", ".join(f"{row[name]:.0f}" for row in found))

    print(f"3. {len(ids):,} words of text")
    v, _ = train(ids, paragraph, args.dim, epochs=args.epochs, batch=min(1024, 2 * len(words)))
    rows = [{"word": word} for word in shown]
    i = torch.tensor([words.index(word) for word in shown])
    counted = ppmi_svd(pair_counts(ids, paragraph), args.dim)
    for name, vectors in (("SGNS", v), ("PPMI-SVD", counted)):
        for row, near in zip(rows, nearest(vectors, i, 5).tolist()):
            row[name] = " ".join(words[j] for j in near)
    print("".join(f"   {r['word']:<10} {r['SGNS']:<50} {r['PPMI-SVD']}\n" for r in rows), end="")
    shared.write_csv(f"{args.out}/word2vec.csv", rows, ["word", "SGNS", "PPMI-SVD"])
    return s, x, other, found, rows


if __name__ == "__main__":
    main()
