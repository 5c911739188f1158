"""Post-train a model beyond the borders, for fainter seams in what `sample --extrapolate` adds to its images.

    python -m experiments.extrapolate runs/tiny-001    # writes runs/tiny-001-extrapolate
    python coco_gan.py sample --checkpoint runs/tiny-001-extrapolate/best.pt --extrapolate 1

Beside each ordinary step, a second Adam takes one on macro patches that reach up to --margin micro patches
beyond the open borders. It trains G's first two blocks only. Deviation: the paper has a second pair of Adams,
which trains D on these patches, too. No real patch lies there, and D learned to tell them by c', which made
the inside worse. Post-training ends when the seams of the margin are no more visible than those inside.
best.pt is the step with the faintest ones, of those at which the SWD of the inside is at most a tenth higher
than at the start. A run cannot be resumed, because checkpoints do not have the second Adam.

Source: section 3.3; appendix E; figures 7, 16 and 17.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call

import coco_gan as core
from coco_gan import COCOGAN, Config, content_consistency, spatial_consistency, spectral_norm, update
from data import UserError, make_folder, release_pages, write_file
from experiments.evaluate import choose_real
from experiments.figures import RED, frame
from experiments.metrics import sliced_wasserstein

EVERY = 100  # steps between two looks at the seams
COUNT = 512  # images of which SWD is taken


def choose_margin(config: Config, asked: int) -> tuple[int, int]:
    """Micro patches beyond the borders, down and across: none where borders meet, or c' never changes."""
    margin = tuple(0 if closed or n == 1 else asked for closed, n in zip(config.closed, config.positions))
    if not any(margin):
        found = "{} x {} on a {}".format(*config.positions, config.topology)
        raise UserError(f"--margin {asked} needs two positions along an open border; there are {found}")
    return margin


def margin_step(gan: COCOGAN, opt_G, margin, z) -> None:
    """One step of G as in `train_step`, on macro patches that may reach into the margin. z (B, z_dim)."""
    config, nets = gan.config, [net for net in (gan.D, gan.A, gan.Q) if net]
    _, alpha_s, alpha_q = config.loss_weights
    i, j = (pixels / config.S for pixels in core.sample_positions(config, gan.rng, margin))
    c_macro = core.macro_coordinates(config, i, j).to(gan.device)  # (B, c_dim)
    c_micro = core.micro_matrix(config, i, j).to(gan.device)  # (B·N·M, c_dim)
    z_micro = z.repeat_interleave(config.N * config.M, dim=0)  # (B·N·M, z_dim)
    gan.G.eval()  # CBN normalizes by the running statistics, as in sampling, and does not change them
    G_sn = core.cast(gan, spectral_norm(gan.G, iterate=False))
    s_micro = functional_call(gan.G, G_sn, (z_micro, c_micro), dict(tanh=False))
    gan.G.train()
    s_macro = core.merge_patches(s_micro, config.N, config.M, tanh=True, dtype=torch.float32)
    s_macro = s_macro.contiguous(memory_format=core.LAYOUT)  # (B, 3, N·S, M·S)

    # L_S is 0 for coordinates outside [-1, 1], which A's tanh cannot reach.
    parameters = [spectral_norm(net, iterate=False).items() for net in nets]
    D_sn, A_sn, *Q_sn = ({name: p.detach() for name, p in some} for some in parameters)
    score, h = functional_call(gan.D, core.cast(gan, D_sn), (s_macro, c_macro))
    inside = (c_macro.abs() <= 1 + 1e-4).all(dim=1, keepdim=True)  # (B, 1)
    L_S = spatial_consistency(c_macro * inside, functional_call(gan.A, A_sn, (h,)) * inside)
    loss = -score.mean() + alpha_s * L_S
    if config.guided:
        loss = loss + alpha_q * content_consistency(z, functional_call(gan.Q, *Q_sn, (h,)))
    update(opt_G, loss)


def seams(images: np.ndarray, S: int, margin: tuple[int, int]) -> tuple[float, float]:
    """How visible the seams between micro patches are, in the margin and inside; the measure is ours.

    It is the mean absolute difference across a seam over that between neighbours within the patches on both
    sides, averaged over seams; NaN where there is none. Args: images (n, H, W, 3) uint8, with the margin.
    """
    outer, inner = [], []
    for axis, extra in zip((1, 2), margin):
        steps = np.abs(np.diff(images.astype(np.int16), axis=axis)).mean((0, 3 - axis, 3))  # (pixels - 1,)
        count = (len(steps) + 1) // S
        for seam in range(1, count):
            around = steps[(seam - 1) * S : (seam + 1) * S - 1]
            within = np.delete(around, S - 1)
            if within.any():
                ratios = outer if min(seam, count - seam) <= extra else inner
                ratios.append(around[S - 1] / within.mean())
    return tuple(float(np.mean(ratios)) if ratios else math.nan for ratios in (outer, inner))


def report(gan: COCOGAN, margin: tuple[int, int], real: np.ndarray, run: Path, losses: list):
    """Draw images with the trained region framed in red (figure 7); log and return what they measure.

    Args: real (n, H, W, 3) uint8. Returns: the `seams`, and the SWD of the inside of n images to them.
    """
    config, corner = gan.config, [m * gan.config.S for m in margin]
    rows, columns = (range(-m, count + m) for m, count in zip(margin, (config.R, config.K)))
    parts = core.latents(range(len(real)), config.z_dim).split(24)
    images = np.concatenate([core.to_uint8(core.full_image(gan.G_ema, z, rows, columns)) for z in parts])
    framed = frame(images[:24], corner, (config.height, config.width), RED)
    core.save_picture(core.grid(core.enlarge(framed)), run / f"sample-{gan.step:09d}.png")
    inside = images[:, corner[0] :, corner[1] :][:, : config.height, : config.width]
    levels = sliced_wasserstein(real, inside)
    entry = dict(zip(("margin_seam", "inner_seam"), seams(images, config.S, margin)))
    entry["inside_swd"] = sum(levels.values()) / len(levels)
    found = tuple(entry.values())
    if losses:
        entry |= zip(gan.LOSSES, torch.stack(losses).double().mean(dim=0).tolist())
    print(f"step {gan.step:,}", *(f"{name} {x:.3f}" for name, x in entry.items()), sep="  ", flush=True)
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(dict(step=gan.step) | entry) + "\n")
    return found


def post_train(args: argparse.Namespace) -> int:
    """From a checkpoint to a run folder with pictures, log.jsonl and checkpoints; returns the exit status."""
    device, path = core.choose_device(args.device), core.find_checkpoint(args.source)
    config, contents = core.read_checkpoint(path)
    margin = choose_margin(config, args.margin)
    given = dict(steps=contents["step"] + args.steps, data=args.data or config.data)
    gan, stored = core.resume(path, given, device, lambda config: core.load_stored(config, args.cache))
    opt_G = core.make_adam([dict(params=[*gan.G.blocks[:2].parameters()], lr=config.lr_g)], config, device)
    run = Path(args.run or f"runs/{path.resolve().parent.name}-extrapolate")
    if run.exists():
        raise UserError(f"--run {run} exists; name a new folder")
    make_folder(run)
    write_file(run / "config.json", (json.dumps(vars(gan.config), indent=1) + "\n").encode())

    draws = config, torch.from_numpy(stored), core.split(len(stored), config.holdout)[0], gan.rng, device
    real = np.asarray(choose_real(stored, config.holdout, COUNT)[0][:])
    best, _, first_swd = report(gan, margin, real, run, [])
    core.save_checkpoint(gan, run / "best.pt", contents["images"])
    losses, last = [], False
    with core.stop_signals() as signals:
        while not last:
            ema_weight = core.to_device(core.ema_weight(config, gan.step), device)
            losses.append(core.train_step(gan, *core.draw_batch(*draws), ema_weight))
            z = core.sample_latents(gan.config.batch_size, gan.config.z_dim, gan.rng)
            margin_step(gan, opt_G, margin, core.to_device(z, device))
            gan.step += 1
            release_pages(stored)
            last = bool(signals) or gan.step == gan.config.steps
            if last or gan.step % EVERY == 0:
                if not all(t.isfinite().all() for t in (*losses, *core.named_tensors(gan).values())):
                    raise UserError(f"a loss or weight is not finite at step {gan.step:,}; try fewer --steps")
                seam, inner_seam, swd = report(gan, margin, real, run, losses)
                losses.clear()
                if seam < best and swd <= 1.1 * first_swd:
                    best = seam
                    core.save_checkpoint(gan, run / "best.pt", contents["images"])
                last = last or seam <= inner_seam
    core.save_checkpoint(gan, run / f"checkpoint-{gan.step:09d}.pt", contents["images"])
    print(f"done: python coco_gan.py sample --checkpoint {run}/best.pt --extrapolate {args.margin}")
    return 128 + max(signals) if signals else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = core.Parser(prog="python -m experiments.extrapolate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="RUN|CHECKPOINT", help="a trained model")
    add("--margin", type=core.positive, default=1, metavar="N", help="width in micro patches (default: 1)")
    add("--steps", type=core.positive, default=2000, metavar="N", help="at most so many (default: 2000)")
    add("--run", metavar="DIR", help="folder of the new run (default: runs/NAME-extrapolate)")
    add("--data", metavar="PATH", help="where the training images are, if they were moved")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return core.run_command(parser, post_train, argv)


if __name__ == "__main__":
    sys.exit(main())
