"""The suite of the losses: in every case ours and the naive form compute the same."""

import argparse

import pytest

from bench.harness.data import Wrong
from bench.suites import losses

SHAPE = (4, 3, 8, 50)


@pytest.mark.parametrize("case", losses.CASES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ours_is_the_naive_form(case, dtype):
    ours, naive = (losses.prepare(case, name, dtype, SHAPE, "cpu") for name in ("ours", "naive"))
    loss, *gradients = result = ours.call()
    found = ours.check(result)
    assert set(found) == {"loss", "d hidden", "d weight"}
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(Wrong, match="from the naive form"):
        ours.check((loss, gradients[0], 1.5 * gradients[1]))
    assert naive.check(naive.call()) == {}
    ours.warm()


def test_shape_is_checked():
    assert losses._shape("8x64x896x151936") == losses.SHAPE
    for text in ("8x64", "3x4x5x6", "axbxcxd"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected RxTxDxV|an even number"):
            losses._shape(text)
