"""Packed rows through flash-attn's varlen kernels are as apart as padded rows."""

import importlib.util

import pytest
import torch

from causal_lms import V, make
from ift.config import IFTConfig
from ift.patching import patch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs ift-kernels[flash]"
)
@pytest.mark.parametrize("config", [None, IFTConfig()], ids=["sft", "ift"])
def test_packed_rows_are_rows(config):
    options = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 256}
    flash = make("llama", attn_implementation="flash_attention_2", **options)
    plain = make("llama", attn_implementation="sdpa", **options)
    lengths, g = [7, 12, 5], torch.Generator().manual_seed(0)
    documents = [torch.randint(3, V, (n,), generator=g) for n in lengths]
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    packed = {
        "input_ids": torch.cat(documents)[None].cuda(),
        "labels": torch.cat([d.index_fill(0, torch.tensor(0), -100) for d in documents])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].cuda(),
        "cu_seq_lens_q": cu, "cu_seq_lens_k": cu,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip
    packed["labels"] = packed["labels"].cuda()
    pad = torch.nn.utils.rnn.pad_sequence
    rows = {
        "input_ids": pad(documents, batch_first=True).cuda(),
        "attention_mask": pad([torch.ones_like(d) for d in documents], batch_first=True).cuda(),
        "labels": pad(documents, batch_first=True, padding_value=-100).cuda(),
    }
    losses = []
    for model, inputs in ((flash, packed), (plain, rows)):
        model = patch(model.to("cuda", torch.bfloat16))
        losses.append(model(**inputs, ift=config).loss)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0.0)
