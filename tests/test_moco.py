"""MoCo against its slides (Algorithm 1), the papers and its own promises."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tools
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tools import TINY, close, draw, fails, refused, same

import common
import moco

ALONE = SimpleNamespace(world=1, rank=0, gather=lambda x: x)  # the only process
SHORT = [*TINY, "--epochs", 1, "--eval-every", 0]

# ==================================================================================================
# Loss
# ==================================================================================================


def slide(q, k, queue, tau, j):
    """The slide's two forms, typed in, and their mean over the N queries, of vectors not yet unit:

        L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum_i exp(q . k_i / tau)) )

    with the negatives k_i, columns of the queue, and

        L_q = -log( exp(q . k+ / tau) / sum_{i=0}^K exp(q . k_i / tau) )

    with K + 1 keys, of which k+ is the one at place j. The last: k+ is none of the keys.
    """
    C, K = queue.shape
    sums = [0.0, 0.0, 0.0]
    for n in range(len(q)):
        a, b = q[n].tolist(), k[n].tolist()
        a = [v / math.sqrt(sum(w * w for w in a)) for v in a]
        positive = [v / math.sqrt(sum(w * w for w in b)) for v in b]
        negatives = [[queue[c, i].item() for c in range(C)] for i in range(K)]
        keys = negatives[:j] + [positive] + negatives[j:]

        def e(key, a=a):
            return np.exp(sum(a[c] * key[c] for c in range(C)) / tau)

        top = e(positive)
        sums[0] -= np.log(top / (top + sum(e(negatives[i]) for i in range(K))))
        sums[1] -= np.log(top / sum(e(keys[i]) for i in range(K + 1)))
        sums[2] -= np.log(top / sum(e(negatives[i]) for i in range(K)))
    return [total / len(q) for total in sums]


def variant(q, k, queue, tau, mistake=None):
    """InfoNCE by matrices, with one of the usual mistakes."""
    (N, C), K = q.shape, queue.shape[1]
    q, k = (q if mistake == "q not normalised" else F.normalize(q)), F.normalize(k)
    k = k if mistake == "gradient into k" else k.detach()
    if mistake == "queue read after the enqueue":
        queue = torch.cat([queue[:, N:], k.T], 1)
    if mistake == "rows of the queue as keys":
        queue = queue.reshape(K, C).T
    tau = {"not divided by tau": 1, "tau squared": tau**2}.get(mistake, tau)
    l_pos, l_neg = (q * k).sum(1) / tau, q @ queue / tau
    if mistake == "key of another image":
        l_pos = (q * k.roll(1, 0)).sum(1) / tau
    keys = [l_neg] if mistake == "positive left out" else [l_pos[:, None], l_neg]
    losses = torch.cat(keys, 1).logsumexp(1) - l_pos
    return losses.sum() if mistake == "sum over the queries" else losses.mean()


def test_info_nce_equation():
    def agrees(loss):
        for N, C, K, tau, seed in ((5, 3, 7, 0.2, 0), (2, 6, 4, 0.07, 1), (3, 4, 3, 0.5, 2)):
            q = 3 * draw(N, C, seed=seed).requires_grad_()
            k = draw(N, C, seed=seed + 7).requires_grad_()
            queue = F.normalize(draw(C, K, seed=seed + 9), dim=0)
            first, second, without = slide(q, k, queue, tau, j=seed)
            assert close(first, second, 1e-12) and abs(first - without) > 1e-2
            value = loss(q, k, queue, tau)
            of_q, of_k = torch.autograd.grad(value, (q, k), allow_unused=True)
            if not close(value.detach(), first) or of_k is not None or not of_q.abs().max() > 1e-4:
                return False
        return True

    assert agrees(variant)
    assert agrees(lambda q, k, *rest: moco.info_nce(F.normalize(q), F.normalize(k), *rest))
    for mistake in ("not divided by tau", "tau squared", "rows of the queue as keys",
                    "positive left out", "queue read after the enqueue", "q not normalised",
                    "gradient into k", "key of another image", "sum over the queries"):
        assert not agrees(lambda *given, m=mistake: variant(*given, m)), mistake
    q, k, queue = (F.normalize(draw(*shape, seed=s), dim=d) for *shape, s, d in (
        (3, 4, 0, 1), (3, 4, 1, 1), (4, 5, 2, 0)))
    assert torch.autograd.gradcheck(lambda x: moco.info_nce(x, k, queue, 0.2), q.requires_grad_())


def test_info_nce_closed_forms():
    for K in (1, 6):  # all equal
        point = F.normalize(draw(1, 4))
        loss = moco.info_nce(point.expand(3, 4), point.expand(3, 4), point.T.expand(4, K), 0.1)
        assert close(loss, math.log(1 + K))
    axes = torch.eye(4, dtype=torch.float64)  # the positive 1, three negatives 0
    assert close(moco.info_nce(axes[:1], axes[:1], axes[:, 1:], 0.5), math.log(math.exp(2) + 3) - 2)
    q, k = F.normalize(draw(2, 4)), F.normalize(draw(2, 4, seed=1))
    sharp = [moco.info_nce(q.to(t), k.to(t), -q.T.to(t), 1e-3)
             for t in (torch.float32, torch.float64)]
    assert close(sharp[0].double() / sharp[1], 1.0, 1e-4)  # exp(1000) would overflow


# ==================================================================================================
# EMA and queue
# ==================================================================================================


def averaged(m, n):
    """n updates of net_ema towards n networks -> net_ema, its start, the networks, in order."""
    nets = []
    for seed in range(n + 1):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
        for t in (*nets[-1].parameters(), nets[-1][1].running_mean):
            nn.init.normal_(t)
    net_ema = copy.deepcopy(nets[0])
    for net in nets[1:]:
        moco.ema_update(net_ema, net, m)
    return net_ema, *nets


def test_ema_update():
    """theta_n = m^n theta_0 + (1 - m) sum_{t=1}^n m^(n-t) theta_t; buffers stay."""
    def geometric(net_ema, *nets, m):
        n, found = len(nets) - 1, [list(f.parameters()) for f in nets]
        return all(close(p.detach(), m**n * found[0][i] + (1 - m) * sum(
            m ** (n - t) * found[t][i] for t in range(1, n + 1)).detach())
            for i, p in enumerate(net_ema.parameters()))

    for m in (0.9, 0.3, torch.tensor(0.9, dtype=torch.float64)):
        made = averaged(m, 5)
        assert geometric(*made, m=float(m))
        assert not geometric(*made, m=1 - float(m)) and not geometric(made[0], *made[:0:-1], m=m)
        assert same(dict(made[0].named_buffers()), dict(made[1].named_buffers()))
        assert not any(p.grad_fn for p in made[0].parameters())
    for m, kept in ((0.0, -1), (torch.tensor(0.0), -1), (1.0, 1), (torch.tensor(1.0), 1)):
        made = averaged(m, 3)
        assert same(list(made[0].parameters()), list(made[kept].parameters()))


def test_queue():
    args = SimpleNamespace(seed=3, dim=5, queue=8)
    queue = moco.random_queue(args)
    assert queue.shape == (5, 8) and close(queue.norm(dim=0), torch.ones(8), 1e-6)
    assert torch.equal(queue, moco.random_queue(args)) and len(queue.unique(dim=1).T) == 8
    assert not torch.equal(queue, moco.random_queue(SimpleNamespace(**vars(args) | {"seed": 4})))

    def by_hand(queue, ptr, k):
        """Key n goes into column (ptr + n) mod K."""
        queue = queue.clone()
        for n in range(len(k)):
            for c in range(len(queue)):
                queue[c, (ptr + n) % queue.shape[1]] = k[n, c]
        return queue, (ptr + len(k)) % queue.shape[1]

    ptr = torch.tensor(0)
    for seed, N in enumerate((3, 3, 3, 8, 1, 7)):  # wraps in the third, a whole turn in the fourth
        k, before = draw(N, 5, seed=seed).float(), queue.clone()
        expected = by_hand(before, int(ptr), k)
        ptr = moco.dequeue_and_enqueue(queue, ptr, k)
        assert torch.equal(queue, expected[0]) and int(ptr) == expected[1], N
        assert (queue != before).any(0).sum() == N  # the others stay
    assert moco.dequeue_and_enqueue(queue, 6, draw(3, 5).double()) == 1  # a number, another dtype
    keys, queue, ptr = draw(8, 5).float(), moco.random_queue(args), torch.tensor(0)
    for k in keys.split(2):  # a full turn leaves nothing of what was there
        ptr = moco.dequeue_and_enqueue(queue, ptr, k)
    assert ptr == 0 and torch.equal(queue, keys.T)


# ==================================================================================================
# Shuffling batch norm
# ==================================================================================================


class Normed(nn.Module):
    """A network of batch norm alone, in training."""

    def __init__(self, splits):
        super().__init__()
        self.norm = moco.SplitBatchNorm2d(3, splits).double()

    def forward(self, x):
        return None, self.norm(x).flatten(1)


def statistics(x, y):
    """Mean and deviation (2, N, 3) by which x was normalised to y (N, 48): two pixels tell both."""
    y = y.view_as(x)
    deviation = (x[..., 0, 0] - x[..., 1, 1]) / (y[..., 0, 0] - y[..., 1, 1])
    return torch.stack([x[..., 0, 0] - deviation * y[..., 0, 0], deviation])


def test_permutation():
    args = SimpleNamespace(seed=1, batch_size=16)
    order = moco.permutation(args, 5, "cpu")
    assert order.sort().values.tolist() == list(range(16))
    assert torch.equal(order, moco.permutation(args, 5, "cpu"))
    for other in (moco.permutation(args, 6, "cpu"),
                  moco.permutation(SimpleNamespace(seed=2, batch_size=16), 5, "cpu")):
        assert not torch.equal(order, other)


def test_encode_shuffled():
    x, order = draw(16, 3, 4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(order, order.argsort())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 5).double())  # without batch statistics
    keys = moco.encode_shuffled(lambda x: (None, linear(x)), x, order, ALONE)
    assert close(keys, linear(x)) and not close(linear(x[order])[order], linear(x), 0.1)
    differ = {}
    for splits in (1, 2):
        net = Normed(splits)
        queries = statistics(x, net(x)[1])
        for name, p in (("shuffled", order), ("in order", torch.arange(16))):
            of_keys = statistics(x, moco.encode_shuffled(net, x, p, ALONE))
            differ[splits, name] = (of_keys - queries).abs().amax((0, 2))  # (16,)
    # The leak: an image's query and key are normalised alike, as no other query and key are.
    assert max(differ[1, "in order"].max(), differ[2, "in order"].max(),
               differ[1, "shuffled"].max()) < 1e-6 < 0.01 < differ[2, "shuffled"].min()


def test_encode_shuffled_over_processes():
    """Two processes, one after the other: each encodes its half of the permutation."""
    x, order = draw(16, 3, 4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    net, halves = Normed(1), order.split(8)
    encoded = torch.cat([net(x[half])[1] for half in halves])

    def keys(rank):
        def gather(t):
            whole = x if t.ndim == 4 else encoded
            assert close(t, whole.split(8)[rank])  # what this process has to give
            return whole

        run = SimpleNamespace(world=2, rank=rank, gather=gather)
        return moco.encode_shuffled(net, x.split(8)[rank], order, run)

    assert close(keys(0), keys(1)) and keys(0).shape == (16, 48)
    found = statistics(x, keys(0))
    for n in range(16):  # those of the half that the permutation has put image n in
        half = x[halves[0] if n in halves[0] else halves[1]]
        assert close(found[0, n], half.mean((0, 2, 3)), 1e-6)
        assert close(found[1, n], half.std((0, 2, 3), correction=0), 1e-4)  # up to eps


def test_split_batch_norm():
    x, start, r = 2 * draw(8, 3, 4, 4) + 1, draw(3, seed=1), draw(8, 3, 4, 4, seed=2)
    x = x.contiguous(memory_format=torch.channels_last)
    for splits in (1, 2, 4, 8):
        norm, plain = moco.SplitBatchNorm2d(3, splits).double(), nn.BatchNorm2d(3).double()
        for i, t in enumerate((norm.weight, norm.bias, norm.running_mean)):
            t.data.copy_(draw(3, seed=i + 5))
        norm.running_mean.copy_(start)
        assert plain.load_state_dict(norm.state_dict()).missing_keys == []  # the same names
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = norm(x1), torch.cat([plain(p) for p in x2.split(8 // splits)])
        assert close(y1, y2) and close(y1, plain(x)) == (splits == 1)
        assert splits == 8 or y1.is_contiguous(memory_format=torch.channels_last)
        plain.zero_grad()
        (y1 * r).sum().backward()
        (y2 * r).sum().backward()
        for a, b in ((x1, x2), (norm.weight, plain.weight), (norm.bias, plain.bias)):
            assert a.grad.abs().max() > 0.1 and close(a.grad, b.grad)
        # Each part moves the statistics from where they were; they become the average (demo).
        means, variances = zip(*((p.mean((0, 2, 3)), p.var((0, 2, 3)))
                                 for p in x.split(8 // splits)))
        assert close(norm.running_mean, 0.9 * start + 0.1 * sum(means) / splits)
        assert close(norm.running_var, 0.9 + 0.1 * sum(variances) / splits)
        assert norm.num_batches_tracked == 1
        norm.eval()
        plain.load_state_dict(norm.state_dict())
        assert close(norm(x), plain.eval()(x))


# ==================================================================================================
# Options and schedule
# ==================================================================================================


def test_lr_by():
    """v1, Section 4: of 200 epochs, multiplied by 0.1 at 120 and 160; v2: half a cosine."""
    peak = 0.03
    for steps in (200, 1000, 15, 35, 7):
        for t in range(steps):
            by_hand = peak * (1 if 200 * t < 120 * steps else 0.1 if 200 * t < 160 * steps else .01)
            assert close(moco.lr_by("step", t, steps, peak), by_hand, 1e-15), t
            by_hand = peak / 2 * (1 + math.cos(t * math.pi / steps))
            assert close(moco.lr_by("cosine", t, steps, peak), by_hand, 1e-15), t
    assert moco.lr_by("cosine", 0, 9, peak) == peak and moco.lr_by("cosine", 9, 9, peak) < 1e-12


def test_queue_and_momentum_shrink_with_the_data():
    def given(**named):
        return SimpleNamespace(**{"image_size": 32, "batch_size": 64} | named)

    for n, size, K in ((4000, 32, 500), (50000, 32, 4096), (50000, 65, 6250), (300, 32, 64),
                       (1281167, 224, 65536)):
        assert moco.keys(given(image_size=size), n) == K
    for epochs, batch, n in ((100, 64, 4000), (50, 128, 20000)):
        m = moco.momentum_k(given(epochs=epochs, batch_size=batch, image_size=65), n)
        assert 0.99 < m < 0.999 and close(m ** (epochs * n / batch / 20), 0.5)
    for epochs, n, size, m in ((1, 640, 32, 0.99), (1, 640, 65, 0.99), (200, 1281167, 64, 0.99),
                               (200, 1281167, 65, 0.999)):
        args = given(epochs=epochs, batch_size=512, image_size=size)
        assert moco.momentum_k(args, n) == m
    assert [moco.CPU["queue"](given(), n) for n in (400, 5000, 50000)] == [64, 625, 1024]
    large = {name: row[2] for name, row in moco.OPTIONS.items()}  # the papers' ImageNet setting
    assert [large[k] for k in "arch dim temperature lr batch_size weight_decay".split()] == [
        "resnet50", 128, 0.2, 0.03, 256, 1e-4]


def test_v1_sets_what_is_not_given(tmp_path):
    def found(*argv):
        args = tools.options(moco, argv)
        common.complete(args, moco.OPTIONS, moco.V1, n=0)
        return [args.head, args.aug, args.schedule, args.temperature]

    v1, v2 = ["linear", "v1", "step", 0.07], ["mlp", "v2", "cosine", 0.2]
    assert found("--v1") == v1
    for i, argv in enumerate((["--head", "mlp"], ["--aug", "v2"], ["--schedule", "cosine"],
                              ["--temperature", "0.2"])):
        assert found("--v1", *argv) == found(*argv, "--v1") == [*v1[:i], v2[i], *v1[i + 1 :]]
    argv = [*TINY, "--v1", *"--limit 16 --epochs 1 --eval-every 0 --out".split(), tmp_path / "run"]
    args = tools.train(moco, argv)[2].args
    assert [args.head, args.aug, args.schedule, args.temperature] == v1


def checked(capsys, **changed):
    """The warnings of check on a sound setting with these changes."""
    args = {"batch_size": 16, "queue": 48, "bn_splits": 2, "m": 0.05, "images": 48, "epochs": 3}
    moco.check(SimpleNamespace(**args | {"eval": None} | changed), per_epoch=3, world=2)
    return [line for line in capsys.readouterr().out.split("\n") if "warning" in line]


def test_check(capsys):
    assert checked(capsys) == [] == checked(capsys, queue=16, m=0.0)
    assert "--queue" in checked(capsys, queue=49)[0]
    assert checked(capsys, m=0.92) == [] and "--m" in checked(capsys, m=0.93)[0]  # 9 steps
    assert len(checked(capsys, queue=49, m=1.0)) == 2
    for changed in ({"queue": 15}, {"bn_splits": 3}, {"bn_splits": 16}, {"bn_splits": 32},
                    {"bn_splits": 1}):  # the last: fewer parts than processes
        error = fails(lambda c=changed: checked(capsys, **c), capsys)
        assert "--" + [*changed][0].replace("_", "-") in error
        assert checked(capsys, **changed | {"eval": "last.pt"}) == []  # nothing is trained


@pytest.mark.parametrize("argv", ["--queue 0", "--bn-splits 0", "--m 1.1", "--head none",
                                  "--aug v3", "--schedule constant", "--temperature 0"])
def test_wrong_options(argv, capsys):
    assert argv.split()[0] in refused(moco, [*TINY, *argv.split()], capsys)


# ==================================================================================================
# Augmentation and model
# ==================================================================================================


def test_augmentation_is_the_papers():
    """v1, Section 3.3, and the released code; v2, Section 3, and the released code (--aug-plus)."""
    args = SimpleNamespace(image_size=60, min_scale=0.2, blur=0.5)
    assert moco.crops(args) == [common.Crop(60, (0.2, 1.0), (3 / 4, 4 / 3), 2)]

    def v1(x):
        return common.flip(common.color_jitter(common.grey(x, 0.2), 0.4, 0.4, 0.4, 0.4, 1.0), 0.5)

    def v2(x):
        x = common.grey(common.color_jitter(x, 0.4, 0.4, 0.4, 0.1, 0.8), 0.2)
        return common.flip(common.blur(x, (0.1, 2.0), 7, 0.5), 0.5)

    x = torch.rand(16, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    for args.aug, by_hand in (("v1", v1), ("v2", v2)):
        common.reseed(1)
        expected = [by_hand(x), by_hand(x)]  # both views alike
        common.reseed(1)
        assert same(moco.augment([x, x], args), expected) and not same(*expected)


def test_model():
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    for head in ("linear", "mlp"):
        net = moco.MoCo("convnet", "3x3", head, 5, splits=2)
        h, q = net(x)
        assert h.shape == (4, 96) and q.shape == (4, 5)
        if head == "linear":
            assert type(net.head) is nn.Linear
        else:  # without batch norm
            assert [type(m) for m in net.head] == [nn.Linear, nn.ReLU, nn.Linear]
            assert net.head[0].out_features == 96
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 4 and {m.splits for m in norms} == {2}
    args = SimpleNamespace(arch="convnet", stem="7x7", head="linear", dim=4, seed=3)
    first, again = moco.build(args), moco.build(args, splits=2)
    assert same(first.state_dict(), again.state_dict())
    args.seed = 4
    assert not close(moco.build(args).head.weight.detach(), first.head.weight.detach(), 1e-3)


def released(version, path):
    """A file laid out as the released ones -> its f_q."""
    torch.manual_seed(0)
    f_q, f_k = (torchvision.models.resnet18(num_classes=6) for _ in range(2))
    for f in (f_q, f_k) if version == "v2" else ():
        f.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), f.fc)
    for name, b in f_q.named_buffers():  # running statistics away from 0 and 1
        if b.is_floating_point():
            b.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.1, 0.1)))
    weights = {f"module.encoder_{n}.{k}": v for n, f in (("q", f_q), ("k", f_k))
               for k, v in f.state_dict().items()}
    weights |= {"module.queue": F.normalize(torch.randn(6, 32), dim=0),
                "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": weights, "optimizer": {}}, path)
    return f_q.eval()


def test_released_weights(tmp_path, capsys):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)

    def load(path, head):
        net = moco.MoCo("resnet18", "7x7", head, 6).eval()
        args = SimpleNamespace(init=path, eval=None, resume=False, method="moco")
        common.load_weights(net, args, renames=moco.RENAMES, adapt=moco.query_encoder)
        return net, capsys.readouterr().out

    for version, head, other in (("v1", "linear", "mlp"), ("v2", "mlp", "linear")):
        path = tmp_path / f"moco_{version}_200ep_pretrain.pth.tar"
        official, (net, out) = released(version, path), load(path, head)
        assert f"{122 if version == 'v1' else 124} tensors" in out.replace(" of ", " tensors, ")
        assert "random" not in out
        with torch.no_grad():
            assert close(net(x)[1], official((x - mean) / std), 1e-5)
        assert "the head stays random" in load(path, other)[1]
    path = tmp_path / "torchvision.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    assert "the head stays random" in load(path, "mlp")[1]


# ==================================================================================================
# The step
# ==================================================================================================


def algorithm_1(f_q, views, queue, args, mistake=None):
    """The slide's Algorithm 1, transcribed, with the shuffle of v1's Section 3.3; a forward pass
    ends with the normalisation."""
    bmm, mm, cat, zeros = torch.bmm, torch.mm, torch.cat, torch.zeros
    m, t, (C, K) = args.m, args.temperature, queue.shape
    f_q = copy.deepcopy(f_q)
    f_k = copy.deepcopy(f_q)  # initialize
    velocity = [torch.zeros_like(p) for p in f_q.parameters()]

    def forward(f, x):
        return F.normalize(f(x)[1])

    def momentum_update():
        for p_k, p_q in zip(f_k.parameters(), f_q.parameters()):
            p_k.data = m * p_k.data + (1 - m) * p_q.data

    def enqueue_and_dequeue(queue, k):
        queue = cat([queue, k.T], dim=1)  # enqueue the current minibatch
        return queue[:, :-N] if mistake == "the newest keys dequeued" else queue[:, N:]

    for step, (x_q, x_k) in enumerate(views):  # load a minibatch x with N samples
        N = len(x_q)
        q = forward(f_q, x_q)  # queries: NxC
        order = moco.permutation(args, step, "cpu")
        if mistake == "keys not shuffled":
            order = torch.arange(N)
        k = torch.empty(N, C)
        k[order] = forward(f_q if mistake == "f_q for the keys" else f_k, x_k[order])  # keys: NxC
        k = k.detach()  # no gradient to keys
        if mistake == "queue read after the enqueue":
            queue = enqueue_and_dequeue(queue, k)
        # positive logits: Nx1
        l_pos = bmm(q.view(N, 1, C), k.view(N, C, 1)).view(N, 1)
        # negative logits: NxK
        l_neg = mm(q.view(N, C), queue.view(C, K))
        # logits: Nx(1+K)
        logits = cat([l_pos, l_neg], dim=1)
        # contrastive loss, Eqn.(1)
        labels = zeros(N, dtype=torch.long)  # positives are the 0-th
        loss = nn.CrossEntropyLoss()(logits / t, labels)
        if mistake == "momentum update before the SGD update":
            momentum_update()
        # SGD update: query network
        rate = args.lr * N / 256 * (1 + math.cos(math.pi * step / len(views))) / 2
        grads = torch.autograd.grad(loss, list(f_q.parameters()))
        for v, p, g in zip(velocity, f_q.parameters(), grads):
            v.copy_(0.9 * v + g + args.weight_decay * p.data)
            p.data = p.data - rate * v
        # momentum update: key network
        if mistake not in ("momentum update before the SGD update", "no momentum update"):
            momentum_update()
        # update dictionary
        if mistake != "queue read after the enqueue":
            queue = enqueue_and_dequeue(queue, k)
    return f_q, f_k, queue


@pytest.fixture
def small(monkeypatch):
    def encoder(arch, stem, norm_layer):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), norm_layer(8), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(2), nn.Flatten())
        net.dim = 32
        return net

    monkeypatch.setattr(moco, "encoder", encoder)  # the real one is slow on a CPU


def test_algorithm_1(tmp_path, small):
    argv = [*SHORT, *"--queue 40 --m 0.6 --dim 4 --lr 4 --weight-decay 0.01 --out".split()]
    _, _, run = tools.train(moco, [*argv, tmp_path / "run"], tools.Watched)
    state, args = run.state, run.args
    assert len(run.views) == 3 and not close(*run.views[0], 0.1) and state["ptr"] == 3 * 16 % 40
    net, start = moco.build(args, splits=2), moco.random_queue(args)
    oldest_first = state["queue"].roll(-state["ptr"].item(), 1)

    def distance(mistake=None):
        f_q, f_k, queue = algorithm_1(net, run.views, start, args, mistake)
        pairs = [(oldest_first, queue)]
        for name, f in (("net", f_q), ("net_ema", f_k)):
            pairs += zip(state[name].state_dict().values(), f.state_dict().values())
        return max((a - b).abs().max().item() for a, b in pairs if a.is_floating_point())

    assert distance() < 1e-5
    for mistake in ("momentum update before the SGD update", "queue read after the enqueue",
                    "no momentum update", "f_q for the keys", "the newest keys dequeued",
                    "keys not shuffled"):
        assert distance(mistake) > 1e-3, mistake


def test_positives_of_the_second_process(tmp_path, small, monkeypatch):
    """Of the keys of two processes those of its own images are positives, all go to the queue."""
    class Second(tools.Watched):
        def restore(self, state):
            super().restore(state)
            self.world, self.rank = 2, 1

        def mean(self, x):
            return x

        def _heed(self):
            self.stopped = 0

    keys, given = F.normalize(draw(16, 4, dtype=torch.float32)), []
    monkeypatch.setattr(moco, "encode_shuffled", lambda *_: keys)
    monkeypatch.setattr(moco, "info_nce", lambda q, k, *_: given.append((q, k)) or q.sum())
    argv = [*SHORT, *"--limit 16 --bn-splits 2 --queue 16 --dim 4 --out".split()]
    *_, run = tools.train(moco, [*argv, tmp_path / "run"], Second)
    ((q, k),) = given
    assert len(q) == 8 and close(k, keys[8:], 1e-6) and close(run.state["queue"], keys.T, 1e-6)


class SecondFails(tools.Watched):
    """The views of the second step are not finite."""

    def compiled(self, f):
        augment = super().compiled(f)
        if isinstance(f, nn.Module):
            return augment
        return lambda views, args: [x / (len(self.views) != 2) for x in augment(views, args)]


def test_failed_step_leaves_queue_and_keys(tmp_path, small):
    argv = [*SHORT, *"--queue 40 --dim 4 --out".split(), tmp_path / "run"]
    _, _, run = tools.train(moco, argv, SecondFails)
    assert run.rows[0]["skipped"] == 1 and run.state["ptr"] == 32
    queue, start = run.state["queue"], moco.random_queue(run.args)
    assert queue.isfinite().all() and (queue != start).any(0).tolist() == [True] * 32 + [False] * 8
    for name in ("net", "net_ema"):
        assert all(t.isfinite().all() for t in run.state[name].state_dict().values())


# ==================================================================================================
# Health
# ==================================================================================================


def test_verdict_says_that_the_queue_is_filling(tmp_path):
    argv = [*TINY, *"--queue 80 --epochs 2 --eval-every 1 --out".split(), tmp_path / "run"]
    net, data, run = tools.train(moco, argv)
    filling, full = (row["verdict"] for row in run.rows)
    assert filling.startswith("queue still filling (40% random keys), ")  # 32 of 80
    assert "queue" not in full and "q has spread" in full
    run.rows = []  # as with --eval
    assert "queue" not in moco.evaluate(net, data, run.args, run)["verdict"]
