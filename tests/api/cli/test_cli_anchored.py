"""`--loss asft` and `psft`: compared with a frozen model, or with the one of some steps ago."""

import shutil

import pytest
import torch
import transformers as hf

from command_line import read_log, refusal, train, untimed, write_rows
from ift.cli import main
from ift.data import Collator, encode
from ift.data_rows import read_rows
from ift.tiny import tiny_llama, train_tokenizer

ROWS = [{"prompt": f"count {i}:", "completion": " 7 8 9 10"[: 2 * (i % 4) + 2]} for i in range(8)]
SIZES = ["--max-length", 32, "--log-steps", 1, "--samples", 0, "--scheduler", "constant"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The rows, and two models with one tokenizer."""
    directory = tmp_path_factory.mktemp("anchored")
    write_rows(directory / "rows.jsonl", ROWS)
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], 300)
    for seed, name in enumerate(("model", "other")):
        tiny_llama(tokenizer, hidden=32, layers=1, seed=seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


def run(place, output, *more):
    given = train(place / "rows.jsonl", output, *SIZES, *more, model=place / "model")
    assert main(given) == 0
    return read_log(output)


def logits(place, name):
    """Of a model before training, on all rows as one batch; and its targets."""
    tokenizer = hf.AutoTokenizer.from_pretrained(place / name)
    examples = encode(read_rows(str(place / "rows.jsonl")), tokenizer, 32).examples
    batch = Collator(0)(examples)
    model = hf.AutoModelForCausalLM.from_pretrained(place / name).eval()
    with torch.no_grad():
        z = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    return z.log_softmax(-1), batch["labels"][:, 1:]


def test_asft_is_dft_and_the_kl_from_its_reference(place, tmp_path):
    """Of the whole step, in parts and packed; the trained model's own start is at distance 0."""
    steps = ["--loss", "asft", "--max-steps", 1, "--lr", 1e-12, "--batch-size", 2, "--accumulate"]
    steps += [4, "--reference", place / "other", "--kl-coef", 0.3]
    (record,) = run(place, tmp_path / "named", *steps)
    (packed,) = run(place, tmp_path / "packed", *steps, "--packing")
    (p, target), (q, _) = (logits(place, name) for name in ("model", "other"))
    mask = target != -100
    own = p.gather(-1, target.clamp(min=0)[..., None])[..., 0][mask]
    kl = (q.exp() * (q - p)).sum(-1)[mask]
    wanted = (-own * own.exp() + 0.3 * kl).mean().item()
    assert record["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert record["loss"] == pytest.approx(wanted, rel=1e-4)
    assert packed["loss"] == pytest.approx(wanted, rel=1e-4)
    start, after = run(place, tmp_path / "own", "--loss", "asft", "--max-steps", 2, "--lr", 0.1)
    assert abs(start["kl"]) < 1e-6 < 1e-4 < after["kl"]


def test_asft_resumes_with_the_reference_of_its_start(place, tmp_path, capsys):
    given = ["--loss", "asft", "--max-steps", 3, "--lr", 0.01, "--batch-size", 4, "--save-steps", 1]
    output = tmp_path / "run"
    whole = run(place, output, *given, "--reference", place / "other", "--save-total-limit", 0)
    for step in (2, 3):
        shutil.rmtree(output / f"checkpoint-{step}")
    shutil.rmtree(output / "model")
    assert main(["train", "--resume", "--output", str(output)]) == 0
    assert untimed(read_log(output)) == untimed(whole)
    (output / "reference" / "fingerprint").write_text("of another one\n")
    said = refusal(["train", "--resume", "--output", str(output), "--max-steps", "4"], capsys)
    assert "--reference: got a reference of other weights or configuration" in said


def test_psft_compares_with_the_policy_of_some_steps_ago(place, tmp_path):
    """A window's first step has ratios of 1 and the gradient of SFT; an interrupted one goes on."""
    given = ["--lr", 0.02, "--optimizer", "sgd", "--batch-size", 2, "--accumulate", 2]
    given += ["--max-steps", 3, "--save-steps", 1, "--save-total-limit", 0]
    output = tmp_path / "run"
    whole = run(place, output, "--loss", "psft", "--old-steps", 2, "--clip", 0.001, *given)
    assert [abs(r["loss"] + 1) < 1e-5 for r in whole] == [True, False, True]
    assert [r["clip_fraction"] > 0 for r in whole] == [False, True, False]
    for step in (2, 3):
        shutil.rmtree(output / f"checkpoint-{step}")
    shutil.rmtree(output / "model")
    assert main(["train", "--resume", "--output", str(output)]) == 0
    assert untimed(read_log(output)) == untimed(whole)
    plain, every = (
        run(place, tmp_path / loss, "--loss", loss, *more, *given, "--eval-split", 0.25)
        for loss, more in (("sft", ()), ("psft", ("--old-steps", 1)))
    )
    for a, b in zip(plain, every, strict=True):
        if "eval_loss" in a:
            assert b["eval_loss"] == pytest.approx(a["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--loss psft --reference x", "--reference: got it with --loss psft; expected --loss asft"),
        ("--loss sft --kl-coef 0.1", "--kl-coef: got it with --loss sft; expected --loss asft"),
        ("--loss asft --clip 0.1", "--clip: got it with --loss asft; expected --loss psft"),
        ("--loss asft --kl-coef 0", "--kl-coef: got '0'; expected a number above 0"),
        ("--loss psft --old-steps 0", "--old-steps: got '0'; expected a whole number of at least"),
        ("--loss asft --deterministic", "--deterministic: expected False with kl_coef"),
    ],
)
def test_what_is_refused(place, tmp_path, capsys, arguments, said):
    given = train(place / "rows.jsonl", tmp_path / "run", *arguments.split(), model=place / "model")
    assert said in refusal(given, capsys)


@pytest.mark.parametrize("loss", ["asft", "psft"])
def test_a_dry_run_takes_them(place, tmp_path, capsys, loss):
    given = train(place / "rows.jsonl", tmp_path / "run", "--loss", loss, "--dry-run",
                  model=place / "model")  # fmt: skip
    assert main(given) == 0
    assert "(measured)" in capsys.readouterr().out
