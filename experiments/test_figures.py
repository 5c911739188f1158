"""Test experiments/figures.py and experiments/extrapolate.py."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
from coco_gan import COCOGAN, Config, full_image, latents, to_uint8
from experiments import extrapolate, figures

CPU = torch.device("cpu")
UNEVEN = Config(height=16, width=24, N=2, M=3, S=4, z_dim=8, width_g=2, width_d=2, batch_size=4, steps=4)
CYLINDER = dataclasses.replace(UNEVEN, topology="cylinder")


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def flags(config):
    given = {name: value for name, value in vars(config).items() if not isinstance(value, bool)}
    return [word for name, value in given.items() for word in (coco_gan.flag(name), str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A guided run, in the folder above its name, with the cache beside it."""
    folder = tmp_path_factory.mktemp("figures")
    place = ["--run", str(folder / "run"), "--cache", str(folder / "cache"), "--device", "cpu", "--guided"]
    assert coco_gan.main(["train", *flags(UNEVEN), *place]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    (tmp_path / "run").symlink_to(trained / "run")
    (tmp_path / "cache").symlink_to(trained / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(*words):
    assert figures.main([*words, "--checkpoint", "run", "--out", "a.png", "--device", "cpu"]) == 0
    return picture("a.png")


def images(*seeds):
    return to_uint8(full_image(coco_gan.load("run"), latents(seeds, 8)))


def test_slerp_turns_and_grows_evenly_and_meets_its_ends():
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 3, 0])
    path = figures.slerp(a, b, torch.linspace(0, 1, 5))
    angles = torch.atan2(path[:, 1], path[:, 0]) * 2 / math.pi
    torch.testing.assert_close(angles, torch.linspace(0, 1, 5))
    torch.testing.assert_close(path.norm(dim=1), torch.linspace(1, 3, 5))
    a, b = latents([1, 2], 8)
    assert torch.equal(figures.slerp(a, b, torch.tensor([0.0, 1.0])), torch.stack([a, b]))
    assert figures.slerp(a, -a, torch.tensor([0.5])).abs().max() < 1e-6  # no arc: a line


def test_positions_and_weights():
    assert figures.positions(4, 7, closed=False).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert figures.positions(4, 8, closed=True).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert figures.blend_weights(8, closed=False).tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert figures.blend_weights(8, closed=True).tolist() == [0.5, 0.25, 0, 0.25, 0.5, 0.75, 1, 0.75, 0.5]


def test_interpolation_leads_from_image_to_image(here):
    sheet = draw("interpolate", "--seed", "1", "2", "3", "--steps", "3")
    one, two, three = images(1, 2, 3).astype(int)
    assert sheet.shape == (3 * 16 + 2 * 2, 2 * 24 + 2, 3)  # wide images: a strip per column
    for top, left, image in ((0, 0, one), (36, 0, two), (0, 26, two), (36, 26, three)):
        assert np.abs(sheet[top : top + 16, left : left + 24] - image).max() <= 1
    patch = draw("interpolate", "--seed", "1", "2", "--steps", "2", "--at", "2", "5")
    assert patch.shape == (4, 10, 3) and np.abs(patch[:, :4] - one[8:12, 20:24]).max() <= 1
    words = ["interpolate", "--gif", "loop.webp", "--checkpoint", "run", "--steps", "4"]
    assert figures.main([*words, "--device", "cpu"]) == 0
    with Image.open("loop.webp") as loop:
        assert loop.n_frames == 6  # three from each of two latents, for the fourth is the next one's first


def test_coordinates_mark_the_trained_positions(here):
    block = draw("coordinates", "--steps", "7", "--seed", "1", "--at", "1", "2")
    image, first, step = images(1)[0].astype(int), 12, 6
    for k, row in ((0, 0), (2, 1), (4, 2), (6, 3)):  # 4 rows in 7 steps: every second is a trained one
        patch = block[first + k * step :, :4][:4]
        assert np.abs(patch - image[4 * row : 4 * row + 4, 8:12]).max() <= 1
        assert (block[first + k * step, 7] == 0).all() and (
            block[first + (k or 1) * step - 6 * (not k), 7] == 0
        ).all()
    assert (block[first + step, 7] == 255).all()


def test_mix_fades_from_one_latent_to_the_other(here):
    sheet = draw("mix", "--seed", "1", "2")
    a, b = images(1, 2).astype(int)
    rows = [sheet[k * 18 : k * 18 + 16].astype(int) for k in range(4)]
    assert np.abs(rows[0] - a).max() <= 1 and np.abs(rows[3] - b).max() <= 1
    hard = np.concatenate([a[:, :12], b[:, 12:]], axis=1)
    assert np.abs(rows[1] - hard).max() <= 1
    assert np.abs(rows[2][:, :8] - a[:, :8]).max() <= 1 and np.abs(rows[2][:, 16:] - b[:, 16:]).max() <= 1


def test_patches_are_cut_from_their_images(here):
    picture_, some = draw("patches", "--count", "3"), images(0, 1, 2)
    for b, left in enumerate((0, 32, 64)):
        image = picture_[:16, left : left + 24]
        assert np.abs(image.astype(int) - some[b]).max() <= 1
        macro = picture_[24:32, left : left + 12]
        i, j = [(0, 0), (1, 0), (2, 0)][b]  # 3 x 4 positions, every fourth of them
        assert np.array_equal(macro, image[4 * i : 4 * i + 8, 4 * j : 4 * j + 12])
        assert np.array_equal(picture_[40:44, left : left + 4], macro[:4, :4])


@pytest.mark.parametrize("config", [UNEVEN, CYLINDER])
def test_positions_of_inverts_the_coordinates(config):
    at = torch.tensor([[0.0, 0.0], [1.5, 2.25], [2.0, 3.0]])
    c_macro = coco_gan.macro_coordinates(config, *at.T)
    torch.testing.assert_close(figures.positions_of(c_macro, config), at)


def test_refining_finds_a_closer_patch(here):
    G = coco_gan.load("run")
    z, at = latents([3, 4], 8), torch.tensor([[1.0, 2.0]])
    x_macro = figures.macro_patches(G, z[:1], at).detach()
    image = full_image(G, z[:1])
    torch.testing.assert_close(x_macro, image[:, :, 4:12, 8:20])  # s' at (1, 2)
    _, first, last = figures.refine(G, z[1:], x_macro, at, 50)
    assert last < 0.6 * first


def test_guided_draws_photographs_of_a_folder(here, capsys):
    rng = np.random.default_rng(0)
    os.mkdir("photos")
    for name, size in (("a.png", (40, 30)), ("b.png", (8, 12)), ("c.png", (4, 4)), ("d.png", (40, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(f"photos/{name}")
    sheet = draw("guided", "photos", "--count", "3", "--at", "4", "8", "--refine", "2")
    out, err = capsys.readouterr()
    assert "a.png: predicted at" in out and "d.png" not in out and "skipped 1 of 3 photographs" in err
    assert "smaller than a macro patch, 12 x 8" in err
    row = sheet[:16]
    red = (row[:, :24] == figures.RED).all(-1)
    assert red[3, 7:21].any() and red[12, 7:21].any()  # around rows 4 to 11 and columns 8 to 19
    photo = coco_gan.load("run").config
    _, x_macro = figures.read_photo(Path("photos/a.png").read_bytes(), (4, 8), photo)
    assert np.array_equal(row[4:12, 31:43], x_macro)


@pytest.mark.parametrize(
    "words, message",
    [
        ("interpolate --seed 1", "--seed 1 is one seed; interpolate takes two or more"),
        ("interpolate --steps 1", "--steps 1 is too few; give 2 or more"),
        ("interpolate --at 4 0", "--at 4 0 is outside of the image; give 0 to 3 and 0 to 5"),
        ("guided nowhere.jpg", "has no photograph that can be used"),
        ("patches --out a.txt", "a.txt is not the name of a picture"),
    ],
)
def test_mistakes_are_one_line(words, message, here, capsys):
    assert figures.main([*words.split(), "--checkpoint", "run", "--device", "cpu"]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


# ---- Post-training -----------------------------------------------------------------------------------------


def margin_step(config):
    gan = COCOGAN(config, CPU)
    adam = gan.opt_G.defaults
    opt_G, opt_D = (torch.optim.Adam(p, **adam) for p in (gan.G.blocks[:2].parameters(), gan.D.parameters()))
    images = torch.randint(256, (6, config.height, config.width, 3), dtype=torch.uint8)
    batch = coco_gan.draw_batch(config, images, torch.arange(6), gan.rng, CPU)
    margin = extrapolate.choose_margin(config, 1)
    return gan, lambda: extrapolate.margin_step(gan, opt_G, opt_D, margin, *batch)


@pytest.mark.parametrize("config", [UNEVEN, dataclasses.replace(CYLINDER, guided=True)])
def test_post_training_changes_d_and_the_first_two_blocks_of_g_alone(config):
    gan, step = margin_step(config)
    before = {name: p.clone() for name, p in gan.named_parameters()}
    step()
    changed = {name for name, p in gan.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if not name.startswith("D.")} == {
        name for name in before if name.startswith(("G.blocks.0.", "G.blocks.1.")) and name in changed
    }
    assert any(name.startswith("G.blocks.1.") for name in changed) and "D.projection.weight" in changed


def test_patches_reach_beyond_open_borders_and_have_no_spatial_loss_there(monkeypatch):
    assert extrapolate.choose_margin(UNEVEN, 2) == (2, 2) and extrapolate.choose_margin(CYLINDER, 2) == (2, 0)
    gan, step = margin_step(dataclasses.replace(UNEVEN, batch_size=64))
    seen = []
    measure = extrapolate.spatial_consistency
    monkeypatch.setattr(extrapolate, "spatial_consistency", lambda c, p: seen.append((c, p)) or measure(c, p))
    step()
    (c_real, _), (c_generated, prediction) = seen
    assert c_real.abs().max() <= 1
    outside = (c_generated == 0).all(dim=1) & (prediction == 0).all(dim=1)
    assert 0.3 < outside.float().mean() < 0.8  # of 5 x 6 positions 3 x 4 are inside
    assert c_generated[~outside].abs().max() <= 1 + 1e-4


def test_seams_tell_the_margin_from_the_inside():
    images = np.random.default_rng(0).integers(0, 20, (4, 24, 32, 3)).astype(np.uint8)
    images[:, 4:20, 4:28] += 60  # steps only at the borders of the margin, of one patch of 4
    outer, inner = extrapolate.seams(images, 4, (1, 1))
    assert outer > 3 and inner == pytest.approx(1, abs=0.2)
    assert math.isnan(extrapolate.seams(images, 4, (0, 0))[0])


def test_a_post_trained_run(here, capsys):
    assert extrapolate.main(["run", "--steps", "2", "--run", "post", "--device", "cpu"]) == 0
    names = {path.name for path in Path("post").iterdir()}
    assert {"best.pt", "config.json", "log.jsonl", "checkpoint-000000006.pt"} <= names
    entry = json.loads(Path("post/log.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == 6 and {"margin_seam", "inner_seam", "L_W"} <= entry.keys()
    sheet = picture("post/sample-000000006.png")
    red = (sheet[:24, :32] == figures.RED).all(-1)
    assert red[3, 3:29].all() and red[20, 3:29].all() and red[3:21, 3].all() and not red[5:19, 5:27].any()
    words = ["--checkpoint", "post/best.pt", "--extrapolate", "1", "--count", "1", "--out", "b.png"]
    assert coco_gan.main(["sample", *words, "--device", "cpu"]) == 0 and picture("b.png").shape == (24, 32, 3)
    assert extrapolate.main(["run", "--run", "post", "--device", "cpu"]) == 2
    assert "--run post exists; name a new folder" in capsys.readouterr().err
