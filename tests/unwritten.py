"""Fresh memory filled with NaN; a module, where torch.compile finds it by its name."""

import torch

ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


def filled(allocate):
    """An allocator whose memory is NaN, or the largest integer."""

    def wrapper(*args, **kwargs):
        memory = allocate(*args, **kwargs)
        with torch.no_grad():
            if memory.dtype == torch.bool:
                return memory.fill_(True)
            floating = memory.is_floating_point() or memory.is_complex()
            return memory.fill_(float("nan") if floating else torch.iinfo(memory.dtype).max)

    return wrapper
