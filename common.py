"""Data in, data out: what the method files share, and nothing of any method.

Out      `fail`, atomic files, the run folder, signals, the progress bar, curves, pictures.
Device   image operations on whole batches; every image has its own random draw.
In       `Data` finds a set (built in, torchvision's, a folder) and holds it in memory or streams
         it; `batches` cuts random or central crops out of it.

Images are float32 (N, 3, H, W) in [0, 1] on the device, uint8 where they are stored.
"""

import argparse
import atexit
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets

try:
    from tqdm import tqdm
except ImportError:  # then there is a line per epoch and no bar
    tqdm = None
try:
    import resource
except ImportError:  # Windows
    resource = None

# ==================================================================================================
# What goes out
# ==================================================================================================


def fail(message):
    """End the program with one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high, both included."""

    def parse(text):
        if not low <= (value := kind(text)) <= min(high, 1e300):
            raise ValueError
        return value

    parse.__name__ = f"number, {kind.__name__} from {low:g} to {high:g}:"  # argparse: "invalid ..."
    return parse


def main_process():
    """Whether this is the first process of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def write(path, content):
    """Write text, what a function saves to a path, or torch.save anything else: whole or not at
    all, whatever crashes, and only in the first process."""
    part = Path(f"{path}.part")
    if not main_process():
        return
    if isinstance(content, str):
        part.write_text(content)
    else:
        content(part) if callable(content) else torch.save(content, part)
    os.replace(part, path)


def write_rows(path, rows):
    """Dicts as JSON lines."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


_scalar = np.float64(0).__reduce__()[0]


def _numpy_1(*args):
    return _scalar(*args)


_numpy_1.__module__, _numpy_1.__name__ = "numpy.core.multiarray", "scalar"  # in older files
_numpy_1.__qualname__ = "scalar"


def read_checkpoint(path):
    """The dict in a file of tensors and plain Python, on the CPU; exit code 2 without one.

    Released checkpoints also hold argparse's Namespace and numpy scalars.
    """
    kinds = {type(np.dtype(t)) for t in "fdilq"}
    torch.serialization.add_safe_globals([argparse.Namespace, np.dtype, _scalar, _numpy_1, *kinds])
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} does not exist")
    except Exception as error:  # cut short, or a pickle that wants to run code
        fail(f"{path} is no checkpoint of tensors and plain values ({type(error).__name__})")
    return found if isinstance(found, dict) else fail(f"{path} holds no dict of weights")


def save(path, method, args, state, progress):
    """All a run needs to go on: options, state (modules, optimisers, tensors by name), counters."""
    held = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
    options = {"method": method, "processes": os.environ.get("WORLD_SIZE", "1")} | vars(args)
    write(path, {"method": method, "args": options, "state": held, "progress": progress})


def restore(path, method, args, state):
    """Load what `save` wrote into state -> progress. The options that shape a run must match."""
    now = {"method": method, "processes": os.environ.get("WORLD_SIZE", "1")} | vars(args)
    saved = read_checkpoint(path)
    free = "resume out device data_dir workers memory_limit compile eval_every knn_k knn_tau"
    if "args" not in saved:
        fail(f"--resume: {path} is not the last.pt of a run")
    for k in [k for k in now if k not in free.split() and now[k] != saved["args"].get(k)]:
        fail(f"--resume: {path} was begun with {k} {saved['args'].get(k)}, not {now[k]}")
    for k, value in saved["state"].items():
        if isinstance(value, torch.Tensor):
            state[k].copy_(value)
        elif value:  # a GradScaler that is off has nothing to say
            state[k].load_state_dict(value)
    return saved["progress"]


def load_into(module, weights, path):
    """Copy tensors into a module by name and say what fits; exit code 2 where not all do."""
    own = module.state_dict()
    fits = {k: w for k, w in weights.items() if k in own and w.shape == own[k].shape}
    missing, extra = [[k for k in a if k not in b] for a, b in ((own, fits), (weights, own))]
    print(f"{path}: {len(fits)} tensors loaded, missing {missing or 0}, unexpected {extra or 0}")
    if extra or any(not k.endswith("num_batches_tracked") for k in missing):  # not in old files
        fail(f"{path} holds another network; give the options of the model it was trained with")
    module.load_state_dict(fits, strict=False)


def run_folder(out, resume):
    """The folder to write to. One that holds a run is left alone: the next run takes -2, -3, ..."""
    folder, n = Path(out), 1
    if resume and not (folder / "last.pt").exists():
        fail(f"--resume: no last.pt in {out}; name the folder of the interrupted run with --out")
    if resume and (folder / "results.json").exists():
        fail(f"--resume: the run in {out} is finished; drop --resume to start another")
    while not resume and any((folder / f).exists() for f in ("last.pt", "results.json")):
        folder, n = Path(f"{Path(out)}-{n + 1}"), n + 1
    if main_process():
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def setup(device=None, amp="auto"):
    """Device, number of this process (rank) and of all (world), autocast and its dtype or None.

    Under torchrun it joins the other processes; only the first one prints. amp auto: bf16 on GPUs
    that have it, fp16 on others, off elsewhere.
    """
    rank, world, local = (int(os.environ.get(k, 0)) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    name = device or (there + ["cpu"])[0]
    if name not in there + ["cpu"]:
        fail(f"--device {name}: here there is {', '.join(there + ['cpu'])}")
    if name == "mps" and amp in ("bf16", "fp16"):
        fail("--amp has to be off on mps")
    cuda, auto = name == "cuda", None
    device = torch.device(name, local if cuda else None)
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # tries convolutions out: shapes stay the same
        auto = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    dtype = {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    cast = partial(torch.autocast, "cuda" if cuda else "cpu", dtype, enabled=dtype is not None)
    world = max(world, 1)
    name = torch.cuda.get_device_name(device) if cuda else name
    return SimpleNamespace(device=device, name=name, rank=rank, world=world, dtype=dtype,
                           autocast=cast)


def cores():
    """Processors this process may use, its share of them under torchrun."""
    known = hasattr(os, "sched_getaffinity")
    there = len(os.sched_getaffinity(0)) if known else os.cpu_count()
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Stop:
    """While it is open, SIGTERM and SIGINT set `signal`; a second one ends the program."""

    def __enter__(self):
        self.signal, kinds = 0, (signal.SIGTERM, signal.SIGINT)
        self.handlers = {kind: signal.signal(kind, self.catch) for kind in kinds}
        return self

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, device):
        """The signal that this or, under torchrun, any process has caught, 0 for none."""
        caught = torch.tensor(self.signal, device=device)
        if dist.is_initialized():
            dist.all_reduce(caught, dist.ReduceOp.MAX)
        return int(caught)

    def __exit__(self, *_):
        for kind, handler in self.handlers.items():
            signal.signal(kind, handler)


class Bar:
    """Iterate over items, with a bar on a terminal; counts `seconds` and those spent `waiting`."""

    def __init__(self, items, total, first, title):
        self.items, self.waiting, self.start = items, 0.0, time.perf_counter()
        shown = tqdm and sys.stderr.isatty() and main_process()
        how = dict(total=total, initial=first, desc=title, unit="step", leave=False)
        self.bar = tqdm(**how) if shown else SimpleNamespace(
            update=lambda: None, close=lambda: None, set_postfix_str=lambda text, refresh: None)

    def __iter__(self):
        tick = time.perf_counter()
        try:
            for item in self.items:
                self.waiting += time.perf_counter() - tick
                yield item
                self.bar.update()
                tick = time.perf_counter()
        finally:
            self.bar.close()

    def say(self, text):
        self.bar.set_postfix_str(text, refresh=False)

    @property
    def seconds(self):
        return time.perf_counter() - self.start


def duration(seconds):
    """90 -> '1:30', 4000 -> '1:06:40'."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


def peak_memory_mb(device):
    """Peak of CUDA's allocator, elsewhere of the whole process, in MB (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
    return usage / (2**20 if sys.platform == "darwin" else 2**10)


def curves(path, rows, panels):
    """A PNG of rows (dicts with "epoch") by epoch; panels: title -> keys. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for ax, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points) if points else ((), ()), ".-", label=key.replace("_", " "))
        ax.set(title=title, xlabel="epoch")
        ax.legend(fontsize=8)
    write(path, lambda part: figure.savefig(part, format="png"))


def picture(path, columns, size=96):
    """A PNG with a row per image: columns is a list of (N, 3, H, W) in [0, 1]."""
    size = max(size, *(c.shape[-1] for c in columns))
    tiles = [F.interpolate(c.float().cpu(), size=(size, size)) for c in columns]
    tiles = torch.stack([F.pad(t, (0, 4, 0, 4), value=1.0) for t in tiles], 1)
    rows = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (N*H, columns*W, 3)
    image = Image.fromarray((rows.clamp(0, 1) * 255).round().byte().numpy())
    write(path, lambda part: image.save(part, format="png"))


# ==================================================================================================
# Image operations: x (N, 3, H, W) in [0, 1] -> same, drawn from the device's global generator
# ==================================================================================================


def uniform(low, high, shape, device):
    return torch.rand(shape, device=device) * (high - low) + low


def chance(x, p):
    """(N, 1, 1, 1) bool, true with probability p, one draw per image of x."""
    return torch.rand(len(x), 1, 1, 1, device=x.device) < p


def random_boxes(sizes, scale, ratio, tries=10):
    """RandomResizedCrop's boxes: sizes (N, 2) height, width -> (N, 4) top, left, height, width.

    An area of scale[0] to scale[1] of the image with a log-uniform aspect in ratio, the first of
    `tries` that fits; where none does, the largest central box within ratio, as torchvision.
    """
    shape, device = (len(sizes), tries), sizes.device
    H, W = sizes.float().split(1, dim=1)  # (N, 1)
    area = uniform(*scale, shape, device) * H * W
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), shape, device).exp()
    w, h = (area * aspect).sqrt().round().clamp(min=1), (area / aspect).sqrt().round().clamp(min=1)
    fits = (w <= W) & (h <= H)
    first, found = fits.byte().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    w = torch.where(found, w.gather(1, first), W.minimum((H * ratio[1]).round()).clamp(min=1))
    h = torch.where(found, h.gather(1, first), H.minimum((W / ratio[0]).round()).clamp(min=1))
    room = torch.cat([H - h, W - w], 1)
    corner = (torch.rand(room.shape, device=device) * (room + 1)).floor().minimum(room)
    return torch.cat([torch.where(found, corner, (room / 2).floor()), h, w], 1)


def central_boxes(sizes, share):
    """The central square of `share` times the shorter side: sizes (N, 2) -> boxes (N, 4)."""
    side = (sizes.amin(1, keepdim=True) * share).round().clamp(min=1).expand(-1, 2)
    return torch.cat([((sizes - side) / 2).floor(), side], 1)


def resize_weights(start, length, out, size):
    """(N, out, size): row o weighs the pixels [start, start + length) of a line for output pixel o.

    A triangle, as wide as an output pixel where it shrinks: resize(antialias=True) of torchvision.
    """
    length = length.view(-1, 1, 1)
    pixel = torch.arange(size, device=start.device) + 0.5 - start.view(-1, 1, 1)  # (N, 1, size)
    centre = (torch.arange(out, device=start.device).view(1, -1, 1) + 0.5) * length / out
    w = (1 - ((pixel - centre) / (length / out).clamp(min=1)).abs()).clamp(min=0)
    w = w * ((pixel > 0) & (pixel < length))
    return w / w.sum(2, keepdim=True)


def crop_resize(x, boxes, out):
    """Each image's box (N, 4) of whole pixels resized to (out, out): two matrix products."""
    rows = resize_weights(boxes[:, 0], boxes[:, 2], out, x.shape[2])  # (N, out, H)
    cols = resize_weights(boxes[:, 1], boxes[:, 3], out, x.shape[3])  # (N, out, W)
    return rows.unsqueeze(1) @ x @ cols.unsqueeze(1).mT


def flip(x, p):
    return torch.where(chance(x, p), x.flip(3), x)


def to_grey(x):
    """(N, 3, H, W) -> (N, 1, H, W), torchvision's weights."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def grey(x, p):
    return torch.where(chance(x, p), to_grey(x), x)


def turn_hue(x, shift):
    """Hue moved by shift (N, 1, 1, 1) of a full turn: adjust_hue, through value, chroma, hue."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    (r, g, b), c = x.split(1, 1), chroma.clamp(min=1e-12)
    green_or_blue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, green_or_blue) + 6 * shift  # in sixths of a turn
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + hue) % 6
    return value - chroma * k.minimum(4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, p):
    """torchvision's ColorJitter, own factors and own order of the four per image, probability p.

    Brightness, contrast and saturation are blends with black, the mean grey and the grey image.
    Hue is the dear one: a random quarter of the batch each takes it first, second, third or last.
    """
    n, device, on = len(x), x.device, chance(x, p)
    draws = zip(uniform(-1, 1, (3, n, 1, 1, 1), device), (brightness, contrast, saturation))
    factor = torch.stack([1 + draw * most for draw, most in draws]).clamp(min=0)
    factor = torch.where(on, factor, 1.0)
    shift = torch.where(on, uniform(-hue, hue, (n, 1, 1, 1), device), 0.0)
    order = torch.rand(3, n, 1, 1, 1, device=device).argsort(0)
    shuffle = torch.randperm(n, device=device)
    x = x[shuffle]
    for turn in range(4):
        part = slice(n * turn // 4, n * (turn + 1) // 4)
        x[part] = turn_hue(x[part], shift[part])
        if turn < 3:
            kind, f, g = order[turn], factor.gather(0, order[turn : turn + 1])[0], to_grey(x)
            black_or_mean = torch.where(kind == 0, 0.0, g.mean((2, 3), keepdim=True))
            x = torch.lerp(torch.where(kind == 2, g, black_or_mean), x, f).clamp(0, 1)
    return torch.empty_like(x).index_copy_(0, shuffle, x)


def solarize(x, p, threshold=0.5):
    """Bright values turned round: v -> 1 - v from the threshold on."""
    return torch.where(chance(x, p) & (x >= threshold), 1 - x, x)


def blur(x, sigma, taps, p):
    """Gaussian blur with sigma in a range of pixels, `taps` (odd) wide, edges reflected."""
    s = torch.where(chance(x, p), uniform(*sigma, (len(x), 1, 1, 1), x.device), 1e-3).view(-1, 1)
    offset = torch.arange(taps, device=x.device) - taps // 2
    k = torch.exp(-0.5 * (offset / s) ** 2)  # (N, taps); sigma 1e-3 leaves the image as it is

    def band(length):  # (N, 1, length, length): the convolution of a line as a matrix
        to = (torch.arange(length, device=x.device).unsqueeze(1) + offset).abs()
        to = (length - 1 - (length - 1 - to).abs()).expand(len(x), -1, -1)
        weights = (k / k.sum(1, keepdim=True)).unsqueeze(1).expand_as(to)
        return x.new_zeros(len(x), length, length).scatter_add_(2, to, weights).unsqueeze(1)

    return band(x.shape[2]) @ x @ band(x.shape[3]).mT


# ==================================================================================================
# What comes in: the built-in set
# ==================================================================================================

TRAIN_SHAPES, TEST_SHAPES = 4000, 2000


def _star(x, y):
    turn = torch.atan2(x, y) / (0.4 * math.pi)
    angle, r = (turn - turn.round()).abs() * 0.4 * math.pi, torch.hypot(x, y)  # 0 at a point
    u, v, cu, cv = r * angle.cos(), r * angle.sin(), 0.5 * math.cos(math.pi / 5), 0.294
    return (u - 1) * cv < v * (cu - 1)  # inside the edge from (1, 0) to the corner (cu, cv)


SHAPES = {  # inside or not, x to the right, y up, in about [-1, 1]
    "disc": lambda x, y: x**2 + y**2 < 0.72,
    "square": lambda x, y: x.abs().maximum(y.abs()) < 0.76,
    "triangle": lambda x, y: (y > -0.65) & (1.75 * x.abs() + y < 0.95),
    "star": _star,
    "cross": lambda x, y: (x.abs().minimum(y.abs()) < 0.28) & (x.abs().maximum(y.abs()) < 0.92),
    "ring": lambda x, y: (x**2 + y**2 - 0.555).abs() < 0.295,
    "heart": lambda x, y: (x**2 + y**2 - 0.6) ** 3 < x**2 * y**3,
    "moon": lambda x, y: (x**2 + y**2 < 0.85) & ((x - 0.42) ** 2 + (y - 0.12) ** 2 > 0.5),
    "arrow": lambda x, y: (y > -0.9) & (x.abs() < torch.where(y < 0, 0.27, 0.9 - y)),
    "tee": lambda x, y: (y > -0.9) & (y < 0.88) & (x.abs() < torch.where(y < 0.36, 0.26, 0.85)),
}


def shapes(n, size, seed):
    """n images of one upright object before a quiet background, under sensor noise: images
    (n, 3, size, size) uint8, labels (n,), masks (n, size, size) bool, depth alike, 0 near to 1 far.

    The class is the shape. All classes have the same area on average, place and size vary, the tilt
    is at most 25 degrees, light comes from above. The material (plain, striped, checked) is drawn
    whatever the class, and the hue goes with the material. Supervised, the default network of
    simclr.py reaches 92.9 % on the test images in 60 s on 2 CPU cores (one run).
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=g) % len(SHAPES)
    images, truth = torch.empty(n, 3, size, size), torch.empty(2, n, size, size)  # mask, depth
    fine = (torch.arange(2 * size) + 0.5) / size - 1  # 2 x 2 points a pixel
    px, py, grid = fine.view(1, 1, -1), -fine.view(1, -1, 1), torch.linspace(-1.2, 1.2, 200)

    def draw(low, high):  # (m, 1, 1)
        return torch.rand(len(part), 1, 1, generator=g) * (high - low) + low

    chunks = [c for k in range(len(SHAPES)) for c in (labels == k).nonzero().squeeze(1).split(256)
              if len(c)]
    for part in chunks:
        inside = list(SHAPES.values())[labels[part[0]]]
        X, Y = torch.meshgrid(grid, grid, indexing="xy")
        X, Y = X[inside(X, Y)], Y[inside(X, Y)]  # len(X) is the area, their mean the centre
        radius = draw(math.log(0.48), math.log(0.8)).exp() * (12500 / len(X)) ** 0.5
        room = (1 - 0.85 * radius).clamp(min=0)
        dx, dy = (px - draw(-1, 1) * room) / radius, (py - draw(-1, 1) * room) / radius
        tilt = draw(-25, 25) * math.pi / 180
        x, y = dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()
        here, material = inside(x + X.mean(), y + Y.mean()), draw(0, 3).floor()
        striped, checked = (8 * y).sin().sign(), (7 * x).sin().sign() * (7 * y).sin().sign()
        pattern = (material == 1) * striped + (material == 2) * checked
        k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + 2 * material.unsqueeze(1)) % 6
        colour = 1 - 0.4 * k.minimum(4 - k).clamp(0, 1)  # (m, 3, 1, 1): red, green or blue
        light = (draw(0.7, 0.84) + 0.06 * dy + 0.04 * pattern).unsqueeze(1)
        light = light * colour / colour.mean(1, keepdim=True)
        picture = torch.where(here.unsqueeze(1), light, (0.5 + 0.04 * py).unsqueeze(1))
        ball = (1 - dx**2 - dy**2).clamp(min=0)
        depth = torch.where(here, 0.5 - 0.2 * ball - 0.3 * radius, 0.8 + 0.2 * py)
        images[part] = F.avg_pool2d(picture, 2)
        truth[:, part] = F.avg_pool2d(torch.stack([here.float(), depth]), 2)
    images += 0.1 * torch.randn(images.shape, generator=g)
    return (images.clamp(0, 1) * 255).round().byte(), labels, truth[0] > 0.5, truth[1]


# ==================================================================================================
# What comes in: a set, found by name or folder
# ==================================================================================================

SETS = {  # torchvision's class, what names its training and its test split, shorter side in pixels
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, 32),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, 32),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}, 28),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}, 96),
    "imagenette": ("Imagenette", {"split": "train", "size": "160px"}, 160),
}
SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}


@dataclass
class Images:
    """N images: labels (N,) int64, -1 unknown, and either files or, on the device, pixels
    (N, 3, H, W) uint8, padded at the right and bottom, with sizes (N, 2) height, width."""

    labels: torch.Tensor
    pixels: torch.Tensor = None
    sizes: torch.Tensor = None
    files: list = None
    unreadable: set = field(default_factory=set)


class Data:
    """A set by name (`shapes`, a key of SETS) or folder. A folder is PATH/train/<class>/* with
    PATH/{val,validation} and PATH/test in the same form, or any tree of images, without labels.

    parts: train, val, test -> (items, labels), items being files, uint8 arrays (N, H, W[, 3]) or,
    for shapes, a number. Where there is no validation split it is a fixed tenth of the labelled
    training images. limit: the first so many training images of a fixed shuffle, and at most as
    many test images. side: the shorter side of its images in pixels, None for any.
    """

    def __init__(self, name, root="data", limit=None):
        self.side, self.parts = None, {}
        if name == "shapes":
            counts = {"train": TRAIN_SHAPES, "test": TEST_SHAPES}
            self.parts = {k: (min(n, limit or n), None) for k, n in counts.items()}
            return
        if name in SETS:
            self._torchvision(name, Path(root))
        elif Path(name).is_dir():
            self._folder(Path(name))
        else:
            fail(f"--dataset {name} is neither a folder nor one of shapes, {', '.join(SETS)}")
        for split, (items, labels) in self.parts.items() if limit else ():
            keep = self._shuffle(len(items))[:limit]
            self.parts[split] = [items[i] for i in keep], labels[keep]

    def __len__(self):
        items, _ = self.parts["train"]
        return items if isinstance(items, int) else len(items)

    def _shuffle(self, n):
        return torch.randperm(n, generator=torch.Generator().manual_seed(0))

    def _torchvision(self, name, root):
        kind, *splits, self.side = SETS[name]
        if not main_process():
            dist.barrier()  # until the first process has downloaded it
        try:
            sets = [getattr(datasets, kind)(root, download=True, **split) for split in splits]
        except Exception as error:
            fail(f"{name} is not in {root}/ and cannot be downloaded ({error}); fetch it where "
                 f"there is a network and copy {root}/, or give --dataset a folder of images")
        if main_process() and dist.is_initialized():
            dist.barrier()
        if name == "imagenette":
            return self._folder(root / "imagenette2-160")
        for split, (images, labels) in zip(("train", "test"), (zip(*s) for s in sets)):
            self.parts[split] = [np.array(image) for image in images], torch.tensor(labels)

    def _folder(self, root):
        def images(folder):
            return sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)

        top = root / "train" if (root / "train").is_dir() else root
        classes = sorted(d.name for d in top.iterdir() if d.is_dir()) if top != root else []
        for split, names in (("train", "train"), ("val", "val validation"), ("test", "test")):
            folder = next((root / n for n in names.split() if (root / n).is_dir()), None)
            if classes and folder:
                found = [(f, c) for c, name in enumerate(classes) for f in images(folder / name)]
                self.parts[split] = [f for f, _ in found], torch.tensor([c for _, c in found])
        if not classes:  # one tree, no labels
            files = images(top)
            self.parts["train"] = files, torch.full((len(files),), -1)
        files, labels = self.parts["train"]
        if not files:
            fail(f"no images in {top}, as <class>/* or below it; formats: {' '.join(SUFFIXES)}")
        if classes and "test" not in self.parts and "val" in self.parts:
            self.parts["test"] = self.parts.pop("val")  # ImageNet: its validation split is the test
        elif classes and "test" not in self.parts:
            order, cut = self._shuffle(len(files)), -(-len(files) // 10)
            for split, index in (("test", order[:cut]), ("train", order[cut:])):
                self.parts[split] = [files[i] for i in index], labels[index]
            print(f"{root} has no test folder: a tenth of the training images is held out as test")
        for split in [k for k, (files, _) in self.parts.items() if not files]:
            fail(f"no images of the training classes in the {split} part of {root}")
        self.side = int(np.median(_sizes(self.parts["train"][0]).min(1)))

    def read(self, *how):
        """Read the training images as `train`; `fit` and `val` are (images, index) for probes."""
        self.how, self.train = how, self.load("train", *how)
        known = (self.train.labels >= 0).nonzero().squeeze(1)
        pool = known if len(known) else torch.arange(len(self.train.labels))
        pool, tenth = pool[self._shuffle(len(pool))], -(-len(pool) // 10)
        self.val, self.fit = (self.train, pool[:tenth]), (self.train, pool[tenth:])
        if "val" in self.parts:
            images = self.load("val", *how)
            self.val, self.fit = (images, torch.arange(len(images.labels))), (self.train, known)

    def epoch(self, number, first, batch_size, crops, run, seed):
        """Batches of a shuffled pass over the training images from batch `first` on; with several
        processes each has its part of every batch. run: device, rank, world."""
        steps, mix = len(self.train.labels) // batch_size, torch.Generator()
        mix.manual_seed(seed * 2**20 + number)
        order = torch.randperm(len(self.train.labels), generator=mix)
        order = order[: steps * batch_size].view(steps, run.world, -1)[first:, run.rank]
        return batches(self.train, order.flatten(), order.shape[1], crops, run.device, self.how[-1],
                       (seed, number, run.rank), first)

    @property
    def labelled(self):
        return bool((self.train.labels >= 0).any())

    @cached_property
    def test(self):
        """(images, index) of the test split, read when first asked for."""
        images = self.load("test", *self.how)
        return images, torch.arange(len(images.labels))

    def load(self, split, size, device, memory_gb, workers):
        """The Images of a split: on the device if they take at most memory_gb, else as files.

        In memory an image is kept with a longer side of at most four times `size`.
        """
        items, labels = self.parts[split]
        if isinstance(items, int):
            made, labels, _, _ = shapes(items, size, seed=["train", "test"].index(split))
            items = made.permute(0, 2, 3, 1).numpy()
        elif isinstance(items[0], str):
            H, W = np.minimum(_sizes(items), 4 * size).max(0)
            need = len(items) * 3 * H * W / 2**30
            if all(_read(f, size) is None for f in items):  # as a rule the first can be read
                fail(f"none of the {len(items)} image files of the {split} split can be read")
            if need > memory_gb:
                print(f"{split}: {len(items):,} images take {need:.2g} GB decoded, over "
                      f"--memory-limit {memory_gb:g}: streamed by {workers} worker processes")
                return Images(labels, files=list(items))
            with ProcessPoolExecutor(max(workers, 1)) as pool:
                read = list(pool.map(_read, items, [4 * size] * len(items), chunksize=64))
            warn_unreadable([f for f, image in zip(items, read) if image is None])
            good = [i for i, image in enumerate(read) if image is not None]
            items, labels = [read[i] for i in good], labels[good]
        sizes = torch.tensor([image.shape[:2] for image in items])
        pixels = torch.zeros(len(items), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
        for p, image in zip(pixels, items):
            image = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)  # grey: one channel
            p[:, : image.shape[1], : image.shape[2]] = image
        return Images(labels, pixels.to(device), sizes.to(device))


def warn_unreadable(files):
    if files:
        shown = ", ".join(files[:5]) + ", ..." * (len(files) > 5)
        print(f"unreadable and skipped: {len(files)} image file(s): {shown}")


# ==================================================================================================
# What comes in: files
# ==================================================================================================


def rgb(image):
    """A Pillow image of any kind -> 8-bit RGB, upright, transparent pixels on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip
        scale = 255 / 65535 if image.mode[0] == "I" else 255
        a = np.asarray(image, dtype=np.float32) * scale
        image = Image.fromarray(np.uint8(a.clip(0, 255)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read(file, most):
    """(H, W, 3) uint8 with a longer side of at most `most`, None where it cannot be read."""
    try:
        image = Image.open(file)
        image.draft("RGB", (most, most))
        image = rgb(image)
        image.thumbnail((most, most), Image.BILINEAR)
        return np.asarray(image)
    except Exception:  # a broken file raises whatever its decoder likes
        return None


def _sizes(files, most=256):
    """(n, 2) height, width from the headers of about `most` files spread over the list."""
    found = []
    for file in files[:: -(-len(files) // most)]:
        try:
            found.append(Image.open(file).size[::-1])
        except Exception:
            continue
    return np.array(found or [(64, 64)])


# ==================================================================================================
# What comes in: batches of crops
# ==================================================================================================


class Crop(NamedTuple):
    """`count` views of size x size pixels: random boxes with area share and aspect in the ranges
    scale and ratio; without a ratio, the central square of `scale` times the shorter side."""

    size: int
    scale: float | tuple
    ratio: tuple = None
    count: int = 1

    def boxes(self, sizes):
        if self.ratio is None:
            return central_boxes(sizes, self.scale)
        return random_boxes(sizes, self.scale, self.ratio)


def reseed(*numbers):
    """Seed torch's generators from integers."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(state)  # of all devices; slow where there is none


def batches(images, order, size, crops, device, workers=0, seed=None, first=0):
    """Yield (views, index) for `order` (indices into images) cut into batches of `size`.

    views: for every crop and each of its count, float (B, 3, S, S) in [0, 1]. seed, a tuple: batch
    i and all that is drawn while it is in use depend on (*seed, first + i) alone.
    """
    chunks = order.split(size)
    stream = _stream(images, chunks, crops, device, workers, seed) if images.files else None
    places = order.to(device).split(size)  # once: copying to a GPU makes it wait
    for i, (index, at) in enumerate(zip(chunks, places)):
        if stream:
            views, index = next(stream)
            views = [v.to(device, non_blocking=True).movedim(3, 1).float() / 255 for v in views]
        if seed is not None:
            reseed(*seed, first + i)
        if not stream:
            x, sizes = images.pixels[at].float() / 255, images.sizes[at]
            views = [crop_resize(x, c.boxes(sizes), c.size) for c in crops for _ in range(c.count)]
        yield views, index


def _stream(images, chunks, crops, device, workers, seed):
    loader = torch.utils.data.DataLoader(
        _Files(images.files, crops, seed), batch_sampler=[c.tolist() for c in chunks],
        num_workers=workers, collate_fn=_collate, pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent)
    for views, index, bad in loader:
        bad = set().union(*bad) - images.unreadable
        warn_unreadable(sorted(bad))
        images.unreadable |= bad
        yield views, index


def _collate(items):
    views, index, bad = zip(*items)
    return [torch.from_numpy(np.stack(v)) for v in zip(*views)], torch.tensor(index), bad


def _leave_signals_to_the_parent(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Files(torch.utils.data.Dataset):
    """i -> crops of file i, uint8 (S, S, 3), i, unreadable files; the next stands in for those."""

    def __init__(self, files, crops, seed):
        self.files, self.crops, self.seed = files, crops, seed

    def __getitem__(self, i):
        bad = []
        while len(bad) < len(self.files):
            try:
                return self.views(i), i, bad
            except Exception:  # a broken file raises whatever its decoder likes
                bad.append(self.files[i])
                i = (i + 1) % len(self.files)
        raise RuntimeError(f"none of the {len(bad)} image files can be read")

    def views(self, i):
        if self.seed is not None:
            reseed(*self.seed, i, 1)  # 1: not the draws of batch i
        image = Image.open(self.files[i])
        turned = image.getexif().get(0x0112, 1) > 4
        width, height = image.size[::-1] if turned else image.size
        sizes = torch.tensor([[height, width]])
        boxes = [(c.size, *box) for c in self.crops
                 for box in c.boxes(sizes.expand(c.count, 2)).tolist()]
        need = max(size / min(h, w) for size, _, _, h, w in boxes)
        draft = image.draft("RGB", [math.ceil(need * s) for s in image.size])  # JPEG: 1/2, 1/4, 1/8
        f = max(draft[1][2:]) / max(width, height) if draft else 1.0
        image = rgb(image)
        return [np.asarray(image.resize((size, size), Image.BILINEAR,
                                        (f * x, f * y, f * (x + w), f * (y + h))))
                for size, y, x, h, w in boxes]
