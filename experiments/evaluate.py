"""Compare a checkpoint's images with real ones: sliced Wasserstein distance, seam ratio and colours.

    python -m experiments.evaluate                             # the newest checkpoint under runs/
    python -m experiments.evaluate --checkpoint runs/tiny-001 --data ./celeba --json evaluation.json

What the figures mean is said in metrics.py. At a finite count not even real images score perfectly, so beside
each figure stands its floor, that of more real images in the place of the generated ones. The real images are
those that `train --holdout` kept out of training; where it kept none, only images that training saw are left.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from coco_gan import (
    Config,
    Generator,
    Parser,
    azimuth_variety,
    choose_device,
    find_checkpoint,
    fingerprint_of,
    full_image,
    latents,
    load,
    read_checkpoint,
    split,
    to_uint8,
)
from data import UserError, load_images
from experiments.metrics import channel_statistics, column_seams, seam_ratio, sliced_wasserstein

RELIABLE_COUNT = 2048
MOST_IMAGES = 10**6  # of one --seed, so that two of them share no image
PIXELS_PER_BATCH = 2**18  # 64 images of 64 x 64: memory goes with the pixels, not with the images


def generate(G: Generator, count: int, seed: int) -> np.ndarray:
    """Generate the images of the latents' seeds from seed * MOST_IMAGES on: uint8 (count, H, W, 3)."""
    H, W, first = G.config.height, G.config.width, seed * MOST_IMAGES
    batch_size = max(1, PIXELS_PER_BATCH // (H * W))
    images = np.empty((count, H, W, 3), np.uint8)
    for start in range(0, count, batch_size):
        seeds = range(first + start, first + min(start + batch_size, count))
        z = latents(seeds, G.config.z_dim)
        images[start : start + batch_size] = to_uint8(full_image(G, z))
    return images


def choose_real(images: np.ndarray, holdout: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pick the real images and as many others for the floor, spread evenly over those there are.

    Args: images (n, H, W, 3); holdout: how many of them training never saw, or 0 to divide all in two.
    Returns: two disjoint sets (m, H, W, 3), m at most `count`; the first is of the held-out images.
    """
    train, held_out = split(len(images), holdout or len(images) // 2)
    count = min(count, len(train), len(held_out))
    # As NumPy's index: a tensor of one number would index a single image, without its dimension.
    return tuple(images[numbers[split(len(numbers), count)[1]].numpy()] for numbers in (held_out, train))


def colours(images: np.ndarray) -> dict[str, float]:
    """Return {name: figure} of the channels, 0 to 255."""
    figures, names = {}, ("red", "green", "blue")
    for statistic, values in zip(("mean", "deviation"), channel_statistics(images)):
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
    return figures | colours(images)


def evaluate(args: argparse.Namespace) -> None:
    """From a checkpoint to a table and, if asked for, the same as JSON."""
    if not 2 <= args.count <= MOST_IMAGES:
        raise UserError(f"--count {args.count} is out of range; give 2 to {MOST_IMAGES}")
    if not 0 <= args.seed < 10**12:
        raise UserError(f"--seed {args.seed} is out of range; give 0 to {10**12 - 1}")
    device, path = choose_device(args.device), find_checkpoint(args.checkpoint, panorama=args.panorama)
    G = load(path, device, raw=args.raw)
    config, data = G.config, args.data or G.config.data
    images = load_images(data, config.height, config.width, crop=config.crop, cache=args.cache)

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

    print(f"{count:,} images of {path}, {weights} weights, --seed {args.seed}")
    print(f"against {count:,} {kind} images of {data}, {config.height} x {config.width} px")
    if note:
        print(f"note: {note}")
    if count < args.count:
        print(f"note: --count {args.count:,} is more than two sets of real images allow; it is now {count:,}")
    if count < RELIABLE_COUNT:
        print(f"warning: under {RELIABLE_COUNT:,} images SWD's floor is high; compare only equal counts")
    sys.stdout.flush()  # what follows may take minutes

    started = time.monotonic()
    floor = measure(real, more, config, args.seed, device)  # first: data that is no good fails at once
    generated = measure(real, generate(G, count, args.seed), config, args.seed, device)
    of_real, seconds = colours(real), time.monotonic() - started

    print(f"\n{'':22}{'real':>10}{'generated':>12}{'floor':>10}")
    for name, value in generated.items():
        first = f"{of_real[name]:.2f}" if name in of_real else ""
        print(f"{name:22}{first:>10}{value:12.2f}{floor[name]:10.2f}")
    print(f"\nfloor: {count:,} more real images in place of the generated; a seam ratio of 1 is seamless")
    print(f"{seconds:.1f} s on {device}")
    if args.json:
        contents = {"checkpoint": str(path), "weights": weights, "data": data, "real_images": kind}
        contents |= {"count": count, "seed": args.seed, "device": str(device), "seconds": seconds}
        contents |= {"real": of_real, "generated": generated, "floor": floor}
        try:
            Path(args.json).write_text(json.dumps(contents, indent=1) + "\n")
        except OSError as error:
            why = f"--json {args.json} cannot be written: {error.strerror}"
            raise UserError(f"{why}; name another file") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = Parser(prog="python -m experiments.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="what to evaluate (default: the newest under runs/)")
    add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
    add("--data", metavar="PATH", help="real images (default: those that it was trained on)")
    add("--count", type=int, default=2048, metavar="N", help="images of each set (default: 2048)")
    add("--raw", action="store_true", help="use G's weights themselves, not their running average")
    add("--json", metavar="FILE", help="also write the figures to a file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--seed", type=int, default=0, help="of the latents and the measurements (default: 0)")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    try:
        evaluate(parser.parse_args(argv))
    except ValueError as error:  # UserError is one; the others are metrics.py's, of images it cannot compare
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
