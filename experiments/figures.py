"""Draw what the paper's figures show: between latents, between coordinates, and two latents in one picture.

    python -m experiments.figures interpolate --steps 8 --seed 1,2    # figures 5 and 23
    python -m experiments.figures interpolate --gif loop.gif          # the same, as a loop
    python -m experiments.figures coordinates --steps 16              # figures 6 and 25
    python -m experiments.figures mix --seed 1,2                      # two latents in one picture

G is asked for micro patches, each with a latent vector and a position of its own: z between those of two
seeds, positions between those that it was trained at, or a z that changes from column to column.
Source: COCO-GAN, section 3.2 and appendices G and I; `mix`: LocoGAN (Struski et al., 2020), section 4.3.
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from coco_gan import (
    LONGEST_SIDES,
    PICTURES,
    Config,
    Generator,
    Parser,
    check_panorama,
    choose_device,
    find_checkpoint,
    free_name,
    full_image,
    grid,
    latents,
    load,
    memory,
    merge_patches,
    micro_patches,
    parse_seeds,
    picture_folder,
    save_picture,
    to_uint8,
    writing,
)
from data import UserError
from experiments.view import save_animation

MOST_PIXELS = 2**26  # of a figure, about: all of it is in memory


def slerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """From a to b on an arc: the direction turns evenly, the length changes evenly.

    Args: a, b (z_dim,); weight (n,) in [0, 1], 0 for a and 1 for b, which come out to the bit: float64 is
    rounded to float32. Where there is no arc, because a and b lie on one line, it is that line.
    Returns: (n, z_dim) float32. Source: section 3.2, "slerp-path".
    """
    a, b, weight = a.double(), b.double(), weight.double().unsqueeze(1)
    u, v = a / a.norm(), b / b.norm()
    angle = torch.acos((u @ v).clamp(-1, 1))
    if not angle.sin() > 1e-6:
        return a.lerp(b, weight).float()
    direction = (torch.sin((1 - weight) * angle) * u + torch.sin(weight * angle) * v) / angle.sin()
    return (direction * a.norm().lerp(b.norm(), weight)).float()


def positions(count: int, steps: int, closed: bool) -> torch.Tensor:
    """Evenly spaced from the first trained position 0 to the last, count-1: (steps,) float32.

    Closed: once round, from 0 towards count, which is 0 again and left out. Trained positions are whole
    numbers to the bit: all of them if count-1 divides steps-1; closed, if count divides steps.
    """
    return torch.arange(steps) * (count if closed else count - 1) / (steps if closed else steps - 1)


def blend_weights(K: int, border: int, blend: int, closed: bool) -> torch.Tensor:
    """How much of B there is at the K+1 edges of K columns, of A and then B: (K+1,), from 0 for A to 1 for B.

    Args: border: the edge between A and B, where it is 0.5; blend: columns on either side of it until it is
    0 or 1. Closed: edge K is edge 0 again, and a border as well, which leads from B back to A.
    """
    edge = torch.arange(K + 1)
    inside = edge - border  # how far within B, in columns; negative within A
    if closed:
        inside = torch.where(inside > 0, inside.minimum(K - edge), inside.maximum(-edge))
    return (inside / (2 * blend) + 0.5).clamp(0, 1)


def faded_image(G: Generator, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """A full image whose columns of micro patches have latents of their own: (H, W, 3) uint8.

    Args: left, right (K, z_dim): those at either edge of each column. Its patches are made with both, and
    the one fades into the other: a latent per column only would show in their colours as steps.
    """
    R, K, S = G.config.R, G.config.K, G.config.S
    fade = ((torch.arange(S) + 0.5) / S).to(next(G.parameters()).device)  # (S,), along x
    rows = []
    for i in range(R):
        first, second = (micro_patches(G, z, torch.full((K,), i), torch.arange(K)) for z in (left, right))
        rows.append(first.lerp(second, fade))  # (K, 3, S, S)
    return to_uint8(merge_patches(torch.cat(rows), R, K))[0]


def patches(G: Generator, z: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> np.ndarray:
    """Micro patches of one latent (z_dim,), in rows i and columns j that broadcast to (r, c): a picture."""
    i, j = torch.broadcast_tensors(i, j)
    rows = [to_uint8(micro_patches(G, z.expand(len(a), -1), a, b)) for a, b in zip(i, j)]
    return grid(np.concatenate(rows), i.shape[1])


def sheet(rows) -> np.ndarray:
    """A picture of pictures (r, c, h, w, 3) uint8: a row of it for each row of them, or a column if w > h."""
    rows = np.array(rows)
    if rows.shape[3] > rows.shape[2]:
        rows = rows.swapaxes(0, 1)
    return grid(rows.reshape(-1, *rows.shape[2:]), rows.shape[1])


# ----------------------------------------------------------------------------------------------------------
# The commands. Each returns a picture (h, w, 3) uint8, or a list of them for an animation.
# ----------------------------------------------------------------------------------------------------------


def interpolate(G: Generator, args: argparse.Namespace) -> np.ndarray | list[np.ndarray]:
    """Full images, or one micro patch, on the slerp path from each latent to the next (figures 5 and 23).

    A strip a pair, both ends included. As a loop, the last latent leads to the first again.
    """
    config, steps = G.config, args.steps
    if args.at and not args.patches:
        raise UserError(f"--at {args.at} is the place of a micro patch; add --patches, or leave it out")
    i, j = place(args.at, config)
    z = chosen(args, config, steps * (config.S**2 if args.patches else config.height * config.width), least=2)

    def draw(z: torch.Tensor) -> list[np.ndarray]:
        if args.patches:
            return [*to_uint8(micro_patches(G, z, torch.full((len(z),), i), torch.full((len(z),), j)))]
        return [to_uint8(full_image(G, one))[0] for one in z.split(1)]

    weight = torch.linspace(0, 1, steps, dtype=torch.float64)
    if args.gif:
        return [frame for a, b in zip(z, z.roll(-1, 0)) for frame in draw(slerp(a, b, weight[:-1]))]
    return sheet([draw(slerp(a, b, weight)) for a, b in zip(z, z[1:])])


def coordinates(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """Micro patches of one latent at and between the trained positions (figures 6 and 25), a block a latent.

    On top those along a row of the image, at the left those down a column, with a line beside the trained
    ones (figure 6); between them those of all pairs of these coordinates (figure 25).
    """
    config, S = G.config, G.config.S
    i, j = (torch.tensor([[index]]) for index in place(args.at, config))
    y, x = (positions(n, args.steps, closed) for n, closed in zip((config.R, config.K), config.closed))
    first, blocks = S + 8, []  # first: where the patches of figure 25 begin, in both directions
    for z in chosen(args, config, (args.steps + 1) ** 2 * S**2):
        inner = patches(G, z, y[:, None], x[None])
        block = np.full((first + len(inner), first + len(inner), 3), 255, np.uint8)
        block[first:, first:] = inner
        block[:S, first:] = patches(G, z, i, x[None])
        block[first:, :S] = patches(G, z, y[:, None], j)
        for k in range(args.steps):
            along = slice(first + k * (S + 2), first + k * (S + 2) + S)
            block[S + 3, along] = 255 * (x[k] % 1 != 0)
            block[along, S + 3] = 255 * (y[k] % 1 != 0)
        blocks.append(block)
    return grid(np.array(blocks), gap=S)


def mix(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """Two latents A and B in one picture: A, A beside B, A that becomes B from column to column, and B.

    A strip for each latent and the next. On a closed axis, B becomes A again where the image meets itself.
    Source: LocoGAN, section 4.3, "Transfer", and figure 11, which mixes its "master plan" in this way.
    """
    config, K, closed = G.config, G.config.K, G.config.closed[1]
    least = 2 if closed else 1  # where both edges of a column are borders, neither A nor B would be seen
    if K < 2 * least:
        found = f"--checkpoint {args.checkpoint} is {K} micro patches wide, on a {config.topology}"
        raise UserError(f"{found}; mix needs {2 * least} there, give another")
    for name, low, high in (("border", least, K - least), ("blend", 1, K)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value} is out of range; give {low} to {high} micro patches")
    z = chosen(args, config, 4 * config.height * config.width, least=2)
    border = args.border or K // 2
    weight = blend_weights(K, border, args.blend or max(1, min(border, K - border) // 2), closed)
    hard = (torch.arange(K) >= border).float()
    four = [(w, w) for w in (torch.zeros(K), hard, torch.ones(K))]  # B's part at the left and right edges
    four.insert(2, (weight[:-1], weight[1:]))
    pairs = [[faded_image(G, *(slerp(a, b, w) for w in edges)) for edges in four] for a, b in zip(z, z[1:])]
    return sheet(pairs)


def place(text: str | None, config: Config) -> tuple[int, int]:
    """ "row,column" of a micro patch, or the one in the middle, the upper left of four."""
    R, K = config.R, config.K
    if text is None:
        return (R - 1) // 2, (K - 1) // 2
    if not re.fullmatch(r"\d{1,9},\d{1,9}", text):
        raise UserError(f"--at {text} is no place; give row,column of a micro patch, like {R - 1},0")
    i, j = map(int, text.split(","))
    if not (i < R and j < K):
        raise UserError(f"--at {text} is outside of the image; give 0 to {R - 1} and 0 to {K - 1}")
    return i, j


def chosen(args: argparse.Namespace, config: Config, pixels: int, least: int = 1) -> torch.Tensor:
    """The latent vectors of --seed, (n, z_dim), if enough, and not too many at so many pixels each."""
    seeds = parse_seeds(args.seed, None)
    if len(seeds) < least:
        raise UserError(f"--seed {args.seed} is one seed, and {args.command} needs {least} or more, like 1,2")
    if len(seeds) * pixels > MOST_PIXELS:
        given = " ".join(f"--{name} {getattr(args, name)}" for name in ("steps", "seed") if name in args)
        raise UserError(f"{given} makes {len(seeds) * pixels} pixels; give fewer, for at most {MOST_PIXELS}")
    return latents(seeds, config.z_dim)


def figure(args: argparse.Namespace) -> None:
    """From a checkpoint to the figure of a command, in a file."""
    if "steps" in args and not 2 <= args.steps <= 1000:
        raise UserError(f"--steps {args.steps} is out of range; give 2 to 1000")
    device, animated = choose_device(args.device), getattr(args, "gif", None)
    torch.backends.cudnn.allow_tf32 = False  # a convolution's rounding must not depend on the batch size
    path = find_checkpoint(args.checkpoint, panorama=args.panorama)
    flag, endings = ("--gif", (".gif", ".webp")) if animated else ("--out", PICTURES)
    out = Path(animated or args.out or free_name(picture_folder(path) / args.command))
    ending = out.suffix.lower()
    if ending not in endings:
        raise UserError(f"{flag} {out} has no known ending; give {', '.join(endings)}")
    if os.path.exists(out) and not args.force:
        raise UserError(f"{flag} {out} exists already; name another, or add --force to replace it")
    G, args.checkpoint = load(path, device, raw=args.raw), path
    check_panorama(args, G.config, path)

    with memory(f"memory of {device} is full; try a smaller figure"), writing(flag, out):
        picture = args.draw(G, args)
        height, width, _ = picture[0].shape if animated else picture.shape
        most = LONGEST_SIDES.get(ending, 2**31)
        if max(height, width) > most:
            found = f"{flag} {out} would be {width} x {height} pixels, and {ending} holds {most} a side"
            raise UserError(f"{found}; give another ending, or a smaller figure")
        out.parent.mkdir(parents=True, exist_ok=True)
        (save_animation if animated else save_picture)(picture, out)
    print(out)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user's, or 128 + signal."""
    name = "python -m experiments.figures"
    parser = Parser(prog=name, description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    adders = {}
    for draw, seed in ((interpolate, "1,2"), (coordinates, "1"), (mix, "1,2")):
        text = draw.__doc__.splitlines()[0]
        command = commands.add_parser(draw.__name__, help=text, description=text, allow_abbrev=False)
        command.set_defaults(draw=draw)
        adders[draw] = add = command.add_argument
        add("--checkpoint", metavar="FILE|RUN", help="what to draw from (default: the newest under runs/)")
        add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
        add("--seed", default=seed, metavar="LIST", help=f"which latents, like 0,1,4-6 (default: {seed})")
        add_one = command.add_mutually_exclusive_group().add_argument
        add_one("--out", metavar="FILE", help=f"a picture (default: {draw.__name__}.png … in the run)")
        if draw is interpolate:
            add_one("--gif", metavar="FILE", help="a loop through all latents instead: .gif or .webp")
        add("--force", action="store_true", help="replace a picture that exists")
        add("--raw", action="store_true", help="use G's weights themselves, not their running average")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add = adders[interpolate]
    add("--steps", type=int, default=8, metavar="N", help="images of a strip, with both ends (default: 8)")
    add("--patches", action="store_true", help="draw one micro patch, instead of full images")
    add("--at", metavar="ROW,COLUMN", help="which micro patch (default: in the middle)")
    add = adders[coordinates]
    add("--steps", type=int, default=16, metavar="N", help="coordinates down, and across (default: 16)")
    add("--at", metavar="ROW,COLUMN", help="where the two strips are taken (default: in the middle)")
    add = adders[mix]
    add("--border", type=int, metavar="N", help="micro patches left of it (default: half of the width)")
    text = "micro patches either side of it, in which A becomes B (default: half of the narrower side)"
    add("--blend", type=int, metavar="N", help=text)
    try:
        figure(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
