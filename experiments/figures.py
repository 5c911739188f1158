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
import math
import os
import re
import sys
import warnings
from dataclasses import replace
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
    draw_places,
    find_checkpoint,
    fitting,
    free_name,
    full_image,
    grid,
    latent,
    latents,
    load,
    memory,
    merge_patches,
    micro_matrix,
    micro_patches,
    normalised_for_good,
    parse_seeds,
    picture_folder,
    read_checkpoint,
    run_command,
    save_picture,
    tell_newest,
    to_uint8,
    writing,
)
from data import ENDINGS, UserError, decode_image, read_file, read_rgb, reason_of
from experiments.view import save_animation

MOST_PIXELS = 2**26  # of a figure, about: all of it is in memory
WHITE = (255, 255, 255)


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
# Patch-guided generation (section 3.5, appendix K): from a macro patch to a place and a latent, and back
# ----------------------------------------------------------------------------------------------------------


def load_judge(path: Path, G: Generator) -> tuple[Discriminator, Head, Head]:
    """D, A and Q of the checkpoint of G, on its device: `feature` of D gives h, A(h) is c' and Q(h) is z."""
    contents, config = read_checkpoint(path)
    if not config.guided:
        why = "was trained without the head Q, which guides"
        raise UserError(f"{path} {why}; name a run of train --guided by --checkpoint")
    if "Q" not in contents:
        raise UserError(f"{path} holds averaged weights only; give the run that it was taken from")
    D = Discriminator(config)
    nets = dict(D=D, A=Head(D.linear.in_features, config.c_dim), Q=Head(D.linear.in_features, config.z_dim))
    for name, net in nets.items():
        with fitting(path):
            net.load_state_dict(contents[name])
        normalised_for_good(net).to(next(G.parameters()).device).requires_grad_(False).eval()
    renew_statistics(G, **nets)
    return tuple(nets.values())


def renew_statistics(G: Generator, D: Discriminator, A: Head, Q: Head) -> None:
    """Give the batch norm of A and Q the means and variances of 128 generated macro patches.

    Training's running averages lag behind h, which changes quickly: in eight checkpoints of a run with preset
    small, A's mean squared error on real macro patches was 0.11 to 1.01 with those, and 0.02 to 0.20 so.
    """
    config, rng = replace(G.config, batch_size=128), torch.Generator().manual_seed(0)
    z = latent(128, config.z_dim, rng).to(next(G.parameters()).device)
    at = torch.stack(draw_places(config, rng), dim=1) / config.S
    some = zip(z.split(at_once(config)), at.split(at_once(config)))
    h = torch.cat([feature(D, macro_patches(G, *z_and_at)) for z_and_at in some])
    for head in (A, Q):
        head.norm.momentum = 1  # all of these, nothing of what was
        head.train()(h)
        head.eval()


def at_once(config: Config) -> int:
    """How many macro patches to make at a time: with the paper's G and gradients, of about 1 GB."""
    return max(1, 2**16 // (config.N * config.M * config.S**2))


def feature(D: Discriminator, x_macro: torch.Tensor) -> torch.Tensor:
    """h, which does not depend on c': (B, 3, N·S, M·S) -> (B, features)."""
    return D(x_macro, x_macro.new_zeros(len(x_macro), D.projection.in_features))[1]


def positions_of(c_macro: torch.Tensor, config: Config) -> torch.Tensor:
    """The inverse of `macro_coordinates`: (B, c_dim) -> (B, 2), in micro patches, fractions included."""
    positions, values = [], c_macro.unbind(dim=1)
    for count, closed in zip(config.places, config.closed):
        if closed:
            cos, sin, *values = values
            positions.append((torch.atan2(sin, cos) / math.pi + 1) / 2 * count % count)
        else:
            c, *values = values
            positions.append((c + 1) / 2 * (count - 1))
    return torch.stack(positions, dim=1)


def macro_patches(G: Generator, z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """s' at any positions, (B, 2) in micro patches, on the CPU: (B, z_dim) -> (B, 3, N·S, M·S)."""
    N, M = G.config.N, G.config.M
    c_micro = micro_matrix(G.config, *at.unbind(dim=1)).to(z.device)  # (B·N·M, c_dim)
    return merge_patches(G(z.repeat_interleave(N * M, dim=0), c_micro), N, M)


def refine(G: Generator, z: torch.Tensor, x_macro: torch.Tensor, at: torch.Tensor, steps: int):
    """Move each z so that its macro patch comes closer to x', by steps of Adam. The paper has no such thing.

    Args: z (B, z_dim) in [-1, 1]; x_macro (B, 3, N·S, M·S); at (B, 2), see `macro_patches`.
    Returns: of each the best z on the way, in [-1, 1], and the errors of the first and of the best, (B,):
    the root mean square difference of the pixels, in 0 to 255.
    """

    def error_of(z: torch.Tensor) -> torch.Tensor:
        return (macro_patches(G, z, at) - x_macro).square().mean(dim=(1, 2, 3))

    best, z = z, z.clone().requires_grad_(steps > 0)
    adam, error = torch.optim.Adam([z], lr=0.05), error_of(z)
    first = least = error.detach()
    for _ in range(steps):
        adam.zero_grad()
        error.sum().backward()
        adam.step()
        with torch.no_grad():
            z.clamp_(-1, 1)
        error = error_of(z)
        best = torch.where((error < least).unsqueeze(1), z.detach(), best)
        least = least.minimum(error.detach())
    return best, 127.5 * first.sqrt(), 127.5 * least.sqrt()


def boxed(image: np.ndarray, place: tuple[int, int], config: Config, colour) -> np.ndarray:
    """A copy of a full image (H, W, 3) with the macro patch at (top, left) outlined, a pixel outside it.

    The outline goes on round borders that meet; at others that leave no room outside it lies on the border.
    """
    image, lines = image.copy(), []
    for first, part, size, closed in zip(place, (config.N, config.M), image.shape, config.closed):
        line = np.arange(first - 1, first + part * config.S + 1)
        lines.append(line % size if closed else line.clip(0, size - 1))
    rows, columns = lines
    image[np.ix_(rows[[0, -1]], columns)] = image[np.ix_(rows, columns[[0, -1]])] = colour
    return image


def guided_row(photo, x_macro, s_macro, full, place, predicted, config: Config) -> np.ndarray:
    """The four pictures that `guided` draws of a photograph, side by side on white: (h, w, 3) uint8.

    Args: photo, x_macro, place: of `read_photo`; s_macro (N·S, M·S, 3), full (H, W, 3) uint8; predicted: top
    and left of s_macro.
    """
    if photo is None:
        edge, photo = WHITE, np.full_like(full, 255)
        photo[: len(x_macro), : x_macro.shape[1]] = x_macro
        photo = boxed(np.roll(photo, predicted, axis=(0, 1)), predicted, config, BLUE)
    else:
        edge, red = RED, boxed(photo, place, config, RED)
        photo = boxed(red, predicted, config, BLUE)
        dashes = np.indices(photo.shape[:2]).sum(axis=0) // 4 % 2 == 0  # of both, where the two coincide
        photo = np.where((dashes & (red == RED).all(axis=2))[..., None], red, photo)
    panels = [photo, edged(x_macro, edge), edged(s_macro, BLUE), boxed(full, predicted, config, BLUE)]
    height, gap, x = max(len(panel) for panel in panels), 6, 0
    row = np.full((height, sum(panel.shape[1] + gap for panel in panels) - gap, 3), 255, np.uint8)
    for panel in panels:
        h, w, _ = panel.shape
        row[(height - h) // 2 :, x : x + w][:h] = panel
        x += w + gap
    return row


def edged(image: np.ndarray, colour) -> np.ndarray:
    """The image with a line around it: (h, w, 3) -> (h + 2, w + 2, 3)."""
    h, w, _ = image.shape
    result = np.full((h + 2, w + 2, 3), colour, np.uint8)
    result[1:-1, 1:-1] = image
    return result


def read_photo(path: Path, at: tuple[int, int], config: Config):
    """A photograph (H, W, 3), its macro patch x' (N·S, M·S, 3), both uint8, and the place of that, `at`.

    It becomes a full image as for training; x' is cut out of that, round borders that meet. If it has the
    size of a macro patch, it is x', and there is no photograph and no place: None.
    Raises: ValueError for one that is too small, and whatever Pillow raises for what it cannot read.
    """
    data, height, width = read_file(path), config.N * config.S, config.M * config.S
    w, h = read_rgb(data).size  # upright, unlike what Image.open tells
    if h < height or w < width:
        raise ValueError(f"is {w} x {h}, smaller than a macro patch, {width} x {height}")
    if (h, w) == (height, width):
        return None, decode_image(data, height, width, "squash"), None
    crop = config.crop.removesuffix("-syn")  # whose displacements belong to the images of a training set
    if crop == "celeba" and (w, h) != (178, 218):
        crop = "center"
    photo = decode_image(data, config.height, config.width, crop)
    return photo, np.roll(photo, (-at[0], -at[1]), axis=(0, 1))[:height, :width], at


def read_photos(where: str, at: tuple[int, int], config: Config) -> list[tuple]:
    """Name, photograph, x' and place, see `read_photo`, of a file, or of each image that lies in a folder.

    Those of a folder that cannot be used are named on stderr.
    Raises: UserError where there is none, or more than a sheet holds.
    """
    folder, photos = os.path.isdir(where), []
    if os.path.exists(where) and not folder and not os.path.isfile(where):  # reading it might never end
        raise UserError(f"{where} is neither a file nor a folder; give another photograph")
    paths = images_in(where) if folder else [Path(where)]
    pixels = len(paths) * 2 * config.height * (config.width + config.M * config.S)
    if pixels > MOST_PIXELS:
        why = f"makes {pixels} pixels of {len(paths)} photographs"
        raise UserError(f"{where} {why}; give fewer, for at most {MOST_PIXELS}")
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                photo = read_photo(path, at, config)
        except Exception as error:  # broken files raise OSError, SyntaxError, struct.error, IndexError...
            why = f"{path}: {getattr(error, 'strerror', None) or reason_of(error)}"
            if not folder:
                raise UserError(f"{why}; give another photograph") from error
            print(f"skipped {why}", file=sys.stderr)
        else:
            name = os.fsencode(path.name).decode(errors="replace")  # print takes UTF-8 only
            photos.append((name, *photo))
    if not photos:
        raise UserError(f"{where} holds no photograph that can be used; give another folder")
    return photos


def images_in(folder: str) -> list[Path]:
    """The images that lie in a folder itself, sorted, dead links among them, to be named as unreadable."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(ENDINGS))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}; give another folder")
    paths = [Path(folder, name) for name in names if name[0] != "."]
    # Reading a named pipe would never end.
    paths = [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    if not paths:
        raise UserError(f"{folder} holds no image; looked for {' '.join(ENDINGS)} in any case")
    return paths


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
            block[S + 3, along] = 255 * (x[k].item() % 1 != 0)
            block[along, S + 3] = 255 * (y[k].item() % 1 != 0)
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
    """For each photograph a full image that is to contain a macro patch of it (figures 9 and 28).

    From left to right: the photograph, framed in red where its patch x' is and in blue where A takes it to
    be; x'; the generated macro patch at A's place, of z = Q(x'), or of what --refine made of that; the full
    image of that z. A patch is framed as its place is. A photograph that is itself x' lies at A's place.
    """
    config, device = G.config, next(G.parameters()).device
    D, A, Q = load_judge(args.checkpoint, G)
    photos = read_photos(args.photo, macro_place(args.at, config), config)
    rows, errors = [], []
    for first in range(0, len(photos), at_once(config)):
        some = photos[first : first + at_once(config)]
        x_macro = torch.from_numpy(np.stack([patch for _, _, patch, _ in some]))  # (B, N·S, M·S, 3)
        x_macro = x_macro.to(device).permute(0, 3, 1, 2) / 127.5 - 1
        h = feature(D, x_macro)
        at = positions_of(A(h).cpu(), config)
        z, before, after = refine(G, Q(h), x_macro, at, args.refine)
        s_macro = to_uint8(macro_patches(G, z, at))
        for b, (name, photo, patch, place) in enumerate(some):
            full = to_uint8(full_image(G, z[b : b + 1]))[0]
            top, left = (round(p * config.S) % side for p, side in zip(at[b].tolist(), full.shape))
            rows.append(guided_row(photo, patch, s_macro[b], full, place, (top, left), config))
            errors.append([before[b].item(), after[b].item()])
            where = "" if place is None else f"patch at {place[0]},{place[1]}, "
            print(f"{name}: {where}predicted at {top},{left}; {told(errors[-1], args.refine)}", flush=True)
    if len(photos) > 1:
        print(f"mean of {len(photos)}: {told(np.mean(errors, axis=0), args.refine)}")
    return grid(np.array(rows), gap=24)


def told(errors, steps: int) -> str:
    before, after = errors
    return f"error {before:.1f} of 255" + (f", {after:.1f} after {steps} steps" if steps else "")


def place(text: str | None, config: Config) -> tuple[int, int]:
    """ "row,column" of a micro patch, or the one in the middle, the upper left of four."""
    last = config.R - 1, config.K - 1
    return parse_place(text, last, "row,column of a micro patch") or (last[0] // 2, last[1] // 2)


def macro_place(text: str | None, config: Config) -> tuple[int, int]:
    """ "top,left" of a macro patch in pixels of a full image, or the one in the middle."""
    sizes = (config.height, config.N * config.S), (config.width, config.M * config.S)
    last = tuple(size - (1 if closed else part) for (size, part), closed in zip(sizes, config.closed))
    return parse_place(text, last, "top,left in pixels") or tuple((size - part) // 2 for size, part in sizes)


def parse_place(text: str | None, last: tuple[int, int], what: str) -> tuple[int, int] | None:
    """ "a,b" -> (a, b), each from 0 to `last`."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,9},\d{1,9}", text):
        raise UserError(f"--at {text} is no place; give {what}, like {last[0]},0")
    a, b = map(int, text.split(","))
    if a > last[0] or b > last[1]:
        raise UserError(f"--at {text} is outside of the image; give 0 to {last[0]} and 0 to {last[1]}")
    return a, b


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
    device, animated, where = choose_device(args.device), getattr(args, "gif", None), args.checkpoint
    torch.backends.cudnn.deterministic = True  # for --refine: the rounding of gradients may depend on chance
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
    tell_newest(where, path)
    print(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
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
    add("--at", metavar="TOP,LEFT", help="where its patch is taken, in pixels (default: in the middle)")
    add("--refine", type=int, default=0, metavar="N", help="steps that improve z on the pixels (default: 0)")
    return run_command(parser, figure, argv)


if __name__ == "__main__":
    sys.exit(main())
