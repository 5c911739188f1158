"""Test experiments/bench.py: python -m pytest experiments/test_bench.py"""

import json
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import coco_gan
import kernels
from coco_gan import CPU as CPU_PRESET
from coco_gan import Config
from experiments import bench

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Config(height=16, width=16, S=4, **{**CPU_PRESET, "width_g": 1, "width_d": 1, "batch_size": 4})


def test_operations_are_counted_forward_backward_and_twice_back():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    w = torch.randn(5, 3, 3, 3, requires_grad=True)
    one = 2 * 2 * 5 * 8 * 8 * 3 * 9  # B · C_out · h · w · C_in · 9 products and as many sums
    with bench.Counter() as forward:
        y = F.conv2d(x, w, padding=1)
    with bench.Counter() as backward:
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with bench.Counter() as twice:
        gradient.square().sum().backward()
    assert forward.total == one and backward.total == one
    assert twice.total >= 3 * one and twice.total % one == 0
    with bench.Counter() as product:
        torch.randn(7, 11) @ torch.randn(11, 5)
    assert product.total == 2 * 7 * 11 * 5


def test_a_step_has_the_operations_of_its_batch():
    """Nothing that is done once a step, whatever the batch, is a product of matrices."""
    few, many = (bench.operations(replace(SMALL, batch_size=B), CPU) for B in (8, 16))
    assert many == 2 * few > 10**6


def test_stages_add_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(kernels, "failure", lambda device: "no C compiler")
    assert "+ kernels" not in [stage.name for stage in bench.stages(SMALL, CUDA)]
    monkeypatch.setattr(kernels, "failure", lambda device: None)
    ladder = bench.stages(SMALL, CUDA)
    names = [
        "eager, float32",
        "+ tf32",
        "+ bf16, channels last",
        "+ kernels",
        "+ graph",
        "the same, full images",
    ]
    assert [stage.name for stage in ladder] == names
    changed = [
        [name for name in vars(a) if name != "name" and vars(a)[name] != vars(b)[name]]
        for a, b in zip(ladder, ladder[1:])
    ]
    assert changed == [["precision"], ["precision", "layout"], ["impl"], ["graph"], ["whole"]]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    names = [stage.name for stage in bench.stages(replace(SMALL, topology="cylinder"), CPU)]
    assert names == ["eager, float32", "+ fp32, channels last"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_stage_is_what_it_says_and_leaves_no_trace(layout):
    before = coco_gan.LAYOUT, kernels.DEFAULT, torch.backends.cuda.matmul.allow_tf32
    stage, seen = bench.Stage("", precision="fp32", layout=layout, whole=True), []
    with bench.set_to(stage):
        assert kernels.DEFAULT == "torch"
        state, step = bench.start(stage, SMALL, CPU)
        convolution = state.D.blocks[0].conv2
        convolution.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        step()
    assert (coco_gan.LAYOUT, kernels.DEFAULT, torch.backends.cuda.matmul.allow_tf32) == before
    assert state.step == 1 and state.config.S == 16 and state.config.N == 1
    for x, y in seen:
        assert x.shape[2:] == y.shape[2:] == (16, 16) and y.dtype == torch.float32
        assert x.is_contiguous(memory_format=layout) and y.is_contiguous(memory_format=layout)


def test_times_are_of_each_call():
    delays = iter([0.02, 0.001, 0.04])
    times = bench.timed(lambda: time.sleep(next(delays)), 3, CPU)
    assert len(times) == 3 and times[1] < times[0] < times[2] and 20 <= times[0]
    median, low, high = bench.spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (median, low, high) == pytest.approx((3, 1.4, 4.6))


def test_the_command_prints_a_table_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SAMPLES", 2)
    monkeypatch.setattr(bench, "IMAGES", 4)
    monkeypatch.setitem(coco_gan.PRESETS, "tiny", dict(vars(SMALL)))
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--steps", "5", "--json", "bench.json", "--device", "cpu", "--batch-size", "6"]) == 0
    out = capsys.readouterr().out
    assert (
        "this is a CPU" in out
        and "preset tiny, batch_size 6, command python -m experiments.bench --st" in out
    )
    contents = json.loads((tmp_path / "bench.json").read_text())
    assert [row["stage"] for row in contents["steps"]][0] == "eager, float32"
    for row in contents["steps"]:
        assert len(row["milliseconds"]) == 5 and row["stage"] in out and row["peak_memory_mb"] is None
    assert contents["flop_per_step"] > 1e6 and f"a step: {contents['flop_per_step'] / 1e9:,.2f} GFLOP" in out
    assert contents["sampling"][0]["images_per_second"] > 0 and "sampling with torch" in out


@pytest.mark.parametrize(
    "command, message",
    [
        (["--preset", "celeba46"], "--preset celeba46 is unknown, did you mean celeba64?"),
        (["--batch-size", "1"], "--batch-size 1 is out of range; give 2 to 65536"),
        (["--json", "."], "--json . exists already"),
        (["--steps", "0"], "argument --steps: '0' is no whole number"),
        (["--device", "gpu"], "--device gpu is unknown"),
    ],
)
def test_mistakes_end_in_one_line(command, message, capsys):
    assert bench.main(["--device", "cpu", *command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
