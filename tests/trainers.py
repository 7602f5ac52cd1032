"""Arguments of the trainers of transformers and TRL in tests."""

import transformers as hf

# One step of plain gradient descent.
SGD = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def training_arguments(directory, kind=hf.TrainingArguments, **options):
    """Of a run on the CPU that logs every step, and neither saves nor reports anything."""
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return kind(output_dir=str(directory), **{**quiet, "logging_steps": 1, **options})
