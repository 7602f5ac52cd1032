"""What the model says: continuations of held-out prompts at each evaluation of ``ift train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ift.cli.processes import note
from ift.dynamics.probes import prompt_and_answer, sampler
from ift.files import JsonlLog
from ift.text import one_line

TOKENS = 32  # of a continuation


class Samples(TrainerCallback):
    """Continue prompts greedily after each evaluation; write all to `path` and show the first.

    A line has ``step``, ``prompt``, ``answer`` (the row's) and ``text`` (the model's). The state of
    every random generator stays as it is. A model that cannot generate is left alone, with a note.
    Each process generates, for a model may be sharded, and the first writes.

    Args:
        rows: held-out rows, or pairs, of which the chosen side. Those without a prompt are left
            out, and with a note those with tools or options of the chat template.
        count: how many prompts to continue, the first ones that differ.
        tokenizer: of the model.
        path: of the JSONL file.
    """

    def __init__(self, rows: Sequence[Any], count: int, tokenizer: Any, path: Path) -> None:
        self.prompts: list[tuple[Any, str]] = []
        sides = [getattr(row, "chosen", row) for row in rows]
        plain = [side for side in sides if not side.template_options]
        if len(plain) < len(sides):
            note(f"samples: {len(sides) - len(plain)} of {len(sides)} held-out rows have 'tools' "
                 "or 'chat_template_kwargs' and are left out")  # fmt: skip
        for side in plain:
            prompt, answer = prompt_and_answer(side.content)
            if len(self.prompts) == count:
                break
            if prompt and all(prompt != other for other, _ in self.prompts):
                self.prompts.append((prompt, answer))
        self.tokenizer, self.log = tokenizer, JsonlLog(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove what a resumed run makes again."""
        if state.is_world_process_zero:
            self.log.rewind(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Generate, write and show."""
        if not self.prompts:
            return
        try:
            answers = sampler(model, self.tokenizer, max_new_tokens=TOKENS, temperature=0)(
                [prompt for prompt, _ in self.prompts]
            )
        except Exception as error:  # the training goes on without
            self.prompts = []
            first = str(error).strip().split("\n")[0]
            note(f"no samples: {type(model).__name__} cannot generate "
                 f"({type(error).__name__}: {first})")  # fmt: skip
            return
        if not state.is_world_process_zero:
            return
        self.log.append(
            *(
                {"step": state.global_step, "prompt": prompt, "answer": answer, "text": text}
                for (prompt, answer), text in zip(self.prompts, answers, strict=True)
            )
        )
        tqdm.write(shown(self.prompts[0][0], answers[0]), file=sys.stderr)


def shown(prompt: Any, text: str) -> str:
    """The end of a prompt and the continuation, in one line of 80 columns."""
    asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return f"  sample: {one_line(asked, 25, end=True)} → {one_line(text, 42)}"
