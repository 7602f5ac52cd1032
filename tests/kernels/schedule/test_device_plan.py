"""Plans of devices: a CPU's are fixed, a GPU's reach their goals by the cost model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ift_kernels
from bench.gpu import roofline
from bench.gpu.roofline import CASES, LARGE, problem
from bench.suites import counts
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.schedule import cost, device, gpu_plan, plan
from ift_kernels.schedule.device import H200
from ift_kernels.schedule.problem import MAX_ROUNDED_GPU, Memory

MIB = 1 << 20


# N, V, D, dtype, workspace in MiB; what is needed (h, w, b) and how (f, c, t, a); a
# forced schedule | schedule, tile, kept columns, rows of dh at once, bytes kept and at the peak.
CPU_PLANS = """
2048 32000 1024 bfloat16 256 - - | statistics 2048 4096 0 2048 0 16777216
2048 32000 1024 bfloat16 256 hw - | keep 2048 4096 32000 2048 131072000 160432128
2048 32000 1024 bfloat16 64 hwt - | keep 2048 2048 8192 2048 33554432 62914560
2048 32000 1024 bfloat16 256 hwtf - | keep 2048 2048 32000 2048 131072000 160432128
1024 151936 896 bfloat16 256 hwtf - | forward 512 8192 151936 1024 0 167772160
16384 32000 512 bfloat16 256 hwtf - | forward 2048 8192 32000 16384 0 245891072
1024 151936 896 bfloat16 256 hf - | forward 512 8192 151936 1024 0 158334976
8192 128256 4096 bfloat16 256 hwt - | keep 8192 512 2560 8192 41943040 260046848
8192 128256 4096 bfloat16 256 hf - | forward 683 8192 128256 8192 0 191983104
16384 32000 512 float32 384 hw - | keep 16384 512 5120 16384 335544320 369098752
300 50257 300 float32 16 hwfc - | keep 300 832 10816 300 12979200 15974400
7 1000 16 float64 1 hwb - | keep 7 1000 1000 7 56000 112000
2048 32000 1024 bfloat16 256 hwt recompute | recompute 2048 2048 0 2048 0 29360128
4096 32000 1024 bfloat16 256 hwtf forward | forward 2048 8192 32000 4096 0 178257920
2048 32000 1024 bfloat16 64 hfa - | forward 342 7872 32000 2048 0 46676352
""".strip().splitlines()


@pytest.mark.parametrize("line", CPU_PLANS)
def test_plans_of_a_cpu_are_fixed(line):
    asked, expected = (part.split() for part in line.split("|"))
    n, v, d, dtype, workspace, flags, forced = asked
    p = plan.Problem(
        int(n), int(v), int(d), getattr(torch, dtype), int(workspace) * MIB,
        need_hidden="h" in flags, need_weight="w" in flags, need_bias="b" in flags,
        grads_in_forward="f" in flags, same_dtype="c" not in flags, transpose="t" in flags,
        active=ActiveSet(0.001, 64, 512) if "a" in flags else None,
    )  # fmt: skip
    made = plan.make(p, 0, None if forced == "-" else forced)
    found = (
        made.schedule, made.tile_rows, made.tile_columns, made.keep_columns, made.hidden_rows,
        made.kept_bytes, made.peak_bytes,
    )  # fmt: skip
    assert [str(value) for value in found] == expected


@pytest.mark.parametrize("fp32_out", [False, True])
@pytest.mark.parametrize(
    ("case", "most"), [("statistics", 1.08), ("token", 1.10), ("frozen", 1.12), ("scalar", 1.15)]
)
def test_goals_of_a_large_head(case, most, fp32_out):
    """Seconds in those of bare products, by the model; N=8192, Llama 3 8B."""
    p = problem(case, LARGE, replace(H200, fp32_out=fp32_out))
    made = plan.make(p)
    taken = cost.seconds(p, made)
    assert taken.device <= most * roofline.bare(case, LARGE)
    assert taken.host <= taken.device / 3
    assert made.peak_bytes <= p.workspace


def of_exact(case, shape):
    """Seconds of an active set in those of the exact gradient, by the model."""
    exact = problem("frozen", shape)
    found = (cost.seconds(p, plan.make(p)) for p in (problem(case, shape), exact))
    active, dense = (taken.device for taken in found)
    return active / dense


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (LARGE, 0.70),
        ((8192, 2304, 256000), 0.72),
        ((8192, 5120, 152064), 0.69),
        ((8192, 896, 151936), 0.79),
        ((2048, 5120, 152064), 0.75),
    ],
)
def test_the_active_set_of_a_frozen_head(shape, most):
    """A tenth of the vocabulary active in 128 rows, by the model.

    Products are read for statistics, for masks and the sums of the tail, and where they are active,
    never written; head rows are read where they lie, at a rate that is not measured.
    """
    p = problem("active", shape)
    made = plan.make(p)
    assert cost.usual_share(128) == 0.1
    assert of_exact("active", shape) <= most
    assert made.active and made.peak_bytes <= p.workspace
    assert cost.seconds(p, made).host <= cost.seconds(p, made).device / 2


def test_the_active_set_with_a_slower_product_of_its_own(monkeypatch):
    """At .4 of the rate of a vendor's product the goal still holds."""
    monkeypatch.setattr(cost, "GATHERED_SHARE", 0.4)
    gpu_plan.make.cache_clear()
    try:
        assert of_exact("active", LARGE) <= 0.75
    finally:
        gpu_plan.make.cache_clear()


def test_the_active_set_of_a_backend_that_gathers_head_rows():
    """CUDA C++: whole gradients are formed first, and vendor products take copies of head rows."""
    assert of_exact("active, C++", LARGE) <= 0.93
    assert of_exact("active, C++", (8192, 896, 151936)) == 1


@pytest.mark.parametrize(
    ("case", "name"), [("frozen", "backward, head frozen"), ("active", "active")]
)
def test_launches_of_the_model_are_those_that_are_counted(case, name):
    p = problem(case, LARGE)
    found = counts.committed()[counts.FULL_SIZE][f"linear_logprobs, {name}"]
    counted = found["operators"] + found["products"] + found["epilogues"]
    assert abs(cost.seconds(p, plan.make(p)).launches - counted) <= counted / 20


def test_the_active_set_is_planned_only_where_it_is_faster():
    """Else the plan is that of the exact gradient, products and all."""
    chosen = set()
    for shape in roofline.SHAPES:
        for case, workspace in (("frozen", 512), ("token", 512), ("token", 8192), ("scalar", 512)):
            exact = problem(case, shape, workspace=workspace * MIB)
            asked = replace(exact, active=ActiveSet())
            made, other = plan.make(asked), plan.make(exact)
            times = [cost.seconds(asked, found).seconds for found in (made, other)]
            assert times[0] < times[1] if made.active else made == other
            assert made.products <= other.products or made.active
            if case == "token":
                backward = plan.make(asked, 0, "recompute", made.kept_bytes)
                assert backward.active == made.active
            chosen.add((case, made.active))
    assert {("frozen", False), ("frozen", True), ("token", False), ("token", True)} <= chosen
    large = replace(problem("token", LARGE), active=ActiveSet())
    assert plan.make(large).products == plan.make(problem("token", LARGE)).products < 4


@pytest.mark.parametrize("shape", roofline.SHAPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "active" not in case])
def test_plans_lose_little_to_waves_and_tiles(case, shape):
    p = problem(case, shape, replace(H200, fp32_out=True))
    made = plan.make(p)
    assert cost.seconds(p, made).device <= 1.10 * cost.floor(p, made)
    assert made.peak_bytes <= p.workspace


def narrow(p):
    """Tiles of 1024 columns, as a CPU would take."""
    made = plan.make(p)
    return replace(made, tile_columns=1024, tile_rows=p.rows if made.keep_columns else 8192)


def test_the_model_finds_narrow_tiles_slow():
    for case, least in (("statistics", 1.15), ("token", 1.2)):
        p = problem(case, LARGE, replace(H200, fp32_out=False))
        fast, slow = (cost.seconds(p, made) for made in (plan.make(p), narrow(p)))
        assert slow.launches > 2 * fast.launches
        assert slow.seconds > least / 1.1 * fast.seconds


def test_a_wave_that_is_hardly_begun_costs_a_whole_one():
    one, two = (cost.gemm(H200, torch.bfloat16, 128 * m, 256, 400) for m in (132, 133))
    assert two > 1.3 * one
    # Few tiles of a long inner size are split over the device.
    short, long = (cost.gemm(H200, torch.bfloat16, 128, 256, k) for k in (1 << 10, 1 << 14))
    assert long < 4 * short


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("workspace", [8, 100, 512, 4096])
@pytest.mark.parametrize("case", CASES)
def test_plans_of_a_gpu_fit(case, workspace, dtype):
    """Whatever the sizes; and a backward beside what its forward kept."""
    for rows, width, vocabulary in ((1, 64, 10), (77, 896, 5000), (5000, 300, 50257)):
        for same in (True, False):
            p = replace(
                problem(case, (rows, width, vocabulary), H200, dtype, workspace * MIB),
                same_dtype=same,
            )
            made = plan.make(p)
            backward = plan.make(p, 0, "recompute", made.kept_bytes)
            assert made.peak_bytes <= p.workspace
            if p.any_gradient:
                assert made.kept_bytes + backward.peak_bytes <= p.workspace


def test_sums_of_dw_are_rounded_three_times_at_most():
    p = problem("scalar", (2048, 896, 151936))
    for workspace in (64, 128, 256, 512, 2048):
        made = plan.make(replace(p, workspace=workspace * MIB), schedule="forward")
        if made.schedule == "forward":  # of a float32 sum once, whatever the number of blocks
            assert made.sum_columns or len(made.blocks(2048)) <= MAX_ROUNDED_GPU
    assert made.schedule == "forward"


@pytest.mark.parametrize("fp32_out", [False, True])
@pytest.mark.parametrize("shape", roofline.SHAPES, ids=str)
def test_no_16_bit_sum_of_dw_where_float32_is_asked_for(shape, fp32_out):
    p = problem("scalar", shape, replace(H200, fp32_out=fp32_out))
    fastest, made = plan.make(p), plan.make(replace(p, fp32_weight_sum=True))
    if made.schedule == "forward":
        assert len(made.blocks(shape[0])) == 1 or made.sum_columns
        left = 1 - (made.sum_columns or shape[2]) / shape[2]
        assert made.products == pytest.approx(3 + left)
        assert (made.rest is None) == (left == 0)
    assert made.peak_bytes <= p.workspace
    assert cost.seconds(p, fastest).seconds <= cost.seconds(p, made).seconds
    assert made.products <= plan.make(replace(p, grads_in_forward=False)).products


def test_a_cpu_rounds_no_16_bit_sum_of_dw_where_float32_is_asked_for():
    for rows, vocabulary, width in ((1024, 151936, 896), (16384, 32000, 512), (4096, 32000, 1024)):
        sizes = rows, vocabulary, width
        auto, asked = (
            ift_kernels.explain(*sizes, scalar=True, weight_grad_sum=kind)
            for kind in ("auto", "float32")
        )
        assert auto.schedule == "forward"
        assert asked.schedule != "forward" or asked.sum_columns == vocabulary
        assert asked.peak_bytes <= 256 * MIB
    for call in (
        lambda: ift_kernels.explain(8, 100, 8, weight_grad_sum="fp32"),
        lambda: ift_kernels.linear_cross_entropy(
            torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(2, dtype=torch.long),
            weight_grad_sum="fp32",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"weight_grad_sum: expected one of .* got 'fp32'"):
            call()


def test_dw_in_float32_takes_less_than_four_products():
    """Of many rows, which would be more blocks than a 16-bit dW may be rounded for."""
    for shape in roofline.SHAPES:
        made = plan.make(problem("scalar", shape))
        assert 3 <= made.products <= 3.5
        if shape[0] >= 8192 and shape[1] == 896:
            assert 3 < made.products < 3.5
    roomy = plan.make(problem("scalar", (8192, 896, 151936), workspace=768 * MIB))
    assert roomy.products == 3 and roomy.sum_columns == 151936
    # What does not fit into dW itself is in the workspace.
    assert roomy.peak_bytes >= 4 * 896 * (151936 // 2)


def properties(name, multiprocessors, major, minor):
    return SimpleNamespace(
        name=name, multi_processor_count=multiprocessors, L2_cache_size=50 * MIB, major=major,
        minor=minor,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "least", "most"),
    [
        (("NVIDIA H200", 132, 9, 0), 7e14, 9e14),
        (("NVIDIA H100 80GB HBM3", 132, 9, 0), 7e14, 9e14),
        (("NVIDIA A100-SXM4-80GB", 108, 8, 0), 2e14, 3e14),
        (("NVIDIA H200 MIG 1g.18gb", 16, 9, 0), 0.8e14, 1.1e14),
        (("A card of 2030", 200, 13, 0), 1e14, 1e15),
        (("Quadro of old", 40, 7, 5), 1e13, 1e14),
    ],
)
def test_records_of_devices(monkeypatch, found, least, most):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties(*found))
    device._of_index.cache_clear()
    record = device.of(torch.device("cuda", 0))
    device._of_index.cache_clear()
    assert (record.name, record.multiprocessors, record.l2_bytes) == (found[0], found[1], 50 * MIB)
    assert least <= record.flops_16 <= most
    assert record.is_gpu and 1e11 < record.bandwidth < 1e13


def test_the_table_says_that_it_is_a_model(capsys):
    assert roofline.main([]) == 0
    shown = capsys.readouterr().out
    assert "a model, not a measurement" in shown
    assert all(f"N={n} D={d} V={v}" in shown for n, d, v in roofline.SHAPES)


def test_everything_but_a_gpu_plans_as_a_cpu():
    for name in ("cpu", "meta", "mps"):
        assert device.of(torch.device(name)) == device.CPU


def test_a_plan_can_be_explained_for_a_device_that_is_not_there():
    sizes = 8192, 128256, 4096
    here, there = ift_kernels.explain(*sizes), ift_kernels.explain(*sizes, device=H200)
    assert there.tile_columns > 4 * here.tile_columns
    assert there == plan.make(problem("token", LARGE))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device: .* torch sees no GPU"):
            ift_kernels.explain(*sizes, device="cuda")


@pytest.mark.parametrize("rows", [0, 300, 8192])
@pytest.mark.parametrize(("vocabulary", "width"), [(3448, 15707), (232643, 1), (128256, 4096)])
@pytest.mark.parametrize(("block", "bucket"), [(32, 64), (4096, 2048), (1 << 20, 1 << 20)])
def test_blocks_larger_than_the_call(rows, vocabulary, width, block, bucket):
    """They take what the rows take: there is a plan, and a block too large changes none."""
    for workspace in (MIB, 300 * MIB):
        for dtype in (torch.bfloat16, torch.float64):
            p = plan.Problem(
                rows, vocabulary, width, dtype, workspace, True, grads_in_forward=True,
                active=ActiveSet(0.0, block, bucket), device=H200,
            )  # fmt: skip
            chosen = plan.make(p)
            assert chosen.tile_rows >= 1 <= chosen.tile_columns <= vocabulary
            if block >= rows:
                whole = replace(p, active=ActiveSet(0.0, max(-(-rows // 256) * 256, 32), bucket))
                assert rows <= 300 or plan.make(whole) == chosen


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("rows", [1024, 4096])
def test_masks_and_ids_of_small_blocks_are_in_the_workspace(rows, block):
    """While ids are listed there are 17 bytes of each block and column, and four masks."""
    p = plan.Problem(
        rows, 32768, 128, torch.bfloat16, 512 * MIB, True, grads_in_forward=True,
        active=ActiveSet(2.0**-12, block), device=H200,
    )  # fmt: skip
    row_bytes = Memory(p).per_row - Memory(replace(p, vocabulary=0)).per_row
    assert row_bytes * block >= (17 + 4) * p.vocabulary
