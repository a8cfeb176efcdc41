"""Rows of texts from users' files, as embed, probes and prepare read them: kept, or refused by their place."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.data.text import corpus, csvfile, rows
from raybert.data.text import documents as readers
from raybert.data.text.values import MISSING, NOT_JSON, UNDECODABLE, WRONG_TYPE
from raybert.errors import InputError
from raybert.probe.classification import ClassificationTask
from raybert.probe.tasks import check_task
from raybert.probe.texts import load_texts

CLEAN = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def embedded(path, column="text", **options):
    """Every row that `raybert embed` would be given, as dicts."""
    source = rows.plan(str(path), column)
    tables = [table for piece in source.pieces for table in rows.read(piece, source.text_column, **options)]
    return [row for table in tables for row in table.to_pylist()]


def probed(path, **changes):
    """(text, label) of every row that a probe task would take."""
    task = ClassificationTask(**{"name": "t", "train": str(path), "test": str(path)} | changes)
    check_task(task)
    texts = load_texts(task)
    return [(texts.texts[i], texts.names[texts.labels[i]]) for i in range(texts.n_train)]


def prepared(path):
    """What `raybert prepare` reads: texts and reasons."""
    fragments = corpus.plan([str(path)], "text").fragments
    return [found for fragment in fragments for piece in fragment for found in readers.documents(piece, "text")]


@given(
    st.lists(CLEAN, min_size=1, max_size=4, unique=True).flatmap(
        lambda names: st.tuples(
            st.just(names), st.lists(st.lists(CLEAN, min_size=len(names), max_size=len(names)), max_size=5)
        )
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_csv_gives_back_what_was_written(table, line_end, encoding):
    names, values = table
    written = io.StringIO(newline="")
    writer = csv.writer(written, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *values])
    data = written.getvalue()
    found = list(csvfile.records(io.BytesIO(data.encode(encoding)), "t.csv"))
    assert [record for _, record in found] == [names, *values]
    assert [line for line, _ in found] == sorted({line for line, _ in found})


def test_csv_values_are_the_text_that_stands_there(tmp_path):
    values = ["00501", "FALSE", "1.10", "2024-01-01", "NA", "null", "", " x ", "1e5", "A1", 'say "hi", you\nthere']
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["text", "id"], *zip(values, values, strict=True)])
    assert embedded(tmp_path / "t.csv") == [{"text": value, "id": value} for value in values]
    assert [words for words, _ in probed(tmp_path / "t.csv", text="text", label="id", train=repeated(tmp_path))] == [
        value for value in values if value
    ] * 3


def repeated(folder):
    """The same rows three times over: a task has more texts than classes."""
    (folder / "three").mkdir()
    for number in range(3):
        (folder / "three" / f"{number}.csv").write_bytes((folder / "t.csv").read_bytes())
    return str(folder / "three")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("a,x\nwell, some text,neg\n", "Line 3 of {} has 3 values, but the header has 2"),
        ("a,x\n\nb\n", "Line 4 of {} has 1 values, but the header has 2"),
        ('"two\nlines",x\nwell, some text,neg\n', "Line 4 of {} has 3 values"),
        ('a,x\n"never closed,neg\nb,x\n', "Line 3 of {} is not csv"),
        ('a,x\n"closed" early,neg\n', "Line 3 of {} is not csv"),
        ("a,x\n\udcff\udcfe,x\n", "Line 3 of {} is not UTF-8"),
    ],
)
def test_a_wrong_row_of_csv_is_named(tmp_path, body, sentence):
    path = tmp_path / "t.csv"
    path.write_bytes(f"text,label\n{body}".encode(errors="surrogateescape"))
    for read in (embedded, probed):
        with pytest.raises(InputError) as refused:
            read(path)
        assert sentence.format(path) in str(refused.value)


def test_an_unquoted_comma_among_two_hundred_rows_makes_no_classes(tmp_path):
    lines = [f"text {i},{'pos' if i % 2 else 'neg'}" for i in range(200)]
    lines[77] = "well, some text,neg"
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(lines))
    with pytest.raises(InputError, match=r"Line 79 of .*t.csv has 3 values.*quote values"):
        probed(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_an_empty_csv_is_a_sentence(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    for read in (embedded, probed):
        with pytest.raises(InputError, match=r"t\.csv is empty"):
            read(tmp_path / "t.csv")


def test_a_csv_of_another_encoding_is_a_sentence(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,x\n", encoding="utf-16")
    for read in (embedded, probed):
        with pytest.raises(InputError, match=r"Line 1 of .*t.csv is not UTF-8"):
            read(tmp_path / "t.csv")


@pytest.mark.parametrize("names", [["text", "text", "label"], ["text", "label", "label"], ["text", "label", "text"]])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, names, kind):
    path = tmp_path / f"t.{kind}"
    twin = max(names, key=names.count)
    if kind == "csv":
        path.write_text(",".join(names) + "\na,b,c\n")
    else:
        pq.write_table(pa.table([pa.array(["a"])] * 3, names), path)
    sentence = rf"t\.{kind} has 2 columns named '{twin}'; rename all but one"
    for read in [embedded, probed] + [prepared] * (kind == "parquet" and twin == "text"):
        with pytest.raises(InputError, match=sentence):
            read(path)
    if twin == "label":
        assert embedded(path, others=False) == [{"text": "a"}]


def jsonl(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in map(ended, lines)))
    return path


def ended(line):
    return line + (b"\n" if isinstance(line, bytes) else "\n")


@pytest.mark.parametrize(
    ("line", "fault", "counted"),
    [
        ('{"text": "a \\ud83d", "label": "x"}', "column text contains a lone surrogate", UNDECODABLE),
        ('{"text": "\\ude00\\ud83d", "label": "x"}', "column text contains a lone surrogate", UNDECODABLE),
        ('{"text": 3, "label": "x"}', r"column text contains a number \(3\) instead of text", WRONG_TYPE),
        ('{"text": ["a"], "label": "x"}', "column text contains a list", WRONG_TYPE),
        ('{"text": true, "label": "x"}', r"column text contains a boolean \(True\)", WRONG_TYPE),
        ('{"text": "a", "label": "x"', "is not JSON", NOT_JSON),
        ('["a", "x"]', "is not a JSON object", WRONG_TYPE),
        ('{"other": "a", "label": "x"}', "has no column text; choose one of other, label", MISSING),
        (b'{"text": "\xff", "label": "x"}', "is not UTF-8", UNDECODABLE),
        ('{"text": ' + "1" * 5000 + ', "label": "x"}', "is not JSON", NOT_JSON),
        ("[" * 100_000, "is not JSON", NOT_JSON),
    ],
)
def test_a_line_that_holds_no_text_is_counted_or_named(tmp_path, monkeypatch, line, fault, counted):
    good = '{"text": "good", "label": "x"}'
    path = jsonl(tmp_path / "t.jsonl", good, "", good, line)
    assert prepared(path) == ["good", "good", counted]
    monkeypatch.setattr(rows, "PIECE_BYTES", 40)  # line 4 stands in another piece than line 1
    for read in (embedded, probed):
        with pytest.raises(InputError, match=rf"Line 4 of .*t\.jsonl:? {fault}"):
            read(path)


@pytest.mark.parametrize("first", ["[1]", "3", "not json", '"text"'])
def test_a_first_line_that_is_no_object_is_named_by_a_task(tmp_path, first):
    path = jsonl(tmp_path / "t.jsonl", first, '{"text": "good", "label": "x"}')
    with pytest.raises(InputError, match=r"Line 1 of .*t.jsonl is not"):
        check_task(ClassificationTask(name="t", train=str(path), test=str(path)))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"good", b"\xff\xfe"]),
        pa.array(["good", b"\xff\xfe"], pa.binary()).dictionary_encode(),
        pa.array([b"good", b"\xff\xfe"]).view(pa.string()),
        pa.array([b"good", b"\xff\xfe"], pa.large_binary()).view(pa.large_string()),
    ],
)
def test_bytes_of_parquet_are_text_or_named(tmp_path, column):
    path = tmp_path / "t.parquet"
    pq.write_table(
        pa.table({"text": pa.concat_arrays([column, column]), "label": list("xyxy")}), path, row_group_size=1
    )
    assert prepared(path) == ["good", UNDECODABLE] * 2
    for read in (embedded, probed):
        with pytest.raises(InputError, match=r"Row 2 of .*t\.parquet: column text is not UTF-8"):
            read(path)
    pq.write_table(pa.table({"text": column.take(pa.array([0, 0, 0, 0])), "label": list("xyxy")}), path)
    assert len(embedded(path)) == 4
    assert probed(path) == [("good", label) for label in "xyxy"]


@pytest.mark.parametrize("values", [[{"a": "x"}] * 4, [["x"]] * 4, [1, 2, 3, 4]])
def test_a_parquet_column_of_another_type_is_a_sentence(tmp_path, values):
    pq.write_table(pa.table({"text": values, "label": list("xyxy")}), tmp_path / "t.parquet")
    for read in (embedded, prepared):
        with pytest.raises(InputError, match=r"Column text of .*t\.parquet contains .*, not text"):
            read(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"Row 1 of .*t\.parquet: column text contains a .* instead of text"):
        probed(tmp_path / "t.parquet")


def test_a_line_of_text_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_bytes(b"first line\nsecond line\nthird \xff line\n")
    monkeypatch.setattr(rows, "PIECE_BYTES", 12)
    with pytest.raises(InputError, match=r"Line 3 of .*t\.txt is not UTF-8"):
        embedded(tmp_path / "t.txt")
    with pytest.raises(InputError, match="Line 2 of standard input is not UTF-8"):
        list(rows.read_lines(io.BytesIO(b"good\n\xff\n"), "standard input"))


def labelled(path, labels):
    """A task's file with these labels, over and over; its kind by its name."""
    labels = labels * 4
    words = [f"text {number}" for number in range(len(labels))]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": words, "label": labels}), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *zip(words, labels, strict=True)])
    else:
        records = ({"text": t, "label": label} for t, label in zip(words, labels, strict=True))
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def classes(path, **changes):
    texts = load_texts(ClassificationTask(**{"name": "t", "train": str(path), "test": str(path)} | changes))
    return texts.names, texts.labels.tolist()


@pytest.mark.parametrize(
    ("by_kind", "names"),
    [
        ({"parquet": [3, 10], "jsonl": [3, 10], "csv": ["3", "10"]}, ["3", "10"]),
        ({"parquet": [3.0, 10.0], "jsonl": [3.0, 10], "csv": ["3.0", "10"]}, ["3", "10"]),
        ({"parquet": [False, True], "jsonl": [False, True], "csv": ["False", "True"]}, ["0", "1"]),
        ({"parquet": ["false", "true"], "jsonl": ["false", "true"], "csv": ["FALSE", "true"]}, ["0", "1"]),
        ({"parquet": [b"a", b"b"], "jsonl": ["a", "b"], "csv": ["a ", "b"]}, ["a", "b"]),
        (
            {"parquet": ["false", "half-true", "true"], "csv": ["false", "half-true", "true"]},
            ["false", "half-true", "true"],
        ),
        ({"parquet": [1.0, 2.0, float("nan")], "jsonl": [1, 2, float("nan")], "csv": ["1", "2", ""]}, ["1", "2"]),
        ({"parquet": ["a", "b", None], "jsonl": ["a", "b", None], "csv": ["a", "b", "  "]}, ["a", "b"]),
        ({"parquet": ["①", "²"], "jsonl": ["①", "²"], "csv": ["①", "²"]}, ["²", "①"]),
        ({"parquet": ["١٢", "٣"], "jsonl": ["١٢", "٣"], "csv": ["١٢", "٣"]}, ["١٢", "٣"]),
        ({"jsonl": ["9" * 5000, "8"], "csv": ["9" * 5000, "8"]}, ["8", "9" * 5000]),
        ({"jsonl": ["01", "1", "1.0"], "csv": ["01", "1", "1.0"]}, ["01", "1"]),
    ],
)
def test_labels_are_the_same_classes_in_every_kind_of_file(tmp_path, by_kind, names):
    found = [classes(labelled(tmp_path / f"t.{kind}", labels)) for kind, labels in by_kind.items()]
    assert all(each == found[0] for each in found)
    assert found[0][0] == names


def test_a_task_of_two_kinds_of_file_has_one_set_of_classes(tmp_path):
    train, test = labelled(tmp_path / "a.parquet", [True, False]), labelled(tmp_path / "b.csv", ["True", "FALSE"])
    names, labels = classes(train, test=str(test), label_names=["no", "yes"])
    assert names == ["no", "yes"]
    assert labels == [1, 0] * 8


@pytest.mark.parametrize("label", ["①", "²", "١٢"])
def test_a_task_with_names_for_its_labels_leaves_other_labels_alone(tmp_path, label):
    assert classes(labelled(tmp_path / "t.csv", ["1", label]), label_names=["no", "yes"])[0] == ["yes", label]


@pytest.mark.parametrize("label", [0.5, ["a"], {"a": 1}])
def test_a_label_that_is_no_class_is_named(tmp_path, label):
    with pytest.raises(InputError, match=r"Line 2 of .*t\.jsonl: the label .* is not a class: column label must hold"):
        classes(labelled(tmp_path / "t.jsonl", ["a", label]))
    with pytest.raises(InputError, match=r"Line 1 of .*t\.jsonl: column label contains a lone surrogate"):
        classes(labelled(tmp_path / "t.jsonl", ["\ud83d"]))


@pytest.mark.parametrize(("labels", "n_train"), [("aabb", 8), ("aabbcc", 10), ("aab", 5)])
def test_training_rows_sorted_by_label_are_to_be_drawn_at_random(tmp_path, labels, n_train):
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(sorted(labels * 4))))
    test = str(labelled(tmp_path / "test.csv", list(labels)))
    with pytest.raises(InputError, match=rf"the first {n_train} rows of .*train.csv .*: set seed in the task"):
        classes(train, test=test, n_train=n_train)
    assert classes(train, test=test, n_train=10, seed=0)[0] == sorted(set(labels))
    train.write_text("text,label\n" + "one,a\n" * 9)
    with pytest.raises(InputError, match="training") as refused:
        classes(train, test=test)
    assert "seed" not in str(refused.value)


def test_a_file_without_rows_is_a_table_without_rows(tmp_path):
    """As Spark writes for an empty partition, beside others."""
    pq.write_table(
        pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    pq.write_table(pa.table({"id": [1], "text": ["one"]}), tmp_path / "b.parquet")
    source = rows.plan(str(tmp_path), "text")
    for others in (True, False):
        found = [table for piece in source.pieces for table in rows.read(piece, "text", None, others=others)]
        assert sum(map(len, found)) == 1
        assert {tuple(table.column_names) for table in found} == {("id", "text") if others else ("text",)}
