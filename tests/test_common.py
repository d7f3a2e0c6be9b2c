"""common.py: image operations against torchvision's, batches, sets, what goes out."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common

CPU = torch.device("cpu")
RATIO = (3 / 4, 4 / 3)
READ = (16, CPU, 8.0, 1)  # Data.read: size, device, memory_gb, workers


def fails(capsys, call, *words):
    """call() ends with exit code 2 and one sentence that has these words in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call()
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert [w for w in words if w not in message] == []


def noise(n, height, width, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def far(a, b):
    return float((a - b).abs().max())


# ==================================================================================================
# Image operations
# ==================================================================================================


def whole_boxes(n, height, width, smallest, seed=0):
    """(n, 4) boxes of whole pixels, top, left, height, width, anywhere in the image."""
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(n):
        h, w = rng.integers(smallest, height + 1), rng.integers(smallest, width + 1)
        boxes.append([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w])
    return torch.tensor(boxes)


@pytest.mark.parametrize("height, width, smallest, out", [
    (40, 31, 1, 8), (40, 31, 1, 48), (9, 64, 9, 9), (1, 5, 1, 4), (30, 900, 2, 24)])
def test_crop_resize_is_resized_crop(height, width, smallest, out):
    boxes = whole_boxes(30, height, width, smallest)
    x = F.pad(noise(30, height, width), (0, 7, 0, 5), value=100.0)  # padding must not be seen
    got = common.crop_resize(x, boxes.float(), out)
    for image, box, crop in zip(x, boxes.tolist(), got):
        assert far(crop, TF.resized_crop(image, *box, [out, out], antialias=True)) < 1e-5


def test_crop_resize_without_antialiasing_would_be_seen():
    x, box = noise(1, 60, 60), (5, 3, 50, 55)
    got = common.crop_resize(x, torch.tensor([box]).float(), 12)
    assert far(got, TF.resized_crop(x, *box, [12, 12], antialias=False)) > 0.1


def kolmogorov_smirnov(a, b):
    """Largest distance of two empirical distribution functions, over its 0.1 % bound."""
    a, b, points = a.sort()[0], b.sort()[0], torch.cat([a, b])
    cdf = [torch.searchsorted(s, points, right=True) / len(s) for s in (a, b)]
    return float((cdf[0] - cdf[1]).abs().max() / (1.95 * (1 / len(a) + 1 / len(b)) ** 0.5))


@pytest.mark.parametrize("height, width", [(60, 60), (40, 120)])
def test_random_boxes_are_torchvisions(height, width):
    common.reseed(1)
    image, n, scale = torch.empty(3, height, width), 2000, (0.08, 1.0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(n)])
    ours = common.random_boxes(torch.tensor([[height, width]]).expand(n, 2), scale, RATIO)

    def statistics(boxes):
        top, left, h, w = boxes.float().unbind(1)
        return [top, left, h, w, h * w, (w / h).log()]

    for a, b in zip(statistics(ours), statistics(theirs)):
        assert kolmogorov_smirnov(a, b) < 1
    small = common.random_boxes(torch.tensor([[height, width]]).expand(n, 2), (0.08, 0.25), RATIO)
    assert max(map(kolmogorov_smirnov, statistics(small), statistics(theirs))) > 1  # can fail


def test_random_boxes_keep_to_the_ranges():
    common.reseed(2)
    sizes = torch.tensor([[500, 400], [300, 333], [400, 520]]).repeat(500, 1)
    top, left, h, w = common.random_boxes(sizes, (0.2, 0.5), RATIO).unbind(1)
    H, W = sizes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= H).all() and (left + w <= W).all()
    assert (top == 0).any() and (left == 0).any()  # and every border can be reached
    assert (top + h == H).any() and (left + w == W).any()
    for value, low, high in ((h * w / (H * W), 0.2, 0.5), (w / h, *RATIO)):
        assert low - 0.01 < value.min() < low + 0.01 and high - 0.01 < value.max() < high + 0.01
    tiny = common.random_boxes(torch.ones(50, 2, dtype=torch.long), (0.05, 0.3), RATIO)
    assert (tiny == torch.tensor([0, 0, 1, 1])).all()


@pytest.mark.parametrize("size", [(3, 2000), (2000, 3), (1, 7)])
def test_random_boxes_fall_back_to_the_centre(size):
    common.reseed(3)
    box = RandomResizedCrop.get_params(torch.empty(3, *size), (0.5, 1.0), RATIO)
    ours = common.random_boxes(torch.tensor([size]).expand(20, 2), (0.5, 1.0), RATIO)
    assert (ours == torch.tensor(box)).all()


def test_central_boxes():
    sizes = torch.tensor([[10, 20], [33, 17], [1, 9]])
    whole = [[0, 5, 10, 10], [8, 0, 17, 17], [0, 4, 1, 1]]
    assert common.central_boxes(sizes, 1.0).tolist() == whole
    assert common.central_boxes(sizes, 0.5).tolist()[0] == [2, 7, 5, 5]


@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.0, 0.1, 0.37, 0.5])
def test_turn_hue_is_adjust_hue(shift):
    x = torch.cat([noise(4, 8, 8), noise(4, 8, 8).round()])  # with greys, ties, pure colours
    x[0] = x[0, :1]
    assert far(common.turn_hue(x, torch.full((8, 1, 1, 1), shift)), TF.adjust_hue(x, shift)) < 1e-5


def test_turn_hue_turns_every_image_by_its_own():
    x, shift = noise(5, 6, 6), torch.linspace(-0.4, 0.4, 5)
    expected = torch.stack([TF.adjust_hue(i, s) for i, s in zip(x, shift.tolist())])
    assert far(common.turn_hue(x, shift.view(-1, 1, 1, 1)), expected) < 1e-5


def test_color_jitter_is_torchvisions_in_the_drawn_order():
    n, most, hue = 24, torch.tensor([[0.8], [0.7], [0.6]]), 0.2
    x = noise(n, 7, 9)
    before = x.clone()
    common.reseed(4)
    got = common.color_jitter(x, *most.flatten().tolist(), hue, p=1.0)
    assert torch.equal(x, before)
    # the same draws again: who, factors, shifts, order of three, place of hue by quarters
    common.reseed(4)
    torch.rand(n)
    factor = 1 + (2 * torch.rand(3, n) - 1) * most
    shift = (2 * torch.rand(n) - 1) * hue
    order, shuffle = torch.rand(3, n).argsort(0), torch.randperm(n)
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]

    def jitter(row, hue_at):
        steps = [(ops[k], float(factor[k, row])) for k in order[:, row].tolist()]
        steps.insert(hue_at, (TF.adjust_hue, float(shift[row])))
        image = x[shuffle[row]]
        for op, by in steps:
            image = op(image, by)
        return image

    elsewhere = 0
    for row in range(n):
        theirs = [jitter(row, hue_at) for hue_at in range(4)]
        mine = got[shuffle[row]]
        assert far(mine, theirs[row * 4 // n]) < 1e-5
        elsewhere += far(mine, theirs[(row * 4 // n + 2) % 4]) > 1e-3
    assert elsewhere > n // 2  # the place of hue is seen, and all four occur
    assert len({tuple(column) for column in order.T.tolist()}) > 3


@pytest.mark.parametrize("sigma, taps, height, width", [
    (0.1, 3, 8, 5), (1.0, 5, 16, 9), (2.0, 9, 24, 31), (1.3, 23, 24, 13), (0.7, 1, 4, 4)])
def test_blur_is_gaussian_blur(sigma, taps, height, width):
    x = noise(3, height, width)
    expected = TF.gaussian_blur(x, [taps, taps], [sigma, sigma])
    assert far(common.blur(x, (sigma, sigma), taps, p=1.0), expected) < 1e-5


def test_flip_and_grey():
    x = noise(4, 5, 6)
    assert torch.equal(common.flip(x, 1.0), TF.horizontal_flip(x))
    assert far(common.grey(x, 1.0), TF.rgb_to_grayscale(x, 3)) < 1e-6
    assert far(common.to_grey(x), TF.rgb_to_grayscale(x, 1)) < 1e-6


@pytest.mark.parametrize("threshold", [0.5, 0.2, 128 / 255])
def test_solarize_is_torchvisions_on_the_chosen(threshold):
    x = (noise(400, 5, 6) * 255).round() / 255  # as images come: some values are the threshold
    common.reseed(7)
    got = common.solarize(x, 0.3, threshold)
    chosen = (got != x).flatten(1).any(1)
    assert torch.equal(got[chosen], TF.solarize(x, threshold)[chosen])
    assert abs(chosen.float().mean() - 0.3) < 0.08


@pytest.mark.parametrize("op, versions", [
    (common.flip, 2), (common.grey, 2), (common.solarize, 2),
    (lambda x, p: common.blur(x, (0.3, 2.0), 5, p), None),
    (lambda x, p: common.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p), None)],
    ids=["flip", "grey", "solarize", "blur", "color_jitter"])
def test_every_image_has_its_own_draw(op, versions):
    n = 400
    x = noise(1, 6, 6).expand(n, -1, -1, -1)
    common.reseed(5)
    assert far(op(x, 0.0), x) < 1e-5
    y = op(x, 0.3)
    same = (y - x).abs().amax((1, 2, 3)) < 1e-5
    assert abs(same.float().mean() - 0.7) < 0.08  # 3.5 standard deviations
    different = len(y[~same].mul(1e5).round().unique(dim=0)) + 1
    assert different == versions or versions is None and different > 0.9 * int((~same).sum())
    assert y.min() >= 0 and y.max() <= 1 + 1e-6


# ==================================================================================================
# Batches
# ==================================================================================================

VIEWS = [common.Crop(16, (0.2, 1.0), RATIO, count=2), common.Crop(8, (0.05, 0.3), RATIO)]
CENTRE = [common.Crop(16, 1.0)]


def photo(height, width, seed=0):
    """A smooth picture, as photos are: what JPEG and a different resampling leave alone."""
    rng, y = np.random.default_rng(seed), np.linspace(0, 3, height)[:, None, None]
    x, a = np.linspace(0, 3, width)[None, :, None], rng.uniform(0.5, 2, (2, 3))
    return np.uint8(127 + 120 * np.sin(a[0] * x + a[1] * y))


SIZES = [(40, 30), (401, 400), (96, 128), (400, 401), (64, 64), (37, 50), (150, 333), (20, 20),
         (77, 99)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(photo(height, width, i)).save(root / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def stored(root, workers):
    """All images of a folder, in memory or (workers 0, 1, ...) streamed."""
    data = common.Data(str(root))
    data.read(16, CPU, 8.0 if workers is None else 0.0, 1)
    assert bool(data.train.files) == (workers is not None)
    return data.train


def run(images, crops, order=None, workers=None, seed=(7, 1), first=0, size=2):
    """[views..., index, a draw of the consumer] of every batch."""
    order = torch.arange(len(images.labels)) if order is None else order
    found = common.batches(images, order, size, crops, CPU, workers or 0, seed, first)
    return [[*views, index, torch.rand(3)] for views, index in found]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for p, q in zip(a, b) for s, t in zip(p, q))


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_depend_on_the_seed_and_the_place_alone(photos, workers):
    images = stored(photos, workers)
    got = run(images, VIEWS, workers=workers)
    x1, x2, local, index, _ = got[0]
    assert x1.shape == x2.shape == (2, 3, 16, 16) and local.shape == (2, 3, 8, 8)
    assert x1.dtype == torch.float32 and index.tolist() == [0, 1]
    assert 0 <= min(v.min() for v in got[0][:3]) and 0.4 < max(v.max() for v in got[0][:3]) <= 1
    assert [len(b[0]) for b in got] == [2, 2, 2, 2, 1]
    assert far(x1, x2) > 0.01
    torch.rand(5)
    assert same(got, run(images, VIEWS, workers=workers))
    assert not same(got, run(images, VIEWS, workers=workers, seed=(7, 2)))
    rest = torch.arange(4, len(SIZES))
    assert same(got[2:], run(images, VIEWS, rest, workers, first=2))
    if workers:
        assert same(got, run(images, VIEWS, workers=0))


@pytest.mark.parametrize("workers", [None, 0])
def test_two_equal_images_get_different_crops(photos, workers):
    images = stored(photos, workers)
    if workers is None:
        x1, x2, *_ = run(images, VIEWS[:1], torch.tensor([2, 2, 2]), size=3)[0]
    else:  # an order holds a file once; a copy of it is another index
        twin = common.Images(images.labels[:3], files=[images.files[2]] * 3)
        x1, x2, *_ = run(twin, VIEWS[:1], workers=workers, size=3)[0]
    crops = torch.cat([x1, x2])
    assert min(far(crops[i], crops[j]) for i in range(6) for j in range(i)) > 0.01


def test_reseed_tells_all_tuples_apart():
    def draw(*numbers):
        common.reseed(*numbers)
        return torch.rand(1).item()

    tuples = [(0,), (1,), (0, 1), (1, 1), (1, 2), (2, 1), (1, 2, 3), (1, 3, 2), (2**31, 1, 0, 1)]
    assert len({draw(*t) for t in tuples}) == len(tuples)
    assert draw(1, 2, 3) == draw(1, 2, 3)


@pytest.mark.parametrize("scale", [1.0, 0.875])
def test_memory_and_stream_give_the_same_views(photos, capsys, scale):
    crop = [common.Crop(16, scale)]
    memory, stream = [run(stored(photos, w), crop, workers=w) for w in (None, 0)]
    assert "unreadable" not in capsys.readouterr().out
    for (a, i, _), (b, j, _) in zip(memory, stream):
        assert torch.equal(i, j)
        assert (a - b).abs().mean((1, 2, 3)).max() < 2 / 255
    square = torch.from_numpy(photo(64, 64, 4)).permute(2, 0, 1) / 255
    side = round(64 * scale)
    expected = TF.resize(TF.center_crop(square, [side, side]), [16, 16], antialias=True)
    assert far(memory[2][0][0], expected) < 1e-2


def test_random_crops_from_files_are_those_of_random_boxes(tmp_path):
    """A picture whose colours are its coordinates shows which box was cut out of it."""
    ramp = np.linspace(0, 255, 256)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 0.0), 2)
    Image.fromarray(np.uint8(image)).save(tmp_path / "a.png")
    files = stored(tmp_path, 0).files
    twins = common.Images(torch.full((300,), -1), files=files * 300)
    x, *_ = run(twins, [common.Crop(8, (0.1, 0.9), RATIO)], size=300)[0]
    h, w = ((x[:, c].amax((1, 2)) - x[:, c].amin((1, 2))) * 255 * 8 / 7 for c in (0, 1))
    common.reseed(6)
    boxes = common.random_boxes(torch.full((2000, 2), 256), (0.1, 0.9), RATIO)
    for mine, theirs in ((h, boxes[:, 2]), (w, boxes[:, 3]), (h * w, boxes[:, 2] * boxes[:, 3])):
        assert kolmogorov_smirnov(mine, theirs) < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_in_the_stream_is_replaced_and_reported_once(photos, capsys, workers):
    images = stored(photos, 0)
    files = [f.replace("3.jpg", "none.jpg") for f in images.files]
    broken = common.Images(torch.arange(len(files)), files=files)
    capsys.readouterr()
    for epoch in range(2):
        found = run(broken, CENTRE, workers=workers, seed=(0, epoch))
        assert torch.cat([b[1] for b in found]).tolist() == [0, 1, 2, 4, 4, 5, 6, 7, 8]
        assert torch.equal(found[1][0][1], found[2][0][0])
    out = capsys.readouterr().out
    assert out.count("none.jpg") == 1 and "1 image file" in out


@pytest.mark.parametrize("memory_gb, workers", [(8.0, 1), (0.0, 0), (0.0, 2)])
def test_nothing_readable_is_an_error(tmp_path, capsys, memory_gb, workers):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("no image")

    def go():
        data = common.Data(str(tmp_path))
        data.read(16, CPU, memory_gb, workers)
        run(data.train, CENTRE, workers=workers)

    fails(capsys, go, "image file")


# ==================================================================================================
# Sets
# ==================================================================================================


def tree(root, **counts):
    """root/<part>/<class>/<i>.png, `part__class=count`."""
    for where, count in counts.items():
        folder = root.joinpath(*where.split("__"))
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (20, 24), (10 * i, 100, 0)).save(folder / f"{i}.png")
    return str(root)


TRAIN = dict(train__a=12, train__b=8)


@pytest.mark.parametrize("counts, train, fit, val, test", [
    (TRAIN | dict(val__a=3, val__b=4, test__a=2, test__b=3), 20, 20, 7, 5),
    (TRAIN | dict(validation__a=3, validation__b=4, test__b=3), 20, 20, 7, 3),
    (TRAIN | dict(val__a=3, val__b=4), 20, 18, 2, 7),
    (TRAIN | dict(test__a=3, test__b=1), 20, 18, 2, 4),
    (TRAIN, 18, 16, 2, 2)],
    ids=["train val test", "train validation test", "train val", "train test", "train"])
def test_folders_with_labels(tmp_path, counts, train, fit, val, test):
    data = common.Data(tree(tmp_path, **counts))
    data.read(*READ)
    parts = {"fit": data.fit, "val": data.val, "test": data.test}
    assert len(data.train.labels) == len(data.train.pixels) == train and data.labelled
    assert {k: len(index) for k, (_, index) in parts.items()} == dict(fit=fit, val=val, test=test)
    assert data.side == 20
    held = [{(id(images), i) for i in index.tolist()} for images, index in parts.values()]
    assert len(set.union(*held)) == fit + val + test  # no image in two of them
    assert set(data.train.labels.tolist()) == {0, 1}
    share = data.train.labels.float().mean()
    assert train < 20 or share == 0.4
    other = common.Data(str(tmp_path))
    assert other.parts["train"][0] == data.parts["train"][0]
    files, labels = data.parts["test"]
    assert ["ab"[c] for c in labels.tolist()] == [f.split(os.sep)[-2] for f in files]


@pytest.mark.parametrize("counts", [dict(x=6, y__deep=5), dict(train=11)], ids=["tree", "train"])
def test_folders_without_labels(tmp_path, counts):
    data = common.Data(tree(tmp_path, **counts))
    data.read(*READ)
    assert not data.labelled and set(data.train.labels.tolist()) == {-1}
    assert len(data.train.labels) == 11 and len(data.fit[1]) == 9 and len(data.val[1]) == 2


@pytest.mark.parametrize("counts", [
    dict(), dict(train__a=0), TRAIN | dict(test__a=0), TRAIN | dict(test__other=3),
    TRAIN | dict(val__a=0, test__a=3), dict(train__a=1)],
    ids=["empty", "empty class", "empty test", "test of other classes", "empty val", "one image"])
def test_folders_that_lack_images_fail_at_once(tmp_path, capsys, counts):
    fails(capsys, lambda: common.Data(tree(tmp_path, **counts)), str(tmp_path))


def test_unknown_name_fails(capsys):
    fails(capsys, lambda: common.Data("cifar11"), "cifar11", "cifar10", "shapes")


def test_limit(tmp_path):
    root = tree(tmp_path, **TRAIN, test__a=9, test__b=2)
    five, eight, many = (common.Data(root, limit=n) for n in (5, 8, 100))
    assert [len(d.parts["train"][0]) for d in (five, eight, many)] == [5, 8, 20]
    assert [len(d.parts["test"][0]) for d in (five, eight, many)] == [5, 8, 11]
    assert eight.parts["train"][0][:5] == five.parts["train"][0]
    for files, labels in eight.parts.values():
        assert ["ab"[c] for c in labels.tolist()] == [f.split(os.sep)[-2] for f in files]


def test_memory_limit_switches_to_streaming_and_says_so(tmp_path, capsys):
    root = tree(tmp_path, **TRAIN, test__a=9)
    for memory_gb, streamed in ((8.0, False), (1e-5, True)):
        data = common.Data(root)
        data.read(16, CPU, memory_gb, 2)
        assert bool(data.train.files) == streamed == (data.train.pixels is None)
        assert ("streamed" in capsys.readouterr().out) == streamed


def test_broken_files_are_skipped_counted_and_listed(tmp_path, capsys):
    root = tree(tmp_path, train__a=5, train__b=5, test__a=2)
    file = tmp_path / "train" / "a" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    (tmp_path / "train" / "b" / "text.jpg").write_text("no image")
    (tmp_path / "train" / "b" / "notes.txt").write_text("not even named like one")
    data = common.Data(root)
    data.read(*READ)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    out = capsys.readouterr().out
    assert "2 image file" in out and "cut.jpg" in out and "text.jpg" in out and "notes" not in out


def grey16(low, high):
    return Image.fromarray(np.linspace(low, high, 400).reshape(20, 20).astype(np.uint16))


def palette():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.paste(0, (0, 0, 10, 20))
    return image


KINDS = {  # name -> image, how to save it, colour of its left and right quarter
    "grey.png": (Image.new("L", (20, 20), 100), {}, (100,) * 3, (100,) * 3),
    "bilevel.png": (Image.new("1", (20, 20), 1), {}, (255,) * 3, (255,) * 3),
    "cmyk.jpg": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), {}, (254, 0, 0), (254, 0, 0)),
    "16bit.png": (grey16(32768, 32768), {}, (128,) * 3, (128,) * 3),
    "16bit-range.png": (grey16(0, 65535).rotate(90), {}, (32,) * 3, (223,) * 3),
    "16bit-dark.png": (grey16(0, 200), {}, (0,) * 3, (0,) * 3),
    "alpha.png": (Image.new("RGBA", (20, 20), (9, 9, 9, 0)), {}, (255,) * 3, (255,) * 3),
    "grey-alpha.png": (Image.new("LA", (20, 20), (0, 128)), {}, (127,) * 3, (127,) * 3),
    "palette.png": (palette(), {}, (0, 0, 0), (200, 30, 60)),
    "palette-transparent.png": (palette(), {"transparency": 0}, (255,) * 3, (200, 30, 60)),
    "palette.gif": (palette(), {"transparency": 0}, (255,) * 3, (200, 30, 60)),
    "wide.png": (Image.new("RGB", (2000, 3), (9, 99, 199)), {}, (9, 99, 199), (9, 99, 199)),
    "tall.jpg": (Image.new("RGB", (3, 2000), (90, 90, 90)), {}, (90,) * 3, (90,) * 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_in_memory_and_streamed(tmp_path, name):
    image, how, left, right = KINDS[name]
    image.save(tmp_path / name, **how)
    for workers in (None, 0):
        x = run(stored(tmp_path, workers), CENTRE, workers=workers)[0][0][0] * 255
        for part, colour in ((x[:, :, :4], left), (x[:, :, -4:], right)):
            mean = part.mean((1, 2))
            assert (mean - torch.tensor(colour)).abs().max() < 3, (workers, mean)


@pytest.mark.parametrize("orientation, turn", [
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"),
    (5, "TRANSPOSE"), (6, "ROTATE_90"), (7, "TRANSVERSE"), (8, "ROTATE_270")])
def test_exif_rotation_in_memory_and_streamed(tmp_path, orientation, turn):
    """The camera stored the picture turned, and wrote down how: we see it upright."""
    upright = Image.fromarray(photo(160, 240, 3))
    camera = upright.transpose(getattr(Image.Transpose, turn)) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    camera.save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = TF.resize(TF.center_crop(TF.pil_to_tensor(upright) / 255, [160, 160]), [16, 16])
    for workers in (None, 0):
        images = stored(tmp_path, workers)
        assert workers is not None or images.sizes.tolist() == [[43, 64]]
        x = run(images, CENTRE, workers=workers)[0][0][0]
        assert (x - expected).abs().mean() < 3 / 255, workers


def fake(monkeypatch, kind, pixels, labels):
    """Put a set of these images (uint8) and labels in place of torchvision's `kind`."""
    class Fake:
        def __init__(self, root, download=False, **split):
            assert download
            self.images = pixels if "train" in str(split.get("split", "")) or split.get("train") \
                else pixels[:4]

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return Image.fromarray(self.images[i]), labels[i]

    monkeypatch.setattr(datasets, kind, Fake)


@pytest.mark.parametrize("name, kind, shape", [
    ("cifar10", "CIFAR10", (32, 32, 3)), ("cifar100", "CIFAR100", (32, 32, 3)),
    ("fashionmnist", "FashionMNIST", (28, 28)), ("stl10", "STL10", (96, 96, 3))])
def test_sets_of_torchvision(monkeypatch, tmp_path, name, kind, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (30, *shape), np.uint8)
    labels = [i % 3 for i in range(30)]
    if name == "stl10":
        labels[10:] = [-1] * 20
    fake(monkeypatch, kind, pixels, labels)
    data = common.Data(name, tmp_path)
    data.read(*READ)
    assert data.side == shape[0] and data.labelled
    assert data.train.labels.tolist() == labels and data.train.labels.dtype == torch.int64
    assert data.train.pixels.dtype == torch.uint8
    expected = torch.from_numpy(pixels if pixels.ndim == 4 else np.stack([pixels] * 3, 3))
    assert torch.equal(data.train.pixels, expected.permute(0, 3, 1, 2))
    assert data.train.sizes.tolist() == [list(shape[:2])] * 30
    known = 10 if name == "stl10" else 30
    assert [len(p[1]) for p in (data.fit, data.val, data.test)] == [known * 9 // 10, known // 10, 4]
    assert data.train.labels[torch.cat([data.fit[1], data.val[1]])].min() >= 0
    few = common.Data(name, tmp_path, limit=3)
    few.read(*READ)
    assert len(few.train.labels) == len(few.test[1]) == 3


def test_imagenette_is_downloaded_small_and_once_and_read_as_a_folder(monkeypatch, tmp_path):
    asked = []

    def imagenette(root, split="train", size="full", download=False):
        asked.append(size)
        tree(root / "imagenette2-160", train__n01=10, train__n02=10, val__n01=3, val__n02=2)

    monkeypatch.setattr(datasets, "Imagenette", imagenette)
    data = common.Data("imagenette", tmp_path)
    assert set(asked) == {"160px"}
    assert [len(data.parts[k][0]) for k in ("train", "test")] == [20, 5]


@pytest.mark.parametrize("name, kind", [("cifar10", "CIFAR10"), ("imagenette", "Imagenette")])
def test_a_set_that_cannot_be_downloaded(monkeypatch, tmp_path, capsys, name, kind):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets, kind, offline)
    fails(capsys, lambda: common.Data(name, tmp_path), name, "no network", str(tmp_path))


# ==================================================================================================
# The built-in set
# ==================================================================================================


@pytest.mark.parametrize("size", [16, 33])
def test_shapes(size):
    n = 107
    images, labels, masks, depth = made = common.shapes(n, size, 5)
    assert images.shape == (n, 3, size, size) and images.dtype == torch.uint8
    assert labels.shape == (n,) and labels.dtype == torch.int64
    assert masks.shape == depth.shape == (n, size, size)
    assert masks.dtype == torch.bool and depth.is_floating_point()
    assert all(torch.equal(a, b) for a, b in zip(made, common.shapes(n, size, 5)))
    assert not torch.equal(images, common.shapes(n, size, 6)[0])
    counts = labels.bincount(minlength=10)
    assert len(common.SHAPES) == len(counts) == 10 and counts.max() - counts.min() <= 1
    assert (labels[1:] != labels[:-1]).any() and images.float().std() > 10
    share = masks.float().mean((1, 2))
    assert share.min() > 0.03 and share.max() < 0.7
    near, far_away = ((depth * m).sum((1, 2)) / m.sum((1, 2)) for m in (masks, ~masks))
    assert (near < far_away).all() and depth.isfinite().all()


def test_shapes_through_data(tmp_path):
    data = common.Data("shapes", tmp_path, limit=40)
    data.read(24, CPU, 8.0, 0)
    assert data.side is None and data.labelled and not list(tmp_path.iterdir())
    assert data.train.pixels.shape == (40, 3, 24, 24) and data.test[0].pixels.shape[0] == 40
    assert [len(p[1]) for p in (data.fit, data.val, data.test)] == [36, 4, 40]
    flat = [p.flatten(1).tolist() for p in (data.train.pixels, data.test[0].pixels)]
    assert not {tuple(p) for p in flat[0]} & {tuple(p) for p in flat[1]}


def probe(features, labels):
    """Top-1 in % on the second half of a linear classifier fitted to the first."""
    x = (features - features.mean(0)) / (features.std(0) + 1e-6)
    half = len(x) // 2
    w = torch.zeros(x.shape[1] + 1, 10, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=60)

    def loss():
        optimiser.zero_grad()
        out = F.cross_entropy(x[:half] @ w[1:] + w[0], labels[:half]) + 1e-3 * w[1:].square().sum()
        out.backward()
        return out

    optimiser.step(loss)
    found = (x[half:] @ w[1:] + w[0]).argmax(1)
    return 100 * float((found == labels[half:]).float().mean())


def hues(images, masks):
    """(n, 12): how often each of 12 hues occurs among the pixels of the object."""
    r, g, b = images.float().unbind(1)
    turns = torch.atan2(3**0.5 * (g - b), 2 * r - g - b) / (2 * torch.pi) + 0.5
    code = (turns * 12).long().clamp(max=11)
    count = torch.stack([((code == c) & masks).sum((1, 2)) for c in range(12)], 1)
    return count / masks.sum((1, 2)).unsqueeze(1).clamp(min=1)


def position_and_size(images, masks):
    """(n, 3): centre of gravity and extent of the object."""
    m, size = masks.float(), masks.shape[-1]
    area, at = m.sum((1, 2)).clamp(min=1), torch.arange(size) / size
    y, x = (m.sum(2) * at).sum(1) / area, (m.sum(1) * at).sum(1) / area
    return torch.stack([y, x, (area / size**2).sqrt()], 1)


@pytest.fixture(scope="module")
def drawn():
    return common.shapes(4000, 24, 0)


@pytest.mark.parametrize("features", [hues, position_and_size])
def test_colour_and_place_do_not_tell_the_class(drawn, features):
    images, labels, masks, _ = drawn
    assert probe(features(images, masks), labels) < 15


def test_the_guards_would_see_a_leak(drawn):
    images, labels, masks, _ = drawn
    tinted = images * (1 - 0.1 * labels.view(-1, 1, 1, 1) * torch.tensor([1, 0, 0]).view(3, 1, 1))
    assert probe(hues(tinted, masks), labels) > 20
    moved = torch.stack([m.roll(2 * int(c) - 9, 1) for m, c in zip(masks, labels)])
    assert probe(position_and_size(images, moved), labels) > 20


# ==================================================================================================
# What goes out
# ==================================================================================================


def test_fail(capsys):
    fails(capsys, lambda: common.fail("so it is"), "so it is")


def test_number():
    whole, share = common.number(int, 1), common.number(float, 0, 1)
    assert whole("3") == 3 and share("1") == 1.0 and share("0") == 0.0
    wrong = [(whole, "0"), (whole, "1.5"), (share, "1.01"), (share, "nan"), (share, "x")]
    for parse, text in wrong:
        with pytest.raises(ValueError):
            parse(text)
    assert "int from 1" in whole.__name__


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.6, "1:00"), (90, "1:30"), (3599.6, "1:00:00"), (4000, "1:06:40"),
    (1e5, "27:46:40")])
def test_duration(seconds, text):
    assert common.duration(seconds) == text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    common.write(path, {"x": torch.arange(3)})
    with pytest.raises(Exception, match="pickle|lambda"):
        common.write(path, {"x": torch.zeros(9), "y": lambda: 0})
    assert common.read_checkpoint(path)["x"].tolist() == [0, 1, 2]
    text, monkey = tmp_path / "a.jsonl", []
    common.write_rows(text, [{"epoch": 1}, {"epoch": 2}])

    def crash(*args):
        monkey.append(args)
        raise OSError("killed")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", crash)
        with pytest.raises(OSError):
            common.write(text, "half a li")
    assert monkey and [json.loads(line)["epoch"] for line in text.open()] == [1, 2]
    common.write(text, "new")
    assert text.read_text() == "new"
    assert {f.name for f in tmp_path.iterdir()} <= {"a.pt", "a.jsonl", "a.pt.part"}


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("kind", ["missing", "folder", "truncated", "text", "code", "no dict"])
def test_checkpoints_that_are_none(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind != "missing":
        content = {"truncated": {"x": torch.zeros(999)}, "code": {"x": Code()}, "no dict": [1]}
        torch.save(content[kind], path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1500])
    fails(capsys, lambda: common.read_checkpoint(path), str(path))
    assert not (tmp_path / "ran").exists()


def training(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(4, 3)).square().mean().backward()
    optimiser.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"net": net, "optimiser": optimiser, "scaler": scaler, "queue": torch.randn(2, 5)}


def test_save_and_restore(tmp_path, capsys):
    path, args = tmp_path / "last.pt", SimpleNamespace(lr=0.1, out="x", workers=2, resume=False)
    old, new = training(0), training(1)
    common.save(path, "simclr", args, old, {"step": 7, "seconds": 1.5})
    kept = new["queue"]
    other = SimpleNamespace(lr=0.1, out="y", workers=0, resume=True)
    assert common.restore(path, "simclr", other, new) == {"step": 7, "seconds": 1.5}
    assert new["queue"] is kept and torch.equal(kept, old["queue"])
    for a, b in zip(old["net"].state_dict().values(), new["net"].state_dict().values()):
        assert torch.equal(a, b)
    momentum = [[s["momentum_buffer"] for s in t["optimiser"].state.values()] for t in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*momentum)) and len(momentum[0]) == 4
    wrong = SimpleNamespace(lr=0.2, out="x", workers=2, resume=True)
    before = new["net"][0].weight.clone()
    fails(capsys, lambda: common.restore(path, "simclr", wrong, new), "lr", "0.1", "0.2")
    fails(capsys, lambda: common.restore(path, "byol", args, new), "simclr", "byol")
    assert torch.equal(before, new["net"][0].weight)


@pytest.mark.parametrize("end", ["", "/"])
def test_run_folder(tmp_path, capsys, monkeypatch, end):
    out = tmp_path / "runs" / "a"
    given = f"{out}{end}"
    fails(capsys, lambda: common.run_folder(given, True), "--resume", "last.pt")
    monkeypatch.setenv("RANK", "1")  # the first process makes it
    assert common.run_folder(given, False) == out and not out.exists()
    monkeypatch.setenv("RANK", "0")
    assert common.run_folder(given, False) == out and out.is_dir()
    assert common.run_folder(given, False) == out  # still empty
    (out / "last.pt").touch()
    assert common.run_folder(given, True) == out
    second = common.run_folder(given, False)
    assert second.name == "a-2" and second.parent == out.parent and second.is_dir()
    (second / "results.json").touch()
    assert common.run_folder(given, False).name == "a-3"
    (out / "results.json").touch()
    fails(capsys, lambda: common.run_folder(given, True), "--resume", "finished")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_stop(kind):
    before = [signal.getsignal(k) for k in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), common.Stop() as stop:
        assert stop.signal == stop.agreed(CPU) == 0
        signal.raise_signal(kind)
        assert stop.signal == stop.agreed(CPU) == kind
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(k) for k in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("terminal, tool, shown", [(True, True, True), (False, True, False),
                                                   (True, False, False)])
def test_bar(monkeypatch, capsys, terminal, tool, shown):
    if not tool:
        monkeypatch.setattr(common, "tqdm", None)
    elif common.tqdm is None:
        pytest.skip("no tqdm here")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    def slow():
        for i in range(3):
            time.sleep(0.03)
            yield i

    bar, seen = common.Bar(slow(), 3, 0, "epoch 1/2"), []
    for i in bar:
        seen.append(i)
        bar.say("loss 1.23")
        time.sleep(0.06)
    assert seen == [0, 1, 2] and 0.09 <= bar.waiting < bar.seconds - 0.17
    assert ("epoch 1/2" in capsys.readouterr().err) == shown


ROWS = [{"epoch": 0, "top_1": 9.0}, {"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1, "top_1": 9}]
PANELS = {"loss": ["loss"], "accuracy": ["top_1", "never_seen"]}


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    common.curves(tmp_path / "curves.png", ROWS, PANELS)
    image = Image.open(tmp_path / "curves.png")
    assert image.format == "PNG" and image.width > image.height > 100
    assert np.asarray(image.convert("L")).std() > 10
    common.curves(tmp_path / "empty.png", [], PANELS)
    assert {f.name for f in tmp_path.iterdir()} == {"curves.png", "empty.png"}


def test_curves_without_matplotlib(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    common.curves(tmp_path / "curves.png", ROWS, PANELS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sides", [(16, 16, 8), (224, 96)], ids=["small", "global and local crops"])
def test_picture(tmp_path, sides):
    tones = torch.linspace(0.1, 0.9, 2 * len(sides)).view(2, -1)  # (rows, columns)
    columns = [tones[:, i].view(2, 1, 1, 1).expand(2, 3, s, s) for i, s in enumerate(sides)]
    common.picture(tmp_path / "views.png", columns)
    image = Image.open(tmp_path / "views.png")
    assert image.format == "PNG" and image.mode == "RGB" and len(list(tmp_path.iterdir())) == 1
    pixels = torch.from_numpy(np.array(image)).float() / 255
    cell = [s // n for s, n in zip(pixels.shape, (2, len(sides)))]
    assert min(cell) >= 96
    for r in range(2):
        for c in range(len(sides)):
            middle = pixels[r * cell[0] + cell[0] // 2, c * cell[1] + cell[1] // 2]
            assert far(middle, tones[r, c]) < 0.01
