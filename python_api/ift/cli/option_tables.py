"""Options of ``ift train`` and ``ift dynamics``, as data; those of losses: `ift.cli.losses`."""

from __future__ import annotations

from typing import Any

from ift.cli.arguments import (
    Option,
    columns,
    fraction,
    names_of,
    natural,
    not_negative,
    number,
    positive,
    positive_int,
)
from ift.cli.losses import LOSSES
from ift.data import TRUNCATE

# The training of the IFT paper as its released code does it; λ and γ are IFTConfig.paper()'s.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "loss": "ift",
        "objective": "released",
        "epochs": 3.0,
        "lr": 5e-7,
        "optimizer": "rmsprop",
        "scheduler": "cosine",
        "warmup_ratio": 0.15,
        "max_grad_norm": 10.0,
        "dropout": False,
        "batch_size": 8,
        "accumulate": 64,
        "max_length": 1024,
        "bf16": True,
    }
}
PRESETS["noisy"] = {**PRESETS["paper"], "lam_noise": 0.5, "lambda_schedule": "linear"}
# Of two options that exclude each other, the one that replaces the other's default.
REPLACES = {"max_steps": "epochs", "eval_data": "eval_split", "warmup_ratio": "lr_warmup_steps"}
# Options without effect unless another one has one of these values.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "k": ("rule", ("kth",)),
    "sample_temperature": ("rule", ("sample",)),
    "min_lam": ("lambda_schedule", ("linear",)),
    "warmup_steps": ("lambda_schedule", ("linear",)),
    "detach_weights": ("objective", ("released", "algorithm1")),
}
HEAD = ("gradient", "logits_dtype", "deterministic")  # arguments of `ift.patch`
INPUT_OPTIONS = {
    "model": Option("a directory, a hub id, or `tiny`: a small random Llama with a tokenizer "
                    "trained on the data", str, "MODEL", required=True),
    "data": Option("rows in JSONL, JSON, Parquet or CSV, or a folder of such files or of "
                   "`datasets`: `prompt` and `completion`, `messages`, ShareGPT, Alpaca or `text`; "
                   "for preference losses `prompt`, `chosen` and `rejected`", str, "FILE",
                   required=True),
    "columns": Option("where the data has other names, as prompt=question,completion=answer; also "
                      "chooses among several formats in a row", columns, "KEY=COLUMN,…"),
    "system": Option("system message of conversations that have none", str, "TEXT"),
    "output": Option("gets checkpoints, model/, log.jsonl and curves.png", str, "DIR",
                     required=True),
    "config": Option("YAML or JSON file of options by their names, such as the run.json of a run; "
                     "options given beside it win", str, "FILE"),
    "allow_new_weights": Option("train a model of which --model (or --reference) lacks weights, a "
                                "head for one: they start from random numbers"),
    "dry_run": Option("show rows in tokens, lengths, and what memory and time it will take; train "
                      "and write nothing", default=False),
}  # fmt: skip
GPU_ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention")
# Of transformers' Trainer.
REPORTERS = (
    "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "dvclive",
    "neptune", "azure_ml", "codecarbon", "dagshub", "flyte", "kubeflow",
)  # fmt: skip
RUN_OPTIONS = {
    "eval_split": Option("share of the rows to hold out for evaluation", fraction, "F", 0.0),
    "eval_data": Option("rows to evaluate on, as --data, instead of a split", str, "FILE"),
    "eval_steps": Option("evaluate every N steps (default: once an epoch)", positive_int, "N"),
    "log_steps": Option("log every N steps", positive_int, "N", 10),
    "save_steps": Option("write a checkpoint every N steps, and at the end", positive_int, "N",
                         500),
    "save_total_limit": Option("checkpoints to keep, the last ones; 0: all", natural, "N", 2),
    "report_to": Option("log to these, too, with commas between: " + ", ".join(REPORTERS),
                        names_of(REPORTERS), "NAMES"),
    "samples": Option("held-out prompts to continue at each evaluation, into DIR/samples.jsonl; "
                      "0: none", natural, "N", 3),
    "resume": Option("continue the run in --output from its last checkpoint, with its options; a "
                     "larger --epochs or --max-steps makes it longer", default=False),
}  # fmt: skip
TRAINING_OPTIONS = {
    "loss": Option("loss to train with", choices=LOSSES, default="ift"),
    "preset": Option("settings of a publication; options given beside it win", choices=PRESETS),
    "responses": Option("of a preference, what `sft` and `ift` learn: both is the `extend` of the "
                        "paper on learning dynamics", choices=("chosen", "rejected", "both"),
                        default="chosen"),
    "epochs": Option("passes over the data", positive, "X", 1.0),
    "max_steps": Option("optimizer steps, instead of --epochs", positive_int, "N"),
    "lr": Option("peak learning rate", positive, "X", 5e-5),
    "gradient": Option("of the head; active approximates it by the columns that matter",
                       choices=("exact", "active"), default="exact"),
    "logits_dtype": Option("float32: logits are not rounded to 16 bits, with --bf16 or weights of "
                           "16 bits", choices=("float32",)),
    "deterministic": Option("a token's log-probability depends on its hidden state alone, to the "
                            "bit: not on the batch or the threads", default=False),
    "freeze_head": Option("do not train the output head (nor an embedding tied to it)",
                          default=False),
    "optimizer": Option("that updates the weights; its other settings are those of transformers",
                        choices=("adamw", "rmsprop", "sgd", "adafactor"), default="adamw"),
    "weight_decay": Option("of the optimizer, but for biases and norms", not_negative, "X", 0.0),
    "max_grad_norm": Option("clip the gradient to this norm; 0: as it is", not_negative, "X", 1.0),
    "scheduler": Option("of the learning rate", choices=("linear", "cosine", "constant"),
                        default="linear"),
    "lr_warmup_steps": Option("steps of linear learning-rate warm-up", natural, "N", 0),
    "warmup_ratio": Option("share of all steps for it, instead of --lr-warmup-steps", fraction,
                           "F"),
    "dropout": Option("train with the dropout of the model's configuration; --no-dropout sets all "
                      "of it to 0", default=True),
    "batch_size": Option("rows per forward on each device", positive_int, "N", 8),
    "accumulate": Option("forwards per optimizer step", positive_int, "N", 1),
    "max_length": Option("longest row in tokens",
                         number("a whole number of at least 2", lambda x: x >= 2, int), "N", 1024),
    "truncate": Option("of longer rows cut off the end or the start (of the prompt, for pairs), or "
                       "drop them", choices=TRUNCATE, default="end"),
    "bf16": Option("bf16 autocast over fp32 weights", default=False),
    "seed": Option("of the initial weights, the order of the data and the sampling",
                   number("a whole number in [0, 2**32)", lambda x: 0 <= x < 2**32, int), "N", 0),
    "cpu": Option("stay off the accelerator", default=False),
}  # fmt: skip
MODEL_OPTIONS = {
    "dtype": Option("of the weights in training and in model/; auto: float32 where they are "
                    "trained, and as in the files of --model in model/ and where they are frozen",
                    choices=("auto", "float32", "bfloat16", "float16"), default="auto"),
    "attn": Option("attention of transformers (default: its choice)",
                   choices=("eager", "sdpa", *GPU_ATTENTION)),
    "gradient_checkpointing": Option("compute activations again in backward instead of keeping "
                                     "them", default=False),
    "packing": Option("put the rows of a forward into one sequence without padding; none attends "
                      "to another", default=False),
    "lora_rank": Option("train a LoRA adapter of rank N alone; model/ is the adapter",
                        positive_int, "N"),
    "lora_alpha": Option("the adapter is scaled by α / rank (2 · rank)", positive, "α"),
    "lora_dropout": Option("dropout before the adapter (0)", fraction, "P"),
    "lora_targets": Option("layers that get one, with commas between (all-linear: each linear "
                           "layer but the head)", names_of(), "NAMES"),
    "lora_config": Option("PEFT's adapter_config.json, instead of these four", str, "FILE"),
    "merge": Option("write the model with its adapter added to the weights to model/",
                    default=False),
    "quantize": Option("keep the frozen weights under an adapter in 4 or 8 bits (bitsandbytes)",
                       choices=("4bit", "8bit")),
}  # fmt: skip
PROBE_OPTIONS = {
    "probes": Option("probe set to use (default: made from --data)", str, "FILE"),
    "probe_every": Option("measure every N steps", positive_int, "N", 25),
    "probe_size": Option("prompts of the set that is made", positive_int, "N", 64),
    "probe_test": Option("JSONL of rows not trained on, for the type `unrelated` (default: the "
                         "rows held out)", str, "FILE"),
    "probe_sample": Option("tokens of a sample of the model before training, for the type "
                           "`sample`; 0: none", natural, "N", 32),
    "probe_fluent": Option("sentences that have nothing to do with the data, one a line, for the "
                           "type `fluent` (default: 20 English ones)", str, "FILE"),
}  # fmt: skip
HEATMAP_OPTIONS = {
    "passes": Option("over the answers of a type", positive_int, "N", 1),
    "projections": Option("measure ‖K‖, too, with N random projections of each answer; 0: do not",
                          number("0, or a whole number of at least 2",
                                 lambda x: x == 0 or x >= 2, int), "N", 0),
}  # fmt: skip
SCORE_OPTIONS = {
    "topk": Option("also write the N best ids of each token with their log-probabilities, for "
                   "`ift.teacher_shards.TeacherDataset`; rows as `ift train --loss sft` reads them",
                   number("a whole number from 1 to 511", lambda x: 1 <= x <= 511, int), "N"),
    "shard_rows": Option("rows of a file of scores: what a process does at a time, and what is "
                         "lost when it is stopped", positive_int, "N", 256),
}  # fmt: skip
CHECK_OPTIONS = {
    "peft": Option("an adapter of PEFT on it", str, "DIR"),
    "rows": Option("of the data to check with, the first ones", positive_int, "N", 4),
    "tolerance": Option("largest relative error (default: 1e-5, of 16 bits 4 epsilon)", positive,
                        "X"),
    "json": Option("print one JSON object", default=False),
}  # fmt: skip
REPORT_OPTIONS = {
    "output": Option("page to write", str, "HTML", "report.html"),
    "title": Option("above the page", str, "TEXT", "Runs"),
}
DEFAULTS = {
    name: option.default
    for options in (
        RUN_OPTIONS,
        TRAINING_OPTIONS,
        MODEL_OPTIONS,
        PROBE_OPTIONS,
        HEATMAP_OPTIONS,
        SCORE_OPTIONS,
        CHECK_OPTIONS,
    )
    for name, option in options.items()
}
