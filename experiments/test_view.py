"""Test experiments/view.py on a panorama coloured by direction, of which a view must show each ray's own."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from coco_gan import ASSETS, Config, Generator, full_image, latents, load, to_uint8
from experiments import view

SIZES = dict(height=48, width=144, S=16, z_dim=4, width_g=2, width_d=2)  # 3 x 9 micro patches


def scene_of(topology="cylinder"):
    torch.manual_seed(0)
    return view.Scene(Generator(Config(**SIZES, topology=topology)).eval(), latents([0], 4))


def coloured_scene(latitude, projection):
    """A panorama of directions (x right, y up, z front), all of which is made."""
    top, down = math.radians(latitude), 1 - (np.arange(48) + 0.5) / 24
    v = down * top
    if projection == "mercator":
        v = 2 * np.arctan(np.exp(down * math.log(math.tan(math.pi / 4 + top / 2)))) - math.pi / 2
    u, v = np.meshgrid(((np.arange(144) + 0.5) / 144 - 0.5) * 2 * math.pi, v)
    d = np.stack([np.cos(v) * np.sin(u), np.sin(v), np.cos(v) * np.cos(u)], -1)
    scene = scene_of()
    scene.image, scene.is_made = torch.from_numpy(d).float(), torch.ones(3, 9, dtype=torch.bool)
    return scene


@pytest.mark.parametrize(
    "yaw, pitch, fov, height, width, latitude, projection",
    [
        (0, 0, 75, 24, 32, 60, "equirectangular"),
        (90, 0, 75, 24, 32, 60, "equirectangular"),
        (180, 25, 110, 20, 31, 60, "equirectangular"),  # the panorama's left and right border
        (-135, -50, 60, 31, 20, 60, "equirectangular"),
        (33, 90, 100, 25, 25, 90, "equirectangular"),  # the zenith
        (200, 30, 90, 20, 31, 70, "mercator"),
    ],
)
def test_each_pixel_shows_its_own_direction_or_black(yaw, pitch, fov, height, width, latitude, projection):
    scene = coloured_scene(latitude, projection)
    picture = view.look(scene, yaw, pitch, fov, height, width, projection, latitude)
    yaw, pitch, z = math.radians(yaw), math.radians(pitch), width / 2 / math.tan(math.radians(fov) / 2)
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - 0.5 - np.arange(height))
    d = np.stack([x, y, np.full_like(x, z)], -1) / np.sqrt(x**2 + y**2 + z**2)[..., None]
    up = [[1, 0, 0], [0, math.cos(pitch), math.sin(pitch)], [0, -math.sin(pitch), math.cos(pitch)]]
    right = [[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]]
    d = d @ (np.array(right) @ np.array(up)).T
    inside = np.abs(np.arcsin(d[..., 1])) <= math.radians(latitude)
    assert (picture[~inside] == 0).all() and inside.mean() > 0.3
    edge = np.abs(np.arcsin(d[..., 1])) < math.radians(latitude) * (1 - 1 / 48)
    assert np.abs(picture[edge] / 127.5 - 1 - d[edge]).max() < 0.012  # half a pixel would be 0.02


@pytest.mark.parametrize("topology, good", [("plane", 2), ("cylinder", 3), ("torus", 4)])
def test_a_viewport_is_that_part_of_the_full_image(topology, good):
    scene = scene_of(topology)
    full = to_uint8(full_image(scene.G, scene.z))[0].astype(int)
    windows = (
        (0, 0, 48, 144),
        (5, 20, 30, 17),
        (5, -14, 30, 40),
        (40, 130, 20, 30),
    )  # the last two wrap around
    for top, left, height, width in windows[:good]:
        expected = np.roll(full, (-top, -left), (0, 1))[:height, :width]
        assert np.abs(scene.viewport(top, left, height, width) - expected).max() <= 1
    for window in (*windows[good:], (0, 0, 0, 5)):
        with pytest.raises(view.UserError, match="is not within the full image, which has 48 x 144 pixels"):
            scene.viewport(*window)


def test_a_scene_makes_only_what_is_new_and_a_turn_ends_where_it_began(monkeypatch):
    scene, made, patches = scene_of(), [], view.micro_patches
    monkeypatch.setattr(view, "micro_patches", lambda G, z, i, j: made.append(len(i)) or patches(G, z, i, j))
    scene.viewport(17, 20, 4, 20)  # row 1, columns 1 and 2
    scene.viewport(17, 20, 30, 20)  # row 2 as well
    scene.viewport(17, 20, 30, 20)
    assert made == [2, 2] and scene.made == 4
    first, turned = (view.look(scene, yaw, 0, 75, 20, 30, "equirectangular", 60.0) for yaw in (-170, 190))
    assert np.array_equal(first, turned) and scene.made < 27


def test_png_in_strips_is_the_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8)
    view.save_png(np.split(pixels, [20, 21]), tmp_path / "a.png", 50, 31)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ASSETS / "toy_landscapes.pt", "l.pt")
    base = ["--checkpoint", "l.pt", "--size", "24x32"]
    for words, name, size in (
        ("", "l-view.png", (32, 24)),
        ("--viewport 8,-20,16,40", "l-view.png", (40, 16)),
        ("--full --out full.png", "full.png", (96, 32)),
        ("--pan --frames 4 --out turn.webp", "turn.webp", (32, 24)),
        ("--pan --frames 4", "l-view.gif", (32, 24)),
    ):
        assert view.main([*base, *words.split()]) == 0
        with Image.open(name) as image:
            assert image.size == size and getattr(image, "n_frames", 1) == (4 if "pan" in words else 1)
    full = to_uint8(full_image(load("l.pt"), latents([0])))[0].astype(int)
    assert np.abs(np.asarray(Image.open("full.png")) - full).max() <= 1
    assert view.main([*base, "--benchmark", "--frames", "4"]) == 0
    assert "new micro patches" in capsys.readouterr().out
    for words, message in (
        ("--size 24", "--size"),
        ("--pan --out a.png", "a.png is not the name of an animation; end it in .gif or .webp"),
        ("--viewport 8,0,160,40", "--viewport 8,0,160,40 is not within the full image"),
        ("--viewport 8,0", "argument --viewport"),
        ("--full --out a.jpg", "a.jpg is not the name of a PNG"),
        ("--fov 180", "--fov 180 is out of range"),
        (f"--checkpoint {ASSETS / 'toy_faces.pt'}", "toy_faces.pt is on a plane, and a view needs a cyl"),
    ):
        assert view.main([*base, *words.split()]) == 2
        assert message in capsys.readouterr().err
