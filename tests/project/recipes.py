"""The calls that other libraries make, for the recipes of docs/integrations.

Each class has the signatures of the release that it names, a body of our own, and the part of the
library that touches the model: what it passes in, and what it reads from the answer.
"""

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from test_docs import blocks
from torch import nn
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Trainer

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


def recipe(page, number=0):
    """The source of a python block of a page of docs/integrations."""
    return blocks((PAGES / f"{page}.md").read_text(encoding="utf-8"))[number].source


def run(source, **names):
    """Execute a block; returns what it has defined."""
    exec(compile(source, "recipe", "exec"), names)
    return names


def install(monkeypatch, **modules):
    """Make modules importable, with "__" for the dots of their names; returns the last."""
    module = None
    for path, members in modules.items():
        name = path.replace("__", ".")
        for match in [*re.finditer(r"\.", name), None]:
            part = name if match is None else name[: match.start()]
            if not (part in sys.modules and getattr(sys.modules[part], "recipe", False)):
                module = types.ModuleType(part)
                module.recipe, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, part, module)
                if "." in part:
                    parent, _, last = part.rpartition(".")
                    setattr(sys.modules[parent], last, module)
        module = sys.modules[name]
        vars(module).update(members)
    return module


# --- OpenRLHF 0.11.2: openrlhf/models/actor.py, ring_attn_utils.py --------------------------------


def unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group):
    indices = attention_mask.flatten().nonzero().flatten()
    positions = (attention_mask.cumsum(-1) - 1).clip(min=0)
    every = (sequences, positions, sequences.roll(-1, 1))
    ids, positions, rolled = (each.flatten()[indices][None] for each in every)
    return ids, positions, rolled, 0, indices


def gather_and_pad_tensor(tensor, ring_attn_group, ring_attn_pad_len, indices, batch, seqlen):
    padded = tensor.new_zeros(batch * seqlen).index_put((indices,), tensor[0])
    return padded.view(batch, seqlen)


class Actor(nn.Module):
    def __init__(
        self, pretrain_or_model, attn_implementation="flash_attention_2", param_dtype="bf16",
        load_in_4bit=False, lora_rank=0, lora_alpha=16, lora_dropout=0, target_modules=None,
        ds_config=None, device_map=None, packing_samples=False, temperature=1.0,
        use_liger_kernel=False, freeze_visual_encoder=False, experts_implementation=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        self.model, self.temperature = pretrain_or_model, temperature
        self.packing_samples = packing_samples
        self.model.config.use_cache = False  # which lets transformers see packed rows

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False,
        allgather_logits=False, return_logprobs=False, ring_attn_group=None, packed_seq_lens=None,
        return_entropy=False, **mm_inputs,
    ):  # fmt: skip
        if self.packing_samples:
            ids, positions, targets, pad, indices = unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
            mask = None
        else:
            ids, mask, targets = sequences, attention_mask, sequences.roll(-1, 1)
            positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        output = self.model(ids, attention_mask=mask, position_ids=positions)
        output["logits"] = output["logits"].float() / self.temperature

        def columns(value):
            if self.packing_samples:
                value = gather_and_pad_tensor(value, None, pad, indices, *sequences.shape)
            return value[:, :-1]

        logp = output["logits"].log_softmax(-1)
        if return_entropy:
            assert return_output
            output.entropy = columns(-(logp.exp() * logp).sum(-1))
        if action_mask is None and not return_logprobs:
            assert return_output
            return output
        log_probs = columns(logp.gather(-1, targets[..., None])[..., 0])
        if action_mask is not None:
            log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
        return (log_probs, output) if return_output else log_probs


# --- verl 0.9.1: verl/workers/engine/fsdp/transformer_impl.py -------------------------------------


class FSDPEngineWithLMHead:
    """`micro_batch`: input_ids and position_ids jagged, temperature a float, and the options."""

    def __init__(self, model, use_fused_kernels):
        self.model = model
        self.model_config = types.SimpleNamespace(use_fused_kernels=use_fused_kernels)
        self.module = self._build_module()

    def _build_module(self):
        return self.model

    def prepare_model_inputs(self, micro_batch):
        ids, positions = micro_batch["input_ids"], micro_batch["position_ids"]
        rolled = ids.values().roll(-1, 0)
        if micro_batch["use_remove_padding"]:
            inputs = {
                "input_ids": ids.values()[None],
                "attention_mask": None,
                "position_ids": positions.values()[None],
            }
        else:
            lengths = ids.offsets().diff()
            inputs = {
                "input_ids": ids.to_padded_tensor(0),
                "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
                "position_ids": positions.to_padded_tensor(0),
            }
        if micro_batch["use_fused_kernels"]:
            inputs |= {"temperature": micro_batch["temperature"], "return_dict": True}
            if micro_batch["use_remove_padding"]:
                inputs["shift_labels"] = rolled[None]
        return inputs, {"input_ids_rmpad_rolled": rolled}

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        lengths = micro_batch["input_ids"].offsets().diff()
        if micro_batch["use_fused_kernels"]:
            log_probs, entropy = output.log_probs, output.entropy
        else:
            logp = (output.logits / micro_batch["temperature"]).log_softmax(-1)
            log_probs, entropy = logp, -(logp.exp() * logp).sum(-1)
        if micro_batch["use_remove_padding"]:
            log_probs, entropy = log_probs.squeeze(0), entropy.squeeze(0)
        else:
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            log_probs, entropy = log_probs[mask], entropy[mask]
        if not micro_batch["use_fused_kernels"]:
            target = output_args["input_ids_rmpad_rolled"]
            log_probs = log_probs.gather(-1, target[:, None])[:, 0]
        return {"log_probs": log_probs, "entropy": entropy}

    def forward_step(self, micro_batch, loss_function, forward_only):
        inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        output = self.module(**inputs, use_cache=False)
        return self.prepare_model_outputs(
            output=output, output_args=output_args, micro_batch=micro_batch,
            logits_processor_func=loss_function,
        )  # fmt: skip


# --- axolotl 0.19.0: axolotl/integrations/base.py, core/trainers/base.py, core/builders/causal.py -


class BasePlugin:
    def post_model_load(self, cfg, model):
        pass

    def get_trainer_cls(self, cfg):
        pass


class AxolotlTrainer(Trainer):
    def __init__(
        self, *_args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs
    ):
        super().__init__(*_args, **kwargs)
        self.model_accepts_loss_kwargs = False  # of every causal LM

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )


def build(plugin, cfg, model, dataset, args):
    """The loader and the trainer's builder."""
    plugin.post_model_load(cfg, model)
    trainer_cls = plugin.get_trainer_cls(cfg) or AxolotlTrainer
    return trainer_cls(
        model=model, train_dataset=dataset, eval_dataset=None, args=args, data_collator=collate,
        callbacks=[], eval_data_collator=collate, bench_data_collator=collate,
        processing_class=None, dataset_tags=["tag"],
    )  # fmt: skip


# --- LLaMA-Factory 0.9.5: llamafactory/train/sft/trainer.py, workflow.py, train/tuner.py ----------


class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    def __init__(
        self, finetuning_args, processor, model_args=None, gen_kwargs=None, ref_model=None, **kwargs
    ):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args = finetuning_args

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


def llama_factory(monkeypatch, model, dataset, training_args, trained):
    """`run_exp` trains `model`; the trainer is appended to `trained`."""

    def load_model(tokenizer, model_args, finetuning_args, is_trainable=False, add_valuehead=False):
        return model

    def run_exp(args=None, callbacks=None):
        trainer = workflow.CustomSeq2SeqTrainer(
            model=workflow.load_model(None, None, None, training_args.do_train),
            args=training_args, finetuning_args=None, data_collator=collate, callbacks=callbacks,
            gen_kwargs={}, ref_model=None, train_dataset=dataset, tokenizer=None, processor=None,
        )  # fmt: skip
        trained.append(trainer)
        trainer.train(resume_from_checkpoint=None)

    install(
        monkeypatch,
        llamafactory__train__sft__trainer={"CustomSeq2SeqTrainer": CustomSeq2SeqTrainer},
        llamafactory__train__tuner={"run_exp": run_exp},
    )
    members = {"load_model": load_model, "CustomSeq2SeqTrainer": CustomSeq2SeqTrainer}
    workflow = install(monkeypatch, llamafactory__train__sft__workflow=members)


def collate(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


# --- torchtitan 0.3.0: torchtitan/components/loss.py, trainer.py ----------------------------------


class ChunkedLossWrapper:
    @dataclass(kw_only=True, slots=True)
    class Config:
        num_chunks: int = 8

    def __init__(self, config, *, compile_config=None):
        self.num_chunks, self.lm_head = config.num_chunks, None

    def set_lm_head(self, lm_head):
        self.lm_head = lm_head

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        logits = self.lm_head(pred)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class Decoder(nn.Module):
    """The parts of a decoder that the trainer touches."""

    _skip_lm_head = False

    def __init__(self, vocab=61, dim=16):
        super().__init__()
        self.tok_embeddings, self.norm = nn.Embedding(vocab, dim), nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens, positions=None, attention_masks=None):
        hidden = self.norm(self.tok_embeddings(tokens))
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def torchtitan_step(model, loss_fn, tokens, labels):
    """What the trainer does with a loss that is a ChunkedLossWrapper; returns the loss."""
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    pred = model(tokens, positions=positions)
    loss, _ = loss_fn(pred, labels, (labels != -100).sum(), positions=positions)
    return loss
