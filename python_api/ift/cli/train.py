"""``ift train``: check the input, build the model, run the trainer, keep everything on disk."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from ift import plotting
from ift.cli import options, processes
from ift.cli.adapters import check_adapter
from ift.cli.arguments import flag_of
from ift.cli.checkpoints import check_whole, damage_in, last_checkpoint, step_of
from ift.cli.config_file import DATA, RUN_FILE, SAMPLES_FILE, absolute, saved_options
from ift.cli.errors import CliError, refusals
from ift.cli.losses import LOSSES, OPTIONS, build_loss, trainer_options
from ift.cli.models import (
    build_collator,
    check_model_path,
    check_positions,
    check_reporters,
    check_supported,
    load_model,
    turn_off_dropout,
)
from ift.cli.option_tables import DEFAULTS, HEAD, PROBE_OPTIONS, REPLACES
from ift.cli.processes import note
from ift.cli.rows import read_rows, tokenise
from ift.data import Encoded
from ift.data_rows import Row
from ift.files import JsonlLog, write_text
from ift.preference_data import EncodedPairs, PairCollator

# A run continued with another value of these, or of an option of its loss, would be another run.
FIXED = (
    *("eval_split", "epochs", "max_steps", "lr", "optimizer", "scheduler", "lr_warmup_steps"),
    *("warmup_ratio", "weight_decay", "max_grad_norm", "dropout"),
    *("batch_size", "accumulate", "max_length", "bf16", *HEAD, "freeze_head"),
    *("columns", "system", "truncate", "responses", "seed"),
    *("dtype", "attn", "gradient_checkpointing", "packing", "quantize"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_config"),
)
# The set is made once, before the first step; --probes is compared by its contents.
PROBE_SET = tuple(name for name in PROBE_OPTIONS if name not in ("probes", "probe_every"))
LENGTHS = ("epochs", "max_steps")  # may grow
OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop", "sgd": "sgd", "adafactor": "adafactor"}


def run(arguments: argparse.Namespace) -> int:
    """Train with the arguments of the command line, as `run_resolved`."""
    return run_resolved(options.resolve(arguments))


def run_resolved(arguments: argparse.Namespace, watch: Any = None) -> int:
    """Train.

    Args:
        arguments: of `options.resolve`.
        watch: (arguments, held-out rows, model, tokenizer) → one more callback of the trainer.

    Returns:
        0 when the run is complete, 130 when it was interrupted (with a checkpoint).

    Raises:
        CliError: bad input.
    """
    output = Path(arguments.output)
    start = last_checkpoint(output) if arguments.resume else None
    if start is not None:
        check_same_run(arguments, output)
        check_whole(start)
    check_model_path(arguments.model)
    check_adapter(arguments)
    processes.check_launcher()
    train_rows, eval_rows = read_rows(arguments)
    if arguments.dry_run and processes.count() > 1:
        raise CliError("--dry-run", f"got {processes.count()} processes; expected one")
    if not arguments.dry_run:
        check_output(output, arguments.resume)
        check_final(arguments, output, start)

    import torch  # from here on it takes seconds
    import transformers

    from ift.cli.reference import add_references, frozen_reference
    from ift.cli.runlog import RunLog
    from ift.cli.samples import Samples
    from ift.cli.trainer import StopOnSignal
    from ift.cli.weights import check_disk, final_dtype, warn_of_lost_updates

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_reporters(arguments)
    kind, loss = LOSSES[arguments.loss], build_loss(arguments)
    flags = kind.flags | dict(zip(HEAD, HEAD, strict=True))
    if arguments.resume and start is None:
        note(f"no checkpoint in {output}: starting from step 0")
    if not plotting.available():
        note("curves.png will not be drawn: matplotlib is not installed (ift-kernels[train])")

    model, tokenizer = load_model(
        arguments, train_rows, start, "--model" if start is None else "--resume"
    )
    if not arguments.dropout:
        off = turn_off_dropout(model)
        if off:
            note(f"--no-dropout: set {off} probabilities of the model and its configuration to 0")
    if arguments.freeze_head:
        model.get_output_embeddings().requires_grad_(False)
    mismatched = kind.pairs and not loss.pairs  # KTO scores other prompts' responses, too
    train_data = tokenise(train_rows, tokenizer, arguments, "--data", mismatched)
    flag = "--eval-split" if arguments.eval_data is None else "--eval-data"
    eval_data = tokenise(eval_rows, tokenizer, arguments, flag, mismatched)
    for data, of in ((train_data, "--data"), (eval_data, flag)):
        check_positions(model, max((len(row["input_ids"]) for row in data.sides()), default=0), of)
    check_supported(arguments, model)
    warn_of_lost_updates(arguments, model)
    training_arguments = build_training_arguments(arguments, transformers)
    log = JsonlLog(output / "log.jsonl")
    steps_per_epoch = -(-len(train_data.examples) // training_arguments.train_batch_size)
    steps_per_epoch = -(-steps_per_epoch // (arguments.accumulate * training_arguments.world_size))
    eval_steps = (arguments.eval_steps or steps_per_epoch) if eval_data.examples else None
    steps = arguments.max_steps or math.ceil(arguments.epochs * steps_per_epoch)
    warmup = arguments.lr_warmup_steps
    if warmup is None:
        warmup = math.ceil(arguments.warmup_ratio * steps)
    training_arguments.warmup_steps = warmup
    if warmup >= steps:
        note(f"{warmup} steps of warm-up: the run has {steps} steps, so the learning rate does "
             "not reach --lr")  # fmt: skip
    if arguments.dry_run:
        from ift.cli.dry_run import show

        sets = train_data, eval_data
        with refusals("--model", flags):
            show(arguments, train_rows, model, tokenizer, loss, sets, training_arguments, steps)
        return 0
    stop = StopOnSignal(alone=training_arguments.world_size == 1)
    collator = build_collator(arguments, tokenizer)
    title = f"{arguments.loss.upper()} of {Path(arguments.model).name} on "
    callbacks: list[Any] = [RunLog(log, eval_steps, title + Path(arguments.data).name), stop]
    if arguments.samples:
        place = output / SAMPLES_FILE
        callbacks.append(Samples(eval_rows, arguments.samples, tokenizer, place))
    if watch is not None:
        callbacks.append(watch(arguments, eval_rows, model, tokenizer))
    with refusals("--model", flags):
        more: dict[str, Any] = {}
        if kind.reference and not kind.pairs:
            more["reference"] = frozen_reference(
                arguments, tokenizer, train_rows, resumed=start is not None
            )
        elif kind.reference:
            original = model if start is None and arguments.reference is None else None
            with training_arguments.main_process_first(local=False):  # the others read its files
                add_references(arguments, (original, tokenizer), train_rows,
                               (train_data, eval_data), collator, training_arguments.device,
                               resumed=start is not None)  # fmt: skip
        if kind.pairs:
            collator = PairCollator(collator)
            more["single"] = isinstance(train_rows[0], Row)
        trainer = kind.trainer_class(
            model,
            training_arguments,
            **trainer_options(loss),
            **more,
            **options.of_head(arguments),
            data_collator=collator,
            train_dataset=train_data.examples,
            eval_dataset=eval_data.examples or None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    processes.prepare_sharding(trainer, arguments.merge)
    trainer.final_dtype, trainer.merge = final_dtype(arguments, start), arguments.merge
    check_disk(arguments, model, steps, trainer.final_dtype, sharded=trainer.is_fsdp_enabled)

    if trainer.is_world_process_zero():
        note(describe(arguments, model, tokenizer, train_data, eval_data, training_arguments))
        saved = saved_options(arguments, options.known_options(arguments))
        write_text(output / RUN_FILE, json.dumps(saved, indent=2) + "\n")
        with damage_in(log.path):
            log.rewind(0 if start is None else step_of(start))
    complete = False
    if start is not None:
        with damage_in(start):
            trainer.restore_window(start)
            state = json.loads((start / "trainer_state.json").read_text(encoding="utf-8"))
            done, before = state["global_step"], state["max_steps"]
        complete = done >= steps  # at its last step `Trainer` would do one more
        epoch = f"epoch {done / steps_per_epoch:.2f}"
        if complete:
            note(f"complete at step {done} of {steps} ({epoch}); a larger --epochs or --max-steps "
                 "continues it")  # fmt: skip
        else:
            note(f"resuming at step {done} of {steps} ({epoch})")
        jumps = arguments.scheduler != "constant" or arguments.warmup_ratio
        if not complete and before < steps and jumps:
            note(f"the run was made longer than {before} steps: from here on the learning rate is "
                 f"that of a {arguments.scheduler} schedule of {steps}")  # fmt: skip
    with stop:
        if not complete:
            first = 0 if start is None else step_of(start)
            at_first = lambda: trainer.state.global_step <= first  # noqa: E731  # later it is a bug
            with refusals("--model", flags, at_first):
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
            if trainer.state.global_step < trainer.state.max_steps:
                done = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
                note(f"interrupted at {done}; its checkpoint is written, --resume continues")
                return 130
        trainer.save_final(output / "model")
    if trainer.is_world_process_zero():
        note(f"done: {output}/model, log.jsonl, curves.png{summary(log.read())}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


# ---- input, checked before anything slow ---------------------------------------------------------


def check_output(output: Path, resume: bool) -> None:
    """Make the directory, try to write in it, and refuse to write over another run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        problem = f"cannot write to {output} ({error.strerror}); expected a writable directory"
        raise CliError("--output", problem) from None
    log = output / "log.jsonl"  # empty where a run was refused at its first loss
    logged = log.exists() and log.stat().st_size > 0
    if not resume and (logged or any(output.glob("checkpoint-*"))):
        raise CliError(
            "--output", f"{output} holds another run; expected a new directory, or --resume"
        )


def check_final(arguments: argparse.Namespace, output: Path, start: Path | None) -> None:
    """Refuse to replace by the trained model one that this run reads, or what is of no run."""
    final = output / "model"
    for name in ("model", "reference"):
        source = getattr(arguments, name)
        path = Path(source or "tiny")  # no path may be there: a hub id
        if source and path.exists() and path.resolve().is_relative_to(final.resolve()):
            problem = f"the trained model would replace {final}, which {flag_of(name)} is in"
            raise CliError("--output", f"{problem}; expected another directory")
    if start is None and os.path.lexists(final):
        raise CliError("--output", f"the trained model would replace {final}; expected a new "
                       "directory")  # fmt: skip


def check_same_run(arguments: argparse.Namespace, output: Path) -> None:
    """Refuse to continue a run under other arguments than those it was started with."""
    path = output / RUN_FILE
    if not path.exists():
        raise CliError("--resume", f"{output} is damaged (no {RUN_FILE})")
    with damage_in(path):
        before = {"processes": 1, **json.loads(path.read_text(encoding="utf-8"))}
    for name, other in REPLACES.items():
        if before.get(name) is not None:
            before[other] = None
    known = options.known_options(arguments)
    for name in DATA:
        data = getattr(arguments, name)
        if data is not None and not Path(data).exists():
            problem = f"no file {data}; expected the data of the run in {output}"
            raise CliError(flag_of(name), problem)
    now = saved_options(arguments, known)
    # Options without a value, since another one replaces them; that one is compared.
    replaced = {
        name for pair in REPLACES.items() for name in pair
        if now[name] is None and any(now[other] is not None for other in pair)
    }  # fmt: skip
    hashes = (f"{name}_sha256" for name in DATA)
    probes = (name for name in PROBE_SET if name in now)
    for name in ("model", "loss", "preset", *OPTIONS, *FIXED, *probes, "processes", *hashes):
        # A run of a version without the option had its default.
        was = absolute(before.get(name, DEFAULTS.get(name)), known.get(name))
        if name not in replaced and now[name] != was and not longer(name, now[name], was):
            refuse_change(name, now[name], was, output)


def longer(name: str, value: Any, was: Any) -> bool:
    """Whether a run only grows."""
    return name in LENGTHS and None not in (value, was) and bool(value > was)


def refuse_change(name: str, value: Any, was: Any, output: Path) -> NoReturn:
    """Raise the error of an option with another value than the run was started with."""
    started = f"as the run in {output} was started"
    got, expected = ("the default" if v is None else v for v in (value, was))
    if name == "processes":
        raise CliError("torchrun --nproc-per-node", f"got {got}; expected {expected}, {started}")
    if name.endswith("_sha256"):
        problem = f"other contents than when the run in {output} was started"
        raise CliError(flag_of(name.removesuffix("_sha256")), problem)
    if name in LENGTHS and was is None:
        other = next(length for length in LENGTHS if length != name)
        expected = flag_of(other)
    elif name in LENGTHS:
        expected = f"at least {was}"
    raise CliError(flag_of(name), f"got {got}; expected {expected}, {started}")


# ---- building ------------------------------------------------------------------------------------


def checkpointing_arguments(arguments: argparse.Namespace, transformers: Any) -> dict[str, Any]:
    """Activation checkpointing as this version of transformers calls it."""
    known = transformers.TrainingArguments.__dataclass_fields__
    new = "activation_checkpointing"
    name = new if new in known else "gradient_checkpointing"
    # The other kind needs inputs with a gradient, which frozen embeddings do not give.
    return {name: arguments.gradient_checkpointing, f"{name}_kwargs": {"use_reentrant": False}}


def build_training_arguments(arguments: argparse.Namespace, transformers: Any) -> Any:
    """transformers' arguments for ours."""
    import torch

    accelerated = not arguments.cpu and torch.accelerator.is_available()
    try:
        return transformers.TrainingArguments(
            output_dir=arguments.output,
            num_train_epochs=arguments.epochs or 1.0,  # or max_steps
            max_steps=arguments.max_steps or -1,
            learning_rate=arguments.lr,
            optim=OPTIMIZERS[arguments.optimizer],
            lr_scheduler_type=(
                "constant_with_warmup" if arguments.scheduler == "constant" else arguments.scheduler
            ),
            weight_decay=arguments.weight_decay,
            max_grad_norm=arguments.max_grad_norm,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.accumulate,
            **checkpointing_arguments(arguments, transformers),
            bf16=arguments.bf16,
            seed=arguments.seed,
            use_cpu=not accelerated,
            logging_steps=arguments.log_steps,
            save_steps=arguments.save_steps,
            save_strategy="steps",
            eval_strategy="no",  # RunLog requests it, at steps that are logged
            save_total_limit=arguments.save_total_limit or None,
            report_to=(arguments.report_to or "none").split(","),
            disable_tqdm=True,  # RunLog shows the bar
            dataloader_pin_memory=accelerated,
            remove_unused_columns=False,
            prediction_loss_only=True,
            ddp_find_unused_parameters=False,
        )
    except (ValueError, ImportError) as error:
        raise CliError("--bf16" if "bf16" in str(error) else "arguments", error) from None


# ---- messages ------------------------------------------------------------------------------------


def describe(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    train_data: Encoded | EncodedPairs,
    eval_data: Encoded | EncodedPairs,
    training_arguments: Any,
) -> str:
    """One line about the run that starts."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    share = "" if trained == millions else f", {trained:.2f} M of them trained"
    return (
        f"{arguments.loss} of {arguments.model} ({millions:.1f} M parameters{share}, "
        f"{len(tokenizer)} tokens) on {training_arguments.device}; "
        f"{len(train_data.examples)} rows with {train_data.target_tokens} target tokens, "
        f"{len(eval_data.examples)} rows for evaluation"
    )


def summary(records: list[dict[str, Any]]) -> str:
    """The last losses, for the closing line; the log has null for one that is not finite."""
    last = {k: r[k] for r in records for k in ("loss", "eval_loss") if k in r}
    shown = {k: "not finite" if value is None else f"{value:.4f}" for k, value in last.items()}
    return "".join(f"; {name} {value}" for name, value in shown.items())
