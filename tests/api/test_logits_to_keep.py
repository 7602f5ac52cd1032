"""`logits_to_keep` of transformers: a number, positions, positions of each row, a mask."""

import pytest
import torch
import transformers as hf

from causal_lms import assert_close, batch, gradients, make
from ift.config import IFTConfig
from ift.patching import patch


def loss_and_gradients(model, **inputs):
    output = model(**inputs)
    output.loss.backward()
    return output, gradients(model)


def test_logits_to_keep_is_honoured_as_transformers_does():
    model, inputs = make("llama"), batch()
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)[
        :, -5:
    ].contiguous()
    plain, expected = loss_and_gradients(model, **inputs, shift_labels=shifted, logits_to_keep=5)
    patch(model)
    fused, got = loss_and_gradients(model, **inputs, shift_labels=shifted, logits_to_keep=5)
    torch.testing.assert_close(fused.loss, plain.loss)
    assert_close(got, expected)
    with pytest.raises(ValueError, match="labels: expected one per hidden state"):
        model(**inputs, logits_to_keep=5)


KEPT = {
    "positions": torch.tensor([0, 4, 9]),
    "positions of each row": torch.tensor([[0, 4, 9], [1, 2, 3], [8, 7, 7]]),
    "a mask": torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4,
    "as many as labels": torch.arange(12).flip(0).expand(3, 12),
}


@pytest.mark.parametrize("kept", KEPT)
def test_logits_to_keep_as_a_tensor(kept):
    keep, inputs = KEPT[kept], batch()
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)[..., None]
    shifted = hf.modeling_utils.slice_logits_to_keep(targets, keep)[..., 0].contiguous()
    given = {**inputs, "shift_labels": shifted, "logits_to_keep": keep}
    model = make("llama")
    plain, expected = loss_and_gradients(model, **given)
    fused, got = loss_and_gradients(patch(model), **given)
    torch.testing.assert_close(fused.loss, plain.loss)
    assert_close(got, expected)
    assert model.ift_metrics["tokens"] == (shifted != -100).sum()
    del given["shift_labels"]
    with pytest.raises(ValueError, match="shift_labels: expected .*LlamaForCausalLM"):
        model(**given)
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 with ift"):
        model(**inputs, logits_to_keep=keep, ift=IFTConfig())
