"""The calls of trainers for reinforcement learning, for the recipes of docs/integrations.

As `recipes`: signatures of the commits that are named, bodies of our own in plain logits.
"""

import torch
import torch.distributed as dist
from torch import nn

# --- megatron.core.tensor_parallel: what is summed over the processes in backward -----------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, sums, group):
        ctx.sums, ctx.group = sums, group
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if ctx.sums:
            dist.all_reduce(gradient, group=ctx.group)
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return gradient.chunk(size)[rank], None, None


def gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=None):
    return _Gather.apply(input_, tensor_parallel_output_grad, group)


# --- verl 02943ff: verl/models/mcore/model_forward_fused.py, kernels of 8007071 -------------------


def megatron_forward(module, hidden_states, output_weight, labels, temperature, group):
    """The end of `_fused_GPTModel_forward`, under sequence parallelism."""
    hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    return module.linear_cross_entropy(
        hidden_states, output_weight, labels, temperature, "none", group
    )


# --- verl 072cf9b: verl/trainer/distillation/fsdp/losses.py ---------------------------------------


def compute_forward_kl_topk(
    student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format
):
    assert teacher_topk_log_probs.is_nested and teacher_topk_ids.is_nested
    teacher = teacher_topk_log_probs.values().unsqueeze(0)
    ids = teacher_topk_ids.values().unsqueeze(0)
    logp = student_logits.float().log_softmax(-1)
    student, best = logp.gather(-1, ids), logp.topk(ids.shape[-1], -1).indices
    masses = student.exp().sum(-1), teacher.exp().sum(-1)
    least = config.distillation_loss.log_prob_min_clamp
    if least is not None:
        student, teacher = student.clamp_min(least), teacher.clamp_min(least)
    kl = teacher.exp() * (teacher - student)
    overlap = torch.stack([torch.isin(a, b) for a, b in zip(ids[0], best[0], strict=True)])[None]
    advantage = (-kl * overlap).sum(-1) / overlap.sum(-1).clamp(min=1)
    return {
        "distillation_losses": kl.sum(-1), "student_mass": masses[0], "teacher_mass": masses[1],
        "overlap_count": overlap.sum(-1), "overlap_token_advantage": advantage,
    }  # fmt: skip


# --- prime-rl 049a80a: prime_rl/trainer/models/layers/lm_head.py, rl/train.py ---------------------

PrimeLmOutput = dict  # a TypedDict


class FusedOutputLinear(nn.Linear):
    def __init__(self, in_features, out_features, chunk_size):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels=None, temperature=None):
        logits = hidden_states.float() @ self.weight.float().T / temperature[..., None]
        logp = logits.log_softmax(-1)
        return PrimeLmOutput(
            logprobs=logp.gather(-1, labels[..., None])[..., 0],
            entropy=-(logp.exp() * logp).sum(-1),
        )


def prime_step(lm_head, hidden_states, input_ids, temperatures, sequence_lengths):
    """What the trainer makes of a packed row, (1, T): log-probabilities of its sequences."""
    labels = torch.cat([input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], 1)
    out = lm_head(hidden_states, labels=labels, temperature=temperatures)
    assert out.get("logits") is None and out["logprobs"].dtype == torch.float32
    shifted = [torch.cat([x.new_zeros(1, 1), x[:, :-1]], 1) for x in
               (out["logprobs"], out["entropy"])]  # fmt: skip
    return [x.squeeze(0).split(sequence_lengths) for x in shifted]


# --- NeMo-RL 0433dae: nemo_rl/distributed/model_utils.py ------------------------------------------


def nemo_forward(module, hidden_states, output_weight_layer, labels, tp_group, inference=False):
    """The end of `_gpt_forward_with_linear_ce_fusion`."""
    rank, rows = dist.get_rank(tp_group), len(output_weight_layer)
    return module.from_parallel_hidden_states_to_logprobs(
        hidden_states, output_weight_layer, None, labels, vocab_start_index=rank * rows,
        vocab_end_index=(rank + 1) * rows, inference_only=inference, tp_group=tp_group,
        cp_group=None, chunk_size=4,
    )  # fmt: skip


def get_distillation_topk_logprobs_from_logits(
    student_logits, teacher_topk_logits, teacher_topk_indices, zero_outside_topk,
    calculate_entropy, vocab_parallel_rank=None, vocab_parallel_group=None,
    context_parallel_group=None,
):  # fmt: skip
    logits = student_logits.float()
    h_all = None
    if zero_outside_topk:
        logp = logits.log_softmax(-1)
        student = logp.gather(-1, teacher_topk_indices)
        h_all = (logp.exp() * logp).sum(-1)[:, :-1] if calculate_entropy else None
    else:
        student = logits.gather(-1, teacher_topk_indices).log_softmax(-1)
    return student[:, :-1], teacher_topk_logits.float().log_softmax(-1)[:, :-1], h_all
