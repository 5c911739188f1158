"""Draw what figures of the paper show, from a checkpoint (default: the newest under runs/).

    python -m experiments.figures method                        # the drawing of the README
    python -m experiments.figures patches --count 8             # figure 3: images, macro and micro patches
    python -m experiments.figures interpolate --seed 1 2 3      # figures 5 and 23: between latents
    python -m experiments.figures interpolate --gif loop.gif    # the same as a loop
    python -m experiments.figures coordinates --steps 16        # figures 6 and 25: between positions
    python -m experiments.figures mix --seed 1 2                # two latents in one image
    python -m experiments.figures guided photos --at 8 8        # figures 9 and 28, after train --guided

Source: COCO-GAN, sections 3.2 and 3.5; `mix`: LocoGAN (Struski et al., 2020), section 4.3, figure 11.
"""

import argparse
import math
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import coco_gan as core
from coco_gan import Config, Generator, full_image, grid, latents, micro_patches, to_uint8
from data import (
    UserError,
    counted,
    decode_image,
    in_threads,
    list_images,
    make_folder,
    read_file,
    read_rgb,
    report_skipped,
    toy_faces,
)
from experiments.view import save_animation

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def frame(images: np.ndarray, corner, size, colour, closed=(False, False)) -> np.ndarray:
    """A copy of images (…, H, W, 3) uint8 with a rectangle outlined, one pixel outside of it.

    The outline wraps around borders that meet, and at others stays inside the image.
    Args: corner: top and left; size: height and width of the rectangle.
    """
    images, lines = images.copy(), []
    for first, length, limit, wraps in zip(corner, size, images.shape[-3:-1], closed):
        line = np.arange(first - 1, first + length + 1)
        lines.append(line % limit if wraps else line.clip(0, limit - 1))
    y, x = lines
    images[..., y[[0, -1], None], x, :] = images[..., y[:, None], x[[0, -1]], :] = colour
    return images


def caption(picture: np.ndarray, zoom: int, above=(), beside=()) -> np.ndarray:
    """Enlarge a picture (h, w, 3) uint8, and write above it and to its left: (H, W, 3) uint8.

    Args: above: pairs (x, text); beside: pairs (y, text), in pixels of the picture.
    """
    font, (image,) = ImageFont.load_default(12), core.enlarge(picture[None], zoom)
    top = 18 if above else 0
    left = max((math.ceil(font.getlength(text)) + 8 for _, text in beside), default=0)
    ends = [left + x * zoom + math.ceil(font.getlength(text)) for x, text in above]
    canvas = Image.new("RGB", (max([left + image.shape[1], *ends]), top + len(image)), "white")
    canvas.paste(Image.fromarray(image), (left, top))
    pen = ImageDraw.Draw(canvas)
    for x, text in above:
        pen.text((left + x * zoom, 1), text, "black", font)
    for y, text in beside:
        pen.text((0, top + y * zoom), text, "black", font)
    return np.asarray(canvas)


def sheet(rows, zoom: int, names, steps=()) -> np.ndarray:
    """Lay out rows of pictures (r, c, h, w, 3) uint8, as columns if the pictures are wider than high.

    Args: names: of the rows; steps: of the pictures of each row, in their order.
    """
    rows = np.array(rows)
    _, _, h, w, _ = rows.shape
    if w > h:
        rows, names, steps = rows.swapaxes(0, 1), steps, names
    above, beside = (
        [(k * (side + 2), name) for k, name in enumerate(some)] for side, some in ((w, steps), (h, names))
    )
    return caption(grid(rows.reshape(-1, h, w, 3), rows.shape[1]), zoom, above, beside)


def draw_images(G: Generator, z: torch.Tensor, *part: range) -> np.ndarray:
    """The full images of latents (n, z_dim), or the part of them in rows and columns: (n, h, w, 3) uint8."""
    return np.concatenate([*core.draw_images(G, z, *part)])


def inside(at, last) -> tuple[int, int]:
    """--at, if none of its two numbers is above `last`. Raises: UserError."""
    if at[0] > last[0] or at[1] > last[1]:
        raise UserError("--at {} {} is outside of the image; give 0 to {} and 0 to {}".format(*at, *last))
    return at


def patches(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """Three rows: full images, a macro patch of each, and the first micro patch in that (figure 3)."""
    config, S, gap = G.config, G.config.S, 8
    seeds = range(args.seed[0], args.seed[0] + args.count) if len(args.seed) == 1 else args.seed
    images = draw_images(G, latents(seeds, config.z_dim))
    B, H, W, _ = images.shape
    height, width = config.N * S, config.M * S
    beside = (0, "full image"), (H + gap, "macro patch"), (H + height + 2 * gap, "micro patch")
    picture = np.full((H + height + S + 2 * gap, B * (W + gap) - gap, 3), 255, np.uint8)
    starts = [(i * S, j * S) for i in range(config.R - config.N + 1) for j in range(config.K - config.M + 1)]
    for b, image in enumerate(images):
        top, left = starts[b * len(starts) // B]  # from the top left to the bottom right
        s_macro, x = image[top : top + height, left : left + width], b * (W + gap)
        picture[:H, x : x + W] = image
        picture[H + gap :, x : x + width][:height] = s_macro
        picture[H + height + 2 * gap :, x : x + S] = s_macro[:S, :S]
    return caption(
        picture, args.zoom, [(b * (W + gap), f"seed {seed}") for b, seed in enumerate(seeds)], beside
    )


def method(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """The method in one drawing: a generated and a real macro patch (toy face) on their ways to D."""
    config, font = G.config, ImageFont.load_default(15)
    i, j = config.positions[0] // 2, config.positions[1] // 2
    N, M, S = config.N, config.M, config.S
    canvas = Image.new("RGB", (920, 400), "white")
    pen, unit = ImageDraw.Draw(canvas), 128 // max(N, M)  # pixels of a micro patch in the drawing

    def write(y, x, text, anchor="mm"):
        pen.text((x, y), text, "black", font, anchor)

    def arrow(y, x, to_y, to_x, text=""):
        pen.line((x, y, to_x, to_y), "black", 2)
        angle = math.atan2(to_y - y, to_x - x)
        for turn in (2.7, -2.7):
            tip = to_x + 9 * math.cos(angle + turn), to_y + 9 * math.sin(angle + turn)
            pen.line((to_x, to_y, *tip), "black", 2)
        write((y + to_y) / 2 - 14, (x + to_x) / 2, text)

    def paste(y, x, image, size):
        height, width = size
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (round(x - width / 2), round(y - height / 2)))

    def box(y, x, text, height):
        pen.rounded_rectangle((x - 24, y - height / 2, x + 24, y + height / 2), 8, "#dde6f2", "black", 2)
        write(y, x, text)

    z = latents([args.seed[0]], config.z_dim)
    s_macro = to_uint8(full_image(G, z, range(i, i + N), range(j, j + M)))[0]
    real = np.concatenate(list(toy_faces(8, config.height, config.width)))[7]
    cell = 96 // max(config.R, config.K)
    left, top = 30, 84
    for row in range(config.R):  # the grid of c''
        for column in range(config.K):
            chosen = i <= row < i + N and j <= column < j + M
            at = left + column * cell, top + row * cell
            pen.rectangle((*at, at[0] + cell, at[1] + cell), "#f4a582" if chosen else "white", "black")
    write(44, 78, "z, one for all")
    write(66, 78, "patches, and c''")
    arrow(132, 140, 132, 196)
    box(132, 222, "G", 72)
    arrow(132, 248, 132, 296)
    for n in range(N):
        for m in range(M):
            s_micro = s_macro[n * S : (n + 1) * S, m * S : (m + 1) * S]
            at = 132 + (n + 0.5 - N / 2) * (unit + 8), 376 + (m + 0.5 - M / 2) * (unit + 8)
            paste(*at, s_micro, (unit, unit))
    write(44, 376, "micro patches s''")
    arrow(132, 456, 132, 528, "merge")
    paste(132, 602, s_macro, (unit * N, unit * M))
    write(44, 602, "macro patch s'")
    real = frame(real, (i * S, j * S), (N * S, M * S), RED)
    longest = max(config.height, config.width)
    paste(306, 376, real, (144 * config.height // longest, 144 * config.width // longest))
    write(220, 376, "real image x")
    arrow(306, 456, 306, 528, "crop")
    paste(306, 602, real[i * S : (i + N) * S, j * S : (j + M) * S], (unit * N, unit * M))
    write(220, 602, "macro patch x'")
    arrow(132, 676, 190, 728)
    arrow(306, 676, 248, 728)
    box(219, 756, "D", 110)
    arrow(200, 782, 176, 832)
    arrow(238, 782, 262, 832)
    write(170, 838, "real?", "lm")
    write(268, 838, "A: its c'", "lm")
    return np.asarray(canvas)


# ---- Between latents and between coordinates (section 3.2) -------------------------------------------------


def slerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """From a to b on an arc: direction and length change evenly. On a line if a and b are on one through 0.

    Args: a, b (z_dim,); weight (n,) in [0, 1], 0 for a and 1 for b, which are met exactly.
    Returns: (n, z_dim) float32. Source: section 3.2, "slerp-path".
    """
    a, b, weight = a.double(), b.double(), weight.double().unsqueeze(1)
    u, v = a / a.norm(), b / b.norm()
    angle = torch.acos((u @ v).clamp(-1, 1))
    if not angle.sin() > 1e-6:
        return a.lerp(b, weight).float()
    direction = (torch.sin((1 - weight) * angle) * u + torch.sin(weight * angle) * v) / angle.sin()
    return (direction * a.norm().lerp(b.norm(), weight)).float()


def interpolate(G: Generator, args: argparse.Namespace) -> np.ndarray | list[np.ndarray]:
    """Full images, or one micro patch, on the slerp path from each latent to the next (figures 5 and 23).

    A strip per pair, with both ends. As a loop, the last latent leads to the first again.
    """
    at = inside(args.at, (G.config.R - 1, G.config.K - 1)) if args.at else ()
    ranges = [range(index, index + 1) for index in at]  # of micro patches; none: all

    z, weight = latents(args.seed, G.config.z_dim), torch.linspace(0, 1, args.steps, dtype=torch.float64)
    if args.gif:
        path = torch.cat([slerp(a, b, weight[:-1]) for a, b in zip(z, z.roll(-1, 0))])
        return list(draw_images(G, path, *ranges))
    strips = [draw_images(G, slerp(a, b, weight), *ranges) for a, b in zip(z, z[1:])]
    return sheet(strips, args.zoom, [f"seeds {a} to {b}" for a, b in zip(args.seed, args.seed[1:])])


def positions(count: int, steps: int, closed: bool) -> torch.Tensor:
    """Evenly spaced from the first trained position 0 to the last, count-1: (steps,) float32.

    Closed: once around, from 0 towards position count, which is 0 again and left out.
    """
    return torch.arange(steps) * (count if closed else count - 1) / (steps if closed else steps - 1)


def patch_grid(G: Generator, z: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> np.ndarray:
    """Micro patches of one latent (z_dim,), in rows i and columns j that broadcast to (r, c): a picture."""
    i, j = torch.broadcast_tensors(i, j)
    made = micro_patches(G, z.expand(i.numel(), -1), i.flatten(), j.flatten())
    return grid(to_uint8(made), i.shape[1])


def coordinates(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """Micro patches of one latent at and between the trained positions (figures 6 and 25), a block a latent.

    On top those along a row of the image, at the left those down a column, with a line beside the trained
    ones (figure 6); between them those of all pairs of these coordinates (figure 25).
    """
    config, S, last = G.config, G.config.S, (G.config.R - 1, G.config.K - 1)
    i, j = (torch.tensor([[index]]) for index in inside(args.at or (last[0] // 2, last[1] // 2), last))
    y, x = (positions(n, args.steps, closed) for n, closed in zip((config.R, config.K), config.closed))
    first, blocks = S + 8, []  # first: where the patches of figure 25 begin, in both directions
    for seed, z in zip(args.seed, counted(latents(args.seed, config.z_dim), len(args.seed), "latents")):
        inner = patch_grid(G, z, y[:, None], x[None])
        block = np.full((first + len(inner), first + len(inner), 3), 255, np.uint8)
        block[first:, first:] = inner
        block[:S, first:] = patch_grid(G, z, i, x[None])
        block[first:, :S] = patch_grid(G, z, y[:, None], j)
        for k in range(args.steps):
            along = slice(first + k * (S + 2), first + k * (S + 2) + S)
            block[S + 3, along] = 255 * (x[k].item() % 1 != 0)
            block[along, S + 3] = 255 * (y[k].item() % 1 != 0)
        above = ((first, f"seed {seed}, in row {i.item()} from left to right; a line: trained"),)
        beside = (first, f"in column {j.item()}"), (first + 12 // args.zoom + 2, "downwards")
        blocks.append(caption(block, args.zoom, above, beside))
    return grid(np.array(blocks), gap=S)


# ---- Two latents in one image (LocoGAN, section 4.3) -------------------------------------------------------


def blend_weights(K: int, closed: bool) -> torch.Tensor:
    """How much of B there is at the K+1 edges of K columns: from 0 for A on the left to 1 for B, (K+1,).

    It grows over a quarter of the columns, at least one, on both sides of edge K // 2. Closed: edge K is edge
    0 again, and B becomes A there in the same way.
    """
    edge = torch.arange(K + 1)
    distance = edge - K // 2  # negative in A
    if closed:
        distance = torch.where(distance > 0, distance.minimum(K - edge), distance.maximum(-edge))
    return (distance / (2 * max(1, K // 4)) + 0.5).clamp(0, 1)


def faded_image(G: Generator, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """A full image whose columns of micro patches have latents of their own: (H, W, 3) uint8.

    Args: left, right (K, z_dim): the latents at both edges of each column. Each patch is made with both, and
    fades from one to the other. With one latent per column, colours would have steps.
    """
    R, K, S = G.config.R, G.config.K, G.config.S
    i, j = torch.arange(R).repeat_interleave(K), torch.arange(K).repeat(R)
    first, second = (micro_patches(G, z.repeat(R, 1), i, j) for z in (left, right))  # (R·K, 3, S, S)
    fade = (torch.arange(S, device=first.device) + 0.5) / S  # along x
    return to_uint8(core.merge_patches(first.lerp(second, fade), R, K))[0]


def mix(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """Two latents A and B in one image: A, A beside B, A that becomes B from column to column, and B.

    A strip for each latent and the next. On a closed axis, B becomes A again where the image meets itself.
    """
    K, weight = G.config.K, blend_weights(G.config.K, G.config.closed[1])
    A, hard, B = torch.zeros(K), (torch.arange(K) >= K // 2).float(), torch.ones(K)
    edges = (A, A), (hard, hard), (weight[:-1], weight[1:]), (B, B)  # how much of B, left and right
    rows, z = [], latents(args.seed, G.config.z_dim)
    for a, b in counted(zip(z, z[1:]), len(z) - 1, "pairs"):
        rows.append([faded_image(G, slerp(a, b, left), slerp(a, b, right)) for left, right in edges])
    names = [f"seeds {a}, {b}" for a, b in zip(args.seed, args.seed[1:])]
    return sheet(rows, args.zoom, names, ["A", "A beside B", "A into B", "B"])


# ---- From a patch of a photograph (section 3.5, appendix K) ------------------------------------------------


def load_heads(path: Path, G: Generator) -> tuple[core.Discriminator, core.Head, core.Head]:
    """D, A and Q of the checkpoint of G, on its device, to be called as they are.

    Deviation: the batch norm of A and Q has the statistics of 128 generated macro patches. Training's running
    averages lag behind h, which changes quickly: in eight checkpoints of a run with preset small, A's mean
    squared error on real macro patches was 0.11 to 1.01 with those, and 0.02 to 0.20 with these.
    """
    config, device, tensors = G.config, next(G.parameters()).device, core.read_checkpoint(path)[1]["tensors"]
    if "Q.linear1.weight" not in tensors:
        raise UserError(f"{path} has no head Q; name a checkpoint of train --guided, with all its networks")
    D = core.Discriminator(config)
    A, Q = (core.Head(D.linear.in_features, size) for size in (config.c_dim, config.z_dim))
    for name, net in (("D.", D), ("A.", A), ("Q.", Q)):
        net.load_state_dict({key: tensors[name + key] for key in net.state_dict()})
        core.fold_spectral_norm(net).to(device).requires_grad_(False).eval()
    rng = torch.Generator().manual_seed(0)
    z = core.sample_latents(128, config.z_dim, rng).to(device)
    at = torch.stack(core.sample_positions(replace(config, batch_size=128), rng), dim=1) / config.S
    c_macro = torch.zeros(8, config.c_dim, device=device)  # h does not depend on it
    h = torch.cat([D(macro_patches(G, *some), c_macro)[1] for some in zip(z.split(8), at.split(8))])
    for head in (A, Q):
        head.norm.momentum = 1  # the statistics of this batch alone
        head.train()(h)
        head.eval()
    return D, A, Q


def positions_of(c_macro: torch.Tensor, config: Config) -> torch.Tensor:
    """The inverse of `macro_coordinates`: (B, c_dim) -> (B, 2), in micro patches, fractions included."""
    found, values = [], c_macro.unbind(dim=1)
    for count, closed in zip(config.positions, config.closed):
        if closed:
            cos, sin, *values = values
            found.append((torch.atan2(sin, cos) / math.pi + 1) / 2 * count % count)
        else:
            c, *values = values
            found.append((c + 1) / 2 * (count - 1))
    return torch.stack(found, dim=1)


def macro_patches(G: Generator, z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """s' at any positions, (B, 2) in micro patches, on the CPU: (B, z_dim) -> (B, 3, N·S, M·S)."""
    N, M = G.config.N, G.config.M
    c_micro = core.micro_matrix(G.config, *at.unbind(dim=1)).to(z.device)  # (B·N·M, c_dim)
    return core.merge_patches(G(z.repeat_interleave(N * M, dim=0), c_micro), N, M)


def refine(G: Generator, z: torch.Tensor, x_macro: torch.Tensor, at: torch.Tensor, steps: int):
    """Improve z by steps of Adam, so that its macro patch comes closer to x'. The paper has no such thing.

    Args: z (1, z_dim) in [-1, 1]; x_macro (1, 3, N·S, M·S); at (1, 2), see `macro_patches`.
    Returns: the best z, in [-1, 1], and the root mean square errors of the first and the best z, of 255.
    """
    z, errors = z.clone().requires_grad_(steps > 0), []
    adam = torch.optim.Adam([z], lr=0.05)
    for step in range(steps + 1):
        error = (macro_patches(G, z, at) - x_macro).square().mean()
        errors.append(127.5 * error.sqrt().item())
        if errors[-1] == min(errors):
            best = z.detach().clone()
        if step < steps:
            adam.zero_grad()
            error.backward()
            adam.step()
            z.data.clamp_(-1, 1)
    return best, errors[0], min(errors)


def read_photo(data: bytes, at: tuple[int, int], config: Config):
    """A photograph (H, W, 3) and its macro patch x' (N·S, M·S, 3) at pixel `at`, both uint8.

    The photograph is cropped as in training. One of the size of a macro patch is x', and the photograph None.
    Raises: ValueError for one that is too small, and whatever Pillow raises for what it cannot read.
    """
    height, width = config.N * config.S, config.M * config.S
    w, h = read_rgb(data).size  # upright
    if h < height or w < width:
        raise ValueError(f"is {h} x {w}, smaller than a macro patch, {height} x {width}")
    if (h, w) == (height, width):
        return None, decode_image(data, height, width, "squash")
    crop = "auto" if config.crop.startswith("celeba") else config.crop  # "celeba" where that fits
    photo = decode_image(data, config.height, config.width, crop)
    return photo, np.roll(photo, (-at[0], -at[1]), axis=(0, 1))[:height, :width]


def guided_row(photo, x_macro, s_macro, full, at, predicted, config: Config, zoom: int) -> np.ndarray:
    """The four pictures of `guided`, side by side on white, with their names above: (h, w, 3) uint8.

    Args: photo, x_macro: of `read_photo`; s_macro (N·S, M·S, 3), full (H, W, 3); at, predicted: corners.
    """
    size, closed, edge = x_macro.shape[:2], config.closed, RED
    if photo is None:
        photo, edge = np.full_like(full, 255), WHITE
        photo[: size[0], : size[1]] = x_macro
        photo = frame(np.roll(photo, predicted, axis=(0, 1)), predicted, size, BLUE, closed)
    else:
        red = frame(photo, at, size, RED, closed)
        photo = frame(red, predicted, size, BLUE, closed)
        dashes = np.indices(photo.shape[:2]).sum(axis=0) // 4 % 2 == 0  # of both, where the two coincide
        photo = np.where((dashes & (red == RED).all(axis=2))[..., None], red, photo)
    padded = [np.pad(patch, ((1, 1), (1, 1), (0, 0))) for patch in (x_macro, s_macro)]
    framed = [frame(patch, (1, 1), size, colour) for patch, colour in zip(padded, (edge, BLUE))]
    panels = [photo, *framed, frame(full, predicted, size, BLUE, closed)]
    height, gap, columns, above = max(len(panel) for panel in panels), 6, [], []
    for panel, name in zip(panels, ("photograph", "its patch", "generated", "full image")):
        h, w, _ = panel.shape
        above.append((sum(column.shape[1] for column in columns), name))
        columns.append(np.full((height, w + gap, 3), 255, np.uint8))
        columns[-1][(height - h) // 2 :, :w][:h] = panel
    return caption(np.concatenate(columns, axis=1)[:, :-gap], zoom, above)


def guided(G: Generator, args: argparse.Namespace) -> np.ndarray:
    """For each photograph a full image that is to contain a macro patch of it (figures 9 and 28).

    From left to right: the photograph, framed in red where its patch x' is and in blue where A predicts it;
    x'; the generated macro patch at A's position, of z = Q(x'), or of what --refine made of that; the full
    image of that z. A photograph that is itself x' is drawn at A's position.
    """
    config, sides = G.config, (G.config.height, G.config.width)
    room = [side - part * config.S for side, part in zip(sides, (config.N, config.M))]
    last = [side - 1 if closed else free for side, free, closed in zip(sides, room, config.closed)]
    chosen = inside(args.at or (room[0] // 2, room[1] // 2), last)
    several = os.path.isdir(args.photo) or zipfile.is_zipfile(args.photo)
    names, read, _ = list_images(args.photo) if several else ([args.photo], read_file, None)
    names = names[: args.count]
    D, A, Q = load_heads(args.checkpoint, G)
    rows, skipped = [], []
    for name, found in zip(names, in_threads(lambda name: read_photo(read(name), chosen, config), names)):
        if isinstance(found, str):  # the reason why it cannot be used
            skipped.append(f"{name!r}: {found}")
            continue
        photo, patch = found
        x_macro = torch.tensor(patch, device=next(G.parameters()).device).permute(2, 0, 1)[None] / 127.5 - 1
        _, h = D(x_macro, x_macro.new_zeros(1, config.c_dim))  # h does not depend on c'
        at = positions_of(A(h).cpu(), config)
        z, before, after = refine(G, Q(h), x_macro, at, args.refine)
        s_macro, full = to_uint8(macro_patches(G, z, at))[0], to_uint8(full_image(G, z))[0]
        predicted = tuple(round(p * config.S) % side for p, side in zip(at[0].tolist(), sides))
        rows.append(guided_row(photo, patch, s_macro, full, chosen, predicted, config, args.zoom))
        refined = f", {after:.1f} after {args.refine} steps" if args.refine else ""
        print(f"{name}: predicted at {predicted}, error {before:.1f} of 255{refined}", flush=True)
    if not rows:
        raise UserError(f"{args.photo} has no photograph that can be used: {(skipped or ['no image'])[0]}")
    report_skipped(skipped, len(names), "photographs")
    return grid(np.array(rows), gap=24)


# ---- Command -----------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace) -> None:
    """From a checkpoint to the figure of a command, in a file."""
    if getattr(args, "steps", 2) < 2:
        raise UserError(f"--steps {args.steps} is too few; give 2 or more")
    if args.figure in (interpolate, mix) and len(args.seed) < 2:
        raise UserError(f"--seed {args.seed[0]} is one seed; {args.command} takes two or more")
    device, path = core.choose_device(args.device), core.find_checkpoint(args.checkpoint, args.panorama)
    G, args.checkpoint, animated = core.load(path, device, raw=args.raw), path, getattr(args, "gif", None)
    args.zoom = args.zoom or max(1, 128 // min(G.config.height, G.config.width))
    picture = args.figure(G, args)
    folder = Path("runs") if path.parent == core.ASSETS else path.parent
    out = Path(animated or args.out or folder / f"{path.stem}-{args.command}.png")
    make_folder(out.parent)
    (save_animation if animated else core.save_picture)(picture, out)
    print(f"{out}, from {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = core.Parser(prog="python -m experiments.figures", description=__doc__.splitlines()[0])
    commands, add = parser.add_subparsers(dest="command", required=True), {}
    figures = {method: [0], patches: [0], interpolate: [1, 2], coordinates: [1], mix: [1, 2]}  # and seeds
    figures[guided] = []
    for figure, seeds in figures.items():
        command = commands.add_parser(figure.__name__, help=figure.__doc__.splitlines()[0])
        command.set_defaults(figure=figure)
        add[figure] = command.add_argument
        add[figure]("--checkpoint", metavar="FILE|RUN", help="default: the newest under runs/")
        add[figure]("--panorama", action="store_true", help="the newest checkpoint of a cylinder")
        add[figure]("--out", metavar="FILE", help="a picture (default: beside the checkpoint)")
        text = "enlarge pixels (default: until an image has 128)"
        add[figure]("--zoom", type=core.positive, metavar="N", help=text)
        add[figure]("--raw", action="store_true", help="use G's weights themselves, not their moving average")
        add[figure]("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
        if seeds:
            text = f"of the latents (default: {' '.join(map(str, seeds))})"
            add[figure]("--seed", type=core.natural, nargs="+", default=seeds, metavar="N", help=text)
    number, two = dict(type=core.positive, metavar="N"), dict(type=core.natural, nargs=2, metavar="N")
    add[patches]("--count", default=8, help="how many images, from one --seed on (default: 8)", **number)
    add[interpolate]("--steps", default=8, help="images of a strip, with both ends (default: 8)", **number)
    add[interpolate]("--at", help="row and column of a micro patch to draw, not full images", **two)
    add[interpolate]("--gif", metavar="FILE", help="a loop instead of a picture: .gif or .webp")
    add[coordinates]("--steps", default=16, help="coordinates down, and across (default: 16)", **number)
    add[coordinates]("--at", help="row and column of the strips (default: in the middle)", **two)
    add[guided]("photo", metavar="PHOTO", help="a photograph, or a folder or zip of them")
    add[guided]("--count", default=16, help="how many of a folder or zip (default: 16)", **number)
    add[guided]("--at", help="top and left of the patch in pixels (default: in the middle)", **two)
    add[guided]("--refine", type=core.natural, default=0, metavar="N", help="steps to improve z (default: 0)")
    return core.run_command(parser, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
