"""Look around in a generated panorama as a headset would: only the micro patches in sight are made.

    python -m experiments.view --yaw 90 --fov 75 --size 480x640    # a perspective view
    python -m experiments.view --pan --out turn.gif                # a full turn, which loops
    python -m experiments.view --serve                             # look around in a browser
    python -m experiments.view --benchmark                         # how long head movements take
    python -m experiments.view --viewport 8,-20,16,40              # a rectangle of the full image
    python -m experiments.view --full --out big.png                # all of it, with little memory

A view is that of a pinhole camera in the middle of a cylinder, black beyond the panorama's latitudes. The
last two commands are for any topology. Source: section 3.4, partial generation; views are not in the paper.
"""

import argparse
import io
import math
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import coco_gan
from coco_gan import Generator, Parser, latents, micro_patches, positive, save_picture, to_uint8
from data import UserError, atomic, make_folder, write_file
from experiments.panorama import add_projection, choose_latitude, picture_size
from experiments.serve import serve


class Scene:
    """A full image of which no part exists before somebody looks at it; `made` counts its micro patches.

    Args: z (1, z_dim) in [-1, 1].
    """

    def __init__(self, G: Generator, z: torch.Tensor):
        self.G, self.z, self.made, device = G, z, 0, next(G.parameters()).device
        self.image = torch.empty(G.config.height, G.config.width, 3, device=device)
        self.is_made = torch.zeros(G.config.R, G.config.K, dtype=torch.bool, device=device)

    def pixels(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The pixels of `full_image` (up to rounding) in rows y and columns x, modulo its height and width.

        Args: int64 whose shapes broadcast to (…), on the device of G. Returns: (…, 3) float32 in [-1, 1].
        """
        (H, W, _), S = self.image.shape, self.G.config.S
        y, x = y % H, x % W
        seen = torch.zeros_like(self.is_made)
        seen[y // S, x // S] = True
        i, j = (seen & ~self.is_made).nonzero(as_tuple=True)
        if len(i):
            patches = micro_patches(self.G, self.z.expand(len(i), -1), i, j)  # (n, 3, S, S)
            self.image.view(H // S, S, W // S, S, 3)[i, :, j] = patches.permute(0, 2, 3, 1)
            self.is_made |= seen
            self.made += len(i)
        return self.image[y, x]

    def viewport(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The rectangle of pixels from (top, left), which wraps around where borders meet.

        Returns: (height, width, 3) uint8. Raises: UserError for one that is empty or reaches beyond a border.
        """
        H, W, (down, across) = self.G.config.height, self.G.config.width, self.G.config.closed
        inside = (down or 0 <= top <= H - height) and (across or 0 <= left <= W - width)
        if not inside or min(height, width) < 1:
            found = f"--viewport {top},{left},{height},{width} is not within the full image"
            raise UserError(f"{found}, which has {H} x {W} pixels")
        y = torch.arange(top, top + height, device=self.image.device).unsqueeze(1)
        x = torch.arange(left, left + width, device=self.image.device)
        return to_uint8(self.pixels(y, x).permute(2, 0, 1).unsqueeze(0))[0]


def directions(yaw: float, pitch: float, fov: float, height: int, width: int, device):
    """Longitude and latitude of the ray through each pixel of a view: two (height, width), in radians.

    Args: yaw to the right, pitch upwards, horizontal field of view: in degrees. x is right, y up, z front. A
    ray goes through the centre of its pixel on the plane z = 1, is then pitched, and then turned.
    """
    yaw, pitch = math.radians(yaw % 360), math.radians(pitch)
    pixel = 2 * math.tan(math.radians(fov) / 2) / width  # on the plane
    x = pixel * (torch.arange(width, device=device) + 0.5 - width / 2)
    y = pixel * (height / 2 - 0.5 - torch.arange(height, device=device)).unsqueeze(1)
    up, front = y * math.cos(pitch) + math.sin(pitch), math.cos(pitch) - y * math.sin(pitch)
    return yaw + torch.atan2(x, front), torch.atan2(up, (x.square() + front.square()).sqrt())


def look(scene: Scene, yaw, pitch, fov, height, width, projection: str, border: float) -> np.ndarray:
    """The view (height, width, 3) uint8, interpolated between the nearest four pixels of the panorama.

    Args: as of `directions`; projection and border: of the panorama, and its highest latitude in degrees.
    """
    config, border = scene.G.config, math.radians(border)
    longitude, latitude = directions(yaw, pitch, fov, height, width, scene.image.device)
    inside = latitude.abs() <= border
    longitude, latitude = longitude[inside], latitude[inside]  # (n,)
    if projection == "mercator":  # asinh tan v = ln tan(π/4 + v/2)
        latitude, border = torch.asinh(torch.tan(latitude)), math.asinh(math.tan(border))
    y = (1 - latitude / border) * config.height / 2 - 0.5  # integers are the centres of pixels
    x = (longitude / math.tau + 0.5) * config.width - 0.5
    above, left = y.floor(), x.floor()
    rows = torch.stack([above, above + 1]).long().clamp(0, config.height - 1)
    columns = torch.stack([left, left + 1]).long()
    pixels = scene.pixels(rows.unsqueeze(1), columns)  # (2, 2, n, 3)
    upper, lower = pixels[:, 0].lerp(pixels[:, 1], (x - left).unsqueeze(1))
    picture = torch.full((height, width, 3), -1.0, device=scene.image.device)  # black
    picture[inside] = upper.lerp(lower, (y - above).unsqueeze(1))
    return to_uint8(picture.permute(2, 0, 1).unsqueeze(0))[0]


def benchmark(G: Generator, see, seed: int, yaw: float, frames: int) -> None:
    """Print the times from a head movement to the view see(scene, yaw) by how many micro patches are new."""
    times = {}
    for turn in range(4):  # the first is to warm up
        scene = Scene(G, latents([seed + turn], G.config.z_dim))
        for k in range(frames):
            made, started = scene.made, time.perf_counter()
            see(scene, yaw + 360 * k / frames)
            ms = 1000 * (time.perf_counter() - started)
            if turn > 0:
                times.setdefault(scene.made - made, []).append(ms)
    for new, ms in sorted(times.items()):
        spread = f"{np.median(ms):.2f} ms, {min(ms):.2f} to {max(ms):.2f}"
        print(f"{new:3} new micro patches, {len(ms):4} times: median {spread}")


def save_animation(pictures, path: Path) -> None:
    """Write pictures (h, w, 3) uint8 as a GIF or WebP, 10 a second, that loops. Raises: UserError."""
    kind = path.suffix[1:].upper()
    if kind not in ("GIF", "WEBP"):
        raise UserError(f"{path} is not the name of an animation; end it in .gif or .webp")
    images = [Image.fromarray(picture) for picture in pictures]
    if kind == "GIF":  # 256 colours a frame, dithered, or a sky has bands
        images = [image.quantize(palette=image.quantize()) for image in images]
    file = io.BytesIO()
    images[0].save(file, format=kind, save_all=True, append_images=images[1:], duration=100, loop=0)
    write_file(path, file.getvalue())


def save_png(parts, path: Path, height: int, width: int) -> None:
    """Write a picture that comes in parts (h, width, 3) uint8 from top to bottom, with one in memory.

    Source: Portable Network Graphics (PNG) Specification, sections 5, 9 and 11.
    """
    with atomic(path) as file:

        def chunk(kind: bytes, data: bytes) -> None:
            checksum = struct.pack(">I", zlib.crc32(kind + data))
            file.write(struct.pack(">I", len(data)) + kind + data + checksum)

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB, not interlaced
        packer = zlib.compressobj()
        for part in parts:
            steps = np.diff(part, axis=1, prepend=np.uint8(0))  # filter 1: less the pixel to the left
            lines = np.pad(steps.reshape(len(part), -1), ((0, 0), (1, 0)), constant_values=1)
            chunk(b"IDAT", packer.compress(lines))
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def draw(args: argparse.Namespace) -> None:
    """From a checkpoint to a picture, to an animation, to a page, or with --benchmark to a table."""
    path = coco_gan.find_checkpoint(args.checkpoint, panorama=True)
    G = coco_gan.load(path, coco_gan.choose_device(args.device), raw=args.raw)
    config, z = G.config, latents([args.seed], G.config.z_dim)
    folder = Path("runs") if path.parent == coco_gan.ASSETS else path.parent
    out = Path(args.out or folder / f"{path.stem}-view.{'gif' if args.pan else 'png'}")
    if args.full and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not the name of a PNG, which --full writes; end it in .png")
    if not 0 < args.fov < 180:
        raise UserError(f"--fov {args.fov:g} is out of range; give more than 0 and less than 180 degrees")
    if config.topology != "cylinder" and not (args.viewport or args.full):
        found = f"{path} is on a {config.topology}, and a view needs a cylinder"
        raise UserError(f"{found}; train one with: python coco_gan.py train --panorama")
    border = choose_latitude(args, config.height, config.width)

    def see(scene: Scene, yaw: float) -> np.ndarray:
        return look(scene, yaw, args.pitch, args.fov, *args.size, args.projection, border)

    if args.serve:
        start = args.seed, args.yaw, args.pitch, args.fov, *args.size
        return serve(
            lambda seed: Scene(G, latents([seed], config.z_dim)),
            lambda *view: look(*view, args.projection, border),
            start,
            args.port,
        )
    if args.benchmark:
        return benchmark(G, see, args.seed, args.yaw, args.frames)
    make_folder(out.parent)
    if args.full:
        rows = (to_uint8(coco_gan.full_image(G, z, range(i, i + 1)))[0] for i in range(config.R))
        save_png(rows, out, config.height, config.width)
        print(f"{out}: the full image, from {path}")
        return
    scene = Scene(G, z)
    if args.viewport:
        save_picture(scene.viewport(*args.viewport), out)
    elif args.pan:
        yaws = (args.yaw + 360 * k / args.frames for k in range(args.frames))
        save_animation([see(scene, yaw) for yaw in yaws], out)
    else:
        save_picture(see(scene, args.yaw), out)
    print(f"{out}: {scene.made} of {config.R * config.K} micro patches made, from {path}")


def rectangle(text: str) -> tuple[int, int, int, int]:
    top, left, height, width = map(int, text.split(","))
    return top, left, height, width


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.view", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="default: the newest of a cylinder under runs/")
    add("--seed", type=int, default=0, metavar="N", help="which panorama (default: 0)")
    add("--yaw", type=float, default=0, metavar="DEG", help="to the right (default: 0, the middle column)")
    add("--pitch", type=float, default=0, metavar="DEG", help="upwards (default: 0)")
    add("--fov", type=float, default=75, metavar="DEG", help="from left to right (default: 75)")
    add("--size", type=picture_size, default=[480, 640], metavar="HEIGHTxWIDTH", help="default: 480x640")
    add_projection(parser)
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--pan", action="store_true", help="an animation of a full turn")
    add_one("--serve", action="store_true", help="a page to look around in with a browser, until Ctrl-C")
    add_one("--benchmark", action="store_true", help="print how long views take, and write nothing")
    add_one("--viewport", type=rectangle, metavar="TOP,LEFT,HEIGHT,WIDTH", help="a part of the full image")
    add_one("--full", action="store_true", help="the full image, a row of micro patches at a time")
    add("--frames", type=positive, default=36, metavar="N", help="views in a full turn (default: 36)")
    add("--port", type=int, default=0, metavar="N", help="of --serve (default: a free one)")
    add("--out", metavar="FILE", help="picture, or .gif or .webp of --pan (default: beside the checkpoint)")
    add("--raw", action="store_true", help="use G's weights themselves, not their moving average")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return coco_gan.run_command(parser, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
