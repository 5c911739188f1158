"""Time a training step, in stages from plain PyTorch to all that makes it fast, and sampling.

    python -m experiments.bench --json bench.json           # celeba128 on a GPU, tiny on a CPU
    python -m experiments.bench --preset celeba64 --batch-size 16

Each stage adds one thing to the one before it. The last row of the table is what COCO-GAN is there to avoid:
the same networks for one patch as large as the image, which D sees whole (macro = micro = full image).

A step is all of it: drawing the batch, D's and G's step, their Adams, the running average. The stages take
turns, so that a machine that slows down slows all of them. Images are noise, which takes as long as faces do.
"""

import argparse
import contextlib
import datetime
import functools
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import coco_gan
import kernels
from coco_gan import (
    PRESETS,
    Config,
    Parser,
    check_config,
    choose_device,
    draw_batch,
    full_image,
    graphed,
    latents,
    memory,
    nearest,
    new_state,
    positive,
    precision_of,
    run_command,
    train_step,
)
from data import UserError
from experiments.evaluate import check_target, write

IMAGES = 1024  # in the store that batches are cut from
SAMPLES = 64


@dataclass(frozen=True)
class Stage:
    name: str
    precision: str = "fp32"
    layout: torch.memory_format = torch.contiguous_format
    impl: str = "torch"
    graph: bool = False
    whole: bool = False  # one patch as large as the image


def stages(config: Config, device: torch.device) -> list[Stage]:
    """Those that the device can run."""
    cuda, fast = device.type == "cuda", precision_of(replace(config, precision="auto"), device)
    ladder = [Stage("eager, float32"), Stage("+ tf32", "tf32")] if cuda else [Stage("eager, float32")]
    name = f"+ {fast}, channels last"
    ladder.append(replace(ladder[-1], name=name, precision=fast, layout=torch.channels_last))
    if cuda and kernels.failure("cuda") is None:
        ladder.append(replace(ladder[-1], name="+ kernels", impl="triton"))
    if cuda:
        ladder.append(replace(ladder[-1], name="+ graph", graph=True))
    if config.height == config.width and config.topology == "plane":
        ladder.append(replace(ladder[-1], name="the same, full images", whole=True))
    return ladder


@contextlib.contextmanager
def set_to(stage: Stage):
    """The switches of PyTorch and of the project for a stage; as they were, in the end."""
    places = (
        (torch.backends.cuda.matmul, "allow_tf32", stage.precision == "tf32"),
        (torch.backends.cudnn, "allow_tf32", stage.precision == "tf32"),
        (torch.backends.cudnn, "benchmark", True),
        (coco_gan, "LAYOUT", stage.layout),
        (kernels, "DEFAULT", stage.impl),
    )
    before = [getattr(where, name) for where, name, _ in places]
    try:
        for where, name, value in places:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(places, before):
            setattr(where, name, value)


def timed(call, count: int, device: torch.device) -> list[float]:
    """Milliseconds that each of `count` calls took, of the GPU if there is one."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1000 * (end - start) for start, end in zip(marks, marks[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(marks, marks[1:])]


def spread(values: list[float]) -> tuple[float, float, float]:
    """The median, the 10th and the 90th percentile."""
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), low, high


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large product of matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = timed(lambda: a @ b, 25, device)[5:]
    return 2000 * n**3 / statistics.median(times)


def start(stage: Stage, config: Config, device: torch.device):
    """The state of a stage, and a function that trains a step, each time on another batch."""
    config = replace(config, precision=stage.precision)
    if stage.whole:
        config = replace(config, N=1, M=1, S=config.height)
    rng = torch.Generator().manual_seed(0)
    shape = (IMAGES, config.height, config.width, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=rng).to(device)
    state, numbers = new_state(config, device), torch.arange(IMAGES)
    step = graphed(state) if stage.graph else functools.partial(train_step, state)
    return state, lambda: step(draw_batch(config, images, numbers, state.rng, device))


class Counter(TorchDispatchMode):
    """Adds up the floating-point operations of products and convolutions; PyTorch's formulas.

    PyTorch's own FlopCounterMode also counts by module, which it cannot within a gradient of a gradient.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (formula := flop_registry.get(function.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def operations(config: Config, device: torch.device) -> int:
    """Floating-point operations of the products and convolutions of a step, forward and backward."""
    with set_to(Stage("")):
        _, step = start(Stage(""), config, device)
        with Counter() as counter:
            step()
    return counter.total


def bench_training(config: Config, device: torch.device, steps: int) -> list[dict]:
    rows, running = [], []
    for stage in stages(config, device):
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
        held, started = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        with set_to(stage):
            state, step = start(stage, config, device)
            first = step().sum().item()  # which waits for it
            seconds = time.perf_counter() - started
            if cuda:
                torch.cuda.reset_peak_memory_stats()  # not the workspaces in which cuDNN tried its algorithms
            timed(step, 8 if cuda else 2, device)  # a graph is captured in the fourth
        assert first == first, "a loss is not finite"
        row = dict(stage=stage.name, first_step_seconds=seconds, milliseconds=[])
        row["peak_memory_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else None
        rows.append(row)
        running.append((stage, step))
        print(f"{stage.name}: first step after {seconds:.1f} s", file=sys.stderr, flush=True)
    rounds = 5
    for _ in range(rounds):
        for row, (stage, step) in zip(rows, running):
            with set_to(stage):
                step()  # after the others the caches are cold
                row["milliseconds"] += timed(step, max(1, steps // rounds), device)
    return rows


def bench_sampling(config: Config, device: torch.device) -> list[dict]:
    """Images a second that sampling makes, in PyTorch and, on a GPU, by the kernels."""
    G, z, rows = new_state(config, device).G_average, latents(range(SAMPLES), config.z_dim), []
    works = device.type == "cuda" and kernels.failure("cuda") is None
    for impl in ("torch", "triton") if works else ("torch",):
        with set_to(Stage("", impl=impl, layout=torch.channels_last)):
            times = timed(lambda: full_image(G, z), 7, device)[2:]
        rows.append(dict(impl=impl, images_per_second=1000 * SAMPLES / statistics.median(times)))
    return rows


def report(config: Config, device: torch.device, rows, sampling, flops: int, rate: float) -> None:
    base = statistics.median(rows[0]["milliseconds"])
    print(f"\n{'':28}{'ms a step (10 to 90 %)':>28}{'images/s':>10}{'ratio':>7}{'peak MB':>9}{'rate':>7}")
    for row in rows:
        ms, low, high = spread(row["milliseconds"])
        whole = row is rows[-1] and "full images" in row["stage"]
        share = "" if whole else f"{1000 * flops / ms / rate:.1%}"
        peak = "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:,.0f}"
        text = f"{ms:,.2f} ({low:,.2f} to {high:,.2f})"
        images = f"{1000 * config.batch_size / ms:,.0f}"
        print(f"{row['stage']:28}{text:>28}{images:>10}{base / ms:>7.2f}{peak:>9}{share:>7}")
    print(f"\na step: {flops / 1e9:,.2f} GFLOP; rate: of {rate / 1e12:.2f} TFLOP/s, a product of matrices")
    if rows[0]["peak_memory_mb"] is not None and "full images" in rows[-1]["stage"]:
        saved = 1 - rows[-2]["peak_memory_mb"] / rows[-1]["peak_memory_mb"]
        print(f"memory: {saved:.1%} less than full images at the same batch (the paper: 47.7 %)")
    for row in sampling:
        print(f"sampling with {row['impl']}: {row['images_per_second']:,.1f} images/s")


def bench(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    preset = args.preset or ("celeba128" if device.type == "cuda" else "tiny")
    if preset not in PRESETS:
        hint = nearest(preset, PRESETS)
        raise UserError(f"--preset {preset} is unknown{hint}; give {', '.join(PRESETS)}")
    config = Config(**PRESETS[preset])
    config = replace(config, batch_size=args.batch_size or config.batch_size)
    check_config(config)
    if args.json:
        check_target("--json", args.json, args.force)
    cuda = device.type == "cuda"
    about = dict(device=torch.cuda.get_device_name(device) if cuda else "CPU", torch=torch.__version__)
    about |= dict(triton=getattr(kernels.triton, "__version__", None), cuda=torch.version.cuda)
    about |= dict(threads=torch.get_num_threads(), date=datetime.date.today().isoformat())
    about |= dict(preset=preset, batch_size=config.batch_size)
    about["command"] = f"python -m experiments.bench {args.given}".strip()
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    if not cuda:
        print("this is a CPU: no tf32, kernels or graph here, and its figures say nothing of a GPU's")
    full = f"--batch-size {config.batch_size} does not fit in the memory of {device}"
    with memory(f"{full}; try a smaller one"):
        flops = operations(config, device)
        fast = precision_of(replace(config, precision="auto"), device)
        rate = matrix_rate(torch.bfloat16 if fast == "bf16" else torch.float32, device)
        rows, sampling = bench_training(config, device, args.steps), bench_sampling(config, device)
    report(config, device, rows, sampling, flops, rate)
    if args.json:
        contents = dict(about=about, flop_per_step=flops, matrix_flop_per_second=rate, steps=rows)
        contents["sampling"] = sampling
        write("--json", args.json, (json.dumps(contents, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    name, text = "python -m experiments.bench", __doc__.splitlines()[0]
    parser = Parser(prog=name, description=text, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", metavar="NAME", help="default: celeba128 on a GPU, tiny on a CPU")
    add("--batch-size", type=positive, metavar="B", help="macro patches a step (default: the preset's)")
    add("--steps", type=positive, default=50, metavar="N", help="timed for each stage (default: 50)")
    add("--json", metavar="FILE", help="also write all figures to a file")
    add("--force", action="store_true", help="replace a file that exists")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.set_defaults(given=" ".join(sys.argv[1:] if argv is None else argv))
    return run_command(parser, bench, argv)


if __name__ == "__main__":
    sys.exit(main())
