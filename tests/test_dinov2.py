"""DINOv2 against its paper, the released code (where the two differ: the code) and timm."""

import contextlib
import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tools import TINY, close, draw, lighten, quiet, refused, same

import dinov2

SHORT = [*TINY, "--limit", "16", "--eval-every", "0"]  # three epochs of one step
NANO = "--arch vit_nano --patch-size 8 --image-size 32 --out-dim 12 --hidden 10 --seed 3"
ONE = SimpleNamespace(world=1, rank=0)


def completed(*argv):
    args = dinov2.options([*NANO.split(), *argv])
    dinov2.complete(args, None, 4000)
    return args


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
    w = torch.cat([torch.full((int(m.sum()),), 1 / (int(m.sum()) * 4)) for m in masks if m.any()])
    got = dinov2.masked_loss(s[masks].requires_grad_(), t[masks], w, 0.1)
    assert got.requires_grad and close(got, sum(means) / 4, 1e-7)
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


def stratified(ratios, low, high):
    """Whether the i-th smallest is in the i-th of equal parts of [low, high]."""
    width = (high - low) / max(len(ratios), 1)
    return all(abs(r - low - (i + 0.5) * width) <= width / 2 + 1e-6
               for i, r in enumerate(sorted(ratios)))


@pytest.mark.parametrize("flags, N, share", [
    ("", 12, 0.5), ("--mask-crops 0.3 --mask-ratio 0.2 0.3", 7, 0.3), ("--mask-crops 1", 8, 1.0),
    ("--random-masks", 8, 0.5), ("--mask-crops 0", 8, 0.0)])
def test_masks(flags, N, share, monkeypatch):
    args, ratios = completed(*flags.split(), "--batch-size", str(N)), []
    name = "random_masks" if args.random_masks else "block_masks"
    make = getattr(dinov2, name)

    def looking(height, width, shares, draws, **least):
        ratios.extend(shares.tolist())
        assert height == width == 16 and least == ({} if args.random_masks else {"least": 4})
        return make(height, width, shares, draws, **least)

    monkeypatch.setattr(dinov2, name, looking)
    masks, hidden, weights = dinov2.stratified_masks(5, 16, args, ONE)
    masked = [r for r in ratios if r]
    assert masks.shape == (2 * N, 16, 16) and masks.dtype == torch.bool
    assert len(ratios) == 2 * N and len(masked) == int(2 * N * share)
    assert stratified(masked, *args.mask_ratio) and (masked != sorted(masked) or not masked)
    drawn = torch.rand(12, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.1
    assert not stratified(drawn.tolist(), 0.1, 0.5)  # as ratios without strata
    for mask, ratio in zip(masks, ratios):
        assert mask.any() == (ratio > 0) and mask.sum() <= ratio * 256
    places = [n * 256 + i for n in range(2 * N) for i in range(256) if masks[n].flatten()[i]]
    assert hidden.tolist() == places
    assert close(weights, [1 / masks[i // 256].sum().item() / (2 * N) for i in places], 1e-8)
    assert close(weights.sum(), len(masked) / (2 * N), 1e-6)
    drawn = [dinov2.stratified_masks(step, 16, args, ONE)[0] for step in (5, 6)]
    args.seed += 1
    drawn.append(dinov2.stratified_masks(5, 16, args, ONE)[0])
    assert [torch.equal(m, masks) for m in drawn] == [True, not masked, not masked]


def test_masks_of_two_processes():
    """An image has the same two masks; a patch weighs twice as much, as gradients are averaged."""
    def dense(n, masks, hidden, weights):
        full = torch.zeros(masks.numel()).index_add_(0, hidden, weights)
        return masks.view(2, n, 16, 16), full.view(2, n, 16, 16)

    args = completed("--batch-size", "6")
    masks, weights = dense(6, *dinov2.stratified_masks(5, 16, args, ONE))
    halves = [dense(3, *dinov2.stratified_masks(5, 16, args, SimpleNamespace(world=2, rank=r)))
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
def twins(request, tmp_path_factory):
    """Our backbone and what the printed lines make of its file."""
    pytest.importorskip("timm")
    args = completed("--registers", *request.param.split())
    net = strange(dinov2.build(args).backbone)
    path = tmp_path_factory.mktemp("twins") / "backbone.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    exec(dinov2.loading(args, path), names := {})
    names["net"].double().load_state_dict(names["w"])
    return net, names["net"].eval()


@torch.no_grad()
def test_vit_is_timms(twins):
    net, other = twins
    x = draw(2, 3, 32, 32)
    ours, theirs = net(x), other.forward_features(x)
    assert ours.shape == (2, 17 + net.registers, 128) and close(ours, theirs, 1e-8)
    assert close(ours[:, 0], other(x), 1e-8) and ours.std() > 0.5
    seen, attn = [], net.blocks[-1].attn
    hook = attn.register_forward_pre_hook(lambda m, given: seen.append(attn.weights(given[0])))
    net(x)
    hook.remove()
    assert close(net.attention(x), seen[0])

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
    gammas = [p for k, p in dinov2.build(completed("--layer-scale", "1e-5")).named_parameters()
              if k.endswith("gamma")]
    assert len(gammas) == 6 and all(g.eq(1e-5).all() for g in gammas)


@pytest.mark.parametrize("n, p, kept", [(10, 0.3, 7), (3, 0.9, 1), (9, 0.5, 4), (4, 0.99, 1)])
def test_stochastic_depth_computes_a_part(n, p, kept):
    block, x, sizes = strange(dinov2.ScaledBlock(12, 3, drop_path=p)), draw(n, 5, 12), []
    whole, total, times = block.ls1(block.attn(block.norm1(x))), torch.zeros(n), 600
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
    args = completed("--drop-path", "0.3")
    rates = [[b.drop_path for b in dinov2.build(args, *p).backbone.blocks] for p in ((0.3,), ())]
    assert rates == [[0.3] * 3, [0] * 3]
    assert same(dinov2.build(args, 0.3).state_dict(), dinov2.build(args).state_dict())


def test_checkpointed_activations_give_the_same_gradients():
    grads, calls = [], []
    for flags in ([], ["--checkpoint-activations"]):
        net = dinov2.build(completed(*flags), 0.5)
        strange(net).train().backbone.blocks[0].register_forward_pre_hook(
            lambda *_: calls.append(0))
        torch.manual_seed(0)
        net(draw(6, 3, 32, 32).sigmoid())[2].square().mean().backward()
        grads.append([p.grad for p in net.backbone.blocks.parameters()])
    assert len(calls) == 1 + 2 and all(map(close, *grads))  # forward once more
    assert all(g.abs().max() > 1e-9 for g in grads[0])


# ==================================================================================================
# Heads and hidden patches
# ==================================================================================================


@torch.no_grad()
@pytest.mark.parametrize("flags", ["", "--registers 2 --tied-heads"])
def test_hidden_patches(flags):
    """The student does not see them, and says something of each of them in the order of hidden."""
    args = completed(*flags.split(), "--batch-size", "3", "--random-masks", "--mask-crops", "0.7")
    net, R = strange(dinov2.build(args)), args.registers
    masks, hidden, _ = dinov2.stratified_masks(2, 4, args, ONE)
    assert 0 < masks.flatten(1).any(1).sum() < 6 and len(hidden) > 8
    views = [draw(3, 3, s, s, seed=i).sigmoid() for i, s in enumerate((32, 32, 16, 16))]

    def said(views):
        return net(*views, masks=masks, hidden=hidden)

    seen = said(views)
    assert [tuple(x.shape) for x in seen] == [(12, 128), (12, 256), (12, 12), (len(hidden), 12)]
    under = masks.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).chunk(2)
    noise = [draw(3, 3, 32, 32, seed=i + 9) for i in range(2)]
    for where, alike in ((under, True), ([~m for m in under], False)):
        other = [x + n * m for x, n, m in zip(views, noise, where)] + views[2:]
        assert [close(a, b) for a, b in zip(said(other), seen)] == [alike] * 4
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
        assert close(tokens[0], seen[0][n], 1e-6)  # mean and std are float32
        of = [i for i in range(16) if mask.flatten()[i]]
        rows += [tokens[1 + R + i] for i in of]
        wrong += [tokens[R + i] for i in of]  # as if there was no class token
    assert close(head(torch.stack(rows))[1], seen[3], 1e-6)
    assert not close(head(torch.stack(wrong))[1], seen[3], 1e-3)
    assert args.tied_heads or not close(net.dino_head(torch.stack(rows))[1], seen[3], 1e-3)
    whole = net(*views[:2], hidden=hidden)  # as the teacher is asked
    assert close(whole[0], torch.cat([net(x)[0] for x in views[:2]]))
    assert not close(whole[3], seen[3], 1e-3) and close(seen[0][6:], net(*views[2:])[0])
    assert close(net.dino_head(seen[0])[1], seen[2])


# ==================================================================================================
# The step
# ==================================================================================================


def small(args, drop_path=0.0):
    """DINOv2 with a network of next to nothing that is not far from where it says something."""
    torch.manual_seed(args.seed)
    backbone = dinov2.RegisterViT(8, 1, 2, "mlp", 4, args.image_size)
    net = dinov2.DINOv2(backbone, args.out_dim, args.hidden, args.tied_heads)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 3.0 if p.shape == (args.out_dim, 1) else 0.0, 0.5)
    return net


def algorithm(net, views, masks, flags, mistake=None):
    """Section 4 of the paper and the released SSLMetaArch.forward_backward and do_train:

        L = L_DINO + L_iBOT + 0.1 (L_KoLeo of the first global view + L_KoLeo of the second)
        clip_grad_norm_(3.0) of backbone, dino_head and ibot_head; AdamW; EMA of the teacher

    with --centering ema softmax((t - C) / tau) in the place of Sinkhorn-Knopp, C of steps before.
    masks: (2 N, T) of every step. -> gs, gt, both centres, entropy and KL in the last step.
    """
    steps, N, gs, gt = len(views), 16, net, copy.deepcopy(net)
    C, moments = [torch.zeros(flags.out_dim)] * 2, {}

    def schedule(k, first, last):
        return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2

    def look(g, x, mask=None):  # -> class tokens (N, d), patches (N, T, d)
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
        return sinkhorn_by_hand(t.detach(), tau)

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
        student = [look(gs, v, mask[i] if i < 2 else None) for i, v in enumerate(x)]
        teacher = [look(gt, v, mask[i] if mistake == "teacher sees the mask" else None)
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
        for p in gs.parameters():
            p.grad = torch.zeros_like(p)
        loss.backward()
        for part in [gs] if mistake == "clipped together" else gs.children():
            nn.utils.clip_grad_norm_(part.parameters(), flags.clip)
        for name, p in gs.named_parameters():
            rests = "last_layer" in name and k < flags.freeze_last_layer
            lr = 0.0 if rests else schedule(k, flags.lr * math.sqrt(16 / 1024), 0.0)
            decay = schedule(k, flags.weight_decay, flags.weight_decay_end) * (
                "bias" not in name and "norm" not in name and "gamma" not in name)
            one, two, i = moments.get(name, (0, 0, 0))
            one, two, i = 0.9 * one + 0.1 * p.grad, 0.999 * two + 0.001 * p.grad**2, i + 1
            if not (rests and mistake == "frozen moments rest"):
                moments[name] = one, two, i
            step = one / (1 - 0.9**i) / ((two / (1 - 0.999**i)).sqrt() + 1e-8)
            p.data = p.data * (1 - lr * decay) - lr * step
        m = schedule(k, flags.m, 1.0)
        for old, p in zip(gt.parameters(), gs.parameters()):
            old.data = m * old.data + (1 - m) * p.data
        C = new
    return gs, gt, C, torch.stack([entropy, dino.detach() - entropy])


@contextlib.contextmanager
def doubles():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """flags -> what dinov2.main makes of them in three steps, in float64: the untrained network,
    views and masks of every step, `state` of last.pt."""
    single = torch.Tensor.float

    def run(flags=""):
        argv = [*SHORT, *"--patch-size 4 --local-size 8 --local-crops 1 --lr 0.08 --warmup 0 --m "
                "0.5 --weight-decay 0.04 --weight-decay-end 0.4 --tau-t 0.2 --tau-t-warmup 1 "
                "--hidden 10 --out-dim 12 --clip 1e9 --koleo 0.1 "
                "--freeze-last-layer 0".split(),
                *flags.split(), "--out", tmp_path / f"run{flags}"]
        seen, masks, augment, stratify = [], [], dinov2.augment, dinov2.stratified_masks

        def looking(views, args):
            seen.append(augment(views, args))
            return [x.clone() for x in seen[-1]]

        def hiding(*given):
            masks.append((out := stratify(*given))[0].flatten(1))
            return out

        with doubles(), monkeypatch.context() as patch:
            lighten(patch, dinov2, report=False)
            patch.setattr(torch.Tensor, "float", lambda t: t.double() if t.ndim else single(t))
            patch.setattr(dinov2, "build", small)
            patch.setattr(dinov2, "augment", looking)
            patch.setattr(dinov2, "stratified_masks", hiding)
            results, _ = quiet(dinov2, argv)
            net = small(args := dinov2.options([str(a) for a in argv]))
        state = torch.load(f"{results['out']}/last.pt", weights_only=True)["state"]
        views = [v for v in seen if len(v[0]) == 16]  # those of views.png are eight
        assert len(views) == len(masks) == 3
        return SimpleNamespace(net=net, views=views, masks=masks, state=state, args=args)

    return run


def agree(run, flags, mistake=None):
    """Whether both networks, the centres and what is said of the teacher are the algorithm's; on
    average, as AdamW makes much of gradients that are 0 but for rounding."""
    with doubles():
        gs, gt, C, said = algorithm(copy.deepcopy(run.net), run.views, run.masks, flags, mistake)
    theirs = [*gs.state_dict().values(), *gt.state_dict().values(), *C, said]
    ours = [*run.state["net"].values(), *run.state["net_ema"].values(),
            *run.state["centers"].squeeze(1), run.state["teaching"]]
    assert len(theirs) == len(ours) and all(t.isfinite().all() for t in theirs)
    return all((a - b).square().mean() < 1e-10 for a, b in zip(theirs, ours))


def test_algorithm(shipped):
    run = shipped()
    assert [len(v) for v in run.views] == [3] * 3 and agree(run, run.args)
    for mistake in ("teacher sees the mask", "no Sinkhorn", "KoLeo across crops", "heads swapped"):
        assert not agree(run, run.args, mistake), mistake
    moved = [close(a, b, 1e-3) for a, b in zip(run.net.state_dict().values(),
                                               run.state["net"].values())]
    assert not any(moved) and run.state["centers"].eq(0).all()


@pytest.mark.parametrize("flags, mistakes", [
    ("--centering ema --center-m 0.5", ["centre of this batch", "centre of all patches"]),
    ("--freeze-last-layer 2", ["frozen moments rest"]), ("--clip 0.1", ["clipped together"]),
    ("--no-token-loss", []), ("--no-class-loss", []), ("--koleo 0", []), ("--tied-heads", []),
    ("--hires-epochs 1 --hires-size 24", []), ("--koleo 0.3 --tau-s 0.2", [])])
def test_flags_change_the_algorithm(shipped, flags, mistakes):
    run = shipped(flags)
    assert agree(run, run.args)
    for mistake in mistakes:
        assert not agree(run, run.args, mistake), mistake
    plain = copy.deepcopy(run.args)
    vars(plain).update(centering="sinkhorn", freeze_last_layer=0, clip=1e9, koleo=0.1, tau_s=0.1,
                       no_token_loss=False, no_class_loss=False)
    last = ("hires" in flags, "tied" in flags)
    assert any(last) or not agree(run, plain)
    sides = [[v.shape[-1] for v in views] for views in run.views]
    assert sides == [[16, 16, 8]] * 2 + [[24, 24, 8] if last[0] else [16, 16, 8]]
    assert ("ibot_head.mlp.0.weight" in run.state["net"]) == (not last[1])


# ==================================================================================================
# The update
# ==================================================================================================

OFF = torch.amp.GradScaler("cpu", enabled=False)


def modules(fused):
    """Three modules, the second without a gradient, and their optimiser."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.GELU()), nn.Linear(2, 2),
                         nn.Linear(4, 2)])
    return net, torch.optim.AdamW(net.parameters(), 0.02, eps=0.1, weight_decay=0.5, fused=fused)


def loss_of(net, seed):
    """Gradients of the first module are short, of the last long, and so over time."""
    return 3**seed * (net[2](0.05 * net[0](draw(6, 3, seed=seed).float())) - 1).square().mean()


def test_clipped_by_module_is_torchs():
    def torchs(clip):
        net, optimizer = modules(fused=False)
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(net, seed).backward()
            clip(net)
            optimizer.step()
        return [*net.parameters()]

    (net, optimizer), norms = modules(fused=True), []
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        norms += [torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
                  for m in (net[0], net[2])]
        parts = torch.tensor([3.0, 1.0, 2.0])
        said, finite = dinov2.clipped_by_module(parts, [net[0], net[2]], optimizer, OFF, 0.5)
        assert finite and torch.equal(said, parts)
    assert min(norms) < 0.4 and max(norms) > 5  # the clip is at 0.5

    def agrees(clip, bound=1e-4):
        return all(close(a, b, bound) for a, b in zip(net.parameters(), torchs(clip)))

    cut = nn.utils.clip_grad_norm_
    assert agrees(lambda net: [cut(m.parameters(), 0.5) for m in (net[0], net[2])], 1e-6)
    assert not agrees(lambda net: cut(net.parameters(), 0.5))
    assert not agrees(lambda net: [cut([p], 0.5) for p in net.parameters()])
    assert not agrees(lambda net: None)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("amp", [False, True])
def test_clipped_by_module_skips_what_is_not_finite(poison, amp):
    def held():
        moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in net.parameters()]
        return [[p.detach().clone() for p in net.parameters()], moments]

    (net, optimizer) = modules(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=amp)
    for seed, spoilt in enumerate((None, poison, None, poison)):
        loss, before = loss_of(net, seed) * (math.inf if spoilt == "loss" else 1), held()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if spoilt == "gradient":
            net[2].weight.grad[1, 0] = math.inf
        _, finite = dinov2.clipped_by_module(loss, [net[0], net[2]], optimizer, scaler, 0.5)
        assert finite == (spoilt is None) and same(held(), before) == (spoilt is not None)
    assert scaler.get_scale() == (256 if amp else 1)


# ==================================================================================================
# Weights in and out
# ==================================================================================================


def loaded(path, args):
    """What load_weights makes of a network of another seed."""
    args.seed = 0
    dinov2.load_weights(net := dinov2.build(args), str(path), args)
    return dict(net.state_dict())


def layouts(args, folder):
    """Files in the layouts of the released ones and of our own: name -> path, and the weights."""
    teacher, student = dinov2.build(args), dinov2.build(completed("--seed", "9"))
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
def test_released_checkpoints(flags, tmp_path, capsys):
    files, teacher, student = layouts(completed(*flags.split()), tmp_path)
    untrained = dinov2.build(completed(*flags.split(), "--seed", "0")).state_dict()
    for name, path in files.items():
        got = loaded(path, completed(*flags.split()))
        said, alone = capsys.readouterr().out, name in ("flat", "backbone")
        assert f"{len(teacher)} tensors loaded, missing 0, unexpected 0" in said
        assert ("the heads stay random" in said) == alone
        assert same(got, {k: untrained[k] if alone and "_head." in k else v
                          for k, v in teacher.items()})
    if not flags:
        got = loaded(files["last"], completed("--branch", "student"))
        assert same(got, dict(student)) and not same(got, teacher)
    got = loaded(files["full"], completed(*flags.split(), "--out-dim", "13"))  # other prototypes
    assert "the heads stay random" in capsys.readouterr().out
    assert torch.equal(got["backbone.mask_token"], teacher["backbone.mask_token"])


@pytest.mark.parametrize("registers", ["0", "4"])
def test_released_checkpoints_at_another_resolution(registers, tmp_path):
    """37 x 37 patches of a released file for 16 x 16 of ours."""
    args = completed("--image-size", "296", "--registers", registers)
    files, teacher, _ = layouts(args, tmp_path)
    assert teacher["backbone.pos_embed"].shape == (1, 1370, 128)
    got = loaded(files["full"], completed("--image-size", "128", "--registers", registers))
    for k, v in got.items():
        expected = teacher[k]
        if k == "backbone.pos_embed":
            right, wrong = (interpolate_pos_encoding(expected, 16, 16, *OFFICIAL[r])
                            for r in (registers == "4", registers == "0"))
            assert not close(v, wrong, 1e-3)
            expected = right
        assert close(v, expected, 1e-6), k


def test_wrong_checkpoints(tmp_path, capsys):
    files, *_ = layouts(completed(), tmp_path)
    for path in files.values():
        for changes in ("--arch vit_tiny", "--patch-size 4", "--registers 4", "--ffn swiglu"):
            with pytest.raises(SystemExit) as stopped:
                loaded(path, completed(*changes.split()))
            assert stopped.value.code == 2 and str(path) in capsys.readouterr().err, changes
    with pytest.raises(SystemExit) as stopped:  # there is no student in it
        loaded(files["full"], completed("--branch", "student"))
    assert stopped.value.code == 2 and "full.pth" in capsys.readouterr().err


# ==================================================================================================
# What is said
# ==================================================================================================


@pytest.mark.parametrize("argv, names", [
    ("--koleo -1", "--koleo"), ("--hires-epochs 1 --hires-size 8 --patch-size 9", "views of 8"),
    ("--no-class-loss --no-token-loss --koleo 0", "nothing to learn"),
    ("--mask-ratio 0.01 0.05", "hides none"), ("--centering none", "--centering"),
    ("--ffn relu", "--ffn"),
    ("--layer-scale 0", "--layer-scale"), ("--registers -1", "--registers"), ("--tau-t 0", "tau-t"),
    ("--drop-path 1", "--drop-path"), ("--mask-crops 2", "--mask-crops"), ("--m 1.1", "--m:"),
    ("--mask-ratio 0.5", "--mask-ratio"), ("--mask-ratio 0.5 0.1", "--mask-ratio"),
    ("--hires-epochs -1", "--hires-epochs"), ("--hires-epochs 4", "--hires-epochs"),
    ("--hires-size 4", "--hires-size"), ("--patch-size 17", "--patch-size"),
    ("--local-scale 0.6", "--local-scale"), ("--clip 0", "--clip"), ("--arch resnet18", "--arch"),
    ("--branch both", "--branch"), ("--out-dim 1", "--out-dim")])
def test_wrong_options(argv, names, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dinov2, "build", small)
    argv = [*SHORT, *argv.split(), "--out", tmp_path / "run"]
    assert names in refused(dinov2, argv, capsys)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_collapsed_run_says_so(tmp_path, monkeypatch):
    """A network that says the same of everything gives every term its chance."""
    def collapsed(args, drop_path=0.0):
        net = small(args)
        nn.init.zeros_(net.backbone.norm.weight)
        nn.init.ones_(net.backbone.norm.bias)
        nn.init.zeros_(net.dino_head.last_layer.weight_g)
        nn.init.zeros_(net.ibot_head.last_layer.weight_g)
        return net

    lighten(monkeypatch, dinov2)
    monkeypatch.setattr(dinov2, "build", collapsed)
    results, said = quiet(dinov2, [*SHORT, "--out", tmp_path / "run", *"--patch-size 4 --lr 1e-9 "
                                   "--local-size 8 --mask-ratio 0.3 0.5 --koleo 0".split()])
    assert results["verdict"].startswith("uniform teacher")
    terms = [part.split() for part in said.split("epoch 1: ")[1].split(", ")[:4]]
    assert [t[0] for t in terms] == ["loss", "class", "patch", "koleo"]
    for name, got, _, chance in terms:
        assert abs(float(got) - float(chance[:-1])) < 0.02, name
    assert terms[0][1] != "0.000" and float(terms[3][1]) > 30
