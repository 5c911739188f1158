"""Tests of experiments/export.py: python -m pytest experiments/test_export.py"""

from pathlib import Path

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
        ("--out weights.bin", "--out weights.bin is no checkpoint's name; end it in .pt"),
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
