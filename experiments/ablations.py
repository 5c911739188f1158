"""Train variants of COCO-GAN that differ in one thing each, and compare them (section 3.7, table 2).

    python -m experiments.ablations --steps 2000 --seeds 2 --json ablations.json     # toy faces on a CPU
    python -m experiments.ablations --steps 20000 --json photos.json --data ./photos --holdout 2048
    python -m experiments.ablations --json ablations.json --table    # what there is by now

Each finished pair of a variant and a seed is in the JSON at once, with a picture of 24 samples beside it; the
same command again does only what is missing. All variants of seed 0 come first: a whole table, soon.

All of them are trained by coco_gan's own train_step, on the same data, for as many steps. A variant is
another Config, or another class in the place of G or D, and nothing else. Their images come from the running
average of G's weights and always the same latents, and are compared with the same real images.

Sources: section 3.7 and table 2; sizes of patches, section 3.1; figure 10. M is of the paper's first version,
section 3.3, table 2 and figures 15 and 16, which the last version left out.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from coco_gan import (
    PRESETS,
    ConditionalBatchNorm,
    Config,
    Discriminator,
    Generator,
    GeneratorBlock,
    Parser,
    State,
    check_config,
    check_finite,
    choose_device,
    draw_batch,
    fingerprint_of,
    full_image,
    grid,
    initialise,
    latents,
    memory,
    micro_coordinates,
    nearest,
    new_state,
    normalised_for_good,
    positive,
    precision_of,
    release_pages,
    run_command,
    save_picture,
    split,
    to_uint8,
    train_step,
    writing,
)
from data import CROPS, UserError, load_images
from experiments.evaluate import choose_real, write
from experiments.metrics import MOST_IMAGES, in_training

# ----------------------------------------------------------------------------------------------------------
# What stands in the place of G or D, and is called as they are.


def all_places(config: Config) -> torch.Tensor:
    """c'' of all micro patches of an image, row by row: (R·K, c_dim)."""
    i, j = torch.meshgrid(torch.arange(config.R), torch.arange(config.K), indexing="ij")
    return micro_coordinates(config, i.flatten(), j.flatten())


class WholeGenerator(nn.Module):
    """G that makes the whole image in one go, out of which micro patches are cut: "optimal G", and M.

    It has the blocks of G for S = the image, and one position, whose coordinate tells it nothing.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.net = Generator(replace(config, N=1, M=1, S=config.height))
        self.register_buffer("places", all_places(config))
        self.register_buffer("place", all_places(self.net.config))  # (1, c_dim)

    def image(self, z, raw=False):  # (B, z_dim) -> (B, 3, H, W) in [-1, 1]
        return self.net(z, self.place.expand(len(z), -1), raw)

    def forward(self, z, c_micro, raw=False):
        config = self.config
        z, b = z.unique_consecutive(dim=0, return_inverse=True)  # patches of one image share its latent
        s = self.image(z, raw).unflatten(3, (config.K, config.S)).unflatten(2, (config.R, config.S))
        number = torch.cdist(c_micro, self.places).argmin(dim=1)
        return s[b, :, number // config.K, :, number % config.K]  # (B, 3, R, S, K, S) -> (n, 3, S, S)


class MultipleGenerator(nn.Module):
    """One G for each position of a micro patch; only the latent is shared ("multiple G").

    Each normalises over its own patches of the batch, in a corner two of tiny's. A G that has none in a step
    stays as it is.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(Generator(config) for _ in range(config.R * config.K))
        self.register_buffer("places", all_places(config))

    def forward(self, z, c_micro, raw=False):
        number = torch.cdist(c_micro, self.places).argmin(dim=1)
        order, counts = number.argsort(stable=True), number.bincount(minlength=len(self.parts)).tolist()
        shares = zip(self.parts, z[order].split(counts), c_micro[order].split(counts))
        return torch.cat([G(z, c, raw) for G, z, c in shares if len(z)])[order.argsort()]


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
        initialise(self)


class BlindDiscriminator(Discriminator):
    """D without the projection, which is not told where the patch lies."""

    def __init__(self, config: Config):
        super().__init__(config)
        del self.projection
        self.projection = lambda c_macro: 0.0


# ----------------------------------------------------------------------------------------------------------
# The variants


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
    "no-average": Variant("coco-gan, sampled from G itself instead of its running average"),
    "continuous": Variant("macro patches from any pixel on", lambda c: dict(continuous=True), fid="6.13"),
    "full-d": Variant("D sees whole images", lambda c: dict(N=c.R, M=c.K), fid="4.05"),
    "full-g": Variant("G makes whole images", G=WholeGenerator, fid="6.12"),
    "multiple-g": Variant("one G for each position", G=MultipleGenerator, fid="7.26"),
    "with-q": Variant("with the head Q and L_Q", lambda c: dict(guided=True), fid="4.99"),
    "n4": Variant("4 x 4 micro patches in the same macro patch", patches(4)),
    "n8": Variant("8 x 8 micro patches in the same macro patch", patches(8)),
    "n16": Variant("16 x 16 micro patches in the same macro patch", patches(16)),
    "m": Variant(
        "M: whole images, D of a micro patch, no coordinates",
        lambda c: dict(N=1, M=1, alpha_s=0.0),
        WholeGenerator,
        BlindDiscriminator,
        "72.82",
    ),
    "m-projection": Variant(
        "M with the projection in D", lambda c: dict(N=1, M=1, alpha_s=0.0), WholeGenerator, fid="90.87"
    ),
    "m-macro": Variant(
        "M with the projection, D of a macro patch", lambda c: dict(alpha_s=0.0), WholeGenerator, fid="60.36"
    ),
    "small-macro": Variant("macro and micro patches of a fourth of the side", lambda c: dict(S=c.S // 4)),
    "two-cbn": Variant("two CBNs a block of G", G=TwoCBNGenerator),
}
# The average changes nothing in training, so one training serves both.
SAMPLED_FROM = {"no-average": "coco-gan"}


def configure(name: str, config: Config) -> Config:
    """The configuration of a variant; UserError where the preset allows none."""
    try:
        if VARIANTS[name].G is WholeGenerator and config.height != config.width:
            raise UserError(f"G makes squares, and whole images are {config.height} x {config.width} pixels")
        config = replace(config, **VARIANTS[name].change(config))
        check_config(config)
    except UserError as error:
        raise UserError(f"--variants {name}: {error}; leave it out, or give another --preset") from error
    return config


def start(variant: Variant, config: Config, device: torch.device) -> State:
    """A new state with the variant's G and D in their places."""
    state, adam = new_state(config, device), torch.optim.Adam
    if variant.G is not Generator:
        state.G = variant.G(config).to(device)
        state.G_average = normalised_for_good(copy.deepcopy(state.G)).requires_grad_(False).eval()
        state.opt_G = adam(state.G.parameters(), **state.opt_G.defaults)
    if variant.D is not Discriminator:
        state.D = variant.D(config).to(device)
        state.opt_D = adam([*state.D.parameters(), *state.A.parameters()], **state.opt_D.defaults)
    return state


def train(state: State, images: torch.Tensor, stored, numbers: torch.Tensor) -> list[float]:
    """Train for config.steps; returns the seconds of each step. UserError when a number is not finite.

    On a CPU they are this thread's processor time, which other programs lengthen less than the clock's.
    """
    config, losses, seconds = state.config, [], []
    clock = time.thread_time if state.device.type == "cpu" else time.perf_counter
    while state.step < config.steps:
        started = clock()
        batch = draw_batch(config, images, numbers, state.rng, state.device)
        losses.append(train_step(state, batch).cpu())  # waits for a GPU
        seconds.append(clock() - started)
        release_pages(stored)
        if len(losses) == 100 or state.step == config.steps:
            check_finite(torch.stack(losses).double(), state, Path(os.devnull))  # where no checkpoint is
            losses.clear()
    return seconds


@torch.inference_mode()
def draw(G: nn.Module, z: torch.Tensor):
    """Full images (B, H, W, 3) uint8: one pass of a whole G, or assembled of micro patches."""
    device = next(G.parameters()).device
    return to_uint8(G.image(z.to(device)) if isinstance(G, WholeGenerator) else full_image(G, z))


def compare(G: nn.Module, real) -> dict[str, float]:
    """swd, the sliced Wasserstein distance x 1,000, and seam_ratio of images put together of patches.

    Raises: UserError for images without contrast, which have no distance.
    """
    config, device = G.config, next(G.parameters()).device

    def generate(first: int, last: int):
        return draw(G, latents(range(first, last), config.z_dim))

    figures = in_training(generate, real, config.S, config.closed, device)
    if "swd" not in figures:
        raise UserError("the generated images have a channel of one value")
    if isinstance(G, WholeGenerator):
        figures.pop("seam_ratio", None)
    return figures


def run(variant: str, names: list[str], config: Config, device, data: tuple, path: Path) -> dict[str, dict]:
    """Train a variant; the figures, or why they failed, of each of the names that are sampled from it.

    Args: data: images, stored, numbers and real, as `train` and `compare` take them.
    """
    images, stored, numbers, real = data
    state, results = start(VARIANTS[variant], config, device), {}
    about = {f"parameters_{n}": sum(p.numel() for p in getattr(state, n).parameters()) for n in "GD"}
    try:
        about["ms"] = 1000 * statistics.median(train(state, images, stored, numbers))
    except UserError as error:
        return {name: {"failed": str(error).split(";")[0]} for name in names}
    for name in names:
        raw = name in SAMPLED_FROM
        G = normalised_for_good(copy.deepcopy(state.G)).eval() if raw else state.G_average
        picture = path.with_name(f"{path.stem}-{name}-{config.seed}.png")
        with writing("--json", picture):
            save_picture(grid(draw(G, latents(range(24), config.z_dim))), picture)
        try:
            results[name] = {**compare(G, real), **about}
        except UserError as error:
            results[name] = {"failed": str(error)}
    return results


# ----------------------------------------------------------------------------------------------------------
# The file and the table


def read(path: Path) -> dict:
    """The file's settings, floor and results, {"variant seed": figures}; UserError if it is another file."""
    if not os.path.isfile(path):  # reading a device or a named pipe would never end
        raise UserError(f"--json {path} does not exist; leave out --table to make it")
    try:
        contents = json.loads(path.read_text())
        table(contents)  # whatever is missing or strange comes up here, as all sorts of errors
    except Exception as error:
        raise UserError(f"--json {path} holds no results of this command; name another file") from error
    return contents


def store(path: Path, contents: dict) -> None:
    write("--json", str(path), (json.dumps(contents, indent=1) + "\n").encode())


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
    if not 2 <= args.count <= MOST_IMAGES:
        raise UserError(f"--count {args.count} is out of range; give 2 to {MOST_IMAGES}")
    if args.preset not in PRESETS:
        hint = nearest(args.preset, PRESETS)
        raise UserError(f"--preset {args.preset} is unknown{hint}; give {', '.join(PRESETS)}")
    given = {name: getattr(args, name) for name in ("data", "crop", "holdout", "precision", "steps")}
    base = Config(**{**PRESETS[args.preset], **{k: value for k, value in given.items() if value is not None}})
    check_config(base)
    configs, device = {}, choose_device(args.device)
    for name in args.variants.split(",") if args.variants else VARIANTS:
        if name not in VARIANTS:
            hint = nearest(name, VARIANTS)
            raise UserError(f"--variants {name} is unknown{hint}; give some of {','.join(VARIANTS)}")
        try:
            configs[name] = configure(name, base)
        except UserError as error:
            if args.variants:
                raise
            print(f"left out: {error}")
    if os.path.isdir(path) or not os.access(path.absolute().parent, os.W_OK):
        why = "it is a folder" if os.path.isdir(path) else "its folder is missing or read-only"
        raise UserError(f"--json {path} cannot be written: {why}; name another file")

    how = dict(crop=base.crop, seed=base.seed, cache=args.cache)
    stored = load_images(base.data, base.height, base.width, **how)
    (real, more), (numbers, _) = (
        choose_real(stored, base.holdout, args.count),
        split(len(stored), base.holdout),
    )
    if len(real) < 2:
        raise UserError(f"--data {base.data} has {len(stored)} images: too few for two sets of 2; give more")
    if len(real) < args.count:
        print(f"note: --count {args.count:,} is more than the real images allow; it is now {len(real):,}")
    settings = dict(data=base.data, images=fingerprint_of(stored), steps=args.steps, preset=args.preset)
    settings |= dict(
        count=len(real), holdout=base.holdout, precision=precision_of(base, device), device=device.type
    )

    if os.path.exists(path):
        made = read(path)["settings"]
        for name, value in settings.items():
            if made.get(name) != value:
                found = f"--json {path} was made with {name} {made.get(name)}, and this is {name} {value}"
                raise UserError(f"{found}; name another file")
    else:
        # The floor: more real images in the place of those of latents from MOST_IMAGES on.
        def others(first: int, last: int):
            return more[first - MOST_IMAGES : last - MOST_IMAGES]

        floor = in_training(others, real, base.S, base.closed, device)
        if "swd" not in floor:
            raise UserError(f"--data {base.data}: images under 16 pixels or of one colour have no distance")
        store(path, {"settings": settings, "floor": floor, "results": {}})

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        images = torch.from_numpy(stored)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if stored.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)
    for seed in range(args.seeds):
        for variant in dict.fromkeys(SAMPLED_FROM.get(name, name) for name in configs):
            done, started = read(path)["results"], time.monotonic()
            names = [name for name in configs if SAMPLED_FROM.get(name, name) == variant]
            names = [name for name in names if f"{name} {seed}" not in done]
            if not names:
                continue
            with memory(f"memory of {device} is full at {variant}; leave it out of --variants"):
                config = replace(configs[names[0]], seed=seed)
                results = run(variant, names, config, device, (images, stored, numbers, real), path)
            contents = read(path)
            contents["results"] |= {f"{name} {seed}": result for name, result in results.items()}
            store(path, contents)
            for name, result in results.items():
                found = result.get("failed", f"SWD {result.get('swd', 0):.2f}")
                print(f"{name}, seed {seed}: {found}, {time.monotonic() - started:.0f} s", flush=True)
    print(table(read(path)))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.ablations", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=positive, default=2000, metavar="N", help="of training each variant (default: 2000)")
    add("--json", required=True, metavar="FILE", help="the results; go on with those that it has")
    add("--seeds", type=positive, default=1, metavar="K", help="train with seeds 0 to K-1 (default: 1)")
    add("--variants", metavar="LIST", help=f"some of {','.join(VARIANTS)} (default: all)")
    add("--preset", default="tiny", metavar="NAME", help="what they are variants of (default: tiny)")
    add("--data", metavar="PATH", help="folder or zip of photographs (default: the preset's)")
    add("--crop", metavar="str", help=f"{', '.join(CROPS)} (default: center)")
    add("--holdout", type=int, metavar="N", help="images kept out of training, to compare with (default: 0)")
    add("--precision", metavar="str", help="auto, fp32, tf32 or bf16 (default: auto)")
    add("--count", type=int, default=2048, metavar="N", help="images of each set compared (default: 2048)")
    add("--table", action="store_true", help="only print the table of what there is by now")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")

    def act(args: argparse.Namespace) -> None:
        try:
            ablations(args)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on with what {args.json} lacks")
            raise

    # UserError is a ValueError; the others are metrics.py's, of images that it cannot compare.
    return run_command(parser, act, argv, ValueError)


if __name__ == "__main__":
    sys.exit(main())
