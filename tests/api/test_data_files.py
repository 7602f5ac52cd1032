"""Files of rows in all formats."""

import csv
import json
import sys

import pytest

from chats import in_json_lines, said
from ift.data_rows import DataError, read_rows, training_row, unread_keys

PLAIN = [{"prompt": "a, b\n", "completion": 'c "d"'}, {"prompt": "é", "completion": "x\n\ny"}]
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CHATS = [
    {"messages": [said("user", "hi"), said("assistant", "yes")], "id": 7},
    {"messages": [said("user", "1?"), said("assistant", None, tool_calls=[CALL]),
                  said("tool", "2", name="add"), said("assistant", "two")]},
]  # fmt: skip


def in_json_array(folder, rows):
    path = folder / "rows.json"
    path.write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    return path


def in_parquet(folder, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def in_csv(folder, rows, separator=",", name="rows.csv"):
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def in_tsv(folder, rows):
    return in_csv(folder, rows, "\t", "rows.tsv")


def in_datasets(folder, rows):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "set"))
    return folder / "set"


def in_split(folder, rows):
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    made.save_to_disk(str(folder / "sets"))
    return folder / "sets"


def in_folder(folder, rows):
    (folder / "some").mkdir()
    for index, row in enumerate(rows):
        in_json_lines(folder, [row]).rename(folder / "some" / f"train-{index:05}.jsonl")
    (folder / "some" / "README.md").write_text("# Rows")
    (folder / "some" / ".cache").mkdir()
    (folder / "some" / ".cache" / "train.jsonl").write_text("no rows")
    return folder / "some"


FILES = [in_json_lines, in_json_array, in_parquet, in_csv, in_tsv, in_datasets, in_split, in_folder]


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__[3:])
def test_files_of_all_formats_have_the_same_rows(tmp_path, write):
    path = write(tmp_path, PLAIN)
    rows = read_rows(path)
    assert [row.content for row in rows] == PLAIN
    assert all(row.where.startswith(str(path)) for row in rows)
    assert rows[1].where.split()[-2:] == {
        in_json_lines: ["line", "2"], in_folder: ["line", "1"]
    }.get(write, ["row", "2"])  # fmt: skip
    if write not in (in_csv, in_tsv):
        found = read_rows(write(tmp_path / "chats", CHATS) if (tmp_path / "chats").mkdir() is None
                          else path)  # fmt: skip
        assert [row.content["messages"] for row in found] == [
            read["messages"] for read in (training_row(row, "").content for row in CHATS)
        ]
        assert unread_keys(found) == {"id": (1, found[0].where)}


def folder_of(names):
    def write(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('{"prompt": "a", "completion": "b"}\n')
        return folder

    return write


def file_of(name, content):
    def write(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return write


BAD_FILES = {
    "splits": (folder_of(["train.jsonl", "test-0.jsonl"]), "holds files of test and train; exp"),
    "splits at the end": (
        folder_of(["my_train.jsonl", "my_test.jsonl"]),
        "holds files of test and train; exp",
    ),
    "splits in the middle": (folder_of(["a-DEV-0.csv", "a.val.csv"]), "holds files of dev and val"),
    "subfolder": (
        folder_of(["train.jsonl", "more/train.csv"]),
        r"in folders of its own \(more.train.csv\); ex",
    ),
    "only subfolder": (folder_of(["README.md", "data/0/x.parquet"]), r"own \(data.0.x.parquet\)"),
    "no files": (folder_of(["README.md"]), "a folder without a file of rows; expected .jsonl"),
    "array of text": (file_of("r.json", '["a"]'), "row 1: got a JSON string; expected"),
    "array cut off": (file_of("r.json", '[{"text": "a"},\n{"te'), "not JSON .* line 2 column 2"),
    "empty array": (file_of("r.json", "[]"), "has no rows"),
    "cells": (
        file_of("r.csv", "prompt,completion\na,b\nc\n"),
        "row 2: got 1 cells; expected",
    ),
    "columns": (file_of("r.csv", "text,text\na,b\n"), "two columns have one name"),
    "quotes": (file_of("r.csv", 'text\n"a"b\n'), "row 1: not CSV"),
    "latin": (file_of("r.csv", b"text\n\xff\n"), "not UTF-8"),
    "parquet": (file_of("r.parquet", "no"), "not Parquet"),
    "dataset": (lambda folder: file_of("state.json", "{}")(folder).parent, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    write, problem = BAD_FILES[name]
    if name == "parquet":
        pytest.importorskip("pyarrow")
    if name == "dataset":
        pytest.importorskip("datasets")
    path = write(tmp_path)
    with pytest.raises(DataError, match=problem) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for name, path in (("pyarrow", in_parquet(tmp_path, PLAIN)),
                       ("datasets", in_datasets(tmp_path, PLAIN))):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(DataError, match=f"needs {name}, which is not installed; expected `pip"):
            read_rows(path)
    two = tmp_path / "two"
    monkeypatch.undo()
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(PLAIN)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(two))
    with pytest.raises(DataError, match=r"holds train, test; expected one of them: .*/two/train"):
        read_rows(two)
    assert len(read_rows(two / "train")) == 2
