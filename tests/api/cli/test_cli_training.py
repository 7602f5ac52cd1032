"""Training as the IFT paper's released code does it: its preset, its log, its SFT."""

import math

import pytest
import torch
import transformers as hf

from causal_lms import batch, make
from command_line import read_log, train, write_rows
from ift import IFTConfig, IFTTrainer, patch, tiny
from ift.cli import main, options
from ift.cli.models import turn_off_dropout
from ift.data import Collator, encode, split_rows
from ift.data_rows import read_rows
from ift.losses import SFTLoss

ROWS = [{"prompt": f"count {i}:", "completion": " 7 8 9 10"[: 2 * (i % 4) + 2]} for i in range(12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve rows whose completions differ in length: means over rows and tokens differ."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def run(data, output, *more):
    """A run at a learning rate that changes nothing but is no 0; its log."""
    sizes = ["--lr", 1e-12, "--max-length", 32, "--max-steps", 1, "--log-steps", 1]
    assert main(train(data, output, *sizes, "--eval-split", 0.34, *more)) == 0
    return read_log(output)


def parts(data, output):
    """The model before training, and batches of the rows to train and to evaluate on."""
    tokenizer = hf.AutoTokenizer.from_pretrained(output / "model")
    rows = split_rows(read_rows(data), 0.34, seed=0)
    batches = [Collator(0)(encode(part, tokenizer, 32).examples) for part in rows]
    return tiny.tiny_llama(tokenizer, max_length=32, seed=0), *batches


def losses(model, batch):
    """The mean loss of each row, and the losses of all tokens."""
    model.eval()
    with torch.no_grad():
        logp = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    rows = []
    for row, target in zip(logp, batch["labels"][:, 1:], strict=True):
        found = [-row[t, y] for t, y in enumerate(target.tolist()) if y != -100]
        rows.append(torch.stack(found))
    return torch.stack([row.mean() for row in rows]).mean().item(), torch.cat(rows).mean().item()


@pytest.mark.parametrize("more", [(), ("--rule", "sample", "--lam-noise", "2")], ids=str)
def test_the_losses_of_both_passes_are_logged(data, tmp_path, more):
    (record,) = run(data, tmp_path, "--batch-size", 2, "--accumulate", 4, *more)
    model, trained, held_out = parts(data, tmp_path)
    (row_mean, token_mean), (own_row_mean, own_token_mean) = (
        losses(model, rows) for rows in (held_out, trained)
    )
    assert abs(own_row_mean - own_token_mean) > 1e-3
    assert abs(row_mean - token_mean) > 1e-3
    assert record["eval_loss"] == pytest.approx(token_mean, rel=1e-5)
    assert record["eval_loss_sft"] == pytest.approx(row_mean, rel=1e-5)
    assert record["loss_sft"] == pytest.approx(own_row_mean, rel=1e-5)
    assert record["loss_ift"] == pytest.approx(record["loss"], rel=1e-5)
    assert record["lam"] == IFTConfig(lam_noise=2.0 if more else 0.0).lam_at(0)
    assert record["eval_lam"] == 0.2  # without the noise
    if not more:
        patch(model.eval())
        for name, rows in (("eval_loss_ift", held_out), ("loss_ift", trained)):
            assert record[name] == pytest.approx(model(**rows, ift=IFTConfig()).loss.item(),
                                                 rel=1e-5)  # fmt: skip


@pytest.mark.parametrize("mean", ["row", "token"])
def test_the_mean_of_sft_is_over_rows_or_tokens(data, tmp_path, mean):
    """Of the whole step, whatever its parts; and not as it would be of the mean of parts."""
    from ift.cli.losses import sft_config

    (record,) = run(data, tmp_path, "--batch-size", 3, "--accumulate", 3, "--loss", "sft",
                    "--sft-mean", mean)  # fmt: skip
    model, trained, held_out = parts(data, tmp_path)
    index = ("row", "token").index(mean)
    assert record["loss"] == pytest.approx(losses(model, trained)[index], rel=1e-5)
    assert record["eval_loss"] == pytest.approx(losses(model, held_out)[1], rel=1e-5)
    assert not {"lam", "loss_sft", "loss_ift", "eval_lam"} & set(record)
    gradients = []
    for config in (sft_config(mean), None):
        model.zero_grad()
        if config is None:
            logp = model(trained["input_ids"], trained["attention_mask"]).logits.log_softmax(-1)
            target = trained["labels"][:, 1:]
            mask = target != -100
            nll = -logp[:, :-1].gather(-1, target.clamp(min=0)[..., None])[..., 0] * mask
            means = (nll.sum(1) / mask.sum(1)).mean(), nll.sum() / mask.sum()
            means[index].backward()
        else:
            patch(model)(**trained, ift=config).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        if mean == "token":  # transformers' own
            break
    for ours, theirs in zip(gradients[0], gradients[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_tokens_are_scaled(data, tmp_path):
    """The loss of the whole step, whatever its parts; evaluation stays cross-entropy."""
    (record,) = run(data, tmp_path, "--batch-size", 3, "--accumulate", 3, "--loss", "sft",
                    "--sft-mean", "row", "--sft-scaling", "eaft")  # fmt: skip
    model, trained, held_out = parts(data, tmp_path)
    model.eval()
    logp = model(trained["input_ids"], trained["attention_mask"]).logits[:, :-1].log_softmax(-1)
    target = trained["labels"][:, 1:]
    own = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    gate = (-(logp.exp() * logp).sum(-1) / math.log(20)).clamp(max=1)
    wanted = SFTLoss(reduction="row_mean")(own * gate, target != -100)
    assert record["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert record["eval_loss"] == pytest.approx(losses(model, held_out)[1], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"loss": "dft"}, TypeError, "loss: expected an ift.losses.SFTLoss or None, got str"),
        (
            {"loss": SFTLoss(), "ift_config": IFTConfig()}, ValueError,
            "loss: expected None with ift_config, got both",
        ),
        ({"loss": SFTLoss(reduction="sum")}, ValueError, "loss: expected a reduction 'mean' or"),
        (
            {"loss": SFTLoss(kl_coef=0.1)}, ValueError,
            "reference: expected a frozen model with kl_coef 0.1, got None",
        ),
        (
            {"loss": SFTLoss(), "reference": torch.nn.Linear(2, 2)}, ValueError,
            "reference: expected None without a loss with kl_coef, got a model",
        ),
        (
            {"loss": SFTLoss(kl_coef=0.1), "reference": torch.nn.Linear(2, 2),
             "deterministic": True}, ValueError, "deterministic: expected False with kl_coef",
        ),
    ],
)  # fmt: skip
def test_a_loss_that_the_trainer_cannot_serve(given, error, said):
    with pytest.raises(error, match=said):
        IFTTrainer(torch.nn.Linear(2, 2), **given)


def test_the_preset_is_the_released_training(data, tmp_path, monkeypatch):
    made = {}
    init = hf.Trainer.__init__

    def watched(self, model, args, *rest, **more):
        made["args"] = args
        init(self, model, args, *rest, **more)

    monkeypatch.setattr(hf.Trainer, "__init__", watched)
    given = ["--preset", "paper", "--max-steps", "4", "--batch-size", "2", "--accumulate", "1",
             "--no-bf16", "--max-length", "32", "--log-steps", "1"]  # fmt: skip
    assert main(train(data, tmp_path / "out", *given)) == 0
    found = made["args"]
    assert (found.max_grad_norm, found.optim, found.lr_scheduler_type) == (10, "rmsprop", "cosine")
    assert found.warmup_steps == 1 and found.weight_decay == 0  # 15 % of 4
    rates = [record["lr"] for record in read_log(tmp_path / "out")]
    assert rates[0] == 0 and rates[1] == 5e-7 == max(rates)
    call = ["train", "--model", "m", "--data", "d", "--output", "o", "--preset"]
    paper, noisy = (
        vars(options.resolve(options.build_parser().parse([*call, name])))
        for name in ("paper", "noisy")
    )
    assert (paper["warmup_ratio"], paper["dropout"], paper["epochs"]) == (0.15, False, 3)
    assert paper["objective"] == "released" and paper["lr_warmup_steps"] is None
    assert {k: v for k, v in noisy.items() if v != paper[k]} == {
        "preset": "noisy", "lam_noise": 0.5, "lambda_schedule": "linear"
    }  # fmt: skip


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "llama": {"attention_dropout": 0.3},
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "layerdrop": 0.5},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mixtral": {"attention_dropout": 0.3},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_no_dropout_is_none(name):
    model, inputs = make(name, **DROPOUT[name]).train(), batch()

    def spread():
        first, second = (model(**inputs).loss for _ in range(2))
        return abs(first - second).item()

    assert spread() > 0
    assert turn_off_dropout(model) > 0
    assert spread() == 0 and model.training
    assert turn_off_dropout(model) == 0
