"""Post-train a model beyond the borders, so that `sample --extrapolate` continues its images with fainter seams.

    python -m experiments.extrapolate runs/tiny-001    # 2,000 more steps at most, in runs/extrapolate-001
    python coco_gan.py sample --checkpoint runs/extrapolate-001/best.pt --extrapolate 1

Beside each ordinary step, a second pair of Adams takes a step on macro patches that reach up to --margin micro
patches beyond the open borders. It trains D and the first two blocks of G only ("the first-two layers of the
generator"). Post-training ends when the seams of the margin are no more visible than those inside. It may also
get worse again: best.pt is the step with the faintest seams of the margin. It cannot be resumed, because the
second pair of Adams is not in the checkpoints.

Source: section 3.3; appendix E; figures 7, 16 and 17.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call

import coco_gan as core
from coco_gan import COCOGAN, Config, content_consistency, spatial_consistency, spectral_norm, update
from data import UserError, release_pages, write_file
from experiments.figures import RED, frame

EVERY = 100  # steps between pictures, lines of the log, and looks at the seams


def choose_margin(config: Config, asked: int) -> tuple[int, int]:
    """How many micro patches beyond the borders, down and across: none where borders meet. Raises: UserError."""
    axes = zip(config.closed, config.positions)  # with a single position, c' is the same in the margin
    margin = tuple(0 if closed or count == 1 else asked for closed, count in axes)
    if not any(margin):
        found = "{1} x {2} positions of macro patches on a {0}".format(config.topology, *config.positions)
        raise UserError(f"--margin {asked} needs two positions towards an open border; there are {found}")
    return margin


def draw_margin_batch(config: Config, images, indices, rng, device, margin: tuple[int, int]):
    """Draw a batch as `draw_batch` does, but the generated macro patches may reach into the margin.

    Returns: x' and its c', which are inside the borders; then c' (B, c_dim) and C'' (B·N·M, c_dim) of s'; z; ε.
    """
    x_macro, c_macro, _, z, epsilon = core.draw_batch(config, images, indices, rng, device)
    top, left = core.sample_positions(config, rng, margin)
    i, j = top / config.S, left / config.S
    c_generated, c_micro = core.macro_coordinates(config, i, j), core.micro_matrix(config, i, j)
    return x_macro, c_macro, c_generated.to(device), c_micro.to(device), z, epsilon


def second_optimizers(gan: COCOGAN) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Adam of G's first two blocks and Adam of D, with the learning rates of training."""
    adam = gan.opt_G.defaults
    opt_G = torch.optim.Adam(gan.G.blocks[:2].parameters(), **adam)
    return opt_G, torch.optim.Adam(gan.D.parameters(), **adam | dict(lr=gan.config.lr_d))


def margin_step(gan: COCOGAN, opt_G, opt_D, x_macro, c_macro, c_generated, c_micro, z, epsilon) -> None:
    """One step of opt_D, then one of opt_G, on a batch of `draw_margin_batch`: `train_step` without the EMA."""
    config, G, D, A, Q, B = gan.config, gan.G, gan.D, gan.A, gan.Q, len(z)
    z_micro = z.repeat_interleave(config.N * config.M, dim=0)  # (B·N·M, z_dim)
    s_micro = gan.run(G, spectral_norm(G, iterate=True), z_micro, c_micro, tanh=False)
    s_macro = core.merge_patches(s_micro, config.N, config.M, tanh=True, dtype=torch.float32)
    s_macro = s_macro.contiguous(memory_format=core.LAYOUT)  # (B, 3, N·S, M·S)

    # D: ŝ' lies between x' and s', and its coordinate between theirs (the paper does not say)
    D_sn, A_sn, Q_sn = (spectral_norm(net, iterate=True) if net else None for net in (D, A, Q))
    s_detached, c_hat = s_macro.detach(), c_macro.lerp(c_generated, epsilon.unsqueeze(1))
    score, h = gan.run(D, D_sn, torch.cat([x_macro, s_detached]), torch.cat([c_macro, c_generated]))
    L_W = core.wasserstein(score[:B], score[B:])
    L_GP, _ = core.gradient_penalty(lambda x: gan.run(D, D_sn, x, c_hat)[0], x_macro, s_detached, epsilon)
    L_S = spatial_consistency(c_macro, functional_call(A, A_sn, (h[:B],)))
    loss = -L_W + config.lambda_gp * L_GP + config.alpha_s * L_S
    if config.guided:
        loss = loss + config.alpha_q * content_consistency(z, functional_call(Q, Q_sn, (h[B:],)))
    update(opt_D, loss)

    # G, by way of the updated D. L_S counts inside [-1, 1] only, for A ends in a tanh and predicts nothing else.
    nets = [spectral_norm(net, iterate=False) if net else {} for net in (D, A, Q)]
    D_sn, A_sn, Q_sn = ({name: p.detach() for name, p in parameters.items()} for parameters in nets)
    score, h = gan.run(D, D_sn, s_macro, c_generated)
    inside = (c_generated.abs() <= 1 + 1e-4).all(dim=1, keepdim=True)
    L_S = spatial_consistency(c_generated * inside, functional_call(A, A_sn, (h,)) * inside)
    loss = -score.mean() + config.alpha_s * L_S
    if config.guided:
        loss = loss + config.alpha_q * content_consistency(z, functional_call(Q, Q_sn, (h,)))
    update(opt_G, loss)


def seams(images: np.ndarray, S: int, margin: tuple[int, int]) -> tuple[float, float]:
    """How visible the seams between micro patches are, in the margin and inside. The paper has no such measure.

    The mean absolute difference across a seam over that between neighbours inside the patches on both sides,
    averaged over seams. Args: images (n, H, W, 3) uint8, with the margin. Returns: NaN where no seam has one.
    """
    inner, outer = [], []
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


def report(gan: COCOGAN, margin: tuple[int, int], run: Path, means: dict[str, float]) -> tuple[float, float]:
    """Draw images with the trained region framed in red (figure 7), log their `seams`, and return these."""
    config, corner = gan.config, [m * gan.config.S for m in margin]
    rows, columns = (range(-m, count + m) for m, count in zip(margin, (config.R, config.K)))
    images = core.to_uint8(core.full_image(gan.G_ema, core.latents(range(24), config.z_dim), rows, columns))
    framed = frame(images, corner, (config.height, config.width), RED)
    core.save_picture(core.grid(framed), run / f"sample-{gan.step:09d}.png")
    margin_seam, inner_seam = seams(images, config.S, margin)
    entry = dict(margin_seam=margin_seam, inner_seam=inner_seam) | means
    print(
        f"step {gan.step:,}", *(f"{name} {value:.3f}" for name, value in entry.items()), sep="  ", flush=True
    )
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(dict(step=gan.step) | entry) + "\n")
    return margin_seam, inner_seam


def post_train(args: argparse.Namespace) -> int:
    """From a checkpoint to a run folder with pictures, log.jsonl and checkpoints; returns the exit status."""
    device, path = core.choose_device(args.device), core.find_checkpoint(args.source)
    config, contents = core.read_checkpoint(path)
    margin = choose_margin(config, args.margin)
    given = dict(steps=contents["step"] + args.steps, data=args.data or config.data)
    gan, stored = core.resume(path, given, args.cache, device)
    config, fingerprint = gan.config, contents["images"]
    draws = config, torch.from_numpy(stored), core.split(len(stored), config.holdout)[0], gan.rng, device
    names = (f"runs/extrapolate-{number:03d}" for number in itertools.count(1))
    run = Path(args.run or next(name for name in names if not os.path.exists(name)))
    run.mkdir(parents=True)
    write_file(run / "config.json", (json.dumps(dataclasses.asdict(config), indent=1) + "\n").encode())

    report(gan, margin, run, {})
    optimizers, losses, best, last = second_optimizers(gan), [], math.inf, False
    with core.stop_signals() as signals:
        while not last:
            ema_weight = core.to_device(core.ema_weight(config, gan.step), device)
            losses.append(core.train_step(gan, *core.draw_batch(*draws), ema_weight))
            margin_step(gan, *optimizers, *draw_margin_batch(*draws, margin))
            gan.step += 1
            release_pages(stored)
            last = bool(signals) or gan.step == config.steps
            if last or gan.step % EVERY == 0:
                means = torch.stack(losses).double().mean(dim=0)
                losses.clear()
                if not all(t.isfinite().all() for t in (means, *gan.tensors().values())):
                    raise UserError(
                        f"a loss or a weight is not finite at step {gan.step:,}; try a lower --steps"
                    )
                seam, inner_seam = report(gan, margin, run, dict(zip(core.LOSSES, means.tolist())))
                if seam < best:
                    best = seam
                    core.save_checkpoint(gan, run / "best.pt", fingerprint)
                last = last or seam <= inner_seam
    path = run / f"checkpoint-{gan.step:09d}.pt"
    core.save_checkpoint(gan, path, fingerprint)
    path = run / "best.pt" if best < math.inf else path
    print(f"done: python coco_gan.py sample --checkpoint {path} --extrapolate {args.margin}")
    return 128 + max(signals) if signals else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = core.Parser(prog="python -m experiments.extrapolate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="RUN|CHECKPOINT", help="a trained model, by its newest checkpoint or another")
    text = "micro patches beyond a border (default: 1)"
    add("--margin", type=core.positive, default=1, metavar="N", help=text)
    add("--steps", type=core.positive, default=2000, metavar="N", help="at most so many (default: 2000)")
    add("--run", metavar="DIR", help="folder of the run (default: the next free runs/extrapolate-NNN)")
    add("--data", metavar="PATH", help="where the training images are, if they were moved")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return core.run_command(parser, post_train, argv)


if __name__ == "__main__":
    sys.exit(main())
