"""Draw what the paper's figures show: between latents, between coordinates, two latents in one, from a patch.

    python -m experiments.figures interpolate --steps 8 --seed 1,2    # figures 5 and 23
    python -m experiments.figures interpolate --gif loop.gif          # the same, as a loop
    python -m experiments.figures coordinates --steps 16              # figures 6 and 25
    python -m experiments.figures mix --seed 1,2                      # two latents in one picture
    python -m experiments.figures guided photo.jpg --at 16,16         # figures 9 and 28, of train --guided

G is asked for micro patches, each with a latent vector and a position of its own: z between those of two
seeds, positions between those that it was trained at, a z that changes from column to column, or a z that Q
estimates from a part of a photograph.
Source: COCO-GAN, sections 3.2 and 3.5, appendices G, I and K; `mix`: LocoGAN (Struski et al., 2020), section
4.3.
"""

import argparse
import io
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coco_gan import (
    BLUE,
    LONGEST_SIDES,
    PICTURES,
    RED,
    Config,
    Discriminator,
    Generator,
    Head,
    Parser,
    check_panorama,
    choose_device,
    find_checkpoint,
    fitting,
    framed,
    free_name,
    full_image,
    grid,
    latents,
    load,
    memory,
    merge_patches,
    micro_coordinates,
    micro_patches,
    normalised_for_good,
    parse_seeds,
    picture_folder,
    read_checkpoint,
    save_picture,
    to_uint8,
    writing,
)
from data import ENDINGS, FORMATS, UserError, decode_image
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


def guided(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """A full image of which a macro patch of a photograph is to be a part (figures 9 and 28), a row each.

    In a row: the photograph with the place of its patch in red and the place that A predicts in blue; the
    patch x'; the generated macro patch at the predicted place; the full image, with that place in blue.
    z = Q(x'); with --refine, what some steps of Adam on the pixels make of it (which the paper does not do).
    """
    config, path = G.config, args.checkpoint
    height, width = config.N * config.S, config.M * config.S
    D, A, Q = load_judge(path, next(G.parameters()).device)
    names, photos, patches, places = read_photos(args, config)
    device = next(G.parameters()).device
    x_macro = torch.from_numpy(patches).to(device).permute(0, 3, 1, 2) / 127.5 - 1  # (n, 3, N·S, M·S)
    with torch.inference_mode():
        _, h = D(x_macro, torch.zeros(len(x_macro), config.c_dim, device=device))
        z, predicted = Q(h), positions_of(A(h).cpu(), config)
    # Where the photograph is the patch itself, nobody knows its place but A.
    known = torch.tensor([[math.nan, math.nan] if at is None else at for at in places]) / config.S
    known = torch.where(known.isnan(), predicted, known)
    refined, before, after = refine(G, z.clone(), x_macro, known, args.refine)

    rows = []
    s_macro = to_uint8(macro_patches(G, refined, predicted).detach())
    for b, (photo, at) in enumerate(zip(photos, places)):
        top, left = (predicted[b] * config.S).round().int().tolist()
        full = to_uint8(full_image(G, refined[b : b + 1]))[0]
        if photo is None:
            photo = np.full_like(full, 255)
            where = np.ix_(
                np.arange(top, top + height) % config.height, np.arange(left, left + width) % config.width
            )
            photo[where] = patches[b]
        else:
            photo = boxed(photo, *at, config, RED)
        photo, full = (boxed(image, top, left, config, BLUE) for image in (photo, full))
        row = np.full((config.height, 2 * (config.width + width) + 24, 3), 255, np.uint8)
        x = 0
        for panel in (photo, patches[b], s_macro[b], full):
            row[: panel.shape[0], x : x + panel.shape[1]] = panel
            x += panel.shape[1] + 8
        rows.append(row)
        told = "" if at is None else f"at {at[0]},{at[1]}, "
        told += f"predicted at {top},{left}; error {before[b]:.1f}"
        print(f"{names[b]}: {told}" + (f", refined {after[b]:.1f}" if args.refine else "") + " of 255")
    return grid(np.array(rows), 1, gap=8)


def load_judge(path: Path, device) -> tuple[Discriminator, Head, Head]:
    """D, A and Q of a checkpoint, to be called as they are: D(x', c') gives h; A(h) is c', Q(h) is z."""
    contents, config = read_checkpoint(path)
    if not config.guided:
        raise UserError(
            f"{path} was trained without the head Q; train with: python coco_gan.py train --guided"
        )
    if "Q" not in contents:
        raise UserError(f"{path} holds averaged weights only; give the run that it was taken from")
    D = Discriminator(config)
    nets = dict(D=D, A=Head(D.linear.in_features, config.c_dim), Q=Head(D.linear.in_features, config.z_dim))
    for name, net in nets.items():
        with fitting(path):
            net.load_state_dict(contents[name])
        normalised_for_good(net).to(device).requires_grad_(False).eval()
    return tuple(nets.values())


def positions_of(c_macro: torch.Tensor, config: Config) -> torch.Tensor:
    """The inverse of `macro_coordinates`: (B, c_dim) -> (B, 2), in micro patches, fractions included."""
    ij, k = [], 0
    for count, closed in zip(config.places, config.closed):
        if closed:
            cos, sin = c_macro[:, k], c_macro[:, k + 1]
            ij.append((torch.atan2(sin, cos) / math.pi + 1) / 2 * count % count)
        else:
            ij.append((c_macro[:, k] + 1) / 2 * (count - 1))
        k += 2 if closed else 1
    return torch.stack(ij, dim=1)


def macro_patches(G: Generator, z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """s' at positions (B, 2) in micro patches, any fraction: (B, z_dim) -> (B, 3, N·S, M·S), differentiable."""
    N, M = G.config.N, G.config.M
    n, m = torch.meshgrid(torch.arange(N), torch.arange(M), indexing="ij")
    i, j = at[:, :1] + n.flatten(), at[:, 1:] + m.flatten()  # (B, N·M)
    c_micro = micro_coordinates(G.config, i, j).flatten(0, 1).to(z.device)
    return merge_patches(G(z.repeat_interleave(N * M, dim=0), c_micro), N, M)


def refine(G: Generator, z: torch.Tensor, x_macro: torch.Tensor, at: torch.Tensor, steps: int):
    """Move each z (B, z_dim) so that its macro patch comes closer to x' (B, 3, N·S, M·S), by steps of Adam.

    Returns: the best z in [-1, 1] on the way; its error and that of the first: the root mean square
    difference of the pixels, 0 to 255, (B,).
    """
    with torch.enable_grad():
        z = z.requires_grad_()
        adam, best, first, least = torch.optim.Adam([z], lr=0.05), z.detach().clone(), None, None
        for step in range(steps + 1):
            error = (macro_patches(G, z, at) - x_macro).square().flatten(1).mean(dim=1)  # (B,)
            if step == 0:
                first, least = error.detach(), error.detach().clone()
            better = error.detach() < least
            best[better], least[better] = z.detach()[better], error.detach()[better]
            adam.zero_grad()
            error.sum().backward()
            adam.step()
            with torch.no_grad():
                z.clamp_(-1, 1)
    return best, *(127.5 * error.sqrt() for error in (first, least))


def boxed(image: np.ndarray, top: int, left: int, config: Config, colour) -> np.ndarray:
    """The image (H, W, 3) with the outline of the macro patch at (top, left), round the borders that meet."""
    (H, W), down, across = image.shape[:2], *config.closed
    shift = (H // 2 - top if down else 0, W // 2 - left if across else 0)
    image = np.roll(image, shift, axis=(0, 1))[None]
    size = config.N * config.S, config.M * config.S
    image = framed(image, top + shift[0], left + shift[1], *size, colour)[0]
    return np.roll(image, (-shift[0], -shift[1]), axis=(0, 1))


def read_photos(args: argparse.Namespace, config: Config):
    """The photographs of a file or a folder: names, images (H, W, 3) or None, patches (n, N·S, M·S, 3), places.

    A photograph of exactly a macro patch's size is one, without a known place; others become full images, as
    for training, and the patch is cut out at --at. Those that cannot be used are named on a folder's way.
    """
    height, width = config.N * config.S, config.M * config.S
    at = parse_place(args.at, config)
    path = Path(args.photo)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and p.name[0] != ".")
        if not paths:
            raise UserError(f"{path} holds no image; looked for {' '.join(ENDINGS)} in any case")
    else:
        paths = [path]
    most = MOST_PIXELS // (2 * config.height * config.width)
    if len(paths) > most:
        raise UserError(f"{path} holds {len(paths)} images; a sheet has room for {most}")
    names, photos, patches, places = [], [], [], []
    for path in paths:
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                w, h = image.size
            if w < width or h < height:
                raise ValueError(f"is {w} x {h}, smaller than a macro patch of {width} x {height}")
            if (w, h) == (width, height):
                photo, patch, place = None, decode_image(data, height, width, "squash"), None
            else:
                crop = "squash" if config.crop == "squash" else "center"
                crop = "celeba" if config.crop.startswith("celeba") and (w, h) == (178, 218) else crop
                photo, place = decode_image(data, config.height, config.width, crop), at
                rows, columns = (np.arange(p, p + side) for p, side in zip(at, (height, width)))
                patch = photo[np.ix_(rows % config.height, columns % config.width)]
        except Exception as error:  # whatever Pillow raises for what it cannot read
            why = "is no image that can be read"
            if isinstance(error, ValueError):
                why = str(error)
            elif isinstance(error, OSError) and error.strerror:
                why = f"cannot be read: {error.strerror}"
            if path == Path(args.photo):
                raise UserError(f"{path} {why}; give another photograph")
            print(f"skipped: {path} {why}", file=sys.stderr)
            continue
        for values, value in zip((names, photos, patches, places), (path.name, photo, patch, place)):
            values.append(value)
    if not names:
        raise UserError(f"{args.photo} holds no photograph that can be used")
    return names, photos, np.stack(patches), places


def parse_place(text: str | None, config: Config) -> tuple[int, int]:
    """ "top,left" of a macro patch in pixels of a full image, or the one in the middle."""
    sizes = (config.height, config.N * config.S), (config.width, config.M * config.S)
    last = [size - 1 if closed else size - part for (size, part), closed in zip(sizes, config.closed)]
    if text is None:
        return tuple((size - part) // 2 for size, part in sizes)
    if not re.fullmatch(r"\d{1,9},\d{1,9}", text):
        raise UserError(f"--at {text} is no place; give top,left in pixels, like {last[0]},0")
    top, left = map(int, text.split(","))
    if top > last[0] or left > last[1]:
        raise UserError(f"--at {text} is outside of the image; give 0 to {last[0]} and 0 to {last[1]}")
    return top, left


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
    for name, low, high in (("steps", 2, 1000), ("refine", 0, 10_000)):
        if name in args and not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)} is out of range; give {low} to {high}")
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
    for draw, seed in ((interpolate, "1,2"), (coordinates, "1"), (mix, "1,2"), (guided, None)):
        text = draw.__doc__.splitlines()[0]
        command = commands.add_parser(draw.__name__, help=text, description=text, allow_abbrev=False)
        command.set_defaults(draw=draw)
        adders[draw] = add = command.add_argument
        add("--checkpoint", metavar="FILE|RUN", help="what to draw from (default: the newest under runs/)")
        add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
        if seed is not None:
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
    add = adders[guided]
    add("photo", metavar="PHOTO", help="a photograph, or a folder of them")
    add(
        "--at", metavar="TOP,LEFT", help="place of the patch in the image, in pixels (default: in the middle)"
    )
    add("--refine", type=int, default=0, metavar="N", help="steps that improve z on the pixels (default: 0)")
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
