"""`ift dynamics run|plot|heatmap`: what they leave, resumption, errors."""

import json
import shutil

import pytest
from test_cli_preference import rows

from command_line import refusal, untimed, write_rows
from ift.cli import main, options
from ift.cli.dynamics import _probes
from ift.cli.errors import CliError
from ift.cli.rows import read_rows
from ift.dynamics import read_probes, report
from ift.dynamics.callback import read_records
from ift.tiny import train_tokenizer

PLAIN = ["--model", "tiny", "--cpu", "--batch-size", "4"]
SMALL = [*PLAIN, "--probe-size", "3", "--probe-sample", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A DPO run of 6 steps, probed every 2."""
    place = tmp_path_factory.mktemp("dynamics")
    data = write_rows(place / "p.jsonl", rows(20))
    arguments = ["--data", data, "--loss", "dpo", "--max-steps", "6", "--save-steps", "3",
                 "--eval-split", "0.2", "--probe-every", "2", "--lr", "1e-3"]  # fmt: skip
    command = ["dynamics", "run", *SMALL, *arguments, "--output"]
    assert main([*command, str(place / "run")]) == 0
    return place, command


def test_run_leaves_curves(trained):
    place, _ = trained
    probes = read_probes(place / "run" / "probes.jsonl")
    assert len(probes) == 3
    wanted = {"chosen", "rejected", "other_train", "unrelated", "fluent", "permuted",
              "random_words", "chosen_format", "rejected_format"}  # fmt: skip
    # A rule of other words applies to "small" alone.
    semantic = {"chosen_semantic", "rejected_semantic"}
    assert all(set(p.responses) - {"sample"} - semantic == wanted for p in probes)
    for side in ("chosen", "rejected"):
        texts = [(p.responses[side], p.responses.get(f"{side}_semantic")) for p in probes]
        assert all(b == (a.replace("small", "little") if "small" in a else None) for a, b in texts)
    assert all({"chosen_format", "rejected_format"} <= set(p.by_rule) for p in probes)
    given = [{k: p.responses[k] for k in ("chosen", "rejected")} | {"prompt": p.prompt}
             for p in probes]  # fmt: skip
    assert all(row in rows(20) for row in given)
    records = read_records(place / "run" / "dynamics")
    assert [r["step"] for r in records] == [0, 2, 4, 6]
    assert records[0]["types"]["chosen"] != records[-1]["types"]["chosen"]
    assert records[-1]["squeeze"]["negative_tokens"] > 0
    assert 0 < records[0]["types"]["chosen"]["energy"] < 1 < records[0]["types"]["chosen"]["a_norm"]
    for name in ("tokens.jsonl", "curves.png", "curves.html"):
        assert (place / "run" / "dynamics" / name).stat().st_size > 500
    assert (place / "run" / "model" / "config.json").exists()


def test_resumed_run_is_the_same(trained, tmp_path):
    place, command = trained
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "model")
    assert main([*command, str(tmp_path / "run"), "--resume"]) == 0
    ours, wanted = (untimed(read_records(p / "run" / "dynamics")) for p in (tmp_path, place))
    assert ours == wanted


def test_plot(trained, tmp_path, capsys):
    place, _ = trained
    shutil.copytree(place / "run" / "dynamics", tmp_path / "other")
    (tmp_path / "other" / "curves.png").unlink()
    assert main(["dynamics", "plot", str(tmp_path / "other"), "--title", "again"]) == 0
    assert (tmp_path / "other" / "curves.png").stat().st_size > 10000
    assert "again" in (tmp_path / "other" / "curves.html").read_text(encoding="utf-8")
    assert "steps 0 → 6" in capsys.readouterr().out


@pytest.mark.pictures
def test_heatmap(trained, tmp_path, capsys):
    """Of the types of a set that is given; the model is trained on each and put back."""
    place, _ = trained
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "say red:", "responses": {"chosen": " red", "rejected": " blue round"}}\n'
        '{"prompt": "say blue:", "responses": {"chosen": " blue"}}\n'
    )
    arguments = ["--data", str(place / "p.jsonl"), "--probes", str(tmp_path / "p.jsonl"), "--lr"]
    output = tmp_path / "map"
    arguments += ["1e-3", "--passes", "3", "--projections", "2", "--output", str(output)]
    assert main(["dynamics", "heatmap", "--model", "tiny", "--cpu", *arguments]) == 0
    record = json.loads((output / "heatmap.json").read_text())
    assert record["types"] == ["chosen", "rejected"]
    (chosen, other), (another, rejected) = record["heatmap"]
    assert chosen > 0 and rejected > 0 and chosen > another and rejected > other
    (a, b), (c, d) = record["kernel"]
    assert min(a, b, d) > 0 and b == c
    assert all((output / f"{n}.png").stat().st_size > 5000 for n in ("heatmap", "kernel"))
    shown, notes = capsys.readouterr()
    assert "ift dynamics: 2 probes" in notes and "ift train: " not in notes
    files = {path: path.read_bytes() for path in output.iterdir()}
    again = ["dynamics", "heatmap", "--model", "tiny", "--cpu", *arguments]
    for left, said in (("probes.jsonl", "probes"), ("kernel.png", "kernel")):
        wanted = f"--output: {output}/{said}"
        assert wanted in refusal(again, capsys) and output.joinpath(left).exists()
        assert {path: path.read_bytes() for path in output.iterdir()} == files
        for name in ("probes.jsonl", "heatmap.json", "heatmap.png"):
            files.pop(output / name, None)
            (output / name).unlink(missing_ok=True)
    assert "change of log π per token\ntrained " in shown and "‖K‖ per pair of tokens" in shown


def made_probes(arguments, capsys):
    """The held-out rows, the probe set, and what is said of the data."""
    parsed = options.resolve(options.build_parser().parse(["dynamics", *map(str, arguments)]))
    trained, held_out = read_rows(parsed)
    tokenizer = train_tokenizer([text for row in trained for text in row.texts], 300)
    return held_out, _probes(parsed, held_out, None, tokenizer), capsys.readouterr().err


@pytest.mark.parametrize("sides", ["chosen", "rejected", "both"])
def test_probes_of_renamed_columns(tmp_path, capsys, sides):
    """Unrelated answers are chosen ones that are not trained, whichever side is trained."""
    data = [
        {"q": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "chosen_gptformat": f"f{i}",
         "score": i} for i in range(6)
    ]  # fmt: skip
    path = write_rows(tmp_path / "p.jsonl", data)
    others = write_rows(tmp_path / "t.jsonl", [{"q": "?", "chosen": "other", "rejected": "no"}])
    command = ["run", *PLAIN, "--data", path, "--output", "o", "--loss", "sft", "--columns"]
    given = [*command, "prompt=q", "--responses", sides]
    command = [*given, "--probe-sample", "0"]
    held_out, probes, notes = made_probes([*command, "--eval-split", "0.5"], capsys)
    kept = {row.where.split()[-1] for row in held_out}
    answers = {f"good {i}" for i in range(6) if str(i + 1) in kept}
    assert len(probes) == 3 and {p.responses["unrelated"] for p in probes} <= answers
    assert not {p.responses[t] for p in probes for t in ("chosen", "other_train")} & answers
    assert all(p.responses["chosen_format"][0] == "f" for p in probes)
    assert "--data: keys that nothing reads: score (6 rows" in notes
    for more in (["--probe-test", others], ["--eval-data", others]):
        _, probes, _ = made_probes([*command, *more], capsys)
        assert {p.responses["unrelated"] for p in probes} == {"other"}
    plain = write_rows(tmp_path / "plain.jsonl", rows(2))
    with pytest.raises(CliError, match="--probe-test: .*plain.jsonl: no row has 'q' for 'prompt'"):
        made_probes([*command, "--probe-test", plain], capsys)
    (tmp_path / "set.jsonl").write_text('{"prompt": "a", "responses": {"chosen": "b"}}\n')
    *_, notes = made_probes([*given, "--probes", tmp_path / "set.jsonl"], capsys)
    assert "nothing reads: chosen_gptformat (6 rows" in notes


# Matplotlib hides labels that start with "_", and fails on a formula that is none.
def test_names_are_shown_as_they_are(tmp_path, monkeypatch):
    drawn, draw = [], report.plotting.draw

    def noted(axes, *given, **style):
        draw(axes, *given, **style)
        drawn.extend(axes.get_legend_handles_labels()[1])

    monkeypatch.setattr(report.plotting, "draw", noted)
    stats = dict.fromkeys(report.PANELS, -1.0)
    types = dict.fromkeys(("_own", "5 $ or $\\frac$"), stats)
    records = [{"step": step, "types": types} for step in (0, 1)]
    report.comparison({"_a": records, "b": records}, report.plotting.styles(2))
    report.plot_curves(records, tmp_path / "d.png", "a $\\frac$ title")
    assert {" _a", "b", " _own", r"5 \$ or \$\frac\$"} <= set(drawn)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("garbage\n", "curves.jsonl line 1: Expecting value"),
        ('{"step": 0, "types": {"a": {}}}\n{"a": 1}\n', "curves.jsonl line 2: expected an object"),
        ('{"step": 0, "types": {}}\n', "curves.jsonl line 1: expected an evaluation"),
    ],
)
@pytest.mark.parametrize("command", ["dynamics plot", "report"])
def test_damaged_curves(command, text, says, tmp_path, capsys):
    (tmp_path / "curves.jsonl").write_text(text, encoding="utf-8")
    error = refusal([*command.split(), str(tmp_path)], capsys)
    assert says in error and error.count("\n") == 1


def test_resumed_run_refuses_other_probes(trained, tmp_path, capsys):
    place, command = trained
    shutil.copytree(place / "run", tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "responses": {"chosen": "b"}}\n', encoding="utf-8")
    resumed = [*command, str(tmp_path / "run"), "--resume", "--probes"]
    assert "--probes: other probes than the run in" in refusal([*resumed, str(other)], capsys)
    assert main([*resumed, str(tmp_path / "run" / "probes.jsonl")]) == 0


def test_a_run_without_a_checkpoint_makes_its_probes_again(trained, tmp_path):
    place, command = trained
    shutil.copytree(place / "run" / "dynamics", tmp_path / "run" / "dynamics")
    for name in ("probes.jsonl", "run.json"):
        shutil.copy(place / "run" / name, tmp_path / "run" / name)
    smaller = ["--resume", "--probe-size", "2", "--probe-sample", "0", "--max-steps", "1"]
    assert main([*command, str(tmp_path / "run"), *smaller]) == 0
    probes = read_probes(tmp_path / "run" / "probes.jsonl")
    assert len(probes) == 2 and "sample" not in probes[0].responses
    assert [r["step"] for r in read_records(tmp_path / "run" / "dynamics")] == [0, 1]


HEATMAP = ["heatmap", "--model", "tiny", "--data", "x", "--output", "y"]
RUN = ["run", *PLAIN, "--data", "x", "--output", "y"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plot", "nowhere"], "DIR: no evaluations in nowhere"),
        (["compare", "nowhere"], "action: invalid choice: 'compare'"),
        ([*HEATMAP, "--projections", "1"], "--projections: got '1'; expected 0, or a whole"),
        ([*HEATMAP, "--probe-fluent", "z"], "--probe-fluent: no file z; expected a text file"),
        ([*HEATMAP, "--probe-every", "3"], "--probe-every: unknown option"),
        (["run", "--prob-size", "3"], "did you mean --probe-size or"),
        (["run", "--probe-size", "3"], "are required: --model, --data, --output"),
        ([*RUN, "--probe-sizes", "3"], "did you mean --probe-size or"),
        ([*RUN, "--probes", "z"], "--probes: no file z"),
        ([*RUN, "--probe-every", "0"], "--probe-every: got"),
        ([], "dynamics: the following arguments are required: action"),
    ],
)
def test_errors(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refusal(["dynamics", *arguments], capsys)
    assert says in text and text.count("\n") == 1


def test_damaged_probes(tmp_path, capsys):
    data = write_rows(tmp_path / "p.jsonl", rows(8))
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    arguments = ["--data", data, "--loss", "dpo", "--output", str(tmp_path / "run")]
    arguments += ["--probes", str(tmp_path / "bad.jsonl")]
    assert "--probes: " in refusal(["dynamics", "run", *PLAIN, *arguments], capsys)
