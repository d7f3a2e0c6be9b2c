"""The Python in lessons/use.md is run, on a backbone of next to no training."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tools import ROOT, TINY, close, quiet

import common
import simclr

SECTIONS = re.split(r"^## ", (ROOT / "lessons" / "use.md").read_text(), flags=re.M)[1:]


def run(title, **names):
    """What the Python of this section leaves behind."""
    section, = (s for s in SECTIONS if s.startswith(f"{title}\n"))
    for code in re.findall(r"```python\n(.+?)```", section, re.S):
        exec(code, names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With two runs and features.npz in it."""
    root = tmp_path_factory.mktemp("use")
    last = root / "runs" / "simclr-toys-s0" / "last.pt"
    tiny = [*TINY, "--image-size", 32, "--epochs", 1, "--eval-every", 0]
    quiet(simclr, [*tiny, "--out", last.parent])
    features, = (s for s in SECTIONS if s.startswith("Features of every image\n"))
    command, = re.findall(r"^python simclr.py (.+)$", features, re.M)
    argv = [re.sub("^(?=runs/|features)", f"{root.as_posix()}/", word) for word in command.split()]
    quiet(simclr, [*tiny, *argv, "--out", root / "eval"])
    quiet(simclr, [*tiny, "--arch", "resnet18", "--out", root / "runs" / "simclr-resnet18"])
    return root


@pytest.fixture
def net(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = simclr.common.options("simclr", "", simclr.OPTIONS, [])
    args.arch, args.stem = "convnet", "7x7"
    exec(simclr.loading(args), names := {})
    weights = torch.load("runs/simclr-toys-s0/backbone.pt", weights_only=True)["state_dict"]
    names["net"].load_state_dict(weights)
    return names["net"].eval()


def test_features(net, capsys):
    found = run("Features of every image")
    images, labels, *_ = common.toys(48, 32, 0)
    assert close(np.load("features.npz")["h"][:48], net(images / 255).detach(), 1e-5)
    assert np.load("features.npz")["label"][:48].tolist() == labels.tolist()
    h = found["h"].double()
    assert close(h.norm(dim=1), torch.ones(len(h)), 1e-6)
    i = found["nearest"][7]
    assert 7 not in i and close((h @ h[7])[i], (h @ h[7]).sort().values[-6:-1].flip(0), 1e-6)
    assert torch.equal((h @ found["centres"].double().T).argmax(1), found["group"])  # at rest
    assert " is like " in capsys.readouterr().out


def test_own_pytorch(net, capsys):
    """The features are those of --embed, also of a photograph that lies on its side, and the
    classifier knows what it was shown."""
    images, labels, *_ = common.toys(600, 32, 0)
    images, labels = images[labels < 2], labels[labels < 2].tolist()
    for i, (image, label) in enumerate(zip(images, labels)):
        for place in (Path("labelled") / "ab"[label], Path("new")):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.byte().permute(1, 2, 0).numpy()).save(place / f"{i:03}.png")
    lying = Image.open("new/001.png").rotate(90)
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    lying.save("new/1.png", exif=exif)
    h = net(images[1:2] / 255).detach()
    torch.manual_seed(0)
    found = run("In your own PyTorch", net=net)
    assert close(found["h"].detach(), h, 1e-5)
    for mode, suffix in (("I;16", "png"), ("F", "tif"), ("RGBA", "png"), ("P", "gif")):
        image = Image.fromarray(np.uint16(images[0, 0] * 9.0)) if mode == "I;16" else Image.open(
            "new/000.png").convert("L" if mode == "F" else mode).convert(mode)
        image.save(f"{mode[0]}.{suffix}")
        read = np.asarray(found["load"](f"{mode[0]}.{suffix}"))
        assert np.ptp(read) > 50 and (read == common.read_image(f"{mode[0]}.{suffix}")).all()
    at_random = torch.rand(2, 3, 8, 8)
    section, = (s for s in SECTIONS if s.startswith("Your images\n"))
    *_, turn = re.findall(r"```python\n(.+?)```", section, re.S)
    exec(turn, names := {"torch": torch, "x": at_random.repeat(40, 1, 1, 1)})
    kinds = names["x"].unique(dim=0)
    assert kinds.shape == (8, 3, 8, 8) and close(kinds.mean(), at_random.mean(), 1e-6)
    told = re.findall(r"^new/(\d+).png ([ab])$", capsys.readouterr().out, re.M)
    right = [name == "ab"[labels[int(i)]] for i, name in told]
    assert len(right) == len(labels) + 1 and sum(right) > 0.8 * len(right)


def test_own_rules():
    assert run("Labels from your own rules")["q"].argmax(1).tolist() == [0, 1, 1, 1]


def test_own_loop(capsys):
    args = run("In your own loop, on your own tensors")["args"]
    cpu = args.arch, args.temperature, args.batch_size, args.epochs, args.image_size
    assert cpu == ("convnet_wide", 0.1, 256, 2, 32)
    first, second = map(float, re.findall(r"epoch \d: (.+)", capsys.readouterr().out))
    assert 1 < second < first - 0.3


def test_timm(net):
    pytest.importorskip("timm")
    theirs = run("timm")["net"].eval()
    ours = simclr.encoder("resnet18", "7x7")
    ours.load_state_dict(torch.load("runs/simclr-resnet18/backbone.pt")["state_dict"])
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert close(theirs(x).detach(), ours.eval()(x).detach(), 1e-4)


def test_safetensors(net):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file
    run("safetensors")
    net.load_state_dict(load_file("backbone.safetensors"))


def test_onnx(net):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run("ONNX", net=net, size=32)
    session = onnxruntime.InferenceSession("backbone.onnx")
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    h, = session.run(["h"], {"x": x.numpy()})
    assert close(h, net(x).detach(), 1e-4)


def test_scikit_learn(net):
    pytest.importorskip("sklearn")
    meta = torch.load("runs/simclr-toys-s0/backbone.pt", weights_only=True)["meta"]
    classifier = run("scikit-learn", net=net, meta=meta)["classifier"]
    images, labels, *_ = common.toys(100, 32, 0)
    assert classifier.fit(images / 255, labels).score(images / 255, labels) > 0.2
