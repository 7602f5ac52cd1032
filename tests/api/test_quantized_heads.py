"""Quantized output heads: rows from their bytes, and a patched model's loss and gradients.

The kinds of bitsandbytes and torchao are tested where those are installed; both run on a CPU.
"""

import pytest
import torch
from torch import nn

import causal_lms
from ift import IFTConfig, patch, unpatch
from ift.heads import head_weight, register_head
from ift_kernels import HeadRows

V, D = 101, 96


class Int8Head(nn.Module):
    """A kind that a user registers: an int8 weight, one scale a row."""

    def __init__(self, linear, error=1.0):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scale).round().to(torch.int8)
        self.bias, self.error = linear.bias, error

    def forward(self, hidden):
        weight = (self.codes * self.scale).to(hidden.dtype)
        return nn.functional.linear(hidden, weight, self.bias)


def int8_rows(head):
    codes, scale = head.codes, head.scale * head.error
    rows = HeadRows(lambda start, stop: codes[start:stop] * scale[start:stop], codes.shape)
    return rows, head.bias


register_head(Int8Head, int8_rows)


def in_4bit(linear, quant_type="nf4", nested=True):
    bnb = pytest.importorskip("bitsandbytes")
    out, width = linear.weight.shape
    made = bnb.nn.Linear4bit(width, out, bias=linear.bias is not None)
    made.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, compress_statistics=nested,
        quant_type=quant_type, module=made,
    )  # fmt: skip
    made.bias = linear.bias
    return made.to("cpu")  # which quantizes


def in_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    out, width = linear.weight.shape
    made = bnb.nn.Linear8bitLt(width, out, linear.bias is not None, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False)
    made.bias = linear.bias
    return made.to("cpu")


def in_torchao(linear, config):
    quantization = pytest.importorskip("torchao.quantization")
    parts = nn.Sequential(nn.Linear(*linear.weight.T.shape, bias=linear.bias is not None))
    parts[0].load_state_dict(linear.state_dict())
    quantization.quantize_(parts, config(quantization))
    return parts[0].requires_grad_(False)


KINDS = {
    "registered": Int8Head,
    "bitsandbytes nf4": in_4bit,
    "bitsandbytes int8": in_8bit,
    "torchao int8": lambda linear: in_torchao(linear, lambda q: q.Int8WeightOnlyConfig()),
    "torchao int8, groups": lambda linear: in_torchao(
        linear, lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(16))
    ),
    "torchao int4": lambda linear: in_torchao(
        linear,
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(16)),
    ),
    "torchao float8": lambda linear: in_torchao(linear, lambda q: q.Float8WeightOnlyConfig()),
}


def dense_of(head, rows):
    """The whole weight, as the package itself dequantizes it."""
    if isinstance(head, Int8Head):
        return head.codes * head.scale
    if hasattr(head.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(head.weight.data, head.weight.quant_state)
    if hasattr(head, "state"):
        codes, scale = (head.weight.CB, head.weight.SCB)
        return codes.float() * (scale * (1 / 127.0))[:, None]
    return head.weight.dequantize()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_dequantized_weight(kind):
    torch.manual_seed(0)
    head = KINDS[kind](nn.Linear(D, V))
    weight, bias = head_weight(head)
    whole, ids = dense_of(head, weight), torch.tensor([V - 1, 3, 3, 0, 17])
    assert bias is head.bias and weight.dtype == whole.dtype
    for part in (slice(0, V), slice(5, 38), slice(V - 3, V)):
        assert torch.equal(weight[part], whole[part])
    assert torch.equal(weight.index_select(0, ids), whole[ids])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("width", [40, 42, 128])  # blocks of 64 begin inside of rows of the first
def test_blocks_of_4_bits_cross_rows(quant_type, nested, width):
    torch.manual_seed(0)
    head = in_4bit(nn.Linear(width, 77), quant_type, nested)
    weight, _ = head_weight(head)
    whole, ids = dense_of(head, weight), torch.tensor([76, 3, 4, 3, 0])
    for part in (slice(0, 77), slice(5, 38), slice(76, 77)):
        assert torch.equal(weight[part], whole[part])
    assert torch.equal(weight.index_select(0, ids), whole[ids])


def test_plain_int4_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    g, group = torch.Generator().manual_seed(0), 16
    codes = torch.randint(-8, 8, (V, D), generator=g)
    scale = torch.rand(D // group, V, generator=g).bfloat16()
    zero = torch.randn(D // group, V, generator=g).bfloat16()
    packed = ((codes[:, ::2] & 0xF) | ((codes[:, 1::2] & 0xF) << 4)).to(torch.uint8)
    linear = nn.Linear(D, V, bias=False)
    weight = quantization.Int4Tensor(packed.view(torch.int8), scale, zero, [1, group], (V, D))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    groups = codes.view(V, -1, group).float()
    want = groups * scale.T[..., None].float() + zero.T[..., None].float()
    assert torch.equal(head_weight(linear)[0][0:V], want.view(V, D).bfloat16())


def step(model, inputs, **options):
    hidden = {}
    handle = model.model.register_forward_hook(
        lambda module, args, output: hidden.update(h=output.last_hidden_state)
    )
    output = model(**inputs, **options)
    handle.remove()
    (gradient,) = torch.autograd.grad(output.loss, hidden["h"])
    return output.loss.detach(), gradient


@pytest.mark.parametrize("kind", ["registered", "bitsandbytes nf4", "bitsandbytes int8",
                                  "torchao int8", "torchao float8"])  # fmt: skip
def test_a_patched_model_is_that_of_its_dequantized_head(kind):
    model = causal_lms.make("llama")
    head = KINDS[kind](model.lm_head)
    plain = nn.Linear(*model.lm_head.weight.T.shape, bias=False).requires_grad_(False)
    plain.weight.copy_(head_weight(head)[0][0 : plain.out_features])
    inputs = causal_lms.batch()
    found = []
    for each in (plain, head):
        model.lm_head = each
        patch(model)
        model.train()
        found.append([step(model, inputs), step(model, inputs, ift=IFTConfig())])
        unpatch(model)
        assert "forward" not in vars(each)
    for (loss, gradient), (want, wanted) in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_function_that_gives_other_rows_is_refused():
    model = causal_lms.make("llama")
    model.lm_head = Int8Head(model.lm_head, error=1.5)
    with pytest.raises(RuntimeError, match="Int8Head, are not those of the rows of its weight"):
        patch(model)
    with pytest.raises(TypeError, match="kind: expected a type of module or of tensor"):
        register_head("Int8Head", int8_rows)


LORA = ("bitsandbytes nf4", "bitsandbytes int8", "torchao int8")


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_lora_on_a_quantized_head_is_lora_on_the_dequantized_one(kind, use_dora):
    """Against the logits of the model with its plain head, which nothing of ours computes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head"], r=4, use_dora=use_dora, init_lora_weights=False
    )
    inputs, found = causal_lms.batch(), []
    for quantized in (False, True):
        torch.manual_seed(0)
        model = causal_lms.make("llama").requires_grad_(False)
        head = KINDS[kind](model.lm_head)
        plain = nn.Linear(*model.lm_head.weight.T.shape, bias=False).requires_grad_(False)
        plain.weight.copy_(head_weight(head)[0][0 : plain.out_features])
        model.lm_head = head if quantized else plain
        model.is_loaded_in_4bit = quantized and "nf4" in kind
        model.is_loaded_in_8bit = quantized and kind == "bitsandbytes int8"
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) / 8)
        if quantized:
            assert type(model.lm_head) is not peft.tuners.lora.Linear
            patch(wrapped)
        loss = wrapped(**inputs).loss
        loss.backward()
        gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
        assert len(gradients) == 2 + use_dora
        found.append((loss.detach(), gradients))
    (want, wanted), (got, gradients) = found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient - other).norm() <= 1e-5 * other.norm()
