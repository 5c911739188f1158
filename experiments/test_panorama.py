"""Test experiments/panorama.py on images coloured by direction, so that a panorama must show each its own."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import panorama
from experiments.panorama import View

TOUR = "f.png r.png b.png l.png u.png d.png"


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


def draw(images, view, kind="PNG", **options):
    files = {str(i): encode(image, kind, **options) for i, image in enumerate(images)}
    return np.asarray(Image.open(io.BytesIO(panorama.draw_panorama(files, view)))).astype(int)


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
    assert panorama.main(["photos", "made", "--size", "128x384", "--projection", projection]) == 0
    assert "6 panoramas made, 0 were there already, 0 skipped, in made" in capsys.readouterr().out
    unit = cylinder(128, 384, projection, latitude)
    for name in ("mp+ab", "photos", "pos", "tour", "sphere", "stereo_l"):
        error = np.abs(np.asarray(Image.open(f"made/{name}.png")) / 255 - (unit + 1) / 2)
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


def test_large_jpegs_are_in_place():
    for side in (512, 505):  # 505 pixels are no whole number of a JPEG's blocks
        pixels = draw(cube(side), View(32, 96, "equirectangular", 60.0), "JPEG", quality=95)
        assert np.abs(pixels / 255 - (cylinder(32, 96) + 1) / 2).max() < 0.008


def test_other_images_are_skipped_and_named_and_what_is_there_is_not_made_again(here, capsys):
    for prefix, faces in (("good_", TOUR), ("lacks_", TOUR[:-6]), ("cut_", TOUR)):
        fill("photos", prefix, faces, cube(16))
    Path("photos/cut_r.png").write_bytes(encode(cube(16)[1])[:-100])
    assert panorama.main(["photos", "made", "--size", "12x36"]) == 0
    out, err = capsys.readouterr()
    assert "1 panoramas made, 0 were there already, 6 skipped" in out and "skipped 6 of 7" in err
    assert "'lacks_b.png': is 16:16, neither" in err and "'cut_f.png': 'cut_r.png': image file is t" in err
    before = Path("made/good.png").stat().st_mtime_ns
    fill("photos", "new_", TOUR, cube(16))
    assert panorama.main(["photos", "made", "--size", "12x36"]) == 0
    assert "1 panoramas made, 1 were there already" in capsys.readouterr().out
    assert Path("made/good.png").stat().st_mtime_ns == before and Path("made/new.png").exists()


def test_names_stay_in_their_folder_and_apart(here):
    names = "b\\..\\..\\up.png /tmp/top.png C:\\d.png a/b.png a+b.png A/B.png a_b.png _.png".split()
    names += ["new\nline.png", "x" * 300 + ".png"]
    Path("inner").mkdir()
    with zipfile.ZipFile("inner/p.zip", "w") as archive:
        for name in names:
            archive.writestr(name, encode(sphere(8)))
    assert panorama.main(["inner/p.zip", "inner/made", "--size", "12x36"]) == 0
    made = {path.name.lower() for path in Path("inner/made").glob("*.png")}
    assert len(made) == 10 and {"b+..+..+up.png", "a_b.png", "p.png", "new+line.png"} < made
    files = list(here.rglob("[!.]*"))
    assert len(files) == 2 + 1 + 10 + 1  # two folders, the zip, the panoramas and the record


@pytest.mark.parametrize(
    "command, message",
    [
        ("photos made --projection mercator", "DST made has panoramas of other settings"),
        ("photos photos/in", "DST photos/in is in SRC photos, or the same; name another folder"),
        ("photos other", "DST other has images from elsewhere; name a new or an empty folder"),
        ("nothing made", "SRC nothing does not exist; give a folder or a zip of images"),
        ("other made2", "SRC other has no panorama"),
        ("photos made2 --size 3", "--size: "),
        ("photos made2 --latitude 100", "--latitude 100"),
    ],
)
def test_mistakes_are_one_line(command, message, here, capsys):
    fill("photos", "", "a.png", [sphere(8)])
    fill("other", "", "b.png", cube(8))
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
