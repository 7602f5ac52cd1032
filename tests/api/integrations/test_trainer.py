"""`IFTTrainer`: what one optimizer step means, what is logged, what is refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from causal_lms import V, assert_close, make, rows, token_metrics
from ift.cli.losses import sft_config
from ift.cli.preference import PairTrainer
from ift.cli.trainer import RunTrainer
from ift.config import IFTConfig
from ift.integrations.transformers import IFTTrainer, averaged_processes
from ift.losses import SFTLoss
from ift.patching import patch
from processes import results
from trainers import SGD, training_arguments

# Response lengths differ, and one row has none: means over rows, tokens and batches all differ.
LENGTHS = [3, 0, 7, 5]


class InOrder(IFTTrainer):
    """Rows in their order, and the gradients of every optimizer step."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = []
        trainer = self

        class Keep(hf.TrainerCallback):
            def on_pre_optimizer_step(self, *_, **__):
                named = trainer.model.named_parameters()
                trainer.gradients.append({n: p.grad.clone() for n, p in named if p.requires_grad})

        self.add_callback(Keep())


def arguments(directory, **changes):
    options = SGD | {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    return training_arguments(directory, **{**options, **changes})


def build(directory, config, model=None, data=None, trainer=InOrder, more=None, **changes):
    """A trainer; `more` goes to it, `changes` to its arguments."""
    given = {"train_dataset": data or rows(LENGTHS), "ift_config": config, **(more or {})}
    return trainer(model or make("llama"), arguments(directory, **changes), **given)


def trained(*given, **options):
    trainer = build(*given, **options)
    trainer.train()
    return trainer


CONFIGS = {
    "sft": None,
    "ift": IFTConfig(),
    "embedding": IFTConfig(embedding_grad=True),
    "sample": IFTConfig(rule="sample"),
    "sft, mean over rows": sft_config("row"),
}


class OfTheCommandLine(InOrder, RunTrainer):
    """`ift train`'s, on rows in their order."""


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("size", "average", "trainer"),
    [(1, True, InOrder), (2, True, InOrder), (1, False, InOrder), (1, True, OfTheCommandLine)],
)
def test_accumulated_rows_are_one_batch(tmp_path, config, size, average, trainer):
    data = rows(LENGTHS)
    for row in data:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    whole = trained(tmp_path, config, data=data)
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    sizes["average_tokens_across_devices"] = average
    parts = trained(tmp_path, config, data=data, trainer=trainer, **sizes)
    # Rows of other lengths are aligned otherwise, so sums come in another order.
    assert_close(parts.gradients[0], whole.gradients[0], 1e-5)
    loss = [t.state.log_history[0]["loss"] for t in (parts, whole)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "row_mean"])
def test_packed_rows_are_rows_for_a_loss(tmp_path, reduction):
    """A mean over rows is one over packed documents, in parts of a step, too."""
    more = {"loss": SFTLoss(reduction=reduction, scaling="dft")}
    whole = trained(tmp_path, None, more=more)
    more["data_collator"] = hf.DataCollatorWithFlattening()
    data = [{name: ids.tolist() for name, ids in row.items()} for row in rows(LENGTHS)]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    packed = trained(tmp_path, None, data=data, more=more, **sizes)
    assert_close(packed.gradients[0], whole.gradients[0], 1e-5)
    loss = [t.state.log_history[0]["loss"] for t in (packed, whole)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_processes_that_share_a_batch_are_one_of_the_average():
    """As transformers multiplies its own loss, also without `get_tp_size`."""
    four = SimpleNamespace(num_processes=4)
    assert averaged_processes(SimpleNamespace(accelerator=four)) == 4
    assert averaged_processes(SimpleNamespace(accelerator=four, get_tp_size=lambda: 2)) == 2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_is_the_loss_of_a_plain_forward(tmp_path, config):
    trainer = trained(tmp_path, config)
    model = patch(make("llama"))
    inputs = {k: torch.stack([row[k] for row in rows(LENGTHS)]) for k in ("input_ids", "labels")}
    loss = model(**inputs, ift=config).loss
    loss.backward()
    named = dict(model.named_parameters())
    assert_close(trainer.gradients[0], {n: named[n].grad for n in trainer.gradients[0]}, 1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if config is None:
        logged, right = trainer.state.log_history[0], token_metrics(make("llama"), rows(LENGTHS))
        assert logged["token_accuracy"] == pytest.approx(right["token_accuracy"])
        assert logged["entropy"] == pytest.approx(right["entropy"], rel=1e-5)


def test_sft_is_transformers_own(tmp_path):
    class Plain(InOrder):  # the same trainer on a model that is not patched
        def _prepared(self, model):
            return model

        def compute_loss(self, *args, **kwargs):
            return hf.Trainer.compute_loss(self, *args, **kwargs)

    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    plain = trained(tmp_path, None, trainer=Plain, data=rows(LENGTHS) * 2, **changes)
    ours = trained(tmp_path, None, data=rows(LENGTHS) * 2, **changes)
    for got, expected in zip(ours.gradients, plain.gradients, strict=True):
        assert_close(got, expected)


def test_the_step_reaches_the_forward_and_resuming_repeats_it(tmp_path):
    config = IFTConfig(lambda_schedule="linear", lam=0.8, warmup_steps=3, lam_noise=0.5)

    class Watching(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            result = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append(result.item())
            return result

    def run(resume=None, **changes):
        losses.clear()
        steps = []
        model = make("llama", attention_dropout=0.2)
        model.register_forward_pre_hook(
            lambda *call: steps.append(call[-1]["ift"].step), with_kwargs=True
        )
        changes = {"per_device_train_batch_size": 2, "save_steps": 2, **changes}
        changes |= {"trainer": Watching, "save_strategy": "steps"}
        trainer = build(tmp_path, config, model, rows([3, 5, 4, 2]), **changes)
        trainer.train(resume_from_checkpoint=resume)
        return list(zip(steps, losses, strict=True))

    losses = []
    unbroken = run(max_steps=5)
    assert [step for step, _ in unbroken] == [0, 1, 2, 3, 4]
    resumed = run(resume=str(tmp_path / "checkpoint-2"), max_steps=5)
    assert resumed == unbroken[2:]


def test_evaluation_measures_cross_entropy_without_logits(tmp_path):
    model, more = make("llama"), {"eval_dataset": rows(LENGTHS)}
    trainer = build(tmp_path, IFTConfig(), model, more=more, per_device_eval_batch_size=4)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda *a: shapes.append(a[-1].shape[-1]))
    metrics = trainer.evaluate()
    handle.remove()
    assert shapes[-1] == 0  # the first call is that of the measurement
    inputs = {k: torch.stack([row[k] for row in rows(LENGTHS)]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        plain = model.eval()(**inputs)
    assert plain.logits.shape[-1] == V
    assert metrics["eval_loss"] == pytest.approx(plain.loss.item(), rel=1e-5)
    accuracy = token_metrics(make("llama"), rows(LENGTHS))["token_accuracy"]
    assert metrics["eval_token_accuracy"] == pytest.approx(accuracy)
    assert "eval_entropy" in trainer.state.log_history[-1]


def test_compute_metrics_gets_its_logits(tmp_path):
    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"x": 1.0}

    seen, more = [], {"eval_dataset": rows(LENGTHS), "compute_metrics": metrics}
    trainer = trained(tmp_path, IFTConfig(), more=more)
    assert trainer.evaluate()["eval_x"] == 1.0
    assert seen[0][-1] == V


def test_the_untied_input_embedding_is_frozen_unless_it_is_trained(tmp_path):
    def embedding_trains(name, config):
        model = make(name)
        build(tmp_path, config, model, trainer=IFTTrainer)
        return model.get_input_embeddings().weight.requires_grad

    assert not embedding_trains("llama", IFTConfig())
    assert embedding_trains("llama", IFTConfig(embedding_grad=True))
    assert embedding_trains("llama", None)
    assert embedding_trains("qwen2", IFTConfig())  # tied: the head trains it


def test_packed_batches_count_their_documents(tmp_path):
    data = [{k: v.tolist() for k, v in row.items()} for row in rows([3, 0, 7, 5])]
    more = {"data_collator": hf.DataCollatorWithFlattening()}
    sizes = [
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        for size in (4, 1)
    ]
    packed, single = (
        trained(tmp_path, IFTConfig(), data=data, more=more, **size).gradients[0] for size in sizes
    )
    assert_close(single, packed)
    assert_close(packed, trained(tmp_path, IFTConfig()).gradients[0])


def test_model_init_is_patched_too(tmp_path):
    trainer = IFTTrainer(
        None,
        arguments(tmp_path),
        train_dataset=rows(LENGTHS),
        model_init=lambda: make("llama"),
        ift_config=IFTConfig(),
    )
    trainer.train()
    assert trainer.model.ift_metrics["tokens"] == sum(LENGTHS)


def test_mixed_precision(tmp_path):
    plain = trained(tmp_path, IFTConfig())
    mixed = trained(tmp_path, IFTConfig(), bf16=True)
    losses = [t.state.log_history[0]["loss"] for t in (mixed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    mixed.accelerator.unwrap_model(mixed.model, keep_fp32_wrapper=False)
    from ift.patching import unpatch

    unpatch(mixed.model)
    assert "forward" not in mixed.model.__dict__


@pytest.mark.parametrize(
    ("arguments_", "options", "match"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor: expected 0"),
        ({}, {"compute_loss_func": lambda *a, **k: None}, "compute_loss_func: expected None"),
        ({}, {"ift_config": {"lam": 0.2}}, "ift_config: expected an ift.IFTConfig"),
    ],
    ids=lambda v: next(iter(v), "") if isinstance(v, dict) else "",
)
def test_what_cannot_serve_is_refused(tmp_path, arguments_, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        IFTTrainer(make("llama"), arguments(tmp_path, **arguments_), **options)


def test_several_devices_in_one_process_are_refused(tmp_path):
    options = arguments(tmp_path)
    options._n_gpu = 2  # as torch finds them
    with pytest.raises(ValueError, match="args: expected one device per process .torchrun., got 2"):
        IFTTrainer(make("llama"), options, ift_config=IFTConfig())


@pytest.mark.parametrize("kind", [IFTTrainer, PairTrainer], ids=lambda kind: kind.__name__)
def test_a_trainer_is_one_class_under_that_of_transformers(kind):
    assert [cls for cls in kind.__mro__ if issubclass(cls, hf.Trainer)] == [kind, hf.Trainer]


@pytest.mark.slow  # Dynamo traces for long
@pytest.mark.parametrize("config", [None, IFTConfig(share_prompt=False)], ids=["sft", "ift"])
def test_torch_compile(tmp_path, config):
    """Losses, metrics and evaluation are those of the model as it is, in training and after."""

    def run(**changes):
        torch._dynamo.reset()
        changes |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
        more = {"eval_dataset": rows([4, 2, 0])}
        model = make("llama", num_hidden_layers=1)
        trainer = trained(tmp_path, config, model, more=more, **changes)
        keys = ("loss", "token_accuracy", "entropy", "eval_loss", "eval_token_accuracy")
        return [record[k] for record in trainer.state.log_history for k in keys if k in record]

    compiled = run(torch_compile=True, torch_compile_backend="eager")
    assert len(compiled) == 5
    assert compiled == pytest.approx(run(), rel=1e-5)


def test_a_forward_that_was_replaced_is_noticed(tmp_path):
    model = make("llama")
    trainer = build(tmp_path, IFTConfig(), model, remove_unused_columns=False)
    own = type(model).forward.__get__(model)
    model.forward = lambda ift=None, **kwargs: own(**kwargs)
    with pytest.raises(RuntimeError, match="the patched forward did not run"):
        trainer.train()


def two_processes(rank, processes, directory):
    sizes, found = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, {}
    for name in ("sft", "ift"):
        trainer = trained(directory, CONFIGS[name], **sizes)
        found[name] = trainer.gradients[0], trainer.state.log_history[0]
    return found


def test_two_processes_are_one(tmp_path):
    """Rows 0 and 2 in one process, 1 (without response) and 3 in the other, one at a time."""
    found, _ = results(two_processes, 2, tmp_path)
    for name, (gradients, logged) in found.items():
        one = trained(tmp_path / "one", CONFIGS[name])
        assert_close(gradients, one.gradients[0])
        for key in ("loss", "token_accuracy", "entropy"):
            assert logged[key] == pytest.approx(one.state.log_history[0][key], rel=1e-4)
