"""Train variants of COCO-GAN that differ in one thing each, and compare them (section 3.7, table 2).

    python -m experiments.ablations --steps 2000 --seeds 2 --json ablations.json     # toy faces on a CPU
    python -m experiments.ablations --steps 20000 --json photos.json --data ./photos --holdout 2048
    python -m experiments.ablations --json ablations.json --table    # the results so far

Each finished pair of a variant and a seed is in the JSON at once, with a picture of 24 samples beside it. The
same command again does what is missing. All variants of seed 0 come first.

All are trained by coco_gan's train_step on the same data for as many steps. A variant is another Config, or
another class in place of G or D. Their images come from the moving average of G's weights and the same
latents, and are compared with the same real images.

Sources: section 3.7 and table 2; sizes of patches, section 3.1; figure 10. M is in the paper's first version,
section 3.3, table 2 and figures 15 and 16.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from coco_gan import (
    COCOGAN,
    PRESETS,
    Config,
    Discriminator,
    Generator,
    GeneratorBlock,
    Parser,
    choose_device,
    choose_precision,
    draw_batch,
    ema_weight,
    fingerprint_of,
    fold_spectral_norm,
    full_image,
    grid,
    init_weights,
    latents,
    make_adam,
    micro_coordinates,
    natural,
    positive,
    run_command,
    save_picture,
    split,
    to_uint8,
    train_step,
)
from data import CROPS, UserError, load_images, make_folder, release_pages, write_file
from experiments.evaluate import choose_real, compare
from kernels import ConditionalBatchNorm

# ---- Networks in place of G and D ------------------------------------------


def all_coordinates(config: Config) -> torch.Tensor:
    """c'' of all micro patches of an image, row by row: (R·K, c_dim)."""
    i, j = torch.meshgrid(torch.arange(config.R), torch.arange(config.K), indexing="ij")
    return micro_coordinates(config, i.flatten(), j.flatten())


class FullGenerator(nn.Module):
    """G of full images, out of which micro patches are cut: "optimal G", and M.

    It has the blocks of G for S = the image, and one position, whose coordinate is always the same.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.net = Generator(replace(config, N=1, M=1, S=config.height))
        self.register_buffer("coordinates", all_coordinates(config))
        self.register_buffer("coordinate", all_coordinates(self.net.config))  # (1, c_dim)

    def image(self, z, tanh=True):  # (B, z_dim) -> (B, 3, H, W) in [-1, 1]
        return self.net(z, self.coordinate.expand(len(z), -1), tanh)

    def forward(self, z, c_micro, tanh=True):
        config = self.config
        z, b = z.unique_consecutive(dim=0, return_inverse=True)  # patches of one image share its latent
        s = self.image(z, tanh).unflatten(3, (config.K, config.S)).unflatten(2, (config.R, config.S))
        number = torch.cdist(c_micro, self.coordinates).argmin(dim=1)
        return s[b, :, number // config.K, :, number % config.K]  # (B, 3, R, S, K, S) -> (n, 3, S, S)


class MultipleGenerator(nn.Module):
    """One G for each position of a micro patch; only the latent is shared ("multiple G").

    Each normalizes over its own patches of the batch. A G that has none in a step stays as it is.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(Generator(config) for _ in range(config.R * config.K))
        self.register_buffer("coordinates", all_coordinates(config))

    def forward(self, z, c_micro, tanh=True):
        number = torch.cdist(c_micro, self.coordinates).argmin(dim=1)
        order, counts = number.argsort(stable=True), number.bincount(minlength=len(self.parts)).tolist()
        shares = zip(self.parts, z[order].split(counts), c_micro[order].split(counts))
        return torch.cat([G(z, c, tanh) for G, z, c in shares if len(z)])[order.argsort()]


class TwoCBNBlock(GeneratorBlock):
    """CBN, ReLU, ×2, conv, CBN, ReLU, conv: with a CBN before each ReLU, as the authors released."""

    def __init__(self, c_in: int, c_out: int, condition: int, upscale: bool):
        super().__init__(c_in, c_out, condition, upscale)
        self.first_cbn = ConditionalBatchNorm(c_in, condition)

    def forward(self, x, condition):
        h = self.conv1(self.up(F.relu(self.first_cbn(x, condition))))
        h = self.conv2(F.relu(self.cbn(h, condition)))
        return h + self.up(self.shortcut(x))


class TwoCBNGenerator(Generator):
    def __init__(self, config: Config):
        super().__init__(config)
        condition = config.z_dim + config.c_dim
        self.blocks = nn.ModuleList(
            TwoCBNBlock(b.conv1.in_channels, b.conv1.out_channels, condition, b.upscale) for b in self.blocks
        )
        init_weights(self)


class BlindDiscriminator(Discriminator):
    """D without the projection, which does not see the coordinate."""

    def __init__(self, config: Config):
        super().__init__(config)
        del self.projection
        self.projection = lambda c_macro: 0.0


# ---- The variants ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    what: str
    change: Callable[[Config], dict] = lambda config: {}  # fields other than the preset's
    G: type[nn.Module] = Generator
    D: type[nn.Module] = Discriminator
    fid: str = "–"  # in the paper, CelebA 64


def patches(N: int) -> Callable[[Config], dict]:
    """N micro patches down a macro patch of the preset's size. Sides of presets are powers of 2."""
    return lambda c: dict(N=N, M=c.M * N // c.N, S=c.N * c.S // N)


# M, the "straightforward approach", is "a full-sized generator and a patch discriminator", which for a
# partial view would compute the locations of its feature maps only. That gives pixels of the whole image: the
# view is cut out of it here, and batch normalisation sees whole images. Of D the paper says that PD is the
# projection discriminator, and that macro ones see macro patches. It leaves open, and we take, that the
# others see micro patches at their discrete positions, and that there is no head A, for L_S belongs to
# COCO-GAN. That makes m-macro full-g without L_S, though the paper's figures for the two are far apart.
VARIANTS = {
    "coco-gan": Variant("COCO-GAN as the preset is", fid="4.87"),
    "no-ema": Variant("coco-gan, sampled from G itself instead of its moving average"),
    "continuous": Variant("macro patches at any pixel", lambda c: dict(continuous=True), fid="6.13"),
    "full-d": Variant("D sees full images", lambda c: dict(N=c.R, M=c.K), fid="4.05"),
    "full-g": Variant("G makes full images", G=FullGenerator, fid="6.12"),
    "multiple-g": Variant("one G for each position", G=MultipleGenerator, fid="7.26"),
    "with-q": Variant("with the head Q and L_Q", lambda c: dict(guided=True), fid="4.99"),
    "n4": Variant("4 x 4 micro patches in the same macro patch", patches(4)),
    "n8": Variant("8 x 8 micro patches in the same macro patch", patches(8)),
    "n16": Variant("16 x 16 micro patches in the same macro patch", patches(16)),
    "m": Variant(
        "M: full images, D of a micro patch, no coordinates",
        lambda c: dict(N=1, M=1, alpha_s=0.0),
        FullGenerator,
        BlindDiscriminator,
        "72.82",
    ),
    "m-projection": Variant(
        "M with the projection in D", lambda c: dict(N=1, M=1, alpha_s=0.0), FullGenerator, fid="90.87"
    ),
    "m-macro": Variant(
        "M with the projection, D of a macro patch", lambda c: dict(alpha_s=0.0), FullGenerator, fid="60.36"
    ),
    "small-macro": Variant("macro and micro patches of a fourth of the side", lambda c: dict(S=c.S // 4)),
    "two-cbn": Variant("two CBNs a block of G", G=TwoCBNGenerator),
}
# The moving average changes nothing in training, so one training serves both.
SAMPLED_FROM = {"no-ema": "coco-gan"}


def configure(name: str, config: Config) -> Config:
    """The configuration of a variant. Raises: UserError where the preset allows none."""
    if VARIANTS[name].G is FullGenerator and config.height != config.width:
        found = f"images of {config.height} x {config.width} pixels"
        raise UserError(f"--variants {name} makes squares, not {found}; leave it out")
    return replace(config, **VARIANTS[name].change(config)).check()


def start(variant: Variant, config: Config, device: torch.device) -> COCOGAN:
    """A new model with the variant's G and D."""
    gan = COCOGAN(config, device)
    if variant.G is not Generator:
        gan.G = variant.G(config).to(device)
        gan.G_ema = fold_spectral_norm(copy.deepcopy(gan.G)).requires_grad_(False).eval()
        gan.opt_G = make_adam([dict(params=[*gan.G.parameters()], lr=config.lr_g)], config, device)
    if variant.D is not Discriminator:
        gan.D = variant.D(config).to(device)
        parameters = [*gan.D.parameters(), *gan.A.parameters()]
        gan.opt_D = make_adam([dict(params=parameters, lr=config.lr_d)], config, device)
    return gan


def train(gan: COCOGAN, images: torch.Tensor, stored, indices: torch.Tensor) -> list[float]:
    """Train for config.steps; returns the seconds of each step. UserError if a loss is not finite.

    On a CPU they are this thread's processor time, which other programs affect less than the clock's.
    """
    config, seconds = gan.config, []
    clock = time.thread_time if gan.device.type == "cpu" else time.perf_counter
    while gan.step < config.steps:
        started = clock()
        batch = draw_batch(config, images, indices, gan.rng, gan.device)
        losses = train_step(gan, *batch, ema_weight(config, gan.step).to(gan.device)).cpu()
        gan.step += 1
        seconds.append(clock() - started)
        release_pages(stored)
        if not losses.isfinite().all():
            raise UserError(f"a loss is not finite at step {gan.step}")
    return seconds


@torch.inference_mode()
def draw(G: nn.Module, z: torch.Tensor):
    """Full images (B, H, W, 3) uint8: in one pass, or assembled of micro patches."""
    device = next(G.parameters()).device
    return to_uint8(G.image(z.to(device)) if isinstance(G, FullGenerator) else full_image(G, z))


def run(variant: str, names: list[str], config: Config, device, data: tuple, path: Path) -> dict[str, dict]:
    """Train a variant; the figures, or why they failed, of each of the names that are sampled from it.

    Args: data: images, stored, indices and real, as `train` and `compare` take them.
    """
    images, stored, indices, real = data
    gan, results = start(VARIANTS[variant], config, device), {}
    about = {f"parameters_{n}": sum(p.numel() for p in getattr(gan, n).parameters()) for n in "GD"}
    try:
        about["ms"] = 1000 * statistics.median(train(gan, images, stored, indices))
        for name in names:
            raw = name in SAMPLED_FROM
            G = fold_spectral_norm(copy.deepcopy(gan.G)).eval() if raw else gan.G_ema
            save_picture(
                grid(draw(G, latents(range(24), config.z_dim))),
                path.with_name(f"{path.stem}-{name}-{config.seed}.png"),
            )
            made = [draw(G, z) for z in latents(range(len(real)), config.z_dim).split(64)]
            figures = compare(real, np.concatenate(made), config, device=device)
            kept = ("swd",) if isinstance(G, FullGenerator) else ("swd", "seam_ratio")
            results[name] = about | {key: figures[key] for key in kept if key in figures}
    except UserError as error:
        results |= {name: {"failed": str(error)} for name in names if name not in results}
    return results


# ---- The file and the table --------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """The file's settings, floor and results, {"variant seed": figures}. Raises: UserError."""
    try:
        contents = json.loads(path.read_text())
        table(contents)  # what is missing or strange raises all sorts of errors here
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"--json {path} holds no results of this command; name another file") from error
    return contents


def store(path: Path, contents: dict) -> None:
    write_file(path, (json.dumps(contents, indent=1) + "\n").encode())


def mean(values: list[float | None]) -> str:
    """ "mean (lowest to highest)", the mean alone of one value, or a dash of none."""
    values = [value for value in values if value is not None]
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else "–"


def table(contents: dict) -> str:
    """Markdown, a row a variant that has results."""
    about, floor, results = contents["settings"], contents["floor"], contents["results"]
    head = "variant, what differs, seeds, SWD × 1,000, seam ratio, G, D, ms a step, paper's FID".split(", ")
    of_real = [mean([floor.get(name)]) for name in ("swd", "seam_ratio")]
    rows = [head, ["---"] * len(head), ["floor", "more real images", "–", *of_real, "–", "–", "–", "–"]]
    for name, variant in VARIANTS.items():
        own = [result for key, result in results.items() if key.split()[0] == name]
        good, bad = [r for r in own if "failed" not in r], [r["failed"] for r in own if "failed" in r]
        what = variant.what + (f"; **{len(bad)} failed: {bad[0]}**" if bad else "")
        figures = [mean([r["swd"] for r in good]), mean([r.get("seam_ratio") for r in good])]
        sizes = [f"{good[0][net]:,}" if good else "–" for net in ("parameters_G", "parameters_D")]
        ms = f"{statistics.median(r['ms'] for r in good):.1f}" if good else "–"
        if own:
            rows.append([name, what, str(len(own)), *figures, *sizes, ms, variant.fid])
    made = f"{about['steps']:,} steps of preset {about['preset']} on {about['data']}"
    made += f" ({about['device']}, {about['precision']}); {about['count']:,} images against as many"
    made += " that training did not see" if about["holdout"] else " that training saw"
    units = "G, D: parameters. ms: median, of processor time on a CPU. The paper's FID is of CelebA 64."
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", f"Mean (lowest to highest) over the seeds, {made}. {units}"])


def ablations(args: argparse.Namespace) -> None:
    """From arguments to the file and the printed table."""
    path = Path(args.json)
    if args.table:
        print(table(read(path)))
        return
    given = {name: getattr(args, name) for name in ("data", "crop", "holdout", "precision", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    base = Config(**{**PRESETS[args.preset], **given}).check()
    device, names = choose_device(args.device), args.variants or [*VARIANTS]
    configs = {name: configure(name, base) for name in names}
    make_folder(path.parent)
    stored = load_images(base.data, base.height, base.width, crop=base.crop, seed=base.seed, cache=args.cache)
    real, more = choose_real(stored, base.holdout, args.count)
    indices, _ = split(len(stored), base.holdout)
    settings = dict(data=base.data, images=fingerprint_of(stored), steps=args.steps, preset=args.preset)
    settings |= dict(count=len(real), holdout=base.holdout, precision=choose_precision(base, device))
    settings["device"] = device.type
    if path.exists():
        made = read(path)["settings"]
        if different := [name for name, value in settings.items() if made.get(name) != value]:
            found = f"{different[0]} {made.get(different[0])}, and this is {settings[different[0]]}"
            raise UserError(f"--json {path} was made with {found}; name another file")
    else:
        floor = compare(real, more, base, device=device)
        floor = {name: floor[name] for name in ("swd", "seam_ratio") if name in floor}
        store(path, {"settings": settings, "floor": floor, "results": {}})

    images = torch.from_numpy(stored)
    if device.type == "cuda" and stored.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    for seed in range(args.seeds):
        for variant in dict.fromkeys(SAMPLED_FROM.get(name, name) for name in names):
            done, started = read(path)["results"], time.monotonic()
            todo = [name for name in names if SAMPLED_FROM.get(name, name) == variant]
            todo = [name for name in todo if f"{name} {seed}" not in done]
            if not todo:
                continue
            config = replace(configs[todo[0]], seed=seed)
            results = run(variant, todo, config, device, (images, stored, indices, real), path)
            contents = read(path)
            contents["results"] |= {f"{name} {seed}": result for name, result in results.items()}
            store(path, contents)
            for name, result in results.items():
                found = result.get("failed", f"SWD {result.get('swd', math.nan):.2f}")
                print(f"{name}, seed {seed}: {found}, {time.monotonic() - started:.0f} s", flush=True)
    print(table(read(path)))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.ablations", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=positive, default=2000, metavar="N", help="of training each variant (default: 2000)")
    add("--json", required=True, metavar="FILE", help="the results; continue those that it has")
    add("--seeds", type=positive, default=1, metavar="K", help="train with seeds 0 to K-1 (default: 1)")
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        help=f"{', '.join(VARIANTS)} (default: all)",
    )
    add("--preset", default="tiny", choices=PRESETS, help="what they are variants of (default: tiny)")
    add("--data", metavar="PATH", help="folder or zip of photographs (default: the preset's)")
    add("--crop", choices=CROPS, help="default: auto")
    add("--holdout", type=natural, metavar="N", help="images kept out of training, to compare with")
    add("--precision", help="auto, fp32, tf32 or bf16 (default: auto)")
    add("--count", type=positive, default=2048, metavar="N", help="images of each set (default: 2048)")
    add("--table", action="store_true", help="only print the table of the results so far")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    return run_command(parser, ablations, argv)


if __name__ == "__main__":
    sys.exit(main())
