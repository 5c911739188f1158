"""Turn cube maps and equirectangular (2:1) images into images of a cylinder, to train panoramas on.

    python -m experiments.panorama matterport.zip panoramas    # or a folder; 256 x 768 pixels, latitude ±60°
    python -m experiments.panorama photos panoramas --projection mercator --size 128x384
    python coco_gan.py train --panorama --data panoramas

A cube map is six square images with one prefix and one of the NAMINGS, like kitchen_f.jpg to kitchen_d.jpg.
Another run makes only the panoramas that are missing.

Source: section 3.4. Deviation: rows are evenly spaced in latitude by default, as in the authors' code. The
text says Mercator projection, which is --projection mercator.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from coco_gan import Parser, run_command
from data import (
    UserError,
    in_threads,
    is_image,
    list_images,
    make_folder,
    read_rgb,
    reason_of,
    report_skipped,
    write_file,
)

# Of the faces front, right, back, left, up and down, in x (right), y (up), z (front): seen from inside, the
# point a to the right and b up in [-1, 1] of a face is in the direction a · RIGHT + b · UP + OUT.
RIGHT = np.array([(1, 0, 0), (0, 0, -1), (-1, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 0)])
UP = np.array([(0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])
OUT = np.array([(0, 0, 1), (1, 0, 0), (0, 0, -1), (-1, 0, 0), (0, 1, 0), (0, -1, 0)])
NAMINGS = (  # of the faces, in the same order; the first is Matterport's
    ("skybox1_sami", "skybox2_sami", "skybox3_sami", "skybox4_sami", "skybox0_sami", "skybox5_sami"),
    ("pz", "px", "nz", "nx", "py", "ny"),
    ("posz", "posx", "negz", "negx", "posy", "negy"),
    ("f", "r", "b", "l", "u", "d"),
)


class View(NamedTuple):  # what a panorama shows
    rows: int
    columns: int  # evenly spaced in longitude, from -π to π
    projection: str  # rows are evenly spaced in latitude v, with "mercator" in ln tan(π/4 + v/2)
    latitude: float  # of the upper border in degrees; the lower one is as far below the horizon


def make_panoramas(args: argparse.Namespace) -> None:
    """Write the panoramas of a folder or zip as PNGs, except those that are in the target folder already.

    Raises: UserError if the source has no panorama, or the target has other images; OSError.
    """
    view = View(*args.size, args.projection, choose_latitude(args, *args.size))
    source, target = Path(args.source).resolve(), args.target
    if not source.exists():
        raise UserError(f"SRC {args.source} does not exist; give a folder or a zip of images")
    if target.resolve().is_relative_to(source):
        raise UserError(f"DST {target} is in SRC {args.source}, or the same; name another folder")
    names, read, _ = list_images(args.source)
    places = find_places(names, source.stem)
    record, settings = target / "panorama.json", json.dumps(view._asdict())
    if record.exists():
        if (found := record.read_text(errors="replace")) != settings:
            raise UserError(f"DST {target} has panoramas of other settings, {found}; name another folder")
    elif any(is_image(path.name) for path in target.rglob("*")):
        raise UserError(f"DST {target} has images from elsewhere; name a new or an empty folder")

    todo, skipped = [file for file in places if not (target / file).exists()], []
    made = in_threads(lambda file: draw_panorama({name: read(name) for name in places[file]}, view), todo)
    for done, (file, png) in enumerate(zip(todo, made), 1):
        if isinstance(png, str):  # why there is none
            skipped.append(f"{places[file][0]!r}: {png}")
        else:
            make_folder(target)
            if not record.exists():
                write_file(record, settings.encode())
            write_file(target / file, png)
        if done % 100 == 0 or done == len(todo):
            print(f"{done:,} of {len(todo):,} panoramas ready", file=sys.stderr)
    if len(skipped) == len(places):
        first = f" (the first of {len(skipped)} skipped: {skipped[0]})" if skipped else ""
        sought = "2:1 images and faces: " + ", ".join(" ".join(naming) for naming in NAMINGS)
        raise UserError(f"SRC {args.source} has no panorama{first}; looked for {sought}")
    report_skipped(skipped, len(places), "panoramas")
    there = f"{len(places) - len(todo):,} were there already, {len(skipped):,} skipped, in {target}"
    print(f"{len(todo) - len(skipped):,} panoramas made, {there}")
    print(f"train on them: python coco_gan.py train --panorama --data {target}")


def find_places(names: list[str], title: str) -> dict[str, list[str]]:
    """Group images by the panoramas that can be made of them.

    Args: names: of the images, sorted; title: of a panorama whose faces have no prefix.
    Returns: for each panorama's file, the name of its image, or of its six faces in the order of NAMINGS.
    """
    pattern = re.compile(rf"(|.*[/\\_. -])({'|'.join(sum(NAMINGS, ()))})\.\w+", re.I | re.S)
    cubes, found = {}, []
    for name in names:
        if match := pattern.fullmatch(name):
            prefix, face = match[1], match[2].lower()
            naming = next(naming for naming in NAMINGS if face in naming)
            cubes.setdefault((prefix, naming), {})[naming.index(face)] = name
    for (prefix, _), numbered in cubes.items():
        if len(numbered) == 6:  # else each is an image by itself, like l and r of a stereo pair
            found.append((prefix, [numbered[i] for i in sorted(numbered)]))
    grouped = {name for _, images in found for name in images}
    found += [(os.path.splitext(name)[0], [name]) for name in names if name not in grouped]

    stems = [re.sub(r"[^\w .-]", "+", stem.strip("/\\_. -") or title) for stem, _ in found]
    counts, places = Counter(stem.casefold() for stem in stems), {}
    for stem, (_, images) in zip(stems, found):
        if counts[stem.casefold()] > 1 or len(stem.encode()) > 200:
            stem = f"{stem[:50]}-{hashlib.sha256(os.fsencode(images[0])).hexdigest()[:8]}"
        places[f"{stem}.png"] = images
    return places


def draw_panorama(files: dict[str, bytes], view: View) -> bytes:
    """Draw the cylinder around one 2:1 image, or around the six faces of a cube map, in the order of NAMINGS.

    Args: files: name and content of each image.
    Returns: a PNG. Raises: ValueError for an image that is damaged or of another shape.
    """
    cube = len(files) == 6
    aspect = 1 if cube else 2
    # Two samples a pixel each way, 7/8 of an image's pixel apart in the middle of a face, were as good for
    # photographs as three, and turned a checkerboard grey. Where pixels are not square, one side has more.
    vertical = 1 / np.abs(np.diff(row_latitudes(view))).max()  # pixels per radian on the horizon
    horizontal = view.columns / (2 * np.pi)
    finest = max(vertical, horizontal)
    down, right = (min(round(2 * finest / density), 8) for density in (vertical, horizontal))
    enough = int(np.ceil(1.75 * finest * (2 if cube else np.pi)))  # height of an image
    images = []
    for name, content in files.items():
        try:
            image = read_rgb(content, (aspect * enough, enough))
            if image.width != aspect * image.height:
                raise ValueError(f"is {image.width}:{image.height}, neither 2:1 nor one of six square faces")
        except Exception as error:  # Pillow raises many for damaged files
            raise ValueError(f"{name!r}: {reason_of(error)}" if cube else reason_of(error)) from error
        side = min(enough, image.height)  # reduced at once, so that no six large ones are in memory
        images.append(image.resize((aspect * side, side), Image.Resampling.LANCZOS, reducing_gap=3.0))
    side = min(image.height for image in images)
    images = [image.resize((aspect * side, side), Image.Resampling.LANCZOS) for image in images]

    # A border of one pixel around each image continues it with the neighbouring face, or the other end, so
    # that there is no seam. Corners are between other borders, hence the second round.
    pixels = np.stack([np.asarray(image) for image in images])  # (6 or 1, side, aspect · side, 3)
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(-1, 3).T.copy()
    border, *neighbours = find_border(cube, side)
    for _ in range(2):
        pixels[:, border] = interpolate(pixels, *neighbours) + 0.5  # rounded

    panorama = np.empty((view.rows, view.columns, 3), np.uint8)
    fine = view._replace(rows=view.rows * down, columns=view.columns * right)  # one row or column per sample
    step = max(1, 2**17 // (fine.columns * down))  # rows drawn at a time, for a bounded memory
    for top in range(0, view.rows, step):
        samples = interpolate(pixels, *find_rows(cube, side, fine, top * down, (top + step) * down))
        samples = samples.reshape(3, -1, down, view.columns, right)
        total = sum(samples[:, :, y, :, x] for y in range(down) for x in range(right))
        panorama[top : top + step] = (total / (down * right) + 0.5).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(panorama).save(file, "PNG", compress_level=1)  # half the time of 6, a tenth more bytes
    return file.getvalue()


def row_latitudes(view: View) -> np.ndarray:
    """Latitudes of the centres of the rows, from the top: (rows,) in radians."""
    height, top = 1 - (2 * np.arange(view.rows) + 1) / view.rows, np.radians(view.latitude)
    if view.projection == "equirectangular":
        return height * top
    return np.arctan(np.sinh(height * np.arcsinh(np.tan(top))))  # arcsinh(tan v) = ln tan(π/4 + v/2)


def direction(longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    """(x, y, z) of angles in radians, whose shapes broadcast to n values: (3, n)."""
    u, v = (angle.ravel() for angle in np.broadcast_arrays(longitude, latitude))
    return np.stack([np.cos(v) * np.sin(u), np.sin(v), np.cos(v) * np.cos(u)])


@functools.lru_cache(maxsize=32)
def find_rows(cube: bool, side: int, view: View, top: int, bottom: int) -> tuple:
    """Where the pixels of some rows of a panorama are in the images: see `locate`."""
    longitude = ((np.arange(view.columns) + 0.5) / view.columns - 0.5) * 2 * np.pi
    return locate(cube, side, direction(longitude, row_latitudes(view)[top:bottom, None]))


@functools.lru_cache
def find_border(cube: bool, side: int) -> tuple:
    """Indices of the border's pixels, and where inside the images the same directions are: see `locate`."""
    mask = np.ones((6 if cube else 1, side + 2, (side if cube else 2 * side) + 2), bool)
    mask[:, 1:-1, 1:-1] = False
    face, row, column = mask.nonzero()
    if cube:
        a, b = (2 * column - 1) / side - 1, 1 - (2 * row - 1) / side
        directions = a * RIGHT[face].T + b * UP[face].T + OUT[face].T
    else:
        directions = direction(((column - 0.5) / side - 1) * np.pi, (0.5 - (row - 0.5) / side) * np.pi)
    return np.flatnonzero(mask), *locate(cube, side, directions)


def locate(cube: bool, side: int, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Where directions (3, n) are in the images with their borders, as `interpolate` takes it."""
    if cube:
        face = (OUT @ directions).argmax(0)
        right, up, out = (np.einsum("ni,in->n", axis[face], directions) for axis in (RIGHT, UP, OUT))
        row, column, width = (1 - up / out) / 2 * side, (1 + right / out) / 2 * side, side
    else:
        x, y, z = directions
        row, column = 0.5 - np.arctan2(y, np.hypot(x, z)) / np.pi, 1 + np.arctan2(x, z) / np.pi
        face, row, column, width = 0, row * side, column * side, 2 * side
    row, column = row + 0.5, column + 0.5  # a pixel's centre is half a pixel inside, and the border one wide
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    index = (face * (side + 2) + top) * (width + 2) + left
    return index, (row - top).astype(np.float32), (column - left).astype(np.float32), width + 2


def interpolate(pixels: np.ndarray, index, below, beside, length: int) -> np.ndarray:
    """Interpolate between four pixels: (3, all pixels) uint8 -> (3, n) float32.

    Args: index: of the pixel to the upper left (n,); below, beside: how far below and to the right of its
    centre, (n,) in [0, 1); length: of a row.
    """
    weights = (1 - below) * (1 - beside), (1 - below) * beside, below * (1 - beside), below * beside
    corners = index, index + 1, index + length, index + length + 1
    return np.stack([sum(channel[i] * w for i, w in zip(corners, weights)) for channel in pixels])


def picture_size(text: str) -> list[int]:
    """Height and width of "HEIGHTxWIDTH", in pixels."""
    if not re.fullmatch(r"[1-9]\d{1,3}x[1-9]\d{1,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH in pixels, like 256x768")
    return [int(side) for side in text.split("x")]


def add_projection(parser: Parser) -> None:
    names = ("equirectangular", "mercator")
    text = "of the panorama's upper border in degrees (default: 60; mercator: that of square pixels)"
    parser.add_argument("--projection", choices=names, default=names[0], help=f"default: {names[0]}")
    parser.add_argument("--latitude", type=float, metavar="DEG", help=text)


def choose_latitude(args: argparse.Namespace, height: int, width: int) -> float:
    """--latitude or its default, for a panorama of so many pixels. Raises: UserError."""
    highest = 89 if args.projection == "mercator" else 90  # Mercator's poles are infinitely far away
    if args.latitude is None:
        square = np.degrees(np.arctan(np.sinh(np.pi * height / width)))
        return float(round(square, 4)) if args.projection == "mercator" else 60.0
    if not 0 < args.latitude <= highest:
        raise UserError(f"--latitude {args.latitude:g} is out of range; give above 0 to {highest}")
    return args.latitude


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.panorama", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SRC", help="folder or zip of cube maps and 2:1 images")
    add("target", metavar="DST", type=Path, help="folder of the panoramas")
    add("--size", type=picture_size, default=[256, 768], metavar="HEIGHTxWIDTH", help="default: 256x768")
    add_projection(parser)
    return run_command(parser, make_panoramas, argv)


if __name__ == "__main__":
    sys.exit(main())
