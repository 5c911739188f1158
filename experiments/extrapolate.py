"""Post-train a model beyond the borders, for fainter seams in what `sample --extrapolate` adds to its images.

    python -m experiments.extrapolate runs/tiny-001    # writes runs/tiny-001-extrapolate
    python coco_gan.py sample --checkpoint runs/tiny-001-extrapolate/best.pt --extrapolate 1

Beside each ordinary step, a second pair of Adams takes one on macro patches that reach up to --margin micro
patches beyond the open borders. It trains D and G's first two blocks only. Post-training ends when the seams
of the margin are no more visible than those inside. best.pt is the step with the faintest ones. A run cannot
be resumed, because checkpoints do not have the second pair of Adams.

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
from experiments.figures import RED, frame

EVERY = 100  # steps between two looks at the seams


def choose_margin(config: Config, asked: int) -> tuple[int, int]:
    """Micro patches beyond the borders, down and across: none where borders meet, or c' never changes."""
    margin = tuple(0 if closed or n == 1 else asked for closed, n in zip(config.closed, config.positions))
    if not any(margin):
        found = "{} x {} on a {}".format(*config.positions, config.topology)
        raise UserError(f"--margin {asked} needs two positions along an open border; there are {found}")
    return margin


def margin_step(gan: COCOGAN, opt_G, opt_D, margin, x_macro, c_macro, _, z, epsilon) -> None:
    """One step of opt_D, then one of opt_G, as `train_step`, but s' may reach into the margin.

    Args: margin: of `choose_margin`; the rest: a batch of `draw_batch`. x' stays within the borders.
    """
    config, G, D, A, Q, B = gan.config, gan.G, gan.D, gan.A, gan.Q, len(z)
    lambda_gp, alpha_s, alpha_q = config.loss_weights
    i, j = (pixels / config.S for pixels in core.sample_positions(config, gan.rng, margin))
    c_generated = core.macro_coordinates(config, i, j).to(gan.device)  # (B, c_dim), c' of s'
    c_micro = core.micro_matrix(config, i, j).to(gan.device)  # (B·N·M, c_dim)
    z_micro = z.repeat_interleave(config.N * config.M, dim=0)  # (B·N·M, z_dim)
    G_sn = core.cast(gan, spectral_norm(G, iterate=True))
    s_micro = functional_call(G, G_sn, (z_micro, c_micro), dict(tanh=False))
    s_macro = core.merge_patches(s_micro, config.N, config.M, tanh=True, dtype=torch.float32)
    s_macro = s_macro.contiguous(memory_format=core.LAYOUT)  # (B, 3, N·S, M·S)

    # D: ŝ' lies between x' and s', and its coordinate between theirs (the paper does not say)
    D_sn, A_sn, Q_sn = (spectral_norm(net, iterate=True) if net else None for net in (D, A, Q))
    D_sn = core.cast(gan, D_sn)
    s_detached, c_hat = s_macro.detach(), c_macro.lerp(c_generated, epsilon.unsqueeze(1))
    both = torch.cat([x_macro, s_detached]), torch.cat([c_macro, c_generated])
    score, h = functional_call(D, D_sn, both)
    L_GP, _ = core.gradient_penalty(
        lambda x: functional_call(D, D_sn, (x, c_hat))[0], x_macro, s_detached, epsilon
    )
    L_S = spatial_consistency(c_macro, functional_call(A, A_sn, (h[:B],)))
    loss = -core.wasserstein(score[:B], score[B:]) + lambda_gp * L_GP + alpha_s * L_S
    if config.guided:
        loss = loss + alpha_q * content_consistency(z, functional_call(Q, Q_sn, (h[B:],)))
    update(opt_D, loss)

    # G, by way of the updated D. L_S is 0 for coordinates outside [-1, 1], which A's tanh cannot reach.
    nets = [spectral_norm(net, iterate=False) if net else {} for net in (D, A, Q)]
    D_sn, A_sn, Q_sn = ({name: p.detach() for name, p in parameters.items()} for parameters in nets)
    score, h = functional_call(D, core.cast(gan, D_sn), (s_macro, c_generated))
    inside = (c_generated.abs() <= 1 + 1e-4).all(dim=1, keepdim=True)  # (B, 1)
    L_S = spatial_consistency(c_generated * inside, functional_call(A, A_sn, (h,)) * inside)
    loss = -score.mean() + alpha_s * L_S
    if config.guided:
        loss = loss + alpha_q * content_consistency(z, functional_call(Q, Q_sn, (h,)))
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


def report(gan: COCOGAN, margin: tuple[int, int], run: Path, losses: list) -> tuple[float, float]:
    """Draw images with the trained region framed in red (figure 7), and log their `seams`, the result."""
    config, corner = gan.config, [m * gan.config.S for m in margin]
    rows, columns = (range(-m, count + m) for m, count in zip(margin, (config.R, config.K)))
    z = core.latents(range(24), config.z_dim)
    images = core.to_uint8(core.full_image(gan.G_ema, z, rows, columns))
    framed = frame(images, corner, (config.height, config.width), RED)
    core.save_picture(core.grid(framed), run / f"sample-{gan.step:09d}.png")
    found = seams(images, config.S, margin)
    entry = dict(margin_seam=found[0], inner_seam=found[1])
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
    opt_D = core.make_adam([dict(params=[*gan.D.parameters()], lr=config.lr_d)], config, device)
    run = Path(args.run or f"runs/{path.resolve().parent.name}-extrapolate")
    if run.exists():
        raise UserError(f"--run {run} exists; name a new folder")
    make_folder(run)
    write_file(run / "config.json", (json.dumps(vars(gan.config), indent=1) + "\n").encode())

    report(gan, margin, run, [])
    draws = config, torch.from_numpy(stored), core.split(len(stored), config.holdout)[0], gan.rng, device
    losses, best, last = [], math.inf, False
    with core.stop_signals() as signals:
        while not last:
            ema_weight = core.to_device(core.ema_weight(config, gan.step), device)
            losses.append(core.train_step(gan, *core.draw_batch(*draws), ema_weight))
            margin_step(gan, opt_G, opt_D, margin, *core.draw_batch(*draws))
            gan.step += 1
            release_pages(stored)
            last = bool(signals) or gan.step == gan.config.steps
            if last or gan.step % EVERY == 0:
                if not all(t.isfinite().all() for t in (*losses, *core.named_tensors(gan).values())):
                    raise UserError(f"a loss or weight is not finite at step {gan.step:,}; try fewer --steps")
                seam, inner_seam = report(gan, margin, run, losses)
                losses.clear()
                if not seam >= best:  # also if it is NaN
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
