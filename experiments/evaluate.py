"""Compare a checkpoint's images with real ones: sliced Wasserstein distance, FID, KID, seams and colours.

    python -m experiments.evaluate                             # the newest checkpoint under runs/
    python -m experiments.evaluate --checkpoint runs/tiny-001 --data ./celeba --json evaluation.json
    python -m experiments.evaluate --features inception-2015-12-05.pt    # with FID and KID

What the figures mean is said in metrics.py. At a finite count not even real images score perfectly, so beside
each figure stands its floor, that of more real images in the place of the generated ones. The real images are
those that `train --holdout` kept out of training; where it kept none, only images that training saw are left.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from coco_gan import (
    Config,
    Generator,
    Parser,
    azimuth_variety,
    choose_device,
    find_checkpoint,
    fingerprint_of,
    full_image,
    joined,
    latents,
    leave,
    load,
    load_once,
    read_checkpoint,
    run_command,
    split,
    to_uint8,
    write_whole,
    writes,
    writing,
)
from data import UserError, release_pages
from experiments import metrics
from experiments.metrics import MOST_FEATURES, MOST_IMAGES, column_seams, seam_ratio, sliced_wasserstein

RELIABLE_COUNT = 2000
# SHA-256 of NVIDIA's inception-2015-12-05.pt; what another network gives is no FID or KID as published.
INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
ABOUT = {"network": str, "sha256": str, "images": str, "count": int, "height": int, "width": int}


class Rows:
    """Some of the images of a map, sliced like an array, and in memory only while they are looked at."""

    def __init__(self, images: np.ndarray, numbers: np.ndarray):
        self.images, self.numbers, self.dtype = images, numbers, images.dtype
        self.shape = (len(numbers), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index) -> np.ndarray:
        found = self.images[self.numbers[index]]
        release_pages(self.images)
        return found


def generate(G: Generator, count: int, seed: int, folder: str) -> np.ndarray | None:
    """Generate the images of the latents' seeds from seed * MOST_IMAGES on: uint8 (count, H, W, 3).

    Only a batch of them is in memory; they lie in a file of the folder, which ends with the array.
    """
    H, W, end = G.config.height, G.config.width, seed * MOST_IMAGES + count
    batch_size = max(1, metrics.PIXELS_PER_BATCH // (H * W))
    with writing("--cache", folder), tempfile.TemporaryFile(dir=folder) as file:
        for first in range(end - count, end, batch_size):
            z = latents(range(first, min(first + batch_size, end)), G.config.z_dim)
            images = to_uint8(full_image(G, z))  # by all processes; the first one keeps them
            if writes():
                file.write(images.tobytes())
        return np.memmap(file, np.uint8, "r", shape=(count, H, W, 3)) if writes() else None


def choose_real(images: np.ndarray, holdout: int, count: int) -> tuple[Rows, Rows]:
    """Pick the real images and as many others for the floor, spread evenly over those there are.

    Args: images (n, H, W, 3); holdout: how many of them training never saw, or 0 to divide all in two.
    Returns: two disjoint sets (m, H, W, 3), m at most `count`; the first is of the held-out images.
    """
    train, held_out = split(len(images), holdout or len(images) // 2)
    count = min(count, len(train), len(held_out))
    return tuple(Rows(images, some[split(len(some), count)[1]].numpy()) for some in (held_out, train))


# ----------------------------------------------------------------------------------------------------------
# Files


def check_target(flag: str, path: str, force: bool) -> None:
    """Refuse a file that exists or cannot be written: now, and not after the minutes of measuring."""
    if os.path.isdir(path) or (os.path.exists(path) and not force):
        raise UserError(f"{flag} {path} exists already; name another file, or add --force to replace it")
    if not os.access(Path(path).absolute().parent, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: its folder is missing or read-only; name another")


def write(flag: str, path: str, contents: bytes) -> None:
    with writing(flag, path):
        write_whole(Path(path), contents)


def load_network(path: str, device: torch.device) -> tuple[torch.jit.ScriptModule, str]:
    """A TorchScript network, whose code runs with every use, and the SHA-256 of its file."""
    if not os.path.isfile(path):
        raise UserError(f"--features {path} does not exist; give a TorchScript file")
    try:
        contents = Path(path).read_bytes()
        network = torch.jit.load(io.BytesIO(contents), map_location=device).eval()
    except Exception as error:  # PyTorch answers a strange file with whatever its parsers meet first
        why = "is no TorchScript that can be loaded; give a file like NVIDIA's inception-2015-12-05.pt"
        raise UserError(f"--features {path} {why}") from error
    return network, hashlib.sha256(contents).hexdigest()


def read_array(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """An array of an .npz, of at most so many bytes: a small file may unpack to terabytes."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # no other version parses as this one
    if dtype.itemsize * math.prod(shape) > most:
        raise ValueError(f"{name} would be {dtype} {shape}")
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # looking for the end also compares the checksum
            raise ValueError(f"{name} is longer than it says")
    return array


def read_statistics(path: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """mu (d,), sigma (d, d) and what they are ABOUT, of a file that --save-statistics wrote."""
    if not os.path.isfile(path):
        raise UserError(f"--statistics {path} does not exist; make one by --save-statistics")
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(str(read_array(archive, "about", 2**16)))
            mu = read_array(archive, "mu", 8 * MOST_FEATURES)
            sigma = read_array(archive, "sigma", 8 * MOST_FEATURES**2)
        if not isinstance(about, dict) or {name: type(value) for name, value in about.items()} != ABOUT:
            raise ValueError("it does not tell what made it")
        if sigma.shape != mu.shape * 2 or not mu.dtype == sigma.dtype == np.float64:
            raise ValueError(f"mu is {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("a number is not finite")
        if about["count"] < 2 or not np.array_equal(sigma, sigma.T) or np.diag(sigma).min() < 0:
            raise ValueError("sigma is no covariance")
    except Exception as error:  # the parsers of a strange file raise all sorts
        why = f"cannot be used: {' '.join(str(error).split())[:200] or type(error).__name__}"
        raise UserError(f"--statistics {path} {why}; make one by --save-statistics") from error
    return mu, sigma, about


# ----------------------------------------------------------------------------------------------------------
# Figures


def colours(images: np.ndarray) -> dict[str, float]:
    """Return {name: figure} of the channels, 0 to 255."""
    figures, names = {}, ("red", "green", "blue")
    for statistic, values in zip(("mean", "deviation"), metrics.channel_statistics(images)):
        figures |= {f"{statistic} {name}": value for name, value in zip(names, values)}
    return figures


def measure(real: np.ndarray, images: np.ndarray, config: Config, seed: int, device) -> dict[str, float]:
    """Return {name: figure} of images (n, H, W, 3) compared with as many real ones."""
    distance = sliced_wasserstein(real, images, seed=seed, device=device)
    figures = {f"SWD x 1,000, {px} px": value for px, value in distance["levels"].items()}
    figures["SWD x 1,000, mean"] = distance["mean"]
    if config.S > 1 and config.R * config.K > 1:  # else nothing lies inside a patch, or nothing between two
        figures["seam ratio"] = seam_ratio(real, images, config.S, config.closed)
    if config.closed[1] and config.S > 1 and config.K > 1:
        *others, ends = column_seams(real, images, config.S)
        figures |= {"seam ratio, right-left": ends, "seam ratio, columns": float(np.mean(others))}
        if real_variety := azimuth_variety(real, config.S):
            figures["azimuth variety"] = azimuth_variety(images, config.S) / real_variety
    return figures


def evaluate(args: argparse.Namespace) -> None:
    """From a checkpoint to a table and, if asked for, the same as JSON."""
    if not 2 <= args.count <= MOST_IMAGES:
        raise UserError(f"--count {args.count} is out of range; give 2 to {MOST_IMAGES}")
    if not 0 <= args.seed < 10**12:
        raise UserError(f"--seed {args.seed} is out of range; give 0 to {10**12 - 1}")
    if (args.statistics or args.save_statistics) and not args.features:
        raise UserError("--statistics and --save-statistics are of a network; give --features as well")
    if args.statistics and args.save_statistics:
        raise UserError("--statistics replaces what --save-statistics would write; give one of them")
    for flag, target in (("--json", args.json), ("--save-statistics", args.save_statistics)):
        if target is not None:
            check_target(flag, target, args.force)
    device, path = choose_device(args.device), find_checkpoint(args.checkpoint, panorama=args.panorama)
    G = load(path, device, raw=args.raw)
    config, data = G.config, args.data or G.config.data
    network, sha256 = load_network(args.features, device) if args.features else (None, None)
    mu, sigma, about = read_statistics(args.statistics) if args.statistics else (None, None, None)
    if about and (about["sha256"], about["height"], about["width"]) != (sha256, config.height, config.width):
        made = f"made by {about['network']} of {about['height']} x {about['width']} px, and not by this"
        here = f"{args.features} of {config.height} x {config.width} px; make another by --save-statistics"
        raise UserError(f"--statistics {args.statistics} was {made} {here}")
    how = dict(crop=config.crop, seed=config.seed, cache=args.cache)
    images = load_once(data, config.height, config.width, **how)

    # Which images were held out is known for the set that was trained on, and for no other.
    if fingerprint_of(images) != read_checkpoint(path)[0]["images"]:
        kind, holdout, note = "other", 0, "this is another set of images than the run's; no --holdout applies"
    elif config.holdout == 0:
        kind, holdout, note = "training", 0, "training saw the real images, for it had no --holdout"
    else:
        kind, holdout, note = "held-out", config.holdout, ""
    real, more = choose_real(images, holdout, args.count)
    count, weights = len(real), "raw" if args.raw else "averaged"
    if count < 2:
        has = f"{len(images)} images, {holdout} of them held out" if holdout else f"{len(images)} images"
        raise UserError(f"--data {data} has {has}: too few for two sets of at least 2; give more")

    def features(images) -> np.ndarray:
        try:
            return metrics.features(network, images, device)
        except ValueError as error:
            raise UserError(f"--features {args.features}: {error}; give another network") from error

    if network:
        d = features(real[:2]).shape[1]  # now, not after minutes
        if about and len(mu) != d:
            raise UserError(f"--statistics {args.statistics} has {len(mu)} features, --features gives {d}")

    print(f"{count:,} images of {path}, {weights} weights, --seed {args.seed}")
    print(f"against {count:,} {kind} images of {data}, {config.height} x {config.width} px")
    if note:
        print(f"note: {note}")
    if count < args.count:
        print(f"note: --count {args.count:,} is more than two sets of real images allow; it is now {count:,}")
    if count < RELIABLE_COUNT:
        print(f"warning: under {RELIABLE_COUNT:,} images SWD's floor is high; compare only equal counts")
    fid, kid = ("FID", "KID") if sha256 == INCEPTION else ("Frechet distance", "kernel distance")
    if network:
        print(f"{d:,} features of {args.features}, SHA-256 {sha256}")
        if sha256 != INCEPTION:
            print("note: that is not NVIDIA's inception-2015-12-05.pt; compare with no published FID or KID")
        if about:
            print(f"{fid}: against {about['count']:,} images, by {args.statistics}")
        few, least = min(count, about["count"] if about else count), max(RELIABLE_COUNT, d + 1)
        if few < least:
            print(f"warning: {few:,} images are too few for a covariance of {d:,} features (under {least:,})")
    sys.stdout.flush()  # what follows may take minutes
    if not writes():  # of several processes, the others help to generate, and the first one measures
        generate(G, count, args.seed, args.cache)
        return

    started = time.monotonic()
    real_x = features(real) if network else None
    mu, sigma = metrics.feature_statistics(real_x) if network and not about else (mu, sigma)
    if args.save_statistics:
        made_by = [Path(args.features).name, sha256, fingerprint_of(real), count, config.height, config.width]
        np.savez(file := io.BytesIO(), mu=mu, sigma=sigma, about=json.dumps(dict(zip(ABOUT, made_by))))
        write("--save-statistics", args.save_statistics, file.getvalue())

    def compare(images) -> dict[str, float]:
        figures = measure(real, images, config, args.seed, device)
        if network:
            x = features(images)
            figures[fid] = metrics.frechet_distance(mu, sigma, *metrics.feature_statistics(x))
            distance = metrics.kernel_distance(real_x, x, seed=args.seed)
            figures |= zip((f"{kid} x 1,000", f"{kid} x 1,000, deviation"), distance)
        return figures | colours(images)

    floor = compare(more)  # first: data that is no good fails at once
    generated = compare(generate(G, count, args.seed, args.cache))
    of_real, seconds = colours(real), time.monotonic() - started

    width = max(map(len, generated))
    print(f"\n{'':{width}}{'real':>10}{'generated':>12}{'floor':>10}")
    for name, value in generated.items():
        row = of_real.get(name), value, floor[name]
        row = ["" if v is None else f"{v:.2f}" if abs(v) > 0.1 else f"{v:.2g}" for v in row]
        print(f"{name:{width}}{row[0]:>10}{row[1]:>12}{row[2]:>10}")
    print(f"\nfloor: {count:,} more real images in place of the generated; a seam ratio of 1 is seamless")
    print(f"{seconds:.1f} s on {device}")
    if args.json:
        contents = {"checkpoint": str(path), "weights": weights, "data": data, "real_images": kind}
        contents |= {"count": count, "seed": args.seed, "device": str(device), "seconds": seconds}
        contents |= {"features": args.features, "sha256": sha256, "statistics": args.statistics}
        contents |= {"real": of_real, "generated": generated, "floor": floor}
        write("--json", args.json, (json.dumps(contents, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="what to evaluate (default: the newest under runs/)")
    add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
    add("--data", metavar="PATH", help="real images (default: those that it was trained on)")
    add("--count", type=int, default=16384, metavar="N", help="images of each set (default: 16384)")
    text = "TorchScript network for FID and KID, like inception-2015-12-05.pt; the code in it is run"
    add("--features", metavar="FILE", help=text)
    add("--statistics", metavar="FILE", help="FID against these instead of the real images' own")
    add("--save-statistics", metavar="FILE", help="write the real images' statistics for FID, as .npz")
    add("--raw", action="store_true", help="use G's weights themselves, not their running average")
    add("--json", metavar="FILE", help="also write the figures to a file")
    add("--force", action="store_true", help="replace files that exist")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--seed", type=int, default=0, help="of the latents and the measurements (default: 0)")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")

    def act(args: argparse.Namespace) -> None:
        with joined(args.device):
            evaluate(args)

    # UserError is a ValueError; the others are metrics.py's, of images that it cannot compare.
    return run_command(parser, act, argv, ValueError)


if __name__ == "__main__":
    leave(main())
