"""Test experiments/extrapolate.py: python -m pytest experiments/test_extrapolate.py"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan as core
from coco_gan import COCOGAN, Config
from experiments import extrapolate

SOURCE, MADE = Path("runs/plain/checkpoint-000000004.pt"), Path("runs/plain-extrapolate")
CPU = torch.device("cpu")
FOUR = Config(height=16, width=16, N=2, M=2, S=4, z_dim=8, width_g=2, width_d=2, batch_size=64, steps=4)


def draw(config):
    images = torch.randint(0, 256, (6, config.height, config.width, 3), dtype=torch.uint8)
    return core.draw_batch(config, images, torch.arange(6), torch.Generator().manual_seed(0), CPU)


def latents(gan):
    return core.sample_latents(gan.config.batch_size, gan.config.z_dim, torch.Generator().manual_seed(0))


def test_margins_are_at_open_borders():
    config, one_row = replace(FOUR, topology="cylinder"), replace(FOUR, N=4)  # of positions, all with c' = 0
    assert [extrapolate.choose_margin(c, 2) for c in (FOUR, config, one_row)] == [(2, 2), (2, 0), (0, 2)]
    with pytest.raises(core.UserError, match="^--margin 2 needs two .*; there are 1 x 4 on a cylinder$"):
        extrapolate.choose_margin(replace(config, N=4), 2)


@pytest.mark.parametrize("topology, margin", [("plane", (1, 1)), ("cylinder", (1, 0))])
def test_generated_patches_reach_into_the_margin(topology, margin):
    gan, seen = COCOGAN(replace(FOUR, topology=topology), CPU), []
    for net in (gan.G, gan.D):
        net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[1]))
    extrapolate.margin_step(gan, gan.opt_G, margin, latents(gan))
    for c, step in zip(seen, (2 / 3, 1)):  # c'' of G and c' of D; appendix E: 1.66 and 2
        for axis in c.T[: sum(margin)].round(decimals=4):
            assert axis.unique() == pytest.approx(np.arange(-1 - step, 1.01 + step, step), abs=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_without_a_margin_it_is_the_step_of_training_with_the_statistics_of_sampling(guided, monkeypatch):
    ours, theirs = (COCOGAN(replace(FOUR, guided=guided, precision="fp32"), CPU) for _ in "ab")
    sample, normalize, drawn = core.sample_positions, core.spectral_norm, []
    monkeypatch.setattr(core, "sample_positions", lambda *a: drawn.append(sample(*a)) or drawn[0])
    monkeypatch.setattr(core, "spectral_norm", lambda net, iterate: normalize(net, iterate=False))
    # Without updates D stays as it is, and G keeps the gradients of its own step.
    monkeypatch.setattr(core, "update", lambda optimizer, loss: optimizer is theirs.opt_G and loss.backward())
    monkeypatch.setattr(extrapolate, "update", lambda optimizer, loss: loss.backward())
    batch, before = draw(FOUR), {name: t.clone() for name, t in ours.G.named_buffers()}
    extrapolate.margin_step(ours, ours.opt_G, (0, 0), batch[3])
    assert all(t.equal(before[name]) for name, t in ours.G.named_buffers())
    theirs.G.eval()
    core.train_step(theirs, *batch, torch.tensor(0.0))
    for (name, p), q in zip(theirs.G.named_parameters(), ours.G.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@pytest.mark.parametrize("row", [0, -1])
def test_coordinates_outside_have_no_spatial_loss(row, monkeypatch):
    positions = torch.full((64,), row * FOUR.S), torch.arange(64) % 3 * FOUR.S
    monkeypatch.setattr(core, "sample_positions", lambda *a: positions)
    gradients = []
    for alpha_s in (0.0, 50.0):
        gan = COCOGAN(replace(FOUR, alpha_s=alpha_s), CPU)
        extrapolate.margin_step(gan, torch.optim.SGD(gan.G.parameters(), lr=0), (1, 1), latents(gan))
        gradients.append(gan.G.linear.weight.grad)
    assert gradients[0].any() and torch.equal(*gradients) == (row < 0)


def test_seams_known_answer():
    line = np.cumsum([0, 1, 1, 1, 5, 1, 1, 1, 3, 1, 1, 1, 3, 1, 1, 1, 5, 1, 1, 1])
    images = np.broadcast_to(line[None, :, None, None], (2, 20, 8, 3)).astype(np.uint8)
    assert extrapolate.seams(images, 4, (1, 0)) == (5, 3)
    assert extrapolate.seams(images.swapaxes(1, 2), 4, (0, 1)) == (5, 3)
    assert np.isnan(extrapolate.seams(0 * images, 4, (1, 0))).all()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that post-trains runs/plain from its step 4, and returns the exit status and the log."""
    monkeypatch.chdir(tmp_path)
    stored = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)
    monkeypatch.setattr(core, "load_stored", lambda *a: stored)
    gan = COCOGAN(replace(FOUR, width=24, M=3, batch_size=4), CPU)
    gan.step = 4
    SOURCE.parent.mkdir(parents=True)
    core.save_checkpoint(gan, SOURCE, core.fingerprint_of(stored))

    def run(line):
        status, log = extrapolate.main([*line.split(), "--device", "cpu"]), MADE / "log.jsonl"
        return status, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return run


def test_a_run_from_a_checkpoint_to_pictures_and_checkpoints(run):
    status, log = run("runs/plain --steps 3")
    names = "best.pt checkpoint-000000007.pt config.json log.jsonl sample-000000004.png sample-000000007.png"
    assert status == 0 and sorted(path.name for path in MADE.glob("[!.]*")) == names.split()
    assert len(log) == 2 and log[1].keys() == {
        "step",
        "margin_seam",
        "inner_seam",
        "inside_swd",
        *COCOGAN.LOSSES[:-1],
    }
    G = core.load(MADE)
    assert G.config.steps == json.loads((MADE / "config.json").read_text())["steps"] == 7
    picture = np.array(Image.open(MADE / "sample-000000007.png"))[::5, ::5][:24, :32]  # enlarged
    image = core.to_uint8(core.full_image(G, core.latents(range(24), 8), range(-1, 5), range(-1, 7)))[0]
    image[[3, 20], 3:29] = image[3:21, [3, 28]] = 255, 0, 0  # around the 16 x 24 pixels of training
    assert np.array_equal(picture, image)


def test_the_second_adam_trains_two_blocks_of_g(run, monkeypatch):
    monkeypatch.setattr(core, "train_step", lambda *a: torch.zeros(5))
    assert run("runs/plain --steps 1")[0] == 0
    before, after = (
        core.read_checkpoint(path)[1]["tensors"] for path in (SOURCE, core.checkpoints(MADE)[-1])
    )
    names = [name for name, _ in COCOGAN(FOUR, CPU).named_parameters()]
    changed = [name for name in names if not torch.equal(before[name], after[name])]
    assert changed == [name for name in names if name.startswith(("G.blocks.0.", "G.blocks.1."))]


@pytest.mark.parametrize(
    "found, swd, last, best",
    [
        ((3, 2, 2.5, 2.4), (9, 9, 9, 9), 10, 6),  # the faintest is kept
        ((3, 2, 0.9, 2), (9, 9, 9, 9), 8, 8),  # and ends it when it is as faint as the inner ones
        ((3, 2, 1.5, 1.2), (9, 9.8, 10, 10), 10, 6),  # unless the inside is worse
        ((3, 4, 4, 4), (9, 9, 9, 9), 10, 4),  # at the start
    ],
)
def test_the_faintest_margin_around_a_good_inside_is_kept(found, swd, last, best, run, monkeypatch):
    monkeypatch.setattr(extrapolate, "seams", lambda *a, found=iter(found): (next(found), 1.0))
    monkeypatch.setattr(extrapolate, "sliced_wasserstein", lambda *a, swd=iter(swd): {16: next(swd)})
    monkeypatch.setattr(extrapolate, "EVERY", 2)
    assert run("runs/plain --steps 6")[0] == 0
    assert core.checkpoints(MADE) == [MADE / f"checkpoint-{last:09d}.pt"]
    assert core.read_checkpoint(MADE / "best.pt")[1]["step"] == best


def test_mistakes_are_one_line(run, capsys):
    for line, message in (
        ("runs/plain --run runs", "--run runs exists; name a new folder"),
        (str(core.ASSETS / "toy_faces.pt"), f"{core.ASSETS / 'toy_faces.pt'} has the moving average only"),
    ):
        assert run(line) == (2, [])
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {message}")
