"""Score checkpoints by comparing their images with real ones, and keep the best of a run.

    python -m experiments.evaluate                         # all checkpoints of the newest run under runs/
    python -m experiments.evaluate runs/tiny-001 --follow  # and those to come, until training is done
    python -m experiments.evaluate assets/toy_faces.pt --count 2000 --json faces.jsonl
    python -m experiments.evaluate --features inception-2015-12-05.pt    # with FID and KID

The figures, which metrics.py defines: swd, the sliced Wasserstein distance x 1,000, is the mean of its
levels (swd_64, …); seam_ratio; on a cylinder seam_ratio_ends, of the border of right and left alone,
seam_ratio_columns, the mean of the borders of other columns, and azimuth_variety, over that of real images;
mean and deviation of each channel. Beside each stands its floor, that of more real images: at a finite count
not even real images score perfectly. Compare figures of equal counts only.

Real images are those that `train --holdout` kept out of training, if it kept any. A run gets a line of
figures per checkpoint in evaluation.jsonl, and best.pt, a copy of the checkpoint with the lowest swd. best.pt
is scored with the others, and so replaced only by a better one.
"""

import argparse
import hashlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from coco_gan import (
    ASSETS,
    Config,
    Generator,
    Parser,
    checkpoints,
    choose_device,
    find_checkpoint,
    fingerprint_of,
    full_image,
    latents,
    load,
    positive,
    read_checkpoint,
    run_command,
    split,
    to_uint8,
)
from data import UserError, counted, load_images, release_pages, write_file
from experiments import metrics

RELIABLE_COUNT = 2000
MOST_IMAGES = 10**6  # of one --seed, so that two seeds share no image
IMAGE_PIXELS_AT_ONCE = 2**18
POLL_SECONDS = 2
# SHA-256 of NVIDIA's inception-2015-12-05.pt; what another network gives is no FID or KID as published.
INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SHOWN = "swd seam_ratio seam_ratio_ends azimuth_variety fid kid frechet_distance kernel_distance".split()
KINDS = {
    "held-out": "that training did not see",
    "training": "that training saw, for it had no --holdout",
    "other": "of another set than the run's",
}


# ---- Images ------------------------------------------------------------------------------------------------


class Rows:
    """Some of the images of a map (n, H, W, 3), which are read as they are sliced."""

    def __init__(self, images: np.ndarray, indices: np.ndarray):
        self.images, self.indices, self.shape = images, indices, (len(indices), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index) -> np.ndarray:
        found = self.images[self.indices[index]]
        release_pages(self.images)
        return found


def choose_real(images: np.ndarray, holdout: int, count: int) -> tuple[Rows, Rows]:
    """Pick the real images and as many others for the floor, spread evenly over those there are.

    Args: images (n, H, W, 3); holdout: how many of them training never saw, or 0 to divide all in two.
    Returns: two disjoint sets (m, H, W, 3), m at most `count`; the first is of the held-out images.
    Raises: UserError if m would be less than 2.
    """
    train, held_out = split(len(images), holdout or len(images) // 2)
    count = min(count, len(train), len(held_out))
    if count < 2:
        raise UserError(f"{len(images)} images, --holdout {holdout}: give more, for two sets of 2 at least")
    return tuple(Rows(images, some[split(len(some), count)[1]].numpy()) for some in (held_out, train))


def generate(G: Generator, count: int, seed: int, folder: str | Path) -> np.ndarray:
    """The images of latents of seeds from seed · 10⁶ on: uint8 (count, H, W, 3), in a temporary file."""
    H, W, first = G.config.height, G.config.width, seed * MOST_IMAGES
    with tempfile.TemporaryFile(dir=folder) as file:
        seeds, at_once = range(first, first + count), max(1, IMAGE_PIXELS_AT_ONCE // (H * W))
        batches = [seeds[i : i + at_once] for i in range(0, count, at_once)]
        made = (to_uint8(full_image(G, latents(some, G.config.z_dim))) for some in batches)
        for images in counted(made, len(batches), f"batches of {at_once} images generated"):
            file.write(images.tobytes())
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=(count, H, W, 3))


def compare(real, images, config: Config, seed: int = 0, device="cpu") -> dict[str, float]:
    """{name: figure} of images (n, H, W, 3) uint8 and as many real ones: swd, seam_ratio and the others.

    One that the images do not have is left out: all are of one grey, or of a single micro patch.
    """
    S, levels = config.S, metrics.sliced_wasserstein(real, images, seed, device)
    figures = {"swd": sum(levels.values()) / len(levels)}
    figures |= {f"swd_{px}": value for px, value in levels.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        figures["seam_ratio"] = metrics.seam_ratio(real, images, S, config.closed)
        if config.closed[1] and config.K > 1:
            *columns, figures["seam_ratio_ends"] = metrics.column_seams(real, images, S)
            figures["seam_ratio_columns"] = np.mean(columns)
            varieties = [metrics.azimuth_variety(some, S) for some in (images, real)]
            figures["azimuth_variety"] = np.divide(*varieties)
    return {
        name: float(value)
        for name, value in (figures | metrics.colours(images)).items()
        if np.isfinite(value)
    }


# ---- Features ----------------------------------------------------------------------------------------------


def load_network(path: str, device: torch.device) -> tuple[torch.jit.ScriptModule, str]:
    """A TorchScript network, whose code runs with every use, and the SHA-256 of its file."""
    contents = Path(path).read_bytes()
    try:
        network = torch.jit.load(io.BytesIO(contents), map_location=device).eval()
    except RuntimeError as error:
        hint = "give a file like NVIDIA's inception-2015-12-05.pt"
        raise UserError(f"--features {path} is no TorchScript that can be loaded; {hint}") from error
    return network, hashlib.sha256(contents).hexdigest()


def read_statistics(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """mu (d,), sigma (d, d) and what they are of, in a file of --save-statistics. Raises: UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma, about = file["mu"], file["sigma"], json.loads(str(file["about"]))
        about = {name: about[name] for name in ("network", "sha256", "height", "width", "count")}
        if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not mu.dtype == sigma.dtype == np.float64:
            raise ValueError(f"mu is {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("a number is not finite")
    except OSError:
        raise
    except Exception as error:  # np.load answers another file with whatever its parsers meet first
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"--statistics {path} cannot be used: {why}; make one by --save-statistics"
        ) from error
    return mu, sigma, about


def feature_comparison(args: argparse.Namespace, real: Rows, config: Config, device: torch.device):
    """A function from images (n, H, W, 3) to {name: figure}, their FID and KID by --features."""
    network, sha256 = load_network(args.features, device)
    real_x, fid, kid = metrics.features(network, real, device), "fid", "kid"
    if sha256 != INCEPTION:
        fid, kid = "frechet_distance", "kernel_distance"
        print(f"note: {args.features} is not NVIDIA's Inception; compare with no published FID or KID")
    about = dict(network=Path(args.features).name, sha256=sha256, height=config.height, width=config.width)
    about |= dict(count=len(real), images=fingerprint_of(real))
    if args.statistics:
        mu, sigma, made = read_statistics(args.statistics)
        if any(made[name] != about[name] for name in ("sha256", "height", "width")):
            was = f"was made by {made['network']} of {made['height']} x {made['width']} pixels"
            raise UserError(f"--statistics {args.statistics} {was}, and not by this --features of this size")
        about = made
    else:
        mu, sigma = metrics.feature_statistics(real_x)
    if args.save_statistics:
        np.savez(file := io.BytesIO(), mu=mu, sigma=sigma, about=json.dumps(about))
        write_file(Path(args.save_statistics), file.getvalue())
    few, d = min(len(real), about["count"]), len(mu)
    if few < max(RELIABLE_COUNT, d + 1):
        print(f"warning: {few:,} images are too few for a covariance of {d:,} features")

    def figures(images) -> dict[str, float]:
        x = metrics.features(network, images, device)
        found = {fid: metrics.frechet_distance(mu, sigma, *metrics.feature_statistics(x))}
        found[kid], found[f"{kid}_deviation"] = metrics.kernel_distance(real_x, x, args.seed)
        return found

    return figures


# ---- Command -----------------------------------------------------------------------------------------------


def find_checkpoints(args: argparse.Namespace) -> tuple[Path | None, Iterator[Path]]:
    """A run and its checkpoints, or None and the only checkpoint. Raises: UserError if there is none."""
    if args.follow and args.where:  # there may be none yet
        return Path(args.where), follow(Path(args.where), wait=True)
    path = find_checkpoint(args.where, args.panorama)
    if path.parent == ASSETS or str(path) == args.where:
        return None, iter([path])
    return path.parent, follow(path.parent, args.follow)


def follow(run: Path, wait: bool) -> Iterator[Path]:
    """best.pt and the checkpoints of a run, and if `wait` those that appear, until that of the last step."""
    seen = set()
    while True:
        new = [path for path in (run / "best.pt", *checkpoints(run)) if path not in seen and path.exists()]
        if new:
            seen.add(new[0])
            yield new[0]  # one at a time: training deletes others meanwhile
        elif wait and not is_done(run):
            time.sleep(POLL_SECONDS)
        else:
            return


def is_done(run: Path) -> bool:
    steps = json.loads((run / "config.json").read_text())["steps"]
    return (run / f"checkpoint-{steps:09d}.pt").exists()


def evaluate(args: argparse.Namespace) -> None:
    """From checkpoints to a line for each, and the table of the best."""
    if not 0 <= args.seed < 10**12:
        raise UserError(f"--seed {args.seed} is out of range; give 0 to {10**12 - 1}")
    if (args.statistics or args.save_statistics) and not args.features:
        raise UserError("--statistics and --save-statistics are of a network; give --features, too")
    device, (run, paths) = choose_device(args.device), find_checkpoints(args)
    first = next(paths)
    config, contents = read_checkpoint(first)
    data = args.data or config.data
    how = dict(crop=config.crop, seed=config.seed, cache=args.cache)
    images = load_images(data, config.height, config.width, **how)
    # Which images were held out is known of the set that was trained on, and of no other.
    kind = "held-out" if config.holdout else "training"
    kind = kind if fingerprint_of(images) == contents["images"] else "other"
    real, more = choose_real(images, config.holdout if kind == "held-out" else 0, args.count)
    count = len(real)
    print(f"{count:,} images of each checkpoint, and {count:,} of {data} {KINDS[kind]}")
    if count < args.count:
        print(f"note: --count {args.count:,} is more than two sets of real images allow")
    if count < RELIABLE_COUNT:
        print(f"warning: under {RELIABLE_COUNT:,} images the floor of swd is high")
    of_features = feature_comparison(args, real, config, device) if args.features else lambda images: {}

    def score(images) -> dict[str, float]:
        return compare(real, images, config, args.seed, device) | of_features(images)

    floor, of_real, best, scored = score(more), metrics.colours(real), None, set()
    about = dict(
        weights="raw" if args.raw else "ema", data=data, real_images=kind, count=count, seed=args.seed
    )
    for path in itertools.chain([first], paths):
        try:
            file = path.read_bytes()
            step = read_checkpoint(path)[1]["step"]
            G = load(path, device, args.raw)
        except FileNotFoundError:  # training has deleted it
            continue
        if step in scored:
            continue
        scored.add(step)
        figures = score(generate(G, count, args.seed, args.cache))
        better = best is None or figures.get("swd", np.inf) < best[1].get("swd", np.inf)
        if better:
            best = path, figures
            if run:
                write_file(run / "best.pt", file)
        text = "  ".join(f"{name} {figures[name]:.2f}" for name in SHOWN if name in figures)
        print(f"step {step:,}  {text}{'  best so far' if better and run else ''}", flush=True)
        if log := args.json or (run and run / "evaluation.jsonl"):
            entry = dict(step=step, checkpoint=str(path)) | about | figures
            entry |= {f"{name}_floor": value for name, value in floor.items()}
            entry |= {f"{name}_real": value for name, value in of_real.items()}
            with open(log, "a") as lines:
                lines.write(json.dumps(entry) + "\n")
    path, figures = best
    print(f"\n{str(path):24}{'real':>10}{'generated':>12}{'floor':>10}")
    for name, value in figures.items():
        row = of_real.get(name), value, floor.get(name)
        row = ["" if value is None else f"{value:.2f}" for value in row]
        print(f"{name:24}{row[0]:>10}{row[1]:>12}{row[2]:>10}")
    if run:
        print(f"{run / 'best.pt'} is a copy of it")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("where", nargs="?", metavar="RUN|CHECKPOINT", help="default: the newest run under runs/")
    add("--follow", action="store_true", help="also score what a run saves from now on, until its last step")
    add("--panorama", action="store_true", help="take the newest run on a cylinder")
    add("--data", metavar="PATH", help="real images (default: those that it was trained on)")
    add("--count", type=positive, default=16384, metavar="N", help="images of each set (default: 16384)")
    text = "TorchScript network for FID and KID, like inception-2015-12-05.pt; the code in it is run"
    add("--features", metavar="FILE", help=text)
    add("--statistics", metavar="FILE", help="FID against these instead of the real images' own")
    add("--save-statistics", metavar="FILE", help="write the real images' statistics for FID, as .npz")
    add("--raw", action="store_true", help="use G's weights themselves, not their moving average")
    add("--json", metavar="FILE", help="append the figures to this file (default: RUN/evaluation.jsonl)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--seed", type=int, default=0, help="of the latents and the measurements (default: 0)")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    return run_command(parser, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
