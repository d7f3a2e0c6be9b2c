"""The Python in lessons/use.md is run, on a backbone of next to no training."""

import re

import numpy as np
import pytest
import torch
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
    command, = re.findall(r"^python simclr.py (.+)$", SECTIONS[0], re.M)
    argv = [re.sub("^(?=runs/|features)", f"{root}/", word) for word in command.split()]
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
    run("In your own PyTorch")
    assert "simclr convnet 32 (0.0, 0.0, 0.0) (1.0, 1.0, 1.0)" in capsys.readouterr().out


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
    run("ONNX", net=net)
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
