"""Time a training step, in stages from plain PyTorch to all that makes it fast, sampling, and the kernels.

    python -m experiments.bench --json bench.json           # celeba128 on a GPU, tiny on a CPU
    python -m experiments.bench --preset celeba64 --batch-size 16
    python -m experiments.bench --kernels                   # on a GPU: each kernel instead of a step

Each stage adds one thing to the one before. The last row of the table is the baseline that COCO-GAN avoids:
the same networks for one patch as large as the image, which D sees completely (macro = micro = full image).

A step is all of it: drawing the batch, D's and G's update, the moving average. The stages take turns, so that
a machine that slows down slows all of them. Images are noise, which takes as long as faces do.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch._functorch.config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import coco_gan
import kernels
from coco_gan import (
    COCOGAN,
    PRESETS,
    Config,
    Parser,
    choose_device,
    choose_precision,
    draw_batch,
    ema_weight,
    full_image,
    latents,
    positive,
    run_command,
    to_device,
    train_step,
)
from data import UserError, write_file

IMAGES = 1024  # in the store that batches are cut from
SAMPLES = 64


@dataclass(frozen=True)
class Stage:
    name: str
    precision: str = "fp32"
    layout: torch.memory_format = torch.contiguous_format
    impl: str = "torch"
    graph: bool = False
    full: bool = False  # one patch as large as the image


def stages(config: Config, device: torch.device) -> list[Stage]:
    """Those that the device can run."""
    cuda, fast = device.type == "cuda", choose_precision(replace(config, precision="auto"), device)
    ladder = [Stage("eager, float32"), Stage("+ tf32", "tf32")] if cuda else [Stage("eager, float32")]
    name = f"+ {fast}, channels last"
    ladder.append(replace(ladder[-1], name=name, precision=fast, layout=torch.channels_last))
    if cuda and kernels.failure("cuda") is None:
        ladder.append(replace(ladder[-1], name="+ kernels", impl="triton"))
    if cuda:
        ladder.append(replace(ladder[-1], name="+ graph", graph=True))
    if config.height == config.width and config.topology == "plane":
        ladder.append(replace(ladder[-1], name="the same, full images", full=True))
    return ladder


@contextlib.contextmanager
def set_to(stage: Stage):
    """Set the switches of PyTorch and of the project for a stage; afterwards they are as before."""
    switches = (
        (torch.backends.cuda.matmul, "allow_tf32", stage.precision == "tf32"),
        (torch.backends.cudnn, "allow_tf32", stage.precision == "tf32"),
        (torch.backends.cudnn, "benchmark", True),
        (coco_gan, "LAYOUT", stage.layout),
        (kernels, "DEFAULT", stage.impl),
    )
    before = [getattr(where, name) for where, name, _ in switches]
    try:
        for where, name, value in switches:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(switches, before):
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
    """The model of a stage, and a function that trains a step, each time on another batch."""
    config = replace(config, precision=stage.precision)
    if stage.full:
        config = replace(config, N=1, M=1, S=config.height)
    rng = torch.Generator().manual_seed(0)
    shape = (IMAGES, config.height, config.width, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=rng).to(device)
    gan, indices = COCOGAN(config, device), torch.arange(IMAGES)
    train = functools.partial(train_step, gan)
    train = kernels.capture(train) if stage.graph else train

    def step() -> torch.Tensor:
        batch = draw_batch(config, images, indices, gan.rng, device)
        gan.step += 1
        return train(*batch, to_device(ema_weight(config, gan.step - 1), device))

    return gan, step


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
            _, step = start(stage, config, device)
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
    G, z, rows = COCOGAN(config, device).G_ema, latents(range(SAMPLES), config.z_dim), []
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
        full = row is rows[-1] and "full images" in row["stage"]
        share = "" if full else f"{1000 * flops / ms / rate:.1%}"
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


# ---- Each kernel, on a GPU ---------------------------------------------------------------------------------

# What the four CBN of celeba128 get for 128 samples of 4 micro patches.
LAYERS = (512, 512, 4, 4), (512, 256, 8, 8), (512, 128, 16, 16), (512, 64, 32, 32)


def timed_graph(calls, repeats: int = 50) -> list[float]:
    """Microseconds a call, `repeats` times: calls on tensors of their own, replayed as one CUDA graph."""
    for _ in range(3):
        for call in calls:
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        _kept = [call() for call in calls]  # freed, all would have one address
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 5)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) / len(calls) for start, end in events[5:]]


def kernel_cases(dtype: torch.dtype, device: str = "cuda"):
    """What to time: function, shape, bytes to move forward and backward, options, inputs."""

    def noise(*shape):
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        return x.requires_grad_()

    def cbn_inputs(B, C, h, w):
        channels = [torch.randn(B, C, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
        return noise(B, C, h, w), *channels, torch.zeros(C, device=device), torch.ones(C, device=device)

    # The last shape of each function makes tensors larger than any cache.
    for shape in (*LAYERS, (4096, 64, 32, 32)):
        x = math.prod(shape) * dtype.itemsize
        options = dict(training=True, relu=True)
        yield kernels.conditional_batch_norm, shape, (3 * x, 5 * x), options, cbn_inputs
    for shape in ((512, 3, 32, 32), (65_536, 3, 32, 32)):
        x, y = math.prod(shape) * dtype.itemsize, math.prod(shape) * 4
        options = dict(rows=2, columns=2, tanh=True, dtype=torch.float32)
        yield kernels.merge_patches, shape, (x + y, 2 * x + y), options, lambda *s: (noise(*s),)

    n = 20_000
    images = torch.randint(256, (n, 128, 128, 3), dtype=torch.uint8, device=device)

    def crop_inputs(B, *_):
        return images, *(torch.randint(end, (B,), device=device) for end in (n, 128, 128))

    for shape in ((128, 3, 64, 64), (16_384, 3, 64, 64)):
        yield kernels.crop_patches, shape, (5 * math.prod(shape),), dict(height=64, width=64), crop_inputs


def bench_kernels(dtype: torch.dtype) -> list[dict]:
    """Time all cases in eager and compiled PyTorch and with the kernels; print and return the figures."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device="cuda")
    times = timed_graph([source.clone])
    copied = 2 * source.numel() / statistics.median(times)  # bytes a microsecond
    rows = [dict(name="copy", bytes=2 * source.numel(), microseconds=times)]
    print(f"copying moves {copied / 1e6:.2f} TB/s, reading and writing; L2 cache {cache / 2**20:.0f} MiB")
    print(f"{dtype}; microseconds: median (10th to 90th percentile), share of that; * fits into the cache")
    for function, shape, moved, options, inputs in kernel_cases(dtype):
        torch._dynamo.reset()
        reference = functools.partial(function, impl="torch")
        impls = dict(eager=reference, compile=torch.compile(reference, dynamic=False))
        impls["triton"] = functools.partial(function, impl="triton")
        # So many that no call finds its tensors in the cache.
        sets = [inputs(*shape) for _ in range(max(2, min(64, 4 * cache // moved[0])))]
        leaves = [[t for t in one if t.requires_grad] for one in sets]
        for direction, count in zip(("forward", "backward"), moved):
            line = f"{function.__name__} {'x'.join(map(str, shape))} {direction}{' *' * (count < cache)}"
            for impl, run in impls.items():
                calls = [functools.partial(run, *one, **options) for one in sets]
                if direction == "backward":
                    results = [(y := call(), torch.randn_like(y)) for call in calls]
                    back = functools.partial(torch.autograd.grad, retain_graph=True)
                    calls = [functools.partial(back, y, x, dy) for (y, dy), x in zip(results, leaves)]
                times = timed_graph(calls)
                low, *_, high = statistics.quantiles(times, n=10)
                middle = statistics.median(times)
                line += f"  {impl} {middle:.1f} ({low:.1f} to {high:.1f}) {count / middle / copied:.0%}"
                row = dict(name=function.__name__, shape=shape, direction=direction, impl=impl, bytes=count)
                rows.append(row | dict(microseconds=times, median=middle, share=count / middle / copied))
            print(line, flush=True)
    return rows


# ---- Command -----------------------------------------------------------------------------------------------


def bench(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    preset = args.preset or ("celeba128" if cuda else "tiny")
    config = Config(**PRESETS[preset])
    config = replace(config, batch_size=args.batch_size or config.batch_size).check()
    about = dict(device=torch.cuda.get_device_name(device) if cuda else "CPU", torch=torch.__version__)
    about |= dict(triton=getattr(kernels.triton, "__version__", None), cuda=torch.version.cuda)
    about |= dict(threads=torch.get_num_threads(), date=datetime.date.today().isoformat())
    about |= dict(preset=preset, batch_size=config.batch_size)
    about["command"] = f"python -m experiments.bench {args.given}".strip()
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    if args.kernels:
        if not cuda or kernels.failure("cuda"):
            raise UserError("--kernels needs a GPU on which Triton's kernels work; leave it out")
        # Graphs are not captured on the default stream, and compiled code goes backward more than once.
        patch = torch._functorch.config.patch(donated_buffer=False)
        with torch.cuda.stream(torch.cuda.Stream()), patch:
            contents = dict(about=about, kernels=bench_kernels(torch.bfloat16))
    else:
        if not cuda:
            print("this is a CPU: no tf32, kernels or graph here, and its figures say nothing of a GPU's")
        flops = operations(config, device)
        fast = choose_precision(replace(config, precision="auto"), device)
        rate = matrix_rate(torch.bfloat16 if fast == "bf16" else torch.float32, device)
        rows, sampling = bench_training(config, device, args.steps), bench_sampling(config, device)
        report(config, device, rows, sampling, flops, rate)
        contents = dict(about=about, flop_per_step=flops, matrix_flop_per_second=rate, steps=rows)
        contents["sampling"] = sampling
    if args.json:
        write_file(Path(args.json), (json.dumps(contents, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    text = __doc__.splitlines()[0]
    parser = Parser(prog="python -m experiments.bench", description=text, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: celeba128 on a GPU, tiny on a CPU")
    add("--batch-size", type=positive, metavar="B", help="macro patches a step (default: the preset's)")
    add("--steps", type=positive, default=50, metavar="N", help="timed for each stage (default: 50)")
    add("--kernels", action="store_true", help="time each kernel instead, in bfloat16 on a GPU")
    add("--json", metavar="FILE", help="also write all figures to a file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.set_defaults(given=" ".join(sys.argv[1:] if argv is None else argv))
    return run_command(parser, bench, argv)


if __name__ == "__main__":
    sys.exit(main())
