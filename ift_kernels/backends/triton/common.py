"""What kernels share: from raw product to logit, its slope, and the merge of running statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.launch import INTERPRETED
from ift_kernels.common.transform import LogitTransform


def transform_arguments(bias: Tensor | None, transform: LogitTransform) -> dict[str, object]:
    """The arguments of a kernel that stand for the transform, and for whether there is a bias.

    Without a softcap ``z = pre·(x + bias)``, with one ``z = post·tanh(pre·(x + bias))``; here
    divisions cost nothing. `plain_slope` is the derivative at 0.
    """
    plain_slope, cap = transform.scale / transform.temperature, transform.softcap
    return {
        "pre": transform.scale / cap if cap else plain_slope,
        "post": cap / transform.temperature if cap else 1.0,
        "plain_slope": plain_slope,
        "HAS_BIAS": bias is not None,
        "HAS_CAP": bool(cap),
    }


@triton.jit
def tanh(u):
    """Good to a few units in the last place: 1 − exp(−2u) alone would cancel where u is small."""
    a = tl.abs(u)
    e = tl.exp(-2.0 * a)
    s = u * u
    # The next term, 1382/155925·u¹¹, is 1e-8 of tanh(u) at u = 0.25.
    series = 1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488)))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.25, u * series, tl.where(u < 0, -large, large))


@triton.jit
def logits(x, bias, pre, post, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of float32 products; `bias` may be anything without HAS_BIAS."""
    z = x
    if HAS_BIAS:
        z = z + bias
    z = z * pre
    if HAS_CAP:
        z = post * tanh(z)
    return z


def padded(x: Tensor) -> bool:
    """Whether rows begin on 16 bytes and own what is up to the next multiple of 16 elements.

    So it is with all tiles of the schedules, see `head.empty_padded`.
    """
    return x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


@triton.jit
def end_of(columns, PADDED: tl.constexpr):
    """Up to where a row may be read and written.

    In whole 16 bytes where it is padded, so that Triton makes accesses of 16 bytes whatever
    `columns` is, and compiles nothing anew for one that is not a multiple of 16.
    """
    end = columns
    if PADDED:
        end = tl.cdiv(columns, 16) * 16
    return end


@triton.jit
def load_bias(bias, start, column, columns, BLOCK: tl.constexpr):
    """Biases of the columns from `start` on, 0 beyond: they have no padding."""
    if (start >= 0) & (start + BLOCK <= columns):
        value = tl.load(bias + column)
    else:
        value = tl.load(bias + column, mask=(column >= 0) & (column < columns), other=0.0)
    return value.to(tl.float32)


@triton.jit
def load_logits(
    x, bias, start, column, columns, readable, pre, post,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of the columns from `start` on, of a row of products that starts at `x`.

    Those that are not `readable` are of a product of 0; of padding, anything.
    """
    z = tl.load(x + column, mask=readable, other=0.0).to(tl.float32)
    b = 0.0
    if HAS_BIAS:
        b = load_bias(bias, start, column, columns, BLOCK)
    return logits(z, b, pre, post, HAS_BIAS, HAS_CAP)


@triton.jit
def slope(z, post, plain_slope, HAS_CAP: tl.constexpr):
    """∂z/∂x from the logits."""
    s = tl.zeros_like(z) + plain_slope
    if HAS_CAP:
        part = z * (1.0 / post)
        s = plain_slope * (1.0 - part * part)
    return s


def precision(dtype: torch.dtype) -> str:
    """Of products in kernels: float32 is not to be rounded to TF32."""
    if INTERPRETED:
        return "widened"
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b``."""
    if PRECISION == "widened":  # the interpreter multiplies the bits of bfloat16 as integers
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def exp_difference(z, m, EXACT: tl.constexpr):
    """``exp(z − m)`` for z ≤ m; EXACT to a few units in the last place wherever z and m lie.

    A difference of −28 is rounded by as much as 8 units in the last place of the result, and so is
    its product with log₂ e, which is what the exponential of a GPU is made of.
    """
    d = z - m
    if EXACT:
        back = d - z
        lost = (z - (d - back)) - (m + back)
        n = tl.floor(d * 1.44269504 + 0.5)
        r = ((d - n * 0.693359375) + n * 2.12194440e-4) + lost
        # An infinite difference has no remainder.
        e = tl.where(d < -104.0, 0.0, tl.exp2(n) * tl.exp(r))
    else:
        e = tl.exp(d)
    return e


@triton.jit
def expm1(x):
    """``exp(x) − 1`` for x ≤ 0, to a few units in the last place."""
    # xⁿ/(n + 1)!; the next term is 1e-8 at x = −0.5.
    series = 1.9841270e-4 + x * 2.4801587e-5
    series = 8.3333333e-3 + x * (1.3888889e-3 + x * series)
    series = 0.16666667 + x * (0.041666667 + x * series)
    series = 1.0 + x * (0.5 + x * series)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def target_gradient(
    z, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post, plain_slope,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """What `dlogits_` makes of the target's logit: 1 − p by expm1."""
    log_p = (z - norm_0) - norm_1
    p = tl.exp(log_p)
    tail = c_plogp * tl.where(p == 0.0, 0.0, log_p)
    grad = p * (c_prob + tail) - c_target * expm1(log_p) + c_uniform
    return grad * slope(z, post, plain_slope, HAS_CAP)


@triton.jit
def nontarget_gradient(
    z, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post, plain_slope,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """What `dlogits_` makes of logits of other ids, given values of their rows."""
    log_p = (z - norm_0) - norm_1
    p = tl.exp(log_p)
    # 0 · (−inf) of a token that is masked out would be NaN.
    tail = c_plogp * tl.where(p == 0.0, 0.0, log_p)
    grad = p * ((c_prob - c_target) + tail) + c_uniform
    return grad * slope(z, post, plain_slope, HAS_CAP)


@triton.jit
def without_upstream(grad, c_target, c_prob, c_plogp, c_uniform):
    """0 from a row without upstream gradient, even where it holds a NaN."""
    no_upstream = (c_target == 0.0) & (c_prob == 0.0) & (c_plogp == 0.0) & (c_uniform == 0.0)
    return tl.where(no_upstream, 0.0, grad)


@triton.jit
def row_gradient(
    z, is_target, of_target, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post,
    plain_slope, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """What `dlogits_` makes of logits, given values of their rows; `of_target` for the target."""
    grad = nontarget_gradient(
        z, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post, plain_slope, HAS_CAP
    )
    grad = tl.where(is_target, of_target, grad)
    return without_upstream(grad, c_target, c_prob, c_plogp, c_uniform)


@triton.jit
def merge_into(
    state, argmax, stride,  # of this row: rows of float64 `stride` apart, and an int64
    top, total, picked, has_target, e_z, e_sq, z_sum, second, top_id,  # float64 scalars; int64
    TRACK: tl.constexpr,
):  # fmt: skip
    """Merge statistics of more columns, relative to their own maximum, into a running state.

    The rows are MAX, SUM, TARGET, E_Z, E_SQ, Z_SUM and SECOND of contract.py: what is summed
    leaves out the target.
    """
    old = tl.load(state)
    old_total = tl.load(state + stride)
    is_new_max = (top > old) | ((top != top) & (old == old))
    new = tl.where(is_new_max, top, old)
    # A row of −inf only has no finite reference point.
    m = tl.where(new == float("-inf"), 0.0, new)
    delta_max = tl.where(old == float("-inf"), 0.0, old - m)
    rescale = tl.where(old == float("-inf"), 0.0, tl.exp(delta_max))
    delta_max_chunk = tl.where(top == float("-inf"), 0.0, top - m)
    rescale_chunk = tl.exp(delta_max_chunk)
    if TRACK & 2:
        before = tl.load(state + 3 * stride)
        both = rescale * (before + delta_max * old_total) + rescale_chunk * (
            e_z + delta_max_chunk * total
        )
        tl.store(state + 3 * stride, both)
    if TRACK & 4:
        before = tl.load(state + 4 * stride)
        tl.store(
            state + 4 * stride, rescale * rescale * before + rescale_chunk * rescale_chunk * e_sq
        )
    if TRACK & 8:
        tl.store(state + 5 * stride, tl.load(state + 5 * stride) + z_sum)
    if TRACK & 16:
        before = tl.load(state + 6 * stride)
        smaller_max = tl.where(top > old, old, top)
        best = tl.where(second > before, second, before)
        tl.store(state + 6 * stride, tl.where(smaller_max > best, smaller_max, best))
    if TRACK & 1:
        tl.store(argmax, tl.where(is_new_max, top_id, tl.load(argmax)))
    tl.store(state + stride, rescale * old_total + rescale_chunk * total)
    tl.store(state, new)
    tl.store(state + 2 * stride, tl.where(has_target, picked, tl.load(state + 2 * stride)))
