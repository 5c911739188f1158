"""Test experiments/view.py on panoramas coloured by direction: python -m pytest experiments/test_view.py

The colour of each pixel is the direction in which it lies, so that a view must show each ray's own direction.
"""

import errno
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
from coco_gan import Config, Generator, Scene, latents, new_state, save_checkpoint
from experiments import view

SIZES = dict(height=48, width=144, S=16, z_dim=4, width_g=2, width_d=2)  # 3 x 9 micro patches
NOISE = np.random.default_rng(0).integers(0, 256, (48, 144, 3), dtype=np.uint8)
SMALL = ("--size", "24x18", "--device", "cpu")
# Half a unit of 255 in the panorama and in the view, in [-1, 1], and under 0.001 of interpolation; a shift by
# half a pixel of the panorama is an error of 0.02.
ERROR = 0.009
VIEWS = [  # yaw, pitch, fov, height, width, latitude, projection
    (0, 0, 75, 24, 32, 60, "equirectangular"),
    (90, 0, 75, 24, 32, 60, "equirectangular"),
    (180, 25, 110, 20, 31, 60, "equirectangular"),  # the panorama's left and right border
    (-135, -50, 60, 31, 20, 60, "equirectangular"),
    (33, 90, 100, 25, 25, 90, "equirectangular"),  # the zenith
    (270, -90, 150, 12, 40, 40, "equirectangular"),
    (360, 10, 10, 30, 40, 30, "equirectangular"),
    (0, 0, 75, 24, 32, 51, "mercator"),
    (200, 30, 90, 20, 31, 70, "mercator"),
    (-90, -40, 120, 31, 20, 51, "mercator"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs on a cylinder, on a torus and on a plane, the newest."""
    here = tmp_path_factory.mktemp("view")
    for topology in ("cylinder", "torus", "plane"):
        run = here / "runs" / topology
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(dict(topology=topology)))
        state = new_state(Config(**SIZES, topology=topology), torch.device("cpu"))
        state.G_average.conv.bias += 0.5  # as if trained: the average is not the weights
        save_checkpoint(state, run, "images", keep=1)
    return here


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Run the command in `here`; returns the exit status, and the lines of its output and of its errors."""
    monkeypatch.chdir(here)

    def run(*arguments):
        status = view.main([*SMALL, *map(str, arguments)])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("from runs/")]
        return status, out.splitlines(), errors

    return run


def rays(yaw, pitch, fov, height, width):
    """The direction of each pixel by two rotations, in float64: (height, width, 3), (x, y, z) of length 1."""
    yaw, pitch, half = np.radians(yaw), np.radians(pitch), np.tan(np.radians(fov) / 2)
    x = half * ((np.arange(width) + 0.5) / width * 2 - 1)
    y = half * (1 - (np.arange(height) + 0.5) / height * 2) * height / width
    x, y = np.meshgrid(x, y)
    d = np.stack([x, y, np.ones_like(x)], -1) / np.sqrt(x**2 + y**2 + 1)[..., None]
    up = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    right = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    return d @ (right @ up).T


def centres(latitude, projection):
    """Latitudes of the panorama's rows and longitudes of its columns, in radians: (48,), (144,)."""
    top, down = math.radians(latitude), 1 - (np.arange(48) + 0.5) / 24
    if projection == "mercator":
        height = math.log(math.tan(math.pi / 4 + top / 2))
        rows = 2 * np.arctan(np.exp(down * height)) - math.pi / 2
    else:
        rows = down * top
    return rows, ((np.arange(144) + 0.5) / 144 - 0.5) * 2 * math.pi


def colours(longitude, latitude):
    """(direction + 1) / 2 as uint8: (…), (…) -> (…, 3)."""
    horizontal = np.cos(latitude)
    x, z = horizontal * np.sin(longitude), horizontal * np.cos(longitude)
    direction = np.stack(np.broadcast_arrays(x, np.sin(latitude), z), -1)
    return np.rint((direction + 1) * 127.5).astype(np.uint8)


def scene_of(image):
    """A scene that shows an image (48, 144, 3) uint8: all its micro patches are there."""
    scene = Scene(Generator(Config(**SIZES, topology="cylinder")), latents([0], 4))
    patches = torch.from_numpy(image.copy()).view(3, 16, 9, 16, 3).transpose(1, 2)
    scene.patches, scene.number = patches.reshape(27, 16, 16, 3), torch.arange(27).view(3, 9)
    return scene


def coloured_scene(latitude=60, projection="equirectangular"):
    v, u = centres(latitude, projection)
    return scene_of(colours(u, v[:, None]))


def look(scene, yaw, pitch, fov, height, width, latitude=60, projection="equirectangular"):
    return view.look(scene, yaw, pitch, fov, height, width, latitude, projection == "mercator").numpy()


def touched(yaw, pitch, fov, height, width, latitude=60, projection="equirectangular"):
    """Which micro patches hold one of the four pixels about a ray: a set of (row, column)."""
    d, (v, u) = rays(yaw, pitch, fov, height, width), centres(latitude, projection)
    latitudes, longitudes = np.arcsin(d[..., 1]), np.arctan2(d[..., 0], d[..., 2])
    inside = np.abs(latitudes) <= math.radians(latitude)
    below = np.searchsorted(-v, -latitudes[inside])  # the first row that is lower
    behind = np.searchsorted(u, longitudes[inside])  # the first column that is further right
    rows, columns = (
        (np.clip(below - k, 0, 47) // 16 for k in (0, 1)),
        [(behind - k) % 144 // 16 for k in (0, 1)],
    )
    return {pair for i in rows for j in columns for pair in zip(i.tolist(), j.tolist())}


def untrained_scene(batch_size=None):
    torch.manual_seed(0)
    G = Generator(Config(**SIZES, topology="cylinder")).eval().requires_grad_(False)
    return Scene(G, latents([0], 4), batch_size)


@pytest.mark.parametrize("looking", VIEWS)
def test_each_pixel_shows_its_own_direction_or_black(looking):
    *_, latitude, projection = looking
    picture, d = look(coloured_scene(latitude, projection), *looking), rays(*looking[:5])
    v, u = np.arcsin(d[..., 1]), np.arctan2(d[..., 0], d[..., 2])
    inside = np.abs(v) <= math.radians(latitude)
    assert np.array_equal(picture.any(axis=-1), inside)  # no direction is black
    rows, _ = centres(latitude, projection)
    v = np.clip(v, rows[-1], rows[0])  # the half pixels at the borders are the rows there
    expected = np.stack([np.cos(v) * np.sin(u), np.sin(v), np.cos(v) * np.cos(u)], -1)
    assert np.abs(picture / 127.5 - 1 - expected)[inside].max() < ERROR


def test_right_left_up_and_down():
    """As it is seen: x is red and grows to the right, y is green and grows upwards, z is blue and ahead."""
    ahead, right, up = (
        look(coloured_scene(), *way, 75, 24, 32).astype(int) for way in ((0, 0), (90, 0), (0, 50))
    )
    assert np.all(np.diff(ahead[:, :, 0], axis=1) > 0) and np.all(np.diff(ahead[:, :, 1], axis=0) < 0)
    assert right[12, 16, 0] > 250 and abs(right[12, 16, 2] - 128) < 9  # it was at the right and is ahead now
    assert up[12, 16, 1] > 215 and not up[0, 16].any() and up[23, 16].any()  # the panorama ends above


def test_a_full_turn_ends_where_it_began():
    scene = scene_of(NOISE)
    for yaw, same in ((0, 360), (0, -360), (-90, 270)):
        assert np.array_equal(look(scene, yaw, 10, 75, 48, 64), look(scene, same, 10, 75, 48, 64))


def test_left_and_right_border_are_one():
    views = [look(scene_of(np.roll(NOISE, x, axis=1)), yaw, 0, 75, 48, 64) for x, yaw in ((0, 180), (72, 0))]
    assert np.abs(np.subtract(*views, dtype=int)).max() <= 1  # float32's rounding


@pytest.mark.parametrize("looking", VIEWS)
def test_only_touched_patches_are_made(looking):
    scene = untrained_scene()
    look(scene, *looking)
    expected = touched(*looking)
    assert {tuple(place) for place in (scene.number >= 0).nonzero().tolist()} == expected
    assert scene.made == len(expected) <= 27


def test_nothing_is_made_for_a_view_that_is_all_black():
    scene = untrained_scene()
    assert not look(scene, 0, 90, 20, 18, 24).any() and scene.made == 0


def test_a_turn_of_the_head_makes_only_what_is_new():
    scene, seen, looking = untrained_scene(), set(), (10, 40, 18, 24)
    frames = view.turn(scene, lambda scene, yaw: torch.from_numpy(look(scene, yaw, *looking)), -30, 36)
    counts = []
    for k, (picture, new, seconds) in enumerate(frames):
        expected = touched(-30 + 10 * k, *looking)
        assert new == len(expected - seen) and 0 < seconds < 60
        fresh = look(untrained_scene(), -30 + 10 * k, *looking)
        assert np.abs(np.subtract(picture, fresh, dtype=int)).max() <= 1  # float32's, by the size of a batch
        seen |= expected
        counts.append(new)
    assert (k, sum(counts)) == (35, scene.made) and 0 in counts[1:] and max(counts[1:]) > 0


@pytest.mark.parametrize("ending", ["gif", "WEBP"])
def test_pan_loops_without_a_jump(run, tmp_path, monkeypatch, ending):
    scene = coloured_scene()
    monkeypatch.setattr(view, "Scene", lambda G, z: scene)
    path = tmp_path / f"out.{ending}"
    status, out, _ = run("--pan", path, "--yaw", 40, "--pitch", 5, "--fov", 60)
    assert status == 0 and out[-1] == str(path)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (36, 0)
        frames = []
        for k in range(36):
            image.seek(k)
            image.load()
            assert image.info["duration"] == 100
            frames.append(np.array(image.convert("RGB"), dtype=int))
    expected = [look(scene, 40 + 10 * k, 5, 60, 18, 24).astype(int) for k in range(36)]
    errors = [[np.abs(frame - picture).mean() for picture in expected] for frame in frames]
    assert np.argmin(errors, axis=1).tolist() == list(range(36)) and np.diag(errors).max() < 4
    steps = [np.abs(expected[k] - expected[k - 1]).mean() for k in range(36)]  # the first is from the last
    assert max(steps) < 1.1 * min(steps)


def test_pan_counts_patches_and_takes_frames(run, tmp_path):
    path = tmp_path / "turn.gif"
    status, out, err = run("--pan", path, "--frames", 12, "--fov", 70, "--yaw", 20)
    seen, counts = set(), []
    for k in range(12):
        now = touched(20 + 30 * k, 0, 70, 18, 24)
        counts.append(len(now - seen))
        seen |= now
    first, most = counts[0], max(counts[1:])
    assert first > most
    first = f"{first} micro patches generated for the first frame, at most {most} for another"
    assert out == [first, f"{len(seen)} of 27 micro patches generated", str(path)] and (status, err) == (
        0,
        [],
    )
    with Image.open(path) as image:
        assert image.n_frames == 12


def test_view_of_the_newest_panorama_beside_its_checkpoint(run, here):
    for name in ("view.png", "view-2.png"):
        path = f"runs/cylinder/{name}"
        count = len(touched(0, 0, 75, 18, 24))
        assert run() == (0, [f"{count} of 27 micro patches generated", path], [])
    first, second = (np.array(Image.open(here / f"runs/cylinder/{name}.png")) for name in ("view", "view-2"))
    assert first.shape == (18, 24, 3) and np.array_equal(first, second)


def test_flags_reach_the_picture(run, tmp_path):
    def picture(*arguments):
        assert run("--out", tmp_path / "a.png", "--force", *arguments)[0] == 0
        return np.array(Image.open(tmp_path / "a.png"))

    first, G = picture(), coco_gan.load("runs/cylinder")
    scene = Scene(G, latents([5], 4))
    assert np.array_equal(
        look(scene, 20, -30, 50, 18, 24), picture(*"--seed 5 --yaw 20 --pitch -30 --fov 50".split())
    )
    assert np.array_equal(
        look(scene, 0, 0, 99, 8, 9, 20), picture(*"--seed 5 --fov 99 --latitude 20 --size 9x8".split())
    )
    square = math.degrees(math.asin(math.tanh(math.pi / 3)))  # Mercator's height is π/3 at 48 of 144 pixels
    expected = look(Scene(G, latents([0], 4)), 0, 40, 75, 18, 24, square, "mercator")
    assert np.array_equal(expected, picture("--projection", "mercator", "--pitch", 40))
    assert not np.array_equal(expected, picture("--pitch", 40))
    assert not np.array_equal(first, picture("--raw"))


def test_without_a_run_it_is_the_shipped_panorama_and_runs_keeps_the_view(run, tmp_path, here, monkeypatch):
    assets = tmp_path / "assets"
    assets.mkdir()
    shutil.copy(next((here / "runs/cylinder").glob("*.pt")), assets / "toy_landscapes.pt")
    monkeypatch.setattr(coco_gan, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    status, out, (told,) = run()
    assert told.endswith("this is toy_landscapes.pt, which comes with the program")
    assert (status, out[-1]) == (0, "runs/view.png") and (tmp_path / "runs/view.png").exists()


def test_benchmark_prints_medians_and_writes_nothing(run, here):
    before = sorted(here.rglob("*"))
    status, (title, *lines), _ = run("--benchmark", "--frames", 12, "--fov", 40)
    assert status == 0 and title.startswith("24x18, --fov 40, 12 views a turn, runs/cylinder/checkpoint-")
    pattern = r"(.{12}) +(\d+) times, +(\d+) micro patches at most: median +([\d.]+) ms, ([\d.]+) to ([\d.]+)"
    rows = [re.fullmatch(pattern, line).groups() for line in lines]
    assert [row[0].strip() for row in rows] == ["first view", "new patches", "no new patch"]
    assert [int(row[1]) for row in rows][0] == 3 and sum(int(row[1]) for row in rows) == 3 * 12
    assert all(0 < float(low) <= float(median) <= float(high) for *_, median, low, high in rows)
    assert int(rows[0][2]) == len(touched(0, 0, 40, 18, 24)) and rows[2][2] == "0"
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--checkpoint none", "--checkpoint none does not exist; give a checkpoint file or a run folder"),
        (
            "--checkpoint runs/plane",
            "--checkpoint runs/plane/checkpoint-000000000.pt is on a plane, and a view",
        ),
        (
            "--checkpoint runs/torus",
            "--checkpoint runs/torus/checkpoint-000000000.pt is on a torus, and a view",
        ),
        ("--yaw 361", "--yaw 361.0 is out of range; give -360 to 360"),
        ("--yaw nan", "--yaw nan is out of range; give -360 to 360"),
        ("--yaw east", "argument --yaw: invalid float value: 'east'"),
        ("--pitch -90.5", "--pitch -90.5 is out of range; give -90 to 90"),
        ("--pitch nan", "--pitch nan is out of range"),
        ("--fov 9", "--fov 9.0 is out of range; give 10 to 150"),
        ("--fov inf", "--fov inf is out of range"),
        ("--latitude 0", "--latitude 0.0 is out of range; give 1 to 90"),
        ("--latitude 91", "--latitude 91.0 is out of range; give 1 to 90"),
        (
            "--latitude 90 --projection mercator",
            "--latitude 90.0 is out of range; give 1 to 89 with --projection mercator",
        ),
        ("--projection cubic", "argument --projection: invalid choice: 'cubic'"),
        ("--seed -1", "--seed -1 is out of range; give 0 to"),
        ("--seed 0.5", "argument --seed: invalid int value: '0.5'"),
        (
            "--size 640",
            "--size 640 is no size of a picture; give WIDTHxHEIGHT, each 1 to 4096 pixels, like 640x480",
        ),
        ("--size 640X480", "--size 640X480 is no size of a picture"),
        ("--size 0x480", "--size 0x480 is no size of a picture"),
        ("--size 640x4097", "--size 640x4097 is no size of a picture"),
        ("--frames 1 --pan a.gif", "--frames 1 is out of range; give 2 to 360"),
        (
            "--pan a.gif --size 4096x4096",
            "--size 4096x4096 is too large for 36 frames; give at most 16 --frames, or",
        ),
        ("--pan a.png", "--pan a.png has no known ending; give .gif, .webp"),
        ("--out a.txt", "--out a.txt has no known ending; give .png, .jpg"),
        ("--out runs", "--out runs has no known ending; give .png"),
        ("--out a.png --pan a.gif", "argument --pan: not allowed with argument --out"),
        ("--benchmark --out a.png", "argument --out: not allowed with argument --benchmark"),
        ("--out taken.png", "--out taken.png exists already; name another, or add --force to replace it"),
        ("--pan taken.gif", "--pan taken.gif exists already; name another, or add --force to replace it"),
        ("--out taken.png/a.png", "--out taken.png/a.png cannot be written: "),
        (
            f"--out {'a' * 300}.png",
            f"--out {'a' * 300}.png cannot be written: File name too long; name another",
        ),
        (
            "--pan folder.gif --force",
            "--pan folder.gif cannot be written: Is a directory; name another place",
        ),
        ("--device abacus", "--device abacus is unknown; give auto, cpu"),
        ("--colour", "--colour is unknown"),
    ],
)
def test_mistakes_end_in_one_line(run, here, arguments, message):
    for name in ("taken.png", "taken.gif"):
        (here / name).touch()
    (here / "folder.gif").mkdir(exist_ok=True)
    before = sorted(here.rglob("*"))
    status, out, (error,) = run(*arguments.split())
    assert (status, out) == (2, []) and error.startswith(f"error: {message}")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("arguments", ["--out full.png", "--pan full.gif"])
def test_full_disk_is_one_line_and_leaves_nothing(run, here, monkeypatch, arguments):
    def save(image, file, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    message = f"error: {arguments} cannot be written: No space left on device; name another place"
    assert run(*arguments.split()) == (2, [], [message])
    assert not list(here.glob("*full*"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to")])
def test_full_memory_is_one_line(run, monkeypatch, error):
    def pixels(*_):
        raise error

    monkeypatch.setattr(Scene, "pixels", pixels)
    assert run("--out", "a.png") == (2, [], ["error: memory of cpu is full; try a smaller --size"])


def test_interruption_is_no_mistake(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scene, "pixels", interrupt)
    assert run("--out", "a.png") == (130, [], [])
