"""What a run shows: lines, the bar, samples; and `ift report`, which compares runs."""

import html.parser
import io
import json
import re
import sys

import pytest

from chats import HI, TOOL, YES
from command_line import read_log, refusal, train, untimed, write_rows
from ift import plotting
from ift.cli import main
from ift.cli.runlog import words
from ift.cli.samples import Samples
from ift.data_rows import training_row
from ift.dynamics import sampler
from ift.tiny import tiny_llama, train_tokenizer

PAIRS = [
    {"prompt": f"say {a} and {b}:", "chosen": f" {a} {b}", "rejected": f" {b}"}
    for a in ("red", "green", "blue", "white")
    for b in ("one", "two", "three", "four")
]
SMALL = ["--lr", "3e-3", "--batch-size", "4", "--max-length", "48", "--eval-split", "0.2"]
DPO = [*SMALL, "--loss", "dpo", "--max-steps", "4", "--eval-steps", "2", "--log-steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """DPO, SFT on both responses, and IFT in bf16 resumed from its first half; what they showed."""
    place = tmp_path_factory.mktemp("runs")
    shown = {}

    def run(name, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", io.StringIO())
            assert main(train(data, place / name, *arguments)) == 0
            shown[name] = shown.get(name, "") + sys.stderr.getvalue()

    run("dpo", *DPO)
    run("both", *SMALL, "--loss", "sft", "--responses", "both", "--max-steps", "4")
    run("silent", *DPO, "--samples", "0")
    return place, shown


# ---- the console ---------------------------------------------------------------------------------


def test_lines_of_a_run(runs):
    place, shown = runs
    lines = [line for line in shown["dpo"].splitlines() if not line.startswith("ift train")]
    record = read_log(place / "dpo")[0]
    first, held_out, sample, *_ = lines
    assert re.fullmatch(
        r"step 2/4  loss 0\.\d+  margin -?\d\S*  accuracy \d\S*  \S+ tokens/s  ETA \d\S* \w+", first
    )
    assert held_out == f"step 2/4  held out: {words(record, 'eval_')}"
    assert sample.startswith("  sample: say ")
    assert "ETA" not in lines[3] and lines[3].startswith("step 4/4  loss ")
    assert all(len(line) <= 80 for line in lines)
    assert not re.search(r"\de[+]", "".join(shown.values()))  # no 1.066e+04
    assert "sample: " not in shown["silent"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_fits_80_columns(data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(train(data, tmp_path / "run", *DPO)) == 0
    drawn = re.split(r"[\r\n]", sys.stderr.getvalue())
    drawn = [re.sub(r"\x1b\[\w*", "", line) for line in drawn]
    bars = [line for line in drawn if "|" in line]
    assert bars and all(len(line) <= 80 for line in drawn if not line.startswith("ift train"))
    assert re.match(
        r"4/4 \|#+\| loss 0\.\d+ margin \S+ accuracy \S+ \S+ tokens/s ETA 00:00", bars[-1]
    )
    assert any(line.startswith("step 2/4  held out: loss") for line in drawn)


def test_words_of_a_record():
    kto = {"loss": 0.5, "reward_margin": -0.25, "token_accuracy": 0.3}
    assert words(kto) == "loss 0.500  margin -0.250"  # no accuracy of pairs
    assert words({"loss": float("nan"), "token_accuracy": 1.0}) == "loss not finite  accuracy 1.00"
    assert words({"loss": 1.0}, "eval_") == ""


# ---- samples -------------------------------------------------------------------------------------


def test_samples_of_each_evaluation(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, _ = runs
    lines = [json.loads(x) for x in (place / "dpo" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 2, 4, 4, 4]
    rows = {row["prompt"]: row["chosen"] for row in PAIRS}
    assert all(rows[line["prompt"]] == line["answer"] for line in lines)
    model = AutoModelForCausalLM.from_pretrained(place / "dpo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "dpo" / "model")
    greedy = sampler(model, tokenizer, max_new_tokens=32, temperature=0)
    assert [line["text"] for line in lines[3:]] == greedy([line["prompt"] for line in lines[3:]])
    both = (place / "both" / "samples.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in both]
    assert len(set(prompts)) == len(prompts) == 3  # one evaluation, of two rows a prompt
    # Training is the same without.
    assert untimed(read_log(place / "dpo")) == untimed(read_log(place / "silent"))
    assert not (place / "silent" / "samples.jsonl").exists()


def test_rows_that_samples_cannot_render_are_left_out(tmp_path, capsys):
    rows = [{"messages": [HI, YES], "tools": [TOOL]}, {"prompt": "a", "completion": "b"},
            {"messages": [HI, YES], "chat_template_kwargs": {"x": 1}}]  # fmt: skip
    found = Samples([training_row(row, "") for row in rows], 3, None, tmp_path / "samples.jsonl")
    assert found.prompts == [("a", "b")]
    said = "samples: 2 of 3 held-out rows have 'tools' or 'chat_template_kwargs' and are left out"
    assert said in capsys.readouterr().err


def test_samples_under_autocast_and_resumed(data, tmp_path):
    """Of a patched model in bf16; a resumed run gives the same records and samples."""
    arguments = [*SMALL, "--loss", "ift", "--bf16", "--rule", "sample", "--max-steps", "4"]
    arguments += ["--eval-steps", "1", "--save-steps", "2", "--log-steps", "1"]
    output = tmp_path / "run"
    assert main(train(data, output, *arguments)) == 0
    log, samples = untimed(read_log(output)), (output / "samples.jsonl").read_text()
    assert samples.count("\n") == 12
    (output / "checkpoint-4").rename(tmp_path / "away")
    assert main(train(data, output, *arguments, "--resume")) == 0
    assert untimed(read_log(output)) == log
    assert (output / "samples.jsonl").read_text() == samples


def test_a_model_that_cannot_generate_is_trained(data, tmp_path, monkeypatch, capsys):
    from transformers import LlamaForCausalLM

    def refuse(*_, **__):
        raise NotImplementedError("no cache\nmore")

    monkeypatch.setattr(LlamaForCausalLM, "generate", refuse)
    assert main(train(data, tmp_path / "run", *DPO)) == 0
    said = "no samples: LlamaForCausalLM cannot generate (NotImplementedError: no cache)\n"
    assert capsys.readouterr().err.count(said) == 1
    wanted = "--samples: got it without --eval-data or --eval-split"
    assert wanted in refusal(train(data, tmp_path / "b", "--samples", "2"), capsys)


# ---- responses of preferences --------------------------------------------------------------------


def test_responses(data, tmp_path, capsys):
    """`both` is one run over the rows of two, split by prompt."""
    from ift.cli.options import build_parser, resolve
    from ift.cli.train import read_rows

    def rows(*more):
        return read_rows(resolve(build_parser().parse(train(data, "o", *SMALL, *more))))

    sides = {name: rows("--loss", "sft", "--responses", name) for name in ("rejected", "both")}
    (learned, held), (twice, held_twice) = sides["rejected"], sides["both"]
    assert len(twice) == 2 * len(learned) and len(held_twice) == 2 * len(held) == 6
    assert [row.content["completion"] for row in twice[1::2]] == [
        row.content["completion"] for row in learned
    ]
    wanted = {(r["prompt"], r[side]) for r in PAIRS for side in ("chosen", "rejected")}
    found = [(r.content["prompt"], r.content["completion"]) for r in (*twice, *held_twice)]
    assert set(found) == wanted and len(found) == len(wanted)
    prompts = {r.content["prompt"] for r in held_twice}
    assert not prompts & {r.content["prompt"] for r in twice}
    assert rows("--loss", "sft") == rows("--loss", "sft", "--responses", "chosen")

    said = refusal(train(data, tmp_path / "o", "--loss", "dpo", "--responses", "both"), capsys)
    assert "--responses: got it with --loss dpo; expected --loss sft or asft or psft or ift" in said
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    said = refusal(train(plain, tmp_path / "o", "--responses", "rejected"), capsys)
    assert "--data: " in said and "line 1: got 'prompt', 'completion'; expected" in said


def test_sft_on_both_learns_both(runs):
    """Other rows than with one response; the log and the settings say which."""
    place, shown = runs
    assert "26 rows with" in shown["both"]  # of 13 pairs
    assert json.loads((place / "both" / "run.json").read_text())["responses"] == "both"


# ---- the report ----------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """The tags of a page, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.pictures
def test_report(runs, tmp_path, capsys):
    place, _ = runs
    page = tmp_path / "page.html"
    names = [str(place / name) for name in ("dpo", "both")]
    assert main(["report", *names, "--output", str(page), "--title", "A <b> & c"]) == 0
    out = capsys.readouterr().out
    head, dpo, both, last = out.splitlines()
    assert head.split("  ")[0] == "run" and dpo.startswith(names[0]) and both.startswith(names[1])
    best = min((r["eval_loss"], r["step"]) for r in read_log(names[0]) if "eval_loss" in r)
    assert f"at {best[1]}" in dpo and last == f"page: {page}"
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert "A &lt;b&gt; &amp; c" in text and 'name="viewport"' in text
    assert outline.links and all(
        link.startswith("data:image/png;base64,") for link in outline.links
    )
    assert "script" not in outline.tags and "http" not in re.sub(r"base64,[^\"]*", "", text)
    for said in ("Settings that differ", ">responses<", ">both<", "Samples", "in the data"):
        assert said in text
    assert ">seed<" not in text  # which is the same
    settings = text[text.index("Settings") : text.index("Curves")]
    assert ">loss<" in settings and 'data-label="' + names[1] in settings


def test_report_of_one_run_and_of_probes(runs, tmp_path, monkeypatch, capsys):
    """A run alone has no settings to compare; a directory of `ProbeCallback` has no log."""
    place, _ = runs
    means = {"mean_logprob": -2.0, "greedy_logprob": -1.0, "off_argmax": 0.5, "count": 3}
    probes = tmp_path / "probes"
    probes.mkdir()
    lines = [{"step": s, "types": {"chosen": {**means, "mean_logprob": -2.0 + s}}} for s in (0, 1)]
    write_rows(probes / "curves.jsonl", lines)
    monkeypatch.setattr(plotting, "available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(place / "dpo"), str(probes)]) == 0
    shown = capsys.readouterr()
    assert "chosen -2.000 → -1.000" in shown.out and "page: report.html" in shown.out
    assert shown.err.count("\n") == 1 and "the page has no curves" in shown.err
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Answers that were watched" in text and "<img" not in text
    Outline(text)
    assert main(["report", str(place / "both")]) == 0
    assert "Settings" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_refuses(runs, tmp_path, monkeypatch, capsys):
    place, _ = runs
    monkeypatch.setattr(plotting, "png", None)  # what is refused is refused before it is drawn
    run = str(place / "dpo")
    for arguments, says in (
        ([run, run + "/."], "RUN: got "),
        ([str(tmp_path)], f"RUN: no log.jsonl in {tmp_path}; expected the output of `ift train`"),
        (["nowhere"], "RUN: no log.jsonl in nowhere"),
        ([run, "--output", str(tmp_path / "a" / "b.html")], "--output: no directory "),
        ([run, "--output", str(tmp_path)], "--output: got the directory "),
        ([], "report: the following arguments are required: RUN"),
    ):
        error = refusal(["report", *arguments], capsys)
        assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    for name in ("log.jsonl", "run.json", "curves.png"):
        file = tmp_path / name
        file.write_bytes((place / "dpo" / name).read_bytes())
        error = refusal(["report", run, "--output", str(file)], capsys)
        assert f"--output: {file} is no page of HTML; expected a new file" in error
        assert file.read_bytes() == (place / "dpo" / name).read_bytes()
        file.unlink()
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert "RUN: cannot read " in refusal(["report", str(tmp_path)], capsys)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run.json").write_text("[]")
    assert "run.json: expected an object" in refusal(["report", str(tmp_path)], capsys)


# ---- pictures ------------------------------------------------------------------------------------


def test_a_point_alone_is_drawn(monkeypatch):
    """Of a run with one record, and of a key that one record has."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    for records in ([{"step": 4, "loss": 2.0}], [{"step": 1}, {"step": 2, "loss": 1.0}]):
        plotting.draw(axes, records, "loss", color="red")
    plotting.draw(axes, [{"step": s, "loss": 1.0} for s in (1, 2)], "loss")
    assert [line.get_marker() for line in axes.lines] == ["o", "o", "None"]


def test_styles_are_different():
    made = plotting.styles(20)
    assert len({tuple(style.items()) for style in made}) == 20


def test_generation_of_a_patched_model_leaves_the_random_state():
    import torch

    import ift

    tokenizer = train_tokenizer([row["prompt"] for row in PAIRS], 300)
    model = ift.patch(tiny_llama(tokenizer))
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        (text,) = sampler(model, tokenizer, max_new_tokens=4, temperature=0)(["say red"])
    assert isinstance(text, str) and torch.equal(state, torch.get_rng_state())
