"""Tests of experiments/export.py: python -m pytest experiments/test_export.py"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import coco_gan
from experiments import export

BUDGET = "--device cpu --preset tiny --steps 1 --batch-size 2 --width-g 2 --width-d 2 --z-dim 8".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    command = ["train", *BUDGET, "--run", str(folder / "tiny"), "--cache", str(folder / "cache")]
    assert coco_gan.main(command) == 0
    return folder / "tiny"


def test_the_file_samples_as_its_run_does(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main(["--checkpoint", str(run), "--out", "new/small.pt"]) == 0
    assert "averaged weights of step 1," in capsys.readouterr().out
    z = coco_gan.latents(range(3), 8)
    images = [coco_gan.full_image(coco_gan.load(path), z) for path in (run, "new/small.pt")]
    assert torch.equal(*images)
    (checkpoint,) = coco_gan.checkpoints(run)
    assert Path("new/small.pt").stat().st_size < checkpoint.stat().st_size / 3
    assert [path.name for path in Path("new").iterdir()] == ["small.pt"]
    for command, message in (
        ("sample --raw --checkpoint new/small.pt", "holds averaged weights only; leave out --raw"),
        ("train --resume new/small.pt", "holds averaged weights only, which cannot be trained"),
    ):
        assert coco_gan.main([*command.split(), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err


# What a process without this project does with an export: given z and c_micro, it stores the patches.
READERS = {
    "pt2": """
import sys, torch
extra = {"config.json": ""}
program = torch.export.load("G.pt2", extra_files=extra).module()
z, c, config = torch.load("in.pt"), torch.load("c.pt"), extra["config.json"]
torch.save((program(z, c), program(z[:1], c[:1]), config), "out.pt")
""",
    "onnx": """
import sys, numpy, onnx, onnxruntime, torch
session = onnxruntime.InferenceSession("G.onnx", providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_inputs()]
z, c = torch.load("in.pt").numpy(), torch.load("c.pt").numpy()
run = lambda *values: torch.from_numpy(session.run(None, dict(zip(names, values)))[0])
config = session.get_modelmeta().custom_metadata_map["config"]
torch.save((run(z, c), run(z[:1], c[:1]), config), "out.pt")
""",
}


@pytest.mark.parametrize("kind", READERS)
def test_programs_run_without_this_project(kind, run, tmp_path, monkeypatch, capsys):
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert export.main(["--checkpoint", str(run), "--out", f"G.{kind}"]) == 0
    assert f"G.{kind}: averaged weights of step 1," in capsys.readouterr().out
    G = coco_gan.load(run)
    z, i, j = coco_gan.latents(range(7), 8), torch.arange(7) % 4, torch.arange(7) % 3
    torch.save(z, "in.pt")
    torch.save(coco_gan.micro_coordinates(G.config, i, j), "c.pt")
    script = READERS[kind] + "assert not {'coco_gan', 'data'} & {*sys.modules}\n"
    # -I: neither this folder nor PYTHONPATH, where the project could be found
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    patches, one, config = torch.load("out.pt")
    expected = coco_gan.micro_patches(G, z, i, j)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, expected[:1], atol=1e-5, rtol=0)
    assert expected.std() > 0.01 and json.loads(config) == dataclasses.asdict(G.config)


def test_plain_weights_are_those_of_g_by_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(["--checkpoint", str(run), "--out", "G.npz"]) == 0
    held, G = dict(np.load("G.npz", allow_pickle=False)), coco_gan.load(run)
    assert json.loads(str(held.pop("config"))) == dataclasses.asdict(G.config)
    state = {name: tensor for name, tensor in G.state_dict().items() if not name.endswith(".v")}
    assert held.keys() == state.keys() and "blocks.0.cbn.norm.running_mean" in held
    assert all(np.array_equal(held[name], tensor.numpy()) for name, tensor in state.items())


def test_onnx_names_the_packages_that_it_takes(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main(["--checkpoint", str(run), "--out", "G.onnx"]) == 2
    assert "--out G.onnx takes two more packages; get them by: pip install onnx" in capsys.readouterr().err


def test_panorama_takes_the_newest_run_on_a_cylinder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in (("a", ["--topology", "cylinder"]), ("b", [])):  # b is newer
        assert coco_gan.main(["train", *BUDGET, *words, "--run", f"runs/{name}"]) == 0
    assert export.main(["--out", "b.pt"]) == export.main(["--panorama", "--out", "a.pt"]) == 0
    topologies = [coco_gan.load(f"{name}.pt").config.topology for name in "ab"]
    assert topologies == ["cylinder", "plane"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--out weights.bin", "--out weights.bin has no known ending; give .pt, .pt2, .npz, .onnx"),
        ("--out taken.pt", "--out taken.pt exists already; name another, or add --force"),
        ("--out taken.pt/a.pt", "--out taken.pt/a.pt cannot be written"),
        ("--out a.pt --checkpoint nowhere", "--checkpoint nowhere does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken.pt").write_text("mine")
    assert export.main(["--checkpoint", str(run), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert Path("taken.pt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
