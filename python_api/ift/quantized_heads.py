"""Rows of the quantized linear layers of bitsandbytes and torchao.

Values are those that the package itself dequantizes to, for each row from its own bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ift_kernels import HeadRows

Found = tuple[HeadRows, Tensor | None]
TILE = 8  # rows that torchao's tile-packed int4 has together


def register(package: str, register_head: Callable[[type, Callable[[Any], Found]], None]) -> None:
    """Register the kinds of a package, which is imported already."""
    if package == "bitsandbytes":
        from bitsandbytes import nn

        register_head(nn.Linear4bit, linear_4bit)
        register_head(nn.Linear8bitLt, linear_8bit)
        return
    from torchao import quantization

    kinds: dict[str, Callable[[Any], Found]] = {
        "Int8Tensor": by_slices,
        "Float8Tensor": by_slices,
        "IntxUnpackedToInt8Tensor": by_slices,
        "Int4Tensor": int4_plain,
        "Int4TilePackedTo4dTensor": int4_tile_packed,
    }
    for name, function in kinds.items():
        if hasattr(quantization, name):  # not in every version
            register_head(getattr(quantization, name), function)


# --- bitsandbytes ---------------------------------------------------------------------------------


def linear_4bit(module: Any) -> Found:
    """``dequantize_4bit`` of nf4 or fp4, also with quantized statistics.

    Blocks run along the flattened weight; those at the borders of the rows are read whole.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    weight, name = module.weight, type(module).__name__
    state = getattr(weight, "quant_state", None) or module.quant_state
    if state is None:
        raise TypeError(f"{name}: its weight is not quantized yet, expected the module on a device")
    if getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            f"{name}: its weight is packed for inference on this CPU, expected a module whose "
            "forward has not run in evaluation mode without gradients"
        )
    shape = vocabulary, width = module.out_features, module.in_features
    if tuple(state.shape) != shape:
        raise TypeError(f"{name}: expected a weight of shape {shape}, got {tuple(state.shape)}")
    packed = weight.data.contiguous().view(-1).view(torch.uint8)
    block, total = state.blocksize, vocabulary * width
    if packed.numel() != -(-total // 2):
        raise TypeError(
            f"{name}: expected {-(-total // 2)} bytes, got {packed.numel()}: a shard of its weight?"
        )

    def scales(start: int, stop: int) -> Tensor:
        """Of these blocks, float32."""
        if not state.nested:
            plain: Tensor = state.absmax[start:stop].float()
            return plain
        outer = state.state2.blocksize
        first, last = start // outer, -(-stop // outer)
        part = slice(first * outer, min(last * outer, state.absmax.numel()))
        found: Tensor = dequantize_blockwise(
            state.absmax[part].contiguous(), absmax=state.state2.absmax[first:last].contiguous(),
            code=state.state2.code, blocksize=outer,
        )  # fmt: skip
        found = (found + state.offset)[start - part.start : stop - part.start].float()
        return found

    def dequantized(codes: Tensor, of_blocks: Tensor) -> Tensor:
        part = QuantState(
            absmax=of_blocks.contiguous(), shape=torch.Size((1, 2 * codes.numel())),
            dtype=state.dtype, blocksize=block, quant_type=state.quant_type,
        )  # fmt: skip
        found: Tensor = dequantize_4bit(codes.contiguous().view(-1, 1), part)
        return found.view(-1)

    def rows(start: int, stop: int) -> Tensor:
        begin, end = start * width, stop * width
        first, last = begin // block, -(-end // block)
        codes = packed[first * block // 2 : min(last * block, total + 1) // 2]
        found = dequantized(codes, scales(first, last))
        return found[begin - first * block : end - first * block].view(-1, width)

    def scales_of(blocks: Tensor) -> Tensor:
        """The same of chosen blocks."""
        if not state.nested:
            plain: Tensor = state.absmax[blocks].float()
            return plain
        inner, code = state.state2, state.state2.code.to(blocks.device)
        found: Tensor = code[state.absmax[blocks].long()] * inner.absmax[blocks // inner.blocksize]
        found = (found + state.offset).float()
        return found

    def gather(ids: Tensor) -> Tensor:
        per_row = width // block
        blocks = ids[:, None] * per_row + torch.arange(per_row, device=ids.device)
        codes = packed.view(vocabulary, width // 2).index_select(0, ids)
        return dequantized(codes.view(-1), scales_of(blocks.view(-1))).view(-1, width)

    whole_blocks = width % block == 0
    made = HeadRows(
        rows,
        shape,
        dtype=state.dtype,
        device=weight.device,
        gather=gather if whole_blocks else None,
    )
    return made, module.bias


def linear_8bit(module: Any) -> Found:
    """``CB * SCB / 127``, by which the module's own backward multiplies.

    On a GPU its forward quantizes the hidden states, too; these are left as they are here.
    """
    state, weight, name = module.state, module.weight, type(module).__name__
    # They move from the weight to the state in a first forward, the scale alone under PEFT's DoRA.
    codes = next(x for x in (weight.CB, state.CB, weight.data) if x is not None)
    scale = state.SCB if weight.SCB is None else weight.SCB
    if state.has_fp16_weights or codes.dtype != torch.int8 or scale is None:
        raise TypeError(
            f"{name}: its weight is not quantized, expected has_fp16_weights=False and the module "
            "on a device"
        )
    factor = (scale.detach().float() * (1.0 / 127.0))[:, None]
    codes = codes.detach()
    return _scaled(codes, factor, torch.float32), module.bias


def _scaled(codes: Tensor, factor: Tensor, dtype: torch.dtype) -> HeadRows:
    return HeadRows(
        lambda start, stop: codes[start:stop] * factor[start:stop],
        (codes.shape[0], codes.shape[1]),
        dtype=dtype,
        device=codes.device,
        gather=lambda ids: codes.index_select(0, ids) * factor.index_select(0, ids),
    )


# --- torchao: kinds of weight inside torch.nn.Linear ----------------------------------------------


def _weight_only(module: Any) -> Any:
    """The weight, or a TypeError where the activations are changed, too."""
    weight = module.weight
    for name in ("act_quant_kwargs", "activation_quantization", "act_pre_scale", "act_quant_scale"):
        if getattr(weight, name, None) is not None:
            raise TypeError(
                f"{type(weight).__name__}: expected a weight-only quantization, got {name}"
            )
    return weight


def by_slices(module: Any) -> Found:
    """``weight[start:stop].dequantize()``, in whole blocks."""
    weight = _weight_only(module)
    size = weight.block_size[0]
    tall = 1 if size >= weight.shape[0] else size  # one block of all rows: any part is one, too

    def rows(start: int, stop: int) -> Tensor:
        first = start // tall * tall
        last = min(-(-stop // tall) * tall, weight.shape[0])
        found: Tensor = weight[_part(first, last, weight.shape[0])].dequantize()
        return found[start - first : stop - first]

    return HeadRows(
        rows, tuple(weight.shape), dtype=weight.dtype, device=weight.device
    ), module.bias


def _part(start: int, stop: int, rows: int) -> slice:
    return slice(start, stop) if (start, stop) != (0, rows) else slice(None)


def int4_plain(module: Any) -> Found:
    """``q * scale + zero_point`` of groups along each row, two codes of -8 to 7 a byte, even first.

    The layout that torchao documents; its codes are those of mslk's ``int4_row_quantize_zp``.
    """
    weight = _weight_only(module)
    if weight.activation_dtype != torch.bfloat16:  # the codes' zero_point means something else
        raise TypeError(
            f"{type(weight).__name__}: expected activation_dtype torch.bfloat16, got "
            f"{weight.activation_dtype}"
        )
    packed, width, group = weight.qdata.view(torch.uint8), weight.shape[1], weight.block_size[-1]
    scale, zero = weight.scale.T, weight.zero_point.T  # (V, groups)

    def dequantized(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        pairs = torch.stack([codes & 0xF, codes >> 4], -1).to(torch.int8)
        q = torch.where(pairs >= 8, pairs - 16, pairs).view(len(codes), -1, group).float()
        return (q * scale[..., None].float() + zero[..., None].float()).view(len(codes), width)

    made = HeadRows(
        lambda start, stop: dequantized(packed[start:stop], scale[start:stop], zero[start:stop]),
        tuple(weight.shape),
        dtype=weight.dtype,
        device=weight.device,
        gather=lambda ids: dequantized(packed[ids], scale[ids], zero[ids]),
    )
    return made, module.bias


def int4_tile_packed(module: Any) -> Found:
    """Products with the identity: the layout is that of one kernel, which alone reads it.

    Exact, but every row costs a product with D rows.
    """
    weight = _weight_only(module)
    vocabulary, width = weight.shape

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // TILE, -(-stop // TILE)
        part = type(weight)(
            weight.qdata[first:last].contiguous(),
            weight.scale_and_zero[:, first * TILE : last * TILE].contiguous(),
            weight.block_size,
            torch.Size(((last - first) * TILE, width)),
        )
        identity = torch.eye(width, dtype=torch.bfloat16, device=weight.device)
        found = torch.nn.functional.linear(identity, part).T
        return found[start - first * TILE : stop - first * TILE]

    made = HeadRows(rows, (vocabulary, width), dtype=torch.bfloat16, device=weight.device)
    return made, module.bias
