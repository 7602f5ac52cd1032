"""Triton's interpreter with the rounding of a GPU."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_to_nearest():
    """Casts from float32 to bfloat16 go to the nearest, ties to even, as a GPU's do.

    The interpreter cuts the last bits off instead, which is twice as far from the truth and always
    on the same side. Casts back are the same as before, but faster.
    """
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast(self, source, wanted):
        kinds = source.dtype.scalar, wanted.scalar
        if kinds == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.array(source.data, dtype=np.float32))
            data = values.bfloat16().view(torch.uint16).numpy()
        elif kinds == (tl.bfloat16, tl.float32):
            data = (np.asarray(source.data).astype(np.uint32) << 16).view(np.float32)
        else:
            return original(self, source, wanted)
        return interpreter.TensorHandle(data, wanted.scalar)

    if not getattr(original, "rounds_to_nearest", False):
        cast.rounds_to_nearest = True
        builder.cast_impl = cast
