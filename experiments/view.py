"""Look around in a generated panorama as a headset would: only the micro patches in sight are made.

    python -m experiments.view --yaw 90 --pitch 0 --fov 75 --size 640x480   # what a headset would see
    python -m experiments.view --pan out.gif                                # a full turn, which loops
    python -m experiments.view --fov 90 --benchmark                         # how long head movements take

The view is that of a pinhole camera in the middle of the cylinder: what is straight in the world is straight
in the view. What lies beyond the panorama's latitudes is black. Pixels are interpolated between the nearest
four of the panorama, which is enough as long as the view shows it about as large as it is, or larger.
"""

import argparse
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coco_gan import (
    PICTURES,
    Generator,
    Parser,
    Scene,
    choose_device,
    find_checkpoint,
    free_name,
    latents,
    load,
    memory,
    picture_folder,
    run_command,
    save_picture,
    tell_newest,
    whole,
    writing,
)
from data import UserError

LONGEST_SIDE = 4096  # of a view, pixels
FRAMES = 36
MOST_PIXELS = 2**28  # of an animation, all of whose frames are in memory
MILLISECONDS = 100  # that an animation shows each frame
TURNS = 4  # that the benchmark takes, the first of them to warm up


def directions(yaw, pitch, fov, height: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Longitude and latitude in which each pixel of the view looks: two (height, width), in radians.

    Args: yaw to the right, pitch upwards and horizontal field of view, in degrees. x is right, y up, z front;
    a ray goes through the centre of its pixel on the plane z = 1, and is then pitched, and turned.
    """
    yaw, pitch = math.radians(yaw % 360), math.radians(pitch)
    pixel = 2 * math.tan(math.radians(fov) / 2) / width  # on the plane
    x = pixel * (torch.arange(width, device=device) + 0.5 - width / 2)
    y = pixel * (height / 2 - 0.5 - torch.arange(height, device=device)).unsqueeze(1)
    up, front = y * math.cos(pitch) + math.sin(pitch), math.cos(pitch) - y * math.sin(pitch)
    return yaw + torch.atan2(x, front), torch.atan2(up, (x.square() + front.square()).sqrt())


def position(longitude, latitude, height: int, width: int, border: float, mercator: bool):
    """Row and column of a panorama (height, width) in a direction, whole numbers at the centres of pixels.

    Args: longitude, latitude (…) in radians, 0 in its middle; border: its highest latitude, in degrees.
    Returns: two (…); columns may lie outside, by a turn or two.
    """
    border = math.radians(border)
    if mercator:  # asinh tan v = ln tan(π/4 + v/2)
        latitude, border = torch.asinh(torch.tan(latitude)), math.asinh(math.tan(border))
    return (1 - latitude / border) * height / 2 - 0.5, (longitude / math.tau + 0.5) * width - 0.5


def look(scene: Scene, yaw, pitch, fov, height: int, width: int, border, mercator: bool) -> torch.Tensor:
    """The view (height, width, 3) uint8, on the device of the scene. Args: of `directions` and `position`."""
    config, device = scene.G.config, scene.patches.device
    longitude, latitude = directions(yaw, pitch, fov, height, width, device)
    inside = latitude.abs() <= math.radians(border)
    longitude, latitude = longitude[inside], latitude[inside]  # (n,)
    picture = torch.zeros(height, width, 3, dtype=torch.uint8, device=device)
    if len(latitude):
        y, x = position(longitude, latitude, config.height, config.width, border, mercator)
        above, left = y.floor(), x.floor()
        rows = torch.stack([above, above + 1]).long().clamp(0, config.height - 1)
        columns = torch.stack([left, left + 1]).long()
        pixels = scene.pixels(rows.unsqueeze(1), columns).float()  # (2, 2, n, 3)
        upper, lower = pixels[:, 0].lerp(pixels[:, 1], (x - left).unsqueeze(1))
        picture[inside] = upper.lerp(lower, (y - above).unsqueeze(1)).round().byte()
    return picture


def turn(scene: Scene, see, yaw: float, frames: int):
    """Turn to the right by 360 degrees in equal steps, the last of which would lead to the first view again.

    Yields: the picture (height, width, 3) uint8 in main memory, the number of micro patches made for it, and
    the seconds that it took.
    """
    for frame in range(frames):
        made, started = scene.made, time.perf_counter()
        picture = see(scene, yaw + 360 * frame / frames).cpu().numpy()  # which waits for a GPU
        yield picture, scene.made - made, time.perf_counter() - started


def save_animation(pictures, path: Path) -> None:
    """Write a GIF or a WebP that repeats for ever, whole or not at all."""
    images = [Image.fromarray(picture) for picture in pictures]
    if path.suffix.lower() == ".gif":  # 256 colours a frame, dithered, or a sky is in bands
        images = [image.quantize(palette=image.quantize()) for image in images]
    options = dict(save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0)
    with whole(path) as part:
        images[0].save(part, format=path.suffix[1:].upper(), **options)


def benchmark(G: Generator, see, seed: int, yaw: float, frames: int) -> None:
    """Print the times from a head movement to the picture in main memory, over full turns in new scenes."""
    times = {"first view": [], "new patches": [], "no new patch": []}
    for number in range(TURNS):
        scene = Scene(G, latents([seed + number], G.config.z_dim))
        for frame, (_, new, seconds) in enumerate(turn(scene, see, yaw, frames)):
            kind = "first view" if frame == 0 else "new patches" if new else "no new patch"
            times[kind] += [(1000 * seconds, new)] if number else []
    for kind, values in times.items():
        if values:
            ms, new = np.array(values).T
            spread = f"median {np.median(ms):7.2f} ms, {ms.min():.2f} to {ms.max():.2f}"
            print(f"{kind:12}  {len(ms):4} times, {new.max():2.0f} micro patches at most: {spread}")


def check(args: argparse.Namespace) -> tuple[int, int]:
    """Raise UserError for the first argument that is out of range; returns height and width of --size."""
    mercator = args.projection == "mercator"  # whose poles are infinitely far
    ranges = dict(yaw=(-360, 360), pitch=(-90, 90), fov=(10, 150), latitude=(1, 89 if mercator else 90))
    for name, (low, high) in dict(**ranges, frames=(2, 360), seed=(0, 10**18)).items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # also refuses a NaN
            projection = " with --projection mercator" if name == "latitude" and mercator else ""
            raise UserError(f"--{name} {value} is out of range; give {low} to {high}{projection}")
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", args.size)
    width, height = map(int, size.groups()) if size else (0, 0)
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        given = f"--size {args.size} is no size of a picture"
        raise UserError(f"{given}; give WIDTHxHEIGHT, each 1 to {LONGEST_SIDE} pixels, like 640x480")
    if args.frames and not (args.pan or args.benchmark):
        raise UserError(f"--frames {args.frames} is of a turn; add --pan or --benchmark, or leave it out")
    if args.pan and (args.frames or FRAMES) * width * height > MOST_PIXELS:
        most = f"give at most {MOST_PIXELS // (width * height)} --frames, or a smaller --size"
        raise UserError(f"--size {args.size} is too large for {args.frames or FRAMES} frames; {most}")
    return height, width


def view(args: argparse.Namespace) -> None:
    """From a checkpoint to a picture, to an animation or to a table of times."""
    (height, width), device = check(args), choose_device(args.device)
    path = find_checkpoint(args.checkpoint, panorama=True)
    flag, endings = ("--pan", (".gif", ".webp")) if args.pan else ("--out", PICTURES)
    out = Path(args.pan or args.out or free_name(picture_folder(path) / "view"))
    if out.suffix.lower() not in endings:
        raise UserError(f"{flag} {out} has no known ending; give {', '.join(endings)}")
    if os.path.exists(out) and not args.force:
        raise UserError(f"{flag} {out} exists already; name another, or add --force to replace it")
    G = load(path, device, raw=args.raw)
    config, frames, border = G.config, args.frames or FRAMES, args.latitude
    if config.topology != "cylinder":
        found = f"--checkpoint {path} is on a {config.topology}, and a view needs a cylinder's panorama"
        raise UserError(f"{found}; train one with: python coco_gan.py train --panorama")
    mercator = args.projection == "mercator"
    if border is None:
        square = math.atan(math.sinh(math.pi * config.height / config.width))  # where its pixels are square
        border = math.degrees(square) if mercator else 60
    shape = dict(height=height, width=width, border=border, mercator=mercator)
    see = partial(look, pitch=args.pitch, fov=args.fov, **shape)

    with memory(f"memory of {device} is full; try a smaller --size"), writing(flag, out):
        if args.benchmark:
            print(f"{args.size}, --fov {args.fov:g}, {frames} views a turn, {path}, on {device}")
            return benchmark(G, see, args.seed, args.yaw, frames)
        out.parent.mkdir(parents=True, exist_ok=True)
        scene = Scene(G, latents([args.seed], config.z_dim))
        if args.pan:
            pictures, new, _ = zip(*turn(scene, see, args.yaw, frames))
            save_animation(pictures, out)
            print(f"{new[0]} micro patches generated for the first frame, at most {max(new[1:])} for another")
        else:
            save_picture(see(scene, args.yaw).cpu().numpy(), out)
    print(f"{scene.made} of {config.R * config.K} micro patches generated")
    tell_newest(args.checkpoint, path)
    print(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    text = f"{__doc__.splitlines()[0]} What lies beyond the panorama's latitudes is black."
    parser = Parser(prog="python -m experiments.view", description=text, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="of panoramas (default: the newest under runs/)")
    add("--seed", type=int, default=0, metavar="N", help="which panorama (default: 0)")
    add("--yaw", type=float, default=0, help="degrees to the right of its middle column (default: 0)")
    add("--pitch", type=float, default=0, help="degrees upwards (default: 0)")
    add("--fov", type=float, default=75, help="degrees from left to right, 10 to 150 (default: 75)")
    add("--size", default="640x480", metavar="WIDTHxHEIGHT", help="of the view, pixels (default: 640x480)")
    projections = ("equirectangular", "mercator")
    add("--projection", choices=projections, default=projections[0], help="(default: equirectangular)")
    text = "highest of the panorama, in degrees (default: 60; with mercator that of square pixels)"
    add("--latitude", type=float, help=text)
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--out", metavar="FILE", help="a picture (default: view.png, view-2.png … in the run)")
    add_one("--pan", metavar="FILE", help="a full turn instead, an animation: .gif or .webp")
    add_one("--benchmark", action="store_true", help="print how long views take, and write nothing")
    add("--frames", type=int, metavar="N", help=f"views in a full turn, 2 to 360 (default: {FRAMES})")
    add("--force", action="store_true", help="replace a picture that exists")
    add("--raw", action="store_true", help="use G's weights themselves, not their running average")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return run_command(parser, view, argv)


if __name__ == "__main__":
    sys.exit(main())
