"""Evaluation of the trainers: per target of the whole set, whatever the batches and processes."""

import math

import pytest
import torch
import transformers as hf
from torch.utils.data import IterableDataset

from causal_lms import V, make, rows, token_metrics
from ift.config import IFTConfig
from ift.integrations.transformers import IFTTrainer
from processes import results
from trainers import training_arguments

# Targets of each row: none, one and many; batches without any among them.
TARGETS = [9, 1, 0, 0, 4, 0, 1]


def whole():
    return rows(TARGETS)


class Stream(IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(self.source)


def model():
    return make("llama", initializer_range=0.6)  # batch means are far from the mean of the set


def right(data):
    """Loss, accuracy and entropy over all targets, in plain torch."""
    return token_metrics(model().eval(), data)


def trainer(directory, data, size, *, kind=IFTTrainer, more=None, **options):
    arguments = training_arguments(directory, per_device_eval_batch_size=size, **options)
    more = {"ift_config": IFTConfig(), **(more or {})}
    return kind(model(), arguments, eval_dataset=data, **more)


def assert_right(metrics, expected, prefix="eval"):
    for name, value in expected.items():
        assert metrics[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("size", "logits"), [(1, False), (2, False), (3, True), (7, False)], ids=str
)
def test_the_mean_is_over_targets(tmp_path, size, logits):
    more = {"compute_metrics": lambda p: {"shape": p.predictions.shape[-1]}} if logits else {}
    one = trainer(tmp_path, whole(), size, more=more)
    for _ in range(2):
        metrics = one.evaluate()
        assert_right(metrics, right(whole()))
        assert metrics.get("eval_shape") == (V if logits else None)


def test_kinds_of_sets(tmp_path):
    first, second = whole(), rows([3, 0, 8], seed=1)
    one = trainer(tmp_path, {"a": first, "b": second}, 2)
    metrics = one.evaluate()
    assert_right(metrics, right(first), "eval_a")
    assert_right(metrics, right(second), "eval_b")
    assert_right(one.evaluate(Stream(first)), right(first))
    predicted = one.predict(second)
    assert_right(predicted.metrics, right(second), "test")
    assert predicted.predictions.shape == (3, 12, V)
    unlabelled = one.predict([{"input_ids": row["input_ids"]} for row in second])
    assert unlabelled.predictions.shape == (3, 12, V) and "test_loss" not in unlabelled.metrics
    short = trainer(tmp_path, first, 2, dataloader_drop_last=True)
    assert_right(short.evaluate(), right(first[:6]))
    grouped = trainer(
        tmp_path, first, 2, train_sampling_strategy="group_by_length",
        more={"data_collator": hf.default_data_collator},
    )  # fmt: skip
    assert_right(grouped.evaluate(), right(first))


def test_without_any_target_there_is_no_number(tmp_path):
    metrics = trainer(tmp_path, rows([0, 0, 0]), 2).evaluate()
    for name in ("loss", "token_accuracy", "entropy"):
        assert math.isnan(metrics[f"eval_{name}"])


def test_inside_training_it_leaves_the_log_of_training_alone(tmp_path):
    def run(**options):
        made = trainer(
            tmp_path, whole(), 2, max_steps=2, learning_rate=0.0,
            more={"train_dataset": rows([5, 6, 2])}, **options,
        )  # fmt: skip
        made.train()
        return made.state.log_history

    log = run(eval_strategy="steps", eval_steps=1)
    evaluated = [record for record in log if "eval_loss" in record]
    assert len(evaluated) == 2
    for record in evaluated:  # a learning rate of 0
        assert_right(record, right(whole()))
    names = ("loss", "token_accuracy", "entropy")
    for a, b in zip([r for r in log if "loss" in r], run(), strict=False):
        assert {n: a[n] for n in names} == {n: b[n] for n in names if n in b}


def test_the_auxiliary_loss_of_experts_is_not_part_of_it(tmp_path):
    class Experts(IFTTrainer):
        def _prepared(self, _):
            return super()._prepared(make("mixtral"))

    losses = [trainer(tmp_path, whole(), n, kind=Experts).evaluate()["eval_loss"] for n in (1, 7)]
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_a_forward_that_was_replaced_is_noticed(tmp_path):
    one = trainer(tmp_path, whole(), 2, remove_unused_columns=False)
    own = type(one.model).forward.__get__(one.model)
    one.model.forward = lambda loss=None, **kwargs: own(**kwargs)
    with pytest.raises(RuntimeError, match="forward .*did not run"):
        one.evaluate()


# ---- several processes ---------------------------------------------------------------------------

flat = {"data_collator": hf.DataCollatorWithFlattening()}
plain = [{k: v.tolist() for k, v in row.items()} for row in whole()]
# Name → (batch size, set, options): the last batch is filled up in other ways.
CASES = {
    "size 1": (1, whole(), {}),
    "size 2": (2, whole(), {}),
    "size 3": (3, whole(), {}),
    "more than the set": (8, whole(), {}),
    "full": (1, whole()[:6], {}),
    "logits": (2, whole(), {"more": {"compute_metrics": lambda p: {"rows": len(p.predictions)}}}),
    "by length": (2, whole(), {"train_sampling_strategy": "group_by_length",
                              "more": {"data_collator": hf.default_data_collator}}),
    "flattened": (2, plain, {"more": flat}),
    "dispatched": (2, whole(), {"accelerator_config": {"dispatch_batches": True}}),
    "split": (6, whole(), {"accelerator_config": {"split_batches": True}}),
    "stream": (2, Stream(whole()), {}),
    "dropped": (1, whole(), {"dataloader_drop_last": True}),
}  # fmt: skip


def cases(processes):
    """All of them in two processes; with more, those whose last batch has other gaps."""
    few = ("size 2", "full", "flattened", "split", "stream", "dropped")
    return {name: CASES[name] for name in (CASES if processes == 2 else few)}


def worker(rank, processes, directory):
    found = {}
    for name, (size, data, options) in cases(processes).items():
        one = trainer(directory, data, size, **options)
        found[name] = one.evaluate()
    assert one.evaluate()["eval_loss"] == found[name]["eval_loss"]
    by_itself = {"accelerator_config": {"dispatch_batches": False}}
    with pytest.raises(ValueError, match="eval_dataset: an iterable one"):
        trainer(directory, Stream(whole()), 2, **by_itself).evaluate()
    packed = [{k: v * 2 for k, v in row.items()} for row in plain]  # two documents in each
    for row in packed:
        row["position_ids"] = [*range(12)] * 2
    with pytest.raises(ValueError, match="data_collator: the last evaluation batch of 2 examples"):
        trainer(directory, packed, 2, more={"data_collator": Flat()}).evaluate()
    return found


class Flat:
    """One row of everything, as collators for padding-free attention make it."""

    def __call__(self, examples):
        names = ("input_ids", "labels", "position_ids")
        return {k: torch.tensor([[i for e in examples for i in e[k]]]) for k in names}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_are_one(processes, tmp_path):
    found, *_ = results(worker, processes, tmp_path)
    for name, (_, data, _) in cases(processes).items():
        seen = whole() if data is plain or isinstance(data, Stream) else data
        if name == "dropped":
            seen = seen[: len(seen) // processes * processes]
        assert_right(found[name], right(seen))
    if processes == 2:
        assert found["logits"]["eval_rows"] == len(TARGETS)
