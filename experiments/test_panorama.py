"""Test experiments/panorama.py on images coloured by direction, so that a panorama must show each its own."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import panorama
from experiments.panorama import View

TOUR = "f.png r.png b.png l.png u.png d.png"
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def encode(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def in_colours(directions):
    unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.rint((unit + 1) / 2 * 255).astype(np.uint8)


def cube(side):
    """Front, right, back, left, up and down."""
    a, b = np.meshgrid((2 * np.arange(side) + 1) / side - 1, 1 - (2 * np.arange(side) + 1) / side)
    one = np.ones_like(a)
    faces = [(a, b, one), (one, b, -a), (-a, b, -one), (-one, b, a), (a, one, -b), (a, -one, b)]
    return [in_colours(np.stack(face, -1)) for face in faces]


def cylinder(rows, columns, projection="equirectangular", latitude=60.0):
    """The directions, x right, y up, z front, that a panorama shows: (rows, columns, 3)."""
    height, top = 1 - (2 * np.arange(rows) + 1) / rows, np.radians(latitude)
    v = height * top
    if projection == "mercator":
        v = 2 * np.arctan(np.exp(height * np.log(np.tan(np.pi / 4 + top / 2)))) - np.pi / 2
    u, v = np.meshgrid(((np.arange(columns) + 0.5) / columns - 0.5) * 2 * np.pi, v)
    return np.stack([np.cos(v) * np.sin(u), np.sin(v), np.cos(v) * np.cos(u)], -1)


def sphere(side):
    return in_colours(cylinder(side, 2 * side, latitude=90))


def fill(folder, prefix, names, faces):
    for name, face in zip(names.split(), faces):
        path = Path(folder, prefix + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(face))


def picture(content):
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def draw(images, view, kind="PNG", **options):
    files = {str(i): encode(image, kind, **options) for i, image in enumerate(images)}
    return picture(panorama.draw_panorama(files, view))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("projection, latitude", [("equirectangular", 60), ("mercator", 51.326)])
def test_panoramas_show_the_directions_of_every_naming(projection, latitude, here, capsys):
    faces = cube(128)
    fill("photos", "mp/ab_", " ".join(f"skybox{i}_sami.png" for i in (1, 2, 3, 4, 0, 5)), faces)
    fill("photos", "", "pz.png px.PNG NZ.png nx.bmp py.tif Ny.png", faces)
    fill("photos", "pos.", "posz.png posx.png negz.png negx.png posy.png negy.png", faces)
    fill("photos", "tour_", TOUR.upper(), faces)
    fill("photos", "", "sphere.png stereo_l.png", [sphere(256)] * 2)
    command = ["photos", "made", "--size", "128x384", "--projection", projection]
    assert panorama.main(command) == 0
    assert "6 panoramas made, 0 were there already, 0 skipped, in made" in capsys.readouterr().out
    unit = cylinder(128, 384, projection, latitude)
    for name in ("mp+ab", "photos", "pos", "tour", "sphere", "stereo_l"):
        error = np.abs(picture(Path(f"made/{name}.png").read_bytes()) / 255 - (unit + 1) / 2)
        # Half a level of 255 is lost in the source and half in the panorama. A quarter of a pixel is 0.005.
        assert error.mean() < 0.0013 and error.max() < 1 / 255, name


@pytest.mark.parametrize("files", [cube(16), [sphere(16)]], ids=["cube", "sphere"])
def test_panoramas_have_no_seams(files):
    pixels = draw(files, View(256, 768, "equirectangular", 90.0))
    assert np.abs(pixels - in_colours(cylinder(256, 768, latitude=90))).max() <= 3
    assert np.abs(np.diff(pixels, axis=0)).max() <= 3  # between pixels of the sources it is up to 8
    assert np.abs(np.diff(pixels, axis=1, append=pixels[:, :1])).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])  # a JPEG is reduced as it is read
@pytest.mark.parametrize("shape", [(6, 512, 512), (1, 512, 1024)])
def test_panoramas_average_instead_of_picking_pixels(shape, kind):
    checks = np.repeat((np.indices(shape).sum(0) % 2 * 255)[..., None], 3, -1).astype(np.uint8)
    assert np.abs(draw(checks, View(24, 72, "equirectangular", 60.0), kind) - 127.5).max() < 3
    if kind == "JPEG" and len(shape) == 6:
        pixels = draw(cube(505), View(32, 96, "equirectangular", 60.0), "JPEG", quality=95)
        assert np.abs(pixels / 255 - (cylinder(32, 96) + 1) / 2).max() < 0.008


def test_other_images_are_skipped_and_named_and_what_is_there_is_not_made_again(here, capsys):
    fill("photos", "good_", TOUR, cube(16))
    fill("photos", "lacks_", TOUR[:-6], cube(16)[:5])
    fill("photos", "", "photo.png a/b.png a+b.png", [NOISE, sphere(8), sphere(8)])
    command = ["photos", "made", "--size", "12x36"]
    assert panorama.main(command) == 0
    out, err = capsys.readouterr()
    assert "3 panoramas made, 0 were there already, 6 skipped" in out
    assert "skipped 6 of 9 panoramas:" in err and "'lacks_b.png': is 16:16" in err
    made = sorted(path.name for path in Path("made").iterdir())
    assert len(made) == 4 and "good.png" in made and "panorama.json" in made
    assert sum(name.startswith("a+b-") for name in made) == 2  # names that would be equal stay apart
    before = {path.name: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    Path("made/good.png").unlink()
    assert panorama.main(command) == 0 and "1 panoramas made, 2 were there" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["good.png"]


@pytest.mark.parametrize(
    "command, message",
    [
        ("photos made --projection mercator", "DST made has panoramas of other settings"),
        ("photos photos/in", "DST photos/in is in SRC photos, or the same; name another folder"),
        ("photos other", "DST other has images from elsewhere; name a new or an empty folder"),
        ("nothing made", "nothing does not exist"),
        ("other made2", "SRC other has no panorama"),
        ("photos made2 --size 3", "--size: "),
        ("photos made2 --latitude 100", "--latitude 100"),
    ],
)
def test_mistakes_are_one_line(command, message, here, capsys):
    fill("photos", "", "a.png", [sphere(8)])
    fill("other", "", "b.png", [NOISE])
    assert panorama.main(["photos", "made", "--size", "12x36"]) == 0
    capsys.readouterr()
    assert panorama.main(command.split()) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


def test_py360convert_agrees():
    second = pytest.importorskip("py360convert")
    ours = draw(cube(64), View(128, 256, "equirectangular", 90.0))
    # Its pixels are not seen at their centres, but from border to border: half a pixel off at most.
    assert np.abs(ours - second.c2e(cube(64), 128, 256, cube_format="list")).max() < 6
