"""DINOv2 against its paper, the released code (where the two differ: the code) and timm."""

import copy
import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tools import (
    PLAIN,
    TINY,
    Watched,
    beit_blocks,
    blocks_agree,
    close,
    draw,
    fails,
    options,
    same,
    train,
)

import common
import dinov2

NANO = "--arch vit_nano --patch-size 8 --image-size 32 --out-dim 12 --hidden 10 --seed 3".split()
ONE = SimpleNamespace(world=1, rank=0, device=torch.device("cpu"))


def completed(*argv, column=0, n=4000):
    """The options with the defaults of a column of the table, for n images."""
    args = options(dinov2, [*PLAIN, *argv] if column == 0 else argv)
    for name, row in dinov2.OPTIONS.items():
        if getattr(args, name) is None:
            value = row[column](args, n) if callable(row[column]) else row[column]
            setattr(args, name, [*value] if isinstance(value, tuple) else value)
    return args


def small_args(*argv):
    return completed(*NANO, *argv)


# ==================================================================================================
# Loss
# ==================================================================================================


def sinkhorn_by_hand(z, tau, iterations=3, mistake=None):
    """The released sinkhorn_knopp_teacher, its sums written out:

        Q = exp(z / tau).t()  # K x B
        Q /= sum(Q)
        three times:
            Q /= sum of each row, over the samples;  Q /= K
            Q /= sum of each column, over the prototypes;  Q /= B
        Q *= B;  return Q.t()
    """
    (B, K), off = z.shape, mistake == "the maximum of a sample taken off"
    tau = 1.0 if mistake == "no temperature" else tau
    Q = [[math.exp((z[b, k].item() - off * z[b].max().item()) / tau) for b in range(B)]
         for k in range(K)]
    Q = [[q / sum(map(sum, Q)) for q in row] for row in Q]
    for half in range(2 if mistake == "one iteration" else 2 * iterations):
        if half % 2 == (mistake == "samples first"):
            Q = [[q / sum(row) / K for q in row] for row in Q]
        else:
            Q = [[q / sum(Q[k][b] for k in range(K)) / B for b, q in enumerate(row)] for row in Q]
    return torch.tensor([[Q[k][b] * B for k in range(K)] for b in range(B)], dtype=torch.float64)


def test_sinkhorn_equation():
    """The code's K and B are not in ours: a factor of all of Q is gone after the next division."""
    for seed, (n, K, tau, times) in enumerate(((4, 5, 0.2, 3), (3, 4, 0.3, 2), (6, 9, 0.25, 3))):
        z = draw(n, K, seed=seed).requires_grad_()
        got = dinov2.sinkhorn_knopp(z, tau, times)
        assert torch.equal(z, draw(n, K, seed=seed)) and not got.requires_grad
        assert close(got, sinkhorn_by_hand(z, tau, times)) and close(got.sum(1), torch.ones(n))
        for mistake in ("no temperature", "the maximum of a sample taken off", "one iteration",
                        "samples first"):
            assert not close(got, sinkhorn_by_hand(z, tau, times, mistake), 1e-3), mistake
        assert close(got, dinov2.sinkhorn_knopp(z, tau), 1e-3) == (times == 3)
        balanced = dinov2.sinkhorn_knopp(z, tau, 1000)
        assert close(balanced.sum(0) * K / n, torch.ones(K), 1e-6)  # every prototype its share
        assert not close(got.sum(0), balanced.sum(0), 1e-3)


def test_sinkhorn_is_finite():
    """What the released code, whose exp is of z / tau itself, is not."""
    z = 1e3 * draw(6, 5, dtype=torch.float32)
    assert (z / 0.04).exp().isinf().any()
    got = dinov2.sinkhorn_knopp(z, 0.04)
    assert got.isfinite().all() and close(got.sum(1), torch.ones(6), 0.01)
    assert dinov2.sinkhorn_knopp(z[:0], 0.04).shape == (0, 5)  # no patch is hidden


def test_sinkhorn_of_two_processes():
    """Two threads, each with half of the answers, are one with all of them."""
    z, sums, barrier = draw(8, 5), [None, None], threading.Barrier(2, timeout=20)

    def half(rank):
        def gather(columns):
            sums[rank] = columns
            barrier.wait()
            both = torch.cat(sums)
            barrier.wait()
            return both

        return dinov2.sinkhorn_knopp(z.chunk(2)[rank], 0.3, gather=gather)

    with ThreadPoolExecutor(2) as pool:
        halves = torch.cat([*pool.map(half, range(2))])
    assert close(halves, dinov2.sinkhorn_knopp(z, 0.3))
    alone = torch.cat([dinov2.sinkhorn_knopp(part, 0.3) for part in z.chunk(2)])
    assert not close(alone, dinov2.sinkhorn_knopp(z, 0.3), 1e-2)


def test_targets():
    """Sinkhorn-Knopp, or DINO's softmax with the centre; no gradient to the teacher."""
    t, C = draw(4, 5).requires_grad_(), draw(1, 5, seed=1)
    assert torch.equal(dinov2.targets(t, C, 0.3, "sinkhorn"), dinov2.sinkhorn_knopp(t, 0.3))
    got = dinov2.targets(t, C, 0.3, "ema")
    for n in range(4):
        e = [math.exp((t[n, k].item() - C[0, k].item()) / 0.3) for k in range(5)]
        assert close(got[n], [v / sum(e) for v in e])
    assert not got.requires_grad and not close(got, dinov2.targets(t, -C, 0.3, "ema"), 1e-3)


def answers(*shape, seed=0):
    return F.softmax(draw(*shape, seed=seed), -1)


def cross_entropy(s, t, tau):
    """-sum_k t_k log(exp(s_k / tau) / sum_j exp(s_j / tau)) of two vectors."""
    of_s = [math.exp(v.item() / tau) for v in s]
    return -sum(t[k].item() * math.log(of_s[k] / sum(of_s)) for k in range(len(s)))


def test_distillation_equation():
    for n, K, tau in ((3, 5, 0.1), (4, 2, 0.5), (1, 7, 1.0)):
        s, t = 0.3 * draw(n, K, seed=n), answers(n, K, seed=K)
        by_hand = [cross_entropy(s[i], t[i], tau) for i in range(n)]
        got = dinov2.distillation(s.requires_grad_(), t.requires_grad_(), tau)
        assert close(got, by_hand)
        assert not close(dinov2.distillation(s, t, 2 * tau), by_hand, 1e-3)
        assert not close(dinov2.distillation(t, s, tau), by_hand, 1e-3)
        of_s, of_t = torch.autograd.grad(got.sum(), (s, t), allow_unused=True)
        assert of_t is None and close(of_s, (F.softmax(s / tau, 1) - t) / tau)
    t = answers(3, 4)
    assert close(dinov2.distillation(0 * t, t, 0.1) / math.log(4), torch.ones(3))  # whatever t is
    assert close(dinov2.distillation(0.1 * t.log(), t, 0.1).mean(), dinov2.mean_entropy(t))
    large = 1e3 * draw(3, 4).float()  # float32: log(softmax) would be infinite
    assert dinov2.distillation(large, t.float(), 0.1).isfinite().all()


def test_class_loss_equation():
    """Released code: of each image every view but the teacher's own, over the number of pairs."""
    for views, teachers in ((2, 2), (5, 2), (4, 3)):
        s = [(0.3 * draw(3, 5, seed=i)).requires_grad_() for i in range(views)]
        t = [answers(3, 5, seed=10 + i) for i in range(teachers)]
        H = [[sum(cross_entropy(a[n], b[n], 0.1) for n in range(3)) / 3 for b in t] for a in s]
        pairs = [H[j][i] for i in range(teachers) for j in range(views) if i != j]
        got = dinov2.class_loss(s, t, 0.1)
        assert close(got, sum(pairs) / len(pairs))
        every = [h for row in H for h in row]
        for wrong in (sum(pairs), sum(every) / len(every), sum(H[i][i] for i in range(2)) / 2):
            assert not close(got, wrong, 1e-3)
        assert views == 2 or not close(got, (H[0][1] + H[1][0]) / 2, 1e-3)
        got.backward()
        assert all(x.grad.abs().max() > 1e-3 for x in s)
    assert close(dinov2.class_loss([0 * t[0]] * 4, t[:2], 0.1), math.log(5))


def test_masked_loss_equation():
    """Released iBOTPatchLoss.forward_masked: the sum of an image over its hidden patches, by their
    number, over all images, those that hide nothing too."""
    s, t = 0.3 * draw(4, 6, 5), answers(4, 6, 5, seed=1)
    masks = torch.tensor([[1, 0, 1, 0, 1, 0], [0] * 6, [0, 0, 0, 1, 0, 0], [0] * 6]).bool()
    H = [[cross_entropy(s[n, i], t[n, i], 0.1) for i in range(6)] for n in range(4)]
    of = [[H[n][i] for i in range(6) if masks[n, i]] for n in range(4)]
    means = [sum(h) / max(len(h), 1) for h in of]
    counts = [int(m.sum()) for m in masks if m.any()]
    w = torch.cat([torch.full((n,), 1 / (4 * n), dtype=torch.double) for n in counts])
    got = dinov2.masked_loss(s[masks].requires_grad_(), t[masks], w, 0.1)
    assert got.requires_grad and close(got, sum(means) / 4)
    for wrong in (sum(means) / 2, sum(map(sum, of)) / 4, sum(map(sum, of)), sum(map(sum, H)) / 24):
        assert not close(got, wrong, 1e-3)
    assert close(dinov2.masked_loss(0 * s[masks], t[masks], w, 0.1), math.log(5) / 2, 1e-6)
    assert dinov2.masked_loss(s[:0, 0], t[:0, 0], w[:0], 0.1) == 0


def koleo_by_hand(x, mistake=None):
    """Released KoLeoLoss: x = normalize(x, eps); i = the nearest by inner product, not itself;
    -log(PairwiseDistance(2, eps)(x, x[i]) + eps).mean(), eps = 1e-8, which PairwiseDistance adds to
    every difference."""
    eps, n, total = 1e-8, len(x), 0.0
    length = [1 if mistake == "no normalisation" else max(math.hypot(*r), eps) for r in x.tolist()]
    rows = [[v / norm for v in r] for r, norm in zip(x.tolist(), length)]
    for i in range(n):
        d = [math.sqrt(sum((a - b + eps) ** 2 for a, b in zip(rows[i], rows[j]))) for j in range(n)
             if j != i or mistake == "itself"]
        nearest = max(d) if mistake == "the farthest" else min(d)
        total -= nearest if mistake == "no logarithm" else math.log(nearest + eps)
    return total / n


def test_koleo_equation():
    for n, D, seed in ((5, 3, 0), (2, 7, 1), (9, 4, 2)):
        x = (draw(n, D, seed=seed) * torch.arange(1, n + 1).view(-1, 1)).requires_grad_()
        got = dinov2.koleo(x)
        assert close(got, koleo_by_hand(x))
        for mistake in ("no normalisation", "itself", "the farthest", "no logarithm"):
            if mistake != "the farthest" or n > 2:
                assert not close(got, koleo_by_hand(x, mistake), 1e-3), mistake
        assert torch.autograd.gradcheck(dinov2.koleo, x)
        near = x + 0.01 * draw(n, D, seed=9)  # another crop of the same images
        assert dinov2.koleo(torch.cat([x, near])) > got + dinov2.koleo(near) + 0.5 or n == 2
    equal = draw(1, 6).expand(4, 6)
    assert close(dinov2.koleo(equal), -math.log(1e-8 * (1 + math.sqrt(6))), 1e-6)
    assert close(dinov2.koleo(3 * torch.eye(4, dtype=torch.float64)), -math.log(2) / 2, 1e-7)
    assert close(dinov2.koleo(torch.tensor([[1.0, 0], [-1, 0]])), -math.log(2), 1e-6)
    x = torch.zeros(2, 3, requires_grad=True)
    dinov2.koleo(x).backward()
    assert x.grad.isfinite().all()


def test_mean_entropy():
    t = answers(4, 5)
    by_hand = -sum(p * math.log(p) for row in t.tolist() for p in row)
    assert close(dinov2.mean_entropy(t), by_hand / 4) and not close(by_hand / 4, by_hand, 1e-2)
    assert dinov2.mean_entropy(torch.eye(5)) == 0  # 0 log 0 is 0
    assert close(dinov2.mean_entropy(torch.full((3, 5), 0.2)), math.log(5), 1e-6)
    s = [draw(4, 5, seed=i) for i in range(3)]  # the class term is this and a KL
    assert dinov2.class_loss(s, [t, t], 0.1) > by_hand / 4


# ==================================================================================================
# Masks
# ==================================================================================================


def test_block_mask():
    """BEiT's blocks of at least 4 patches."""
    make = functools.partial(dinov2.block_mask, least=4)
    assert blocks_agree(make, least=4) and not blocks_agree(make, least=5)
    for mistake in ("all squares", "height and width swapped", "one block"):
        assert not blocks_agree(make, mistake, least=4), mistake


def stratified(ratios, low, high, slack):
    """Whether the i-th smallest is in the i-th of equal parts of [low, high]."""
    width = (high - low) / max(len(ratios), 1)
    return all(abs(r - low - (i + 0.5) * width) <= width / 2 + slack
               for i, r in enumerate(sorted(ratios)))


@pytest.mark.parametrize("flags, N, share", [
    ("", 12, 0.5), ("--mask-crops 0.3 --mask-ratio 0.2 0.3", 7, 0.3), ("--mask-crops 1", 8, 1.0),
    ("--random-masks", 8, 0.5), ("--mask-crops 0", 8, 0.0)])
def test_masks(flags, N, share):
    """Exactly the share has a mask, of strata of --mask-ratio: one by one as many as asked for, in
    blocks at most; a patch weighs 1 / (those of its view x 2 N)."""
    args = small_args(*flags.split(), "--batch-size", str(N))
    masks, hidden, weights = dinov2.stratified_masks(5, 16, args, ONE)
    assert masks.shape == (2 * N, 16, 16) and masks.dtype == torch.bool
    counts = masks.sum((1, 2)).tolist()
    masked = int(2 * N * share)
    assert sum(map(bool, counts)) == masked
    args.random_masks = True
    singles, *_ = dinov2.stratified_masks(5, 16, args, ONE)
    asked = [(n + 0.5) / 256 for n in singles.sum((1, 2)).tolist() if n]  # rounded down
    assert stratified(asked, *args.mask_ratio, 0.5 / 256) and (asked != sorted(asked) or not asked)
    drawn = torch.rand(12, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.1
    assert not stratified(drawn.tolist(), 0.1, 0.5, 0.5 / 256)  # as ratios without strata
    assert all(0 < a <= b or a == b == 0 for a, b in zip(counts, singles.sum((1, 2)).tolist()))
    generator = torch.Generator().manual_seed(3 * 2**20 + 5)
    parts = torch.rand(masked, generator=generator).tolist() + [0] * (2 * N - masked)
    order = torch.randperm(2 * N, generator=generator).tolist()
    rounds = [torch.rand(2 * N, 4, generator=generator).tolist() for _ in range(200)]
    (low, high), view = args.mask_ratio, order.index(0)
    if masked and "random" not in flags:  # blocks of at least 4 patches
        ratio = low + (high - low) * parts[0] / masked  # of the first stratum
        block = beit_blocks(16, 16, ratio, (numbers[view] for numbers in rounds), 4)
        assert torch.equal(masks[view], block) and block.any()
    places = [n * 256 + i for n in range(2 * N) for i in range(256) if masks[n].flatten()[i]]
    assert hidden.tolist() == places
    assert close(weights, [1 / counts[i // 256] / (2 * N) for i in places], 1e-8)
    args.random_masks = "random" in flags
    again = [dinov2.stratified_masks(step, 16, args, ONE)[0] for step in (5, 6)]
    args.seed += 1
    again.append(dinov2.stratified_masks(5, 16, args, ONE)[0])
    assert [torch.equal(m, masks) for m in again] == [True, not masked, not masked]


def test_masks_of_two_processes():
    """An image has the same two masks; a patch weighs twice as much, as gradients are averaged."""
    def dense(n, masks, hidden, weights):
        full = torch.zeros(masks.numel()).index_add_(0, hidden, weights)
        return masks.view(2, n, 16, 16), full.view(2, n, 16, 16)

    args = small_args("--batch-size", "6")
    masks, weights = dense(6, *dinov2.stratified_masks(5, 16, args, ONE))
    halves = [dense(3, *dinov2.stratified_masks(5, 16, args, SimpleNamespace(
        world=2, rank=r, device=ONE.device)))
              for r in range(2)]
    assert torch.equal(torch.cat([m for m, _ in halves], 1), masks)
    assert close(torch.cat([w for _, w in halves], 1) / 2, weights, 1e-8)
    assert not torch.equal(torch.cat([m for m, _ in halves[::-1]], 1), masks)


# ==================================================================================================
# Vision transformer
# ==================================================================================================


def strange(net):
    """Double precision, random weights everywhere, norms and LayerScale away from 1."""
    for i, (name, p) in enumerate(net.named_parameters()):
        spread = 0.3 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5
        p.data = spread * draw(*p.shape, seed=i, dtype=torch.float64)
        p.data += 1.0 if "gamma" in name or "norm" in name and "weight" in name else 0
    return net.double().eval()


@pytest.fixture(scope="module", params=["0 --ffn mlp", "0 --ffn swiglu", "3 --ffn mlp",
                                        "3 --ffn swiglu"])
def twins(request):
    """Our backbone and what the printed lines make of its weights."""
    pytest.importorskip("timm")
    args = small_args("--registers", *request.param.split())
    net = strange(dinov2.build(args).backbone)
    exec(dinov2.loading(args), names := {})
    twin = names["net"].double().eval()
    twin.load_state_dict(net.state_dict())
    return net, twin


@torch.no_grad()
def test_vit_is_timms(twins):
    net, other = twins
    x = draw(2, 3, 32, 32)
    ours, theirs = net(x), other.forward_features(x)
    assert ours.shape == (2, 17 + net.registers, 128) and close(ours, theirs, 1e-8)
    assert close(ours[:, 0], other(x), 1e-8) and ours.std() > 0.5

    def differs(change):
        changed = copy.deepcopy(net)
        for m in changed.modules():
            change(m)
        return not close(changed(x), theirs, 1e-6)

    def flipped(m):
        if isinstance(m, dinov2.SwiGLU):  # gate and value
            m.w12.weight.data = m.w12.weight.data.roll(len(m.w12.weight) // 2, 0)

    assert not differs(lambda m: None)
    assert differs(lambda m: setattr(m, "eps", 1e-4))
    assert differs(lambda m: setattr(m, "heads", 2 * getattr(m, "heads", 0)))
    assert differs(lambda m: m.gamma.data.fill_(1) if hasattr(m, "gamma") else None)
    gelu = isinstance(net.blocks[0].mlp, nn.Sequential)
    assert differs(lambda m: setattr(m, "approximate", "tanh")) == gelu
    assert differs(flipped) == (not gelu)


@pytest.mark.parametrize("make, width, depth, heads, parameters, tensors", [
    (dinov2.vit_small, 384, 12, 6, 22_056_576, 175),
    (dinov2.vit_base, 768, 12, 12, 86_580_480, 175),
    (dinov2.vit_large, 1024, 24, 16, 304_368_640, 343),
    (dinov2.vit_giant, 1536, 40, 24, 1_136_480_768, 567)])
def test_official_sizes(make, width, depth, heads, parameters, tensors):
    with torch.device("meta"):
        net, with_registers = make(), make(registers=4)
        small = make(16, 224)
    w = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert len(w) == tensors and sum(map(math.prod, w.values())) == parameters
    D, block = width, f"blocks.{depth - 1}."
    mlp = {"mlp.w12.weight": (8192, D), "mlp.w3.weight": (D, 4096)} if depth == 40 else {
        "mlp.fc1.weight": (4 * D, D), "mlp.fc2.weight": (D, 4 * D)}
    last = mlp | {"norm1.weight": (D,), "norm2.bias": (D,), "attn.qkv.weight": (3 * D, D),
                  "attn.proj.bias": (D,), "ls1.gamma": (D,), "ls2.gamma": (D,)}
    expected = {block + k: v for k, v in last.items()} | {
        "cls_token": (1, 1, D), "mask_token": (1, D), "pos_embed": (1, 1370, D),
        "patch_embed.proj.weight": (D, 3, 14, 14), "patch_embed.proj.bias": (D,), "norm.bias": (D,)}
    assert expected.items() <= w.items() and net.blocks[0].attn.heads == heads
    more = {k: tuple(v.shape) for k, v in with_registers.state_dict().items()}
    assert more == w | {"register_tokens": (1, 4, D)} and small.pos_embed.shape == (1, 197, D)


def interpolate_pos_encoding(pos_embed, w0, h0, offset, antialias):
    """The released code's, typed in; there x is (B, nc, w, h)."""
    N, dim, kwargs = pos_embed.shape[1] - 1, pos_embed.shape[-1], {}
    M = int(math.sqrt(N))
    if N == w0 * h0 and w0 == h0:
        return pos_embed
    if offset:
        kwargs["scale_factor"] = (float(w0 + offset) / M, float(h0 + offset) / M)
    else:
        kwargs["size"] = (w0, h0)
    patch_pos_embed = F.interpolate(
        pos_embed[:, 1:].reshape(1, M, M, dim).permute(0, 3, 1, 2), mode="bicubic",
        antialias=antialias, **kwargs)
    assert (w0, h0) == patch_pos_embed.shape[-2:]
    patch_pos_embed = patch_pos_embed.permute(0, 2, 3, 1).view(1, -1, dim)
    return torch.cat((pos_embed[:, 0].unsqueeze(0), patch_pos_embed), dim=1)


OFFICIAL = {False: (0.1, False), True: (0.0, True)}  # with registers: offset, antialias


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_other_resolutions(registers):
    net = strange(dinov2.RegisterViT(24, 1, 3, patch_size=4, image_size=24, registers=registers))
    native = net.pos_embed.float()
    for h, w in ((6, 6), (16, 16), (2, 2), (9, 4), (4, 9), (3, 12)):
        patches = draw(1, 24, h, w)
        tokens = net.tokens(patches)
        assert close(tokens[:, 0], net.cls_token[0] + net.pos_embed[:, 0])
        assert not registers or torch.equal(tokens[:, 1:5], net.register_tokens)  # no position
        got = tokens[:, 1 + registers :] - patches.flatten(2).mT
        right, wrong = (interpolate_pos_encoding(native, h, w, *OFFICIAL[k])[:, 1:]
                        for k in (registers > 0, registers == 0))
        assert close(got, right, 1e-6), (h, w)
        assert close(got, wrong, 1e-3) == ((h, w) == (6, 6)), (h, w)
        assert net(draw(2, 3, 4 * h, 4 * w)).shape == (2, 1 + registers + h * w, 24)


def test_swiglu_and_layer_scale():
    """Shazeer 2020, equation 6, with SiLU of the first half; Touvron et al. 2021, equation 1."""
    ffn, x = dinov2.SwiGLU(12).double(), draw(2, 12)
    assert [dinov2.SwiGLU(d).w3.in_features for d in (12, 1024, 1536)] == [32, 2736, 4096]
    W, V, b, c = *ffn.w12.weight.split(32), *ffn.w12.bias.split(32)
    for n in range(2):
        gate = [(W[k] @ x[n] + b[k]).item() for k in range(32)]
        held = [g / (1 + math.exp(-g)) * (V[k] @ x[n] + c[k]).item() for k, g in enumerate(gate)]
        assert close(ffn(x)[n].detach(), ffn.w3.weight @ torch.tensor(held).double() + ffn.w3.bias,
                     1e-7)
    scale = dinov2.LayerScale(12, 0.3).double()
    assert close(scale(x), 0.3 * x, 1e-6)
    scale.gamma.data = draw(12, seed=1)
    assert close(scale(x), torch.stack([x[:, k] * scale.gamma[k] for k in range(12)], 1))
    gammas = [p for k, p in dinov2.build(small_args("--layer-scale", "1e-5")).named_parameters()
              if k.endswith("gamma")]
    assert len(gammas) == 6 and all(g.eq(1e-5).all() for g in gammas)


@pytest.mark.parametrize("n, p, kept", [(10, 0.3, 7), (3, 0.9, 1), (9, 0.5, 4), (4, 0.99, 1)])
def test_stochastic_depth_computes_a_part(n, p, kept):
    block, x, sizes = strange(dinov2.ScaledBlock(12, 3, drop_path=p)), draw(n, 5, 12), []
    whole, total, times = block.ls1(block.attn(block.norm1(x))), torch.zeros(n), 150
    assert close(block.add(x, lambda x: 2 * x), 3 * x)  # all of it where there is no training
    torch.manual_seed(0)
    for part in (block.train().attn, block.mlp):
        part.register_forward_pre_hook(lambda m, given: sizes.append(len(given[0])))
    block(x)
    assert sizes == [kept, kept]
    for _ in range(times):
        y = block.add(x, lambda x: block.ls1(block.attn(block.norm1(x))))
        moved = (y - x).abs().amax((1, 2)) > 0
        assert moved.sum() == kept
        assert close(y, torch.where(moved.view(-1, 1, 1), x + n / kept * whole, x))
        assert not close(y, x + moved.view(-1, 1, 1) * whole, 1e-3)
        total += moved * n / kept
    assert (total / times - 1).abs().max() < 4 * math.sqrt((n / kept - 1) / times)  # on average


def test_stochastic_depth_is_the_students():
    """The same rate in all blocks, unlike DINO."""
    args = small_args("--drop-path", "0.3")
    rates = [[b.drop_path for b in dinov2.build(args, *p).backbone.blocks] for p in ((0.3,), ())]
    assert rates == [[0.3] * 3, [0] * 3]
    assert same(dinov2.build(args, 0.3).state_dict(), dinov2.build(args).state_dict())


def test_checkpointed_activations_give_the_same_gradients():
    grads, calls = [], []
    for flags in ([], ["--checkpoint-activations"]):
        net = dinov2.build(small_args(*flags), 0.5)
        strange(net).train().backbone.blocks[0].register_forward_pre_hook(
            lambda *_: calls.append(0))
        torch.manual_seed(0)
        net(draw(6, 3, 32, 32).sigmoid())[2].square().mean().backward()
        grads.append([p.grad for p in net.backbone.blocks.parameters()])
    assert len(calls) == 1 + 2 and all(map(close, *grads))  # forward once more
    assert all(g.abs().max() > 1e-9 for g in grads[0])


def test_start_with_sines():
    """Row y and column x of a patch, in waves of 2 sides / side^(j / (J - 1)) patches."""
    vit, side, J = dinov2.build(small_args("--image-size", "40")).backbone, 5, 32
    for patch in (0, 1, 7, 24):
        y, x = divmod(patch, side)
        expected = [f(at * math.pi / side * side ** (j / (J - 1))) for at in (y, x)
                    for f in (math.sin, math.cos) for j in range(J)]
        assert close(vit.pos_embed[0, 1 + patch], expected, 1e-5)
    for name, p in vit.blocks.named_parameters():
        if p.ndim == 2:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
    wide = dinov2.build(small_args("--arch", "vit_small", "--patch-size", "16")).backbone
    assert wide.pos_embed.abs().max() < 0.2 and wide.blocks[0].mlp.fc1.weight.std() < 0.021


# ==================================================================================================
# Heads and hidden patches
# ==================================================================================================


@torch.no_grad()
@pytest.mark.parametrize("flags", ["", "--registers 2 --tied-heads"])
def test_hidden_patches(flags):
    """The student does not see them, and says something of each of them in the order of hidden."""
    args = small_args(*flags.split(), "--batch-size", "3", "--random-masks", "--mask-crops", "0.7")
    net, R = strange(dinov2.build(args)), args.registers
    masks, hidden, _ = dinov2.stratified_masks(2, 4, args, ONE)
    assert 0 < masks.flatten(1).any(1).sum() < 6 and len(hidden) > 8
    views = [draw(3, 3, s, s, seed=i).sigmoid() for i, s in enumerate((32, 32, 16, 16))]

    def student(views):
        return net(*views, masks=masks, hidden=hidden)

    got = student(views)
    assert [tuple(x.shape) for x in got] == [(12, 128), (12, 256), (12, 12), (len(hidden), 12)]
    under = masks.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).chunk(2)
    noise = [draw(3, 3, 32, 32, seed=i + 9) for i in range(2)]
    for where, alike in ((under, True), ([~m for m in under], False)):
        other = [x + n * m for x, n, m in zip(views, noise, where)] + views[2:]
        assert [close(a, b) for a, b in zip(student(other), got)] == [alike] * 4
    head = net.dino_head if args.tied_heads else net.ibot_head
    assert (net.ibot_head is None) == args.tied_heads
    rows, wrong = [], []
    mean, std = (torch.tensor(t).double().view(3, 1, 1) for t in (dinov2.MEAN, dinov2.STD))
    for n, mask in enumerate(masks):
        x = net.backbone.patch_embed((torch.cat(views[:2])[n : n + 1] - mean) / std)
        for i in range(16):
            if mask[i // 4, i % 4]:
                x[0, :, i // 4, i % 4] = net.backbone.mask_token[0]
        tokens = net.backbone.encode(x)[0]
        assert close(tokens[0], got[0][n], 1e-6)  # mean and std are float32
        of = [i for i in range(16) if mask.flatten()[i]]
        rows += [tokens[1 + R + i] for i in of]
        wrong += [tokens[R + i] for i in of]  # as if there was no class token
    assert close(head(torch.stack(rows))[1], got[3], 1e-6)
    assert not close(head(torch.stack(wrong))[1], got[3], 1e-3)
    assert args.tied_heads or not close(net.dino_head(torch.stack(rows))[1], got[3], 1e-3)
    whole = net(*views[:2], hidden=hidden)  # as the teacher is asked
    assert close(whole[0], torch.cat([net(x)[0] for x in views[:2]]))
    assert not close(whole[3], got[3], 1e-3) and close(got[0][6:], net(*views[2:])[0])
    assert close(net.dino_head(got[0])[1], got[2])


# ==================================================================================================
# The step
# ==================================================================================================


STEPS = [*TINY, *PLAIN, "--limit", "12", "--batch-size", "4", "--eval-every", "0", *(
    "--arch vit_nano --patch-size 4 --local-size 8 --local-crops 1 --hidden 10 --out-dim 12 --lr "
    "0.016 --warmup 0 --m 0.5 --m-end 1 --weight-decay 0.04 --weight-decay-end 0.4 --tau-t 0.2 "
    "--tau-t-warmup 1 --clip 1e9 --koleo 0.1 --freeze-last-layer 0 --mask-ratio 0.3 0.5 "
    "--epochs 1").split()]


def algorithm(net, views, masks, flags, mistake=None):
    """Section 4 of the paper and the released SSLMetaArch.forward_backward and do_train:

        L = L_DINO + L_iBOT + 0.1 (L_KoLeo of the first global view + L_KoLeo of the second)
        clip_grad_norm_(3.0) of backbone, dino_head and ibot_head; AdamW; EMA of the teacher

    with --centering ema softmax((t - C) / tau) in the place of Sinkhorn-Knopp, C of steps before.
    masks: (2 N, T) of every step. -> gs, gt, both centres, and means over the steps of the loss,
    its three terms, the entropy of the targets and KL.
    """
    steps, N, gs, gt = len(views), flags.batch_size, net, copy.deepcopy(net)
    C, moments, rows = [torch.zeros(flags.out_dim)] * 2, {}, []

    def schedule(k, first, last):
        return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2

    def encode(g, x, mask=None):  # -> class tokens (N, d), patches (N, T, d)
        x = g.backbone.patch_embed((x - g.mean) / g.std)
        if mask is not None:
            tokens = x.flatten(2).mT.clone()
            tokens[mask] = g.backbone.mask_token[0]
            x = tokens.mT.reshape(x.shape)
        tokens = g.backbone.encode(x)
        return tokens[:, 0], tokens[:, 1:]

    def answer(t, C, tau):
        if flags.centering == "ema" or mistake == "no Sinkhorn":
            return torch.softmax((t.detach() - C) / tau, 1)
        Q = torch.exp(t.detach() / tau)  # sinkhorn_by_hand in short
        for dim in (0, 1) * 3:
            Q = Q / Q.sum(dim, keepdim=True)
        return Q

    def cross(t, s):
        return -(t * torch.log(torch.softmax(s / flags.tau_s, -1))).sum(-1)

    def koleo(x):
        x = x / x.norm(dim=1, keepdim=True)
        d = (x.unsqueeze(1) - x + 1e-8).norm(dim=2) + torch.diag(torch.full((len(x),), math.inf))
        return -(d.min(1).values + 1e-8).log().mean()

    for k, (x, mask) in enumerate(zip(views, masks)):
        mask = mask.split(N)
        tau = 0.04 + (flags.tau_t - 0.04) * k / steps
        of_class, of_patch = "dino_head", "dino_head" if flags.tied_heads else "ibot_head"
        if mistake == "heads swapped":
            of_class, of_patch = of_patch, of_class
        student = [encode(gs, v, mask[i] if i < 2 else None) for i, v in enumerate(x)]
        teacher = [encode(gt, v, mask[i] if mistake == "teacher sees the mask" else None)
                   for i, v in enumerate(x[:2])]
        s = [getattr(gs, of_class)(h)[1] for h, _ in student]
        t = torch.cat([getattr(gt, of_class)(h)[1] for h, _ in teacher])
        t2 = torch.cat([getattr(gt, of_patch)(p[m])[1] for (_, p), m in zip(teacher, mask)])
        means = [t.mean(0).detach(), t2.mean(0).detach()]
        if mistake == "centre of all patches":
            means[1] = torch.cat([getattr(gt, of_patch)(p.flatten(0, 1))[1]
                                  for _, p in teacher]).mean(0).detach()
        new = [flags.center_m * c + (1 - flags.center_m) * m for c, m in zip(C, means)]
        new = new if flags.centering == "ema" else C
        C = new if mistake == "centre of this batch" else C
        q, q2 = answer(t, C[0], tau).chunk(2), answer(t2, C[1], tau)
        pairs = [cross(q[i], s[j]).mean() for i in range(2) for j in range(len(s)) if i != j]
        dino = sum(pairs) / len(pairs)
        ibot, left = 0.0, q2
        for p, hidden in zip(torch.cat([p for _, p in student[:2]]), torch.cat(mask)):
            if count := int(hidden.sum()):
                s2, part = getattr(gs, of_patch)(p[hidden])[1], left[:count]
                ibot, left = ibot + cross(part, s2).mean() / (2 * N), left[count:]
        spread = koleo(student[0][0]) + koleo(student[1][0])
        if mistake == "KoLeo across crops":
            spread = 2 * koleo(torch.cat([h for h, _ in student[:2]]))
        loss = dino * (not flags.no_class_loss) + ibot * (not flags.no_token_loss)
        loss = loss + flags.koleo * spread
        entropy = -sum((p * p.log()).sum(1).mean() for p in q) / 2
        terms = loss, dino, torch.as_tensor(ibot), spread, entropy, dino - entropy
        rows.append(torch.stack(terms).detach())
        for p in gs.parameters():
            p.grad = torch.zeros_like(p)
        loss.backward()
        for part in [gs] if mistake == "clipped together" else gs.children():
            nn.utils.clip_grad_norm_(part.parameters(), flags.clip)
        for name, p in gs.named_parameters():
            rests = "last_layer" in name and flags.freeze_last_layer  # the run has one epoch
            lr = 0.0 if rests else schedule(k, flags.lr * math.sqrt(N / 1024), 0.0)
            decay = schedule(k, flags.weight_decay, flags.weight_decay_end) * (
                "bias" not in name and "norm" not in name and "gamma" not in name)
            one, two, i = moments.get(name, (0, 0, 0))
            one, two, i = 0.9 * one + 0.1 * p.grad, 0.999 * two + 0.001 * p.grad**2, i + 1
            if not (rests and mistake == "frozen moments rest"):
                moments[name] = one, two, i
            step = one / (1 - 0.9**i) / ((two / (1 - 0.999**i)).sqrt() + 1e-8)
            p.data = p.data * (1 - lr * decay) - lr * step
        m = schedule(k, flags.m, flags.m_end)
        for old, p in zip(gt.parameters(), gs.parameters()):
            old.data = m * old.data + (1 - m) * p.data
        C = new
    return gs, gt, C, torch.stack(rows).mean(0)


def three_steps(tmp_path, *flags):
    """dinov2.train as it is shipped, for three steps: the run, which has views and state."""
    *_, run = train(dinov2, [*STEPS, *flags, "--out", tmp_path / "run"], Watched)
    run.masks = [dinov2.stratified_masks(step, views[0].shape[-1] // 4, run.args, ONE)[0].flatten(1)
                 for step, views in enumerate(run.views)]
    return run


def agree(run, flags=None, mistake=None):
    """Whether networks, centres and figures are the algorithm's in double precision. The networks
    by their movement, but for biases of keys: their gradient is 0, Adam makes much of its noise."""
    net = dinov2.build(run.args).double()
    views = [[x.double() for x in step] for step in run.views]
    gs, gt, C, terms = algorithm(
        copy.deepcopy(net), views, run.masks, flags or run.args, mistake)
    start, apart, moved = net.state_dict(), 0.0, 0.0
    for ours, theirs in ((run.state["net"], gs), (run.state["net_ema"], gt)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        for k in (k for k in theirs if "qkv.bias" not in k):
            apart += (ours[k] - theirs[k]).square().sum().item()
            moved += (theirs[k] - start[k]).square().sum().item()
    centres = zip(run.state["centers"], C)
    names = ["loss", "cls", "patch", "koleo", "entropy", "kl"]
    return apart < 1e-6 * moved and all(close(a, b, 1e-6) for a, b in centres) and close(
        terms, [run.rows[0][k] for k in names], 1e-5)


def test_algorithm(tmp_path):
    run = three_steps(tmp_path)
    assert [len(v) for v in run.views] == [3] * 3 and agree(run)
    for mistake in ("teacher sees the mask", "no Sinkhorn", "KoLeo across crops", "heads swapped"):
        assert not agree(run, mistake=mistake), mistake
    assert run.state["centers"].eq(0).all()


@pytest.mark.parametrize("flags, mistakes", [
    ("--centering ema --center-m 0.5", ["centre of this batch", "centre of all patches"]),
    ("--freeze-last-layer 1 --koleo 0 --m-end 0.6", []), ("--clip 0.1", ["clipped together"]),
    ("--no-token-loss --tied-heads", []),
    ("--no-class-loss --koleo 0.3 --tau-s 0.2 --hires-epochs 1 --hires-size 24", [])])
def test_flags_change_the_algorithm(tmp_path, flags, mistakes):
    run = three_steps(tmp_path, *flags.split())
    assert agree(run)
    for mistake in mistakes:
        assert not agree(run, mistake=mistake), mistake
    plain = copy.deepcopy(run.args)
    vars(plain).update(centering="sinkhorn", freeze_last_layer=0, clip=1e9, koleo=0.1, tau_s=0.1,
                       no_token_loss=False, no_class_loss=False)
    hires, tied = "hires" in flags, "tied" in flags
    assert mistakes or not agree(run, plain)
    side = 24 if hires else 16
    assert [[v.shape[-1] for v in views] for views in run.views] == [[side, side, 8]] * 3
    assert (run.state["net"].ibot_head is None) == tied


def test_over_epochs(tmp_path):
    """The last ones have larger views; a last layer that rests at first has moments of its own."""
    flags = "--epochs 2 --hires-epochs 1 --hires-size 24 --freeze-last-layer 1".split()
    *_, run = train(dinov2, [*STEPS, *flags, "--out", tmp_path / "run"], Watched)
    assert [views[0].shape[-1] for views in run.views] == [16] * 3 + [24] * 3
    first = run.state["optimizer"].state_dict()
    assert {int(v["step"]) for v in first["state"].values()} == {6}
    start, end = dinov2.build(run.args).state_dict(), run.state["net"].state_dict()
    assert not any(torch.equal(start[k], end[k]) for k in start if "last_layer" in k)


def test_equal_outputs_have_the_value_of_chance(tmp_path):
    """Equal tokens and last layers of length 0 give every term its chance."""
    net = dinov2.build(completed(*STEPS))
    nn.init.zeros_(net.backbone.norm.weight)
    nn.init.ones_(net.backbone.norm.bias)
    for head in (net.dino_head, net.ibot_head):
        nn.init.zeros_(head.last_layer.weight_g)
    path = tmp_path / "equal.pth"
    torch.save({"teacher": dict(net.state_dict())}, path)
    flags = "--koleo 0 --lr 1e-9 --mask-ratio 0.4 0.5".split()  # no mask stays empty
    *_, run = train(dinov2, [*STEPS, *flags, "--init", path, "--out", tmp_path / "run"])
    for name, chance in run.chance.items():
        assert close(run.rows[0][name], chance, 0.02), name
    assert run.rows[0]["loss"] > 3 and run.rows[0]["koleo"] > 30


# ==================================================================================================
# EMA, centre, schedules, clipping
# ==================================================================================================


def test_ema_update():
    for m in (0.0, 0.9, 1.0, torch.tensor(0.9)):
        ema, net = nn.Linear(3, 2).double(), nn.BatchNorm1d(2).double()
        ema, net = (nn.Sequential(copy.deepcopy(ema), copy.deepcopy(net)) for _ in range(2))
        for i, p in enumerate([*ema.parameters(), *net.parameters()]):
            p.data = draw(*p.shape, seed=i)
        net[1].running_mean += 1
        expected = [m * a + (1 - m) * b for a, b in zip(ema.parameters(), net.parameters())]
        dinov2.ema_update(ema, net, m)
        assert all(close(a, b, 1e-7) for a, b in zip(ema.parameters(), expected))
        assert ema[1].running_mean.eq(0).all()  # the parameters alone


def test_center():
    """C_n = m^n C_0 + (1 - m) sum_t m^(n-t) mean_t, of raw outputs."""
    start = C = draw(1, 5, seed=9)
    means, m, n = [], 0.9, 6
    for t in range(n):
        teacher = draw(4, 5, seed=t) + t
        means.append([sum(teacher[i, k].item() for i in range(4)) / 4 for k in range(5)])
        before, C = C, dinov2.update_center(C, teacher, m)
        assert close(C, dinov2.update_center(before, teacher.mean(0, keepdim=True), m))
    weights = [m ** (n - 1 - t) for t in range(n)]
    for powers, right in ((weights, True), (weights[::-1], False)):
        expected = [m**n * start[0, k].item() + (1 - m) * sum(
            w * mean[k] for w, mean in zip(powers, means)) for k in range(5)]
        assert close(C[0], expected, 1e-10 if right else 1e-2) == right


def test_lr_at():
    rates = [dinov2.lr_at(k, 10, 4, 0.8) for k in range(11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    expected = [0.4 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    assert rates[4:] == pytest.approx(expected) and dinov2.lr_at(0, 10, 0, 0.8) == 0.8


def test_cosine():
    for start, end, n in ((0.996, 1.0, 1000), (0.04, 0.4, 7)):
        values = [dinov2.cosine(i, n, start, end) for i in range(n + 1)]
        for i, v in enumerate(values):  # cosine_scheduler of the released code
            assert close(v, end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)), 1e-15)
        assert values[-1] == end and values == sorted(values)


def test_tau_at():
    def taus(tau_t, warmup, n=10):
        return [dinov2.tau_at(i, n, tau_t, warmup) for i in range(n)]

    assert taus(0.07, 0.3) == pytest.approx([0.04, 0.05, 0.06] + [0.07] * 7)
    assert taus(0.02, 0.3) == pytest.approx([0.02] * 10)  # it does not start above what is asked
    assert taus(0.07, 0.0) == pytest.approx([0.07] * 10)


def test_mean_of_all():
    """Rows of two processes with different numbers of them."""
    x = draw(7, 3)
    sums = [torch.cat([part.sum(0), torch.tensor([float(len(part))])]) for part in x.split([5, 2])]
    for part in x.split([5, 2]):
        run = SimpleNamespace(mean=lambda own: sum(sums) / 2)
        assert close(dinov2.mean_of_all(part, run), x.mean(0, keepdim=True))
    alone = SimpleNamespace(mean=lambda own: own)
    assert close(dinov2.mean_of_all(x, alone), x.mean(0, keepdim=True))
    assert dinov2.mean_of_all(x[:0], alone).eq(0).all()  # no patch is hidden


def test_clip_modules():
    """Each module as a whole, not all together, not tensor by tensor."""
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 2)]).double()
    for i, p in enumerate([*net[0].parameters(), *net[2].parameters()]):
        p.grad = draw(*p.shape, seed=i) * (0.01 if i < 2 else 5)
    before = [[p.grad.clone() for p in m.parameters()] for m in (net[0], net[2])]
    dinov2.clip_modules(net, 0.5)
    for m, grads in zip((net[0], net[2]), before):
        length = math.sqrt(sum(g.square().sum().item() for g in grads))
        factor = min(1.0, 0.5 / (length + 1e-6))
        assert all(close(p.grad, factor * g) for p, g in zip(m.parameters(), grads))
        assert (factor < 0.2) == (m is net[2])


# ==================================================================================================
# Weights in, options, words
# ==================================================================================================


def loaded(path, *argv):
    """The weights with which a network of another seed would be evaluated."""
    argv = [*TINY, *PLAIN, "--limit", "20", *NANO, "--seed", "0", "--local-crops", "0", *argv]
    net, *_ = train(dinov2, [*argv, "--eval", path, "--out", f"{path}-run"])
    return dict(net.state_dict())


def layouts(args, folder):
    """Files in the layouts of the released ones and of our own: name -> path, and the weights."""
    teacher, student = dinov2.build(args), dinov2.build(small_args("--seed", "9"))
    strange(teacher).float()
    flat = dict(teacher.backbone.state_dict())
    chunked = {}
    for k, v in teacher.state_dict().items():
        first, *rest = k.split("blocks.")
        i = int(rest[0].split(".")[0]) if rest else 0
        chunked[f"{first}blocks.{i // 2}.{rest[0]}" if rest else k] = v
    assert "backbone.blocks.1.2.norm1.weight" in chunked
    both = {"net": student.state_dict(), "net_ema": teacher.state_dict()}
    files = {"flat": flat, "full": {"teacher": chunked}, "backbone": {"state_dict": flat},
             "last": {"method": "dinov2", "state": both}}
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pth")
    return {k: folder / f"{k}.pth" for k in files}, dict(teacher.state_dict()), student.state_dict()


@pytest.mark.parametrize("flags", ["", "--registers 4 --ffn swiglu"])
def test_weights_from_files(flags, tmp_path):
    files, teacher, student = layouts(small_args(*flags.split()), tmp_path)
    untrained = dinov2.build(small_args(*flags.split(), "--seed", "0")).state_dict()
    for name, path in files.items():
        got = loaded(path, *flags.split())
        alone = name in ("flat", "backbone")
        assert same(got, {k: untrained[k] if alone and "_head." in k else v
                          for k, v in teacher.items()}), name
    if not flags:
        got = loaded(files["last"], "--branch", "student")
        assert same(got, dict(student)) and not same(got, teacher)
    bare = {k: v for k, v in torch.load(files["flat"]).items() if k != "mask_token"}
    torch.save(bare, tmp_path / "bare.pth")
    got = loaded(tmp_path / "bare.pth", *flags.split(), "--out-dim", "13")
    assert got["backbone.mask_token"].eq(0).all() and torch.equal(
        got["backbone.cls_token"], teacher["backbone.cls_token"])


@pytest.mark.parametrize("registers", ["0", "4"])
def test_weights_at_another_resolution(registers, tmp_path):
    """37 x 37 patches of a released file for 16 x 16 of ours."""
    args = small_args("--image-size", "296", "--registers", registers)
    files, teacher, _ = layouts(args, tmp_path)
    assert teacher["backbone.pos_embed"].shape == (1, 1370, 128)
    got = loaded(files["full"], "--image-size", "128", "--registers", registers)
    for k, v in got.items():
        expected = teacher[k]
        if k == "backbone.pos_embed":
            expected, wrong = (interpolate_pos_encoding(expected, 16, 16, *OFFICIAL[r])
                               for r in (registers == "4", registers == "0"))
            assert not close(v, wrong, 1e-3)
        assert close(v, expected, 1e-6), k


def test_files_of_another_network(tmp_path, capsys):
    files, *_ = layouts(small_args(), tmp_path)
    for path, changes in ((files["flat"], "--arch=vit_tiny"), (files["full"], "--patch-size=4"),
                          (files["last"], "--registers=4"), (files["backbone"], "--ffn=swiglu")):
        error = fails(functools.partial(loaded, path, changes), capsys)
        assert "another network" in error and str(path) in error


@pytest.mark.parametrize("argv, words", [
    ("--hires-epochs 1 --hires-size 8 --patch-size 9 --local-crops 0", "over --hires-size"),
    ("--no-class-loss --no-token-loss --koleo 0", "nothing to learn"),
    ("--mask-ratio 0.01 0.05", "hides none"), ("--patch-size 17", "--patch-size is over"),
    ("--local-scale 0.6", "--local-scale is over"), ("--koleo -1", "--koleo"),
    ("--centering none", "--centering"), ("--ffn relu", "--ffn"), ("--layer-scale 0", "--layer"),
    ("--registers -1", "--registers"), ("--drop-path 1", "--drop-path"), ("--hires-size 4", "size"),
    ("--mask-ratio 0.5", "--mask-ratio"), ("--arch resnet18", "--arch")])
def test_what_cannot_work(argv, words, capsys):
    error = fails(lambda: dinov2.check(completed(*TINY, *argv.split()), 100), capsys)
    assert words in error


def test_warnings(capsys):
    for argv, words in (("--m 0.99", "half-life"), ("--m 0 --patch-size 5", "multiple of"),
                        ("--m 0 --local-size 32", "not smaller than"), ("--m 0", ""),
                        ("--m 0 --patch-size 16", "hardly fit"),
                        ("--m 0 --patch-size 16 --random-masks", "")):
        dinov2.check(completed(*argv.split()), 100)
        out = capsys.readouterr().out
        assert words in out and out.count("warning") == bool(words)
    evaluated = completed("--local-scale", "0.9", "--m", "1")
    evaluated.eval = "x"
    dinov2.check(evaluated, 100)  # what training alone would need
    assert not capsys.readouterr().out


def test_the_collapse_is_named():
    """DINO's Figure 7: where KL goes to 0 nothing is learned; the entropy says why."""
    def words(entropy, kl):
        row = {"entropy": entropy * math.log(12), "kl": kl * math.log(12)}
        return dinov2.teacher_verdict("healthy: z is fine", SimpleNamespace(rows=[row]), 12)

    assert words(0.99, 0.001).startswith("uniform teacher: z is fine, teacher's entropy 0.99")
    assert words(0.001, 0.001).startswith("one-hot teacher: ")
    assert words(0.99, 0.2).startswith("healthy: ") and words(0.5, 0.001).startswith("healthy: ")
    assert dinov2.teacher_verdict("healthy: z", SimpleNamespace(rows=[]), 12) == "healthy: z"
    failed = SimpleNamespace(rows=[{"entropy": 0.0, "kl": 0.0}])
    assert dinov2.teacher_verdict("not finite", failed, 12) == "not finite"


def test_the_recipes():
    """Views and schedules of the released recipe of 100 epochs, DINO's rate for a ViT-S; blur as it
    was executed."""
    args = completed(column=2, n=10**6)
    assert dinov2.crops(args) == [common.Crop(224, (0.32, 1.0), (3 / 4, 4 / 3), 2),
                                  common.Crop(98, (0.05, 0.32), (3 / 4, 4 / 3), 8)]
    assert dinov2.crops(args, 518)[0].size == 518 and len(dinov2.crops(
        completed("--local-crops", "0"))) == 1
    assert (args.tau_s, args.tau_t, args.m) == (0.1, 0.07, 0.992)
    assert args.lr * (args.batch_size / 1024) ** 0.5 == pytest.approx(5e-4)
    assert (args.blur, args.koleo, args.ffn) == ([0.0, 0.9, 0.5], 0.1, "mlp")
    assert completed("--arch", "vit_giant").ffn == "swiglu"
    assert completed(column=1, n=10**6).m == 0.994
    steps = completed().epochs * 4000 / 64
    assert completed().m == pytest.approx(0.5 ** (20 / steps))
