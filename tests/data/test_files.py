"""Local files: every type, read as it is written, and every error that names the file and line."""

import gzip

import pytest

from rlhf_jax.data import load_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from tests.data.test_datasets import TEXTS, load


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.parquet", "A.JSONL"]
)
def test_every_file_type(write, name):
    examples = [
        {"prompt": "one, two", "completion": ' "three"\nfour'},
        {"prompt": "", "completion": "ä"},
    ]
    assert load(write(name, examples), "text") == examples


def test_a_packed_csv(write):
    assert load(write("a.csv.gz", "text\nhello\n"), "text") == [{"text": "hello"}]


def test_columns_have_the_types_of_the_file(write):
    """No date, number or truth value is read into a text, and no missing value into another."""
    examples = [
        {"prompt": "a", "day": "2024-01-05", "code": "004", "price": 1.5, "tags": {"x": [1, None]}},
        {"prompt": "b", "day": "2024-01-06T00:00:00", "code": 7, "price": None},
    ]
    missing = {**examples[1], "tags": None}
    for name in ("a.jsonl", "a.json"):
        assert load(write(name, examples), "prompts") == [examples[0], missing]
    cells = [{"prompt": "a", "day": "2024-01-05", "code": "004", "price": "1.50", "none": "NA"}]
    assert load(write("a.csv", cells), "prompts") == cells


def test_columns_that_are_not_read_cannot_fail(write):
    """Types that change after many examples, and half a surrogate pair."""
    examples = [{"text": f"text {i}", "meta": None} for i in range(3000)]
    examples += [{"text": "last", "meta": "source"}, {"text": "z", "meta": {"a": "\ud83d"}}]
    assert len(load(write("a.jsonl", examples), "text")) == 3002


def test_json_lines_may_be_in_a_json_file_and_one_object_is_one_example(write):
    assert load(write("a.json", '{"text": "a"}\n\n{"text": "b"}\n'), "text") == [
        {"text": "a"},
        {"text": "b"},
    ]
    assert load(write("b.json", '{"text": "a"}'), "text") == [{"text": "a"}]
    with pytest.raises(InputError, match=r"^Line 2 of .*c\.json is no JSON \("):
        load(write("c.json", '{"text": "a"}\n{"text"\n'), "text")
    with pytest.raises(InputError, match=r"^Row 2 of .*d\.json is no JSON object"):
        load(write("d.json", '[{"text": "a"}, 3]'), "text")


def test_a_csv_file_may_have_long_cells_and_line_breaks(write, tmp_path):
    examples = [{"text": 'a "b",\nc' + "x" * 200_000, "id": "1"}, {"text": "", "id": "2"}]
    assert load(write("a.csv", examples), "prompts") == examples
    path = write("c.csv.gz", "a,text,a,a\n1,2,3,4\n")
    assert load(path, "prompts") == [{"a": "1", "text": "2", "a.1": "3", "a.2": "4"}]
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbftext\r\none\r\n\r\ntwo\r\n")
    assert load(str(tmp_path / "b.csv"), "text") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            'text,b\nabc,1\n"d\ne",2\nabc def,1,2,3\n',
            "Line 5 of .* has 4 cells, but the header has 2",
        ),
        ("text,b\nabc\n", "Line 2 of .* has 1 cells, but the header has 2: put texts with"),
        ('text\n"abc"d\n', "Line 2 of .* is no CSV: "),
        ('text\nx\n"abc\n', "Line 3 of .* is no CSV: unexpected end of data"),
    ],
)
def test_ragged_and_broken_csv(write, content, expected):
    with pytest.raises(InputError, match=f"^{expected}"):
        load(write("a.csv.gz", content), "text")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_bytes_that_are_no_utf8_name_the_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes('text\n{"text": "é"}\n{"text": "caf'.encode() + b'\xe9"}\n')
    if name == "a.jsonl":
        path.write_bytes(path.read_bytes().replace(b"text\n", b"\n", 1))
    with pytest.raises(
        InputError, match=r"^Line 3 of .* is not in UTF-8: it has the byte 0xe9; sa"
    ):
        load(str(path), "text")


def test_folders_of_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = (Dataset.from_list(part) for part in (TEXTS[:15], TEXTS[15:]))
    train.save_to_disk(tmp_path / "one")
    DatasetDict({"train": train, "validation": test}).save_to_disk(tmp_path / "two")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert load(one, "text") == TEXTS[:15]
    assert load(one, "text", split="train[:2]") == TEXTS[:2]
    settings = DataSettings(path=two, eval_split="validation")
    assert load_examples(settings, "text") == (TEXTS[:15], TEXTS[15:])
    assert load_examples(DataSettings(path="builtin", eval_path=one), "text")[1] == TEXTS[:15]
    with pytest.raises(InputError, match="has no split 'test': there are train, validation"):
        load(two, "text", split="test")
    with pytest.raises(InputError, match="^The folder .*one has no split 'test': there are train"):
        load(one, "text", split="test")
    Dataset.from_list([{"text": "a"}, {"text": None}]).save_to_disk(tmp_path / "null")
    with pytest.raises(InputError, match=r"^Row 2 of .*null: column 'text' holds nothing"):
        load(str(tmp_path / "null"), "text")
    (tmp_path / "two" / "train" / "state.json").write_text("{")
    with pytest.raises(InputError, match="two cannot be read: "):
        load(two, "text")


def test_the_information_of_a_data_set_is_no_data(write):
    write("set/dataset_info.json", '{"features": {}}')
    folder = write("set/data.jsonl", TEXTS).rsplit("/", 1)[0]
    assert load(folder, "text") == TEXTS


def test_a_cache_that_cannot_be_written_is_not_the_fault_of_the_data(write, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/no/cache")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert load(write(name, TEXTS), "text") == TEXTS

    def refuse(path, name, split):
        raise FileNotFoundError("/proc/no")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="cannot be stored in /proc/no/cache .*: set HF_HOME to a"):
        load("some/set", "text")


def test_a_csv_file_keeps_texts_as_they_are_written(write):
    examples = [
        {"prompt": "042", "chosen": "NA", "rejected": "1.50", "margin": "0.5"},
        {"prompt": "", "chosen": "None", "rejected": "7", "margin": ""},
    ]
    result = load(write("a.csv", examples), "pairs")
    assert result == [{**examples[0], "margin": 0.5}, {**examples[1], "margin": 0.0}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(write, name, content):
    with pytest.raises(InputError, match=r"is empty: give a file with at least one example\.$"):
        load(write(name, content), "text")


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.csv", [{"text": "a"}])])
def test_a_file_without_examples(write, tmp_path, name, content):
    path = write(name, content)
    if name == "a.csv":
        (tmp_path / name).write_text("text\n")
    with pytest.raises(InputError, match=r"a\.(json|csv)"):
        load(path, "text")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_wrong_json_names_the_line(write, name):
    path = write(name, '{"text": "a"}\n\n{"text": "b"\n')
    with pytest.raises(
        InputError, match=rf"^Line 3 of .*{name} is no JSON \(Expecting .* at column 13\): '"
    ):
        load(path, "text")


def test_lines_that_are_no_objects(write):
    with pytest.raises(InputError, match=r"Line 1 of .* is no JSON object such as .*: \['text'\]"):
        load(write("a.jsonl", '["text"]\n"more"\n'), "text")


def test_wrong_json_of_one_document(write):
    with pytest.raises(InputError, match=r"a\.json is no JSON: "):
        load(write("a.json", '[{"text": "a"},'), "text")


def test_a_broken_parquet_file(write, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"a\.parquet cannot be read: ") as caught:
        load(str(path), "text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [3, -4])
def test_broken_gzip(tmp_path, cut):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "abc"}\n' * 100)[:cut])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz (cannot be unpacked|is empty)"):
        load(str(path), "text")


def test_unknown_extension(write):
    with pytest.raises(InputError, match=r"a\.txt cannot be read: data files end in \.jsonl, "):
        load(write("a.txt", "text"), "text")


def test_folders_that_do_not_fit(write, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds no data files: they end in"):
        load(str(tmp_path / "bare"), "text")
    write("set/a.jsonl", TEXTS)
    folder = write("set/b.csv", TEXTS).rsplit("/", 1)[0]
    with pytest.raises(InputError, match=r"mixes formats \(a\.jsonl, b\.csv\)"):
        load(folder, "text")


@pytest.mark.parametrize("depth", [900, 200_000])
def test_deeply_nested_json_is_read_or_refused_by_its_line(write, depth):
    """How deep it may be depends on the version of Python."""
    path = write("a.jsonl", '{"text": "a", "deep": ' + "[" * depth + "]" * depth + "}")
    try:
        assert load(path, "prompts")[0]["text"] == "a"
    except InputError as error:
        message = str(error)
        if not message.startswith("Line 1 of") or len(message) > 500:
            raise


def test_unread_columns_of_parquet_cannot_fail(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    moment = pyarrow.array([0], pyarrow.timestamp("ns", tz="Mars/Phobos"))
    table = pyarrow.table({"text": ["one"], "moment": moment})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.parquet"), "text") == [{"text": "one"}]


def test_nulls_that_fill_the_objects_of_a_column_are_no_data(write):
    """A column of Parquet has one schema; in JSON a null is meant."""
    examples = [
        {
            "messages": [
                {"role": "user", "content": "go"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {name: 1}}}],
                },
            ]
        }
        for name in ("a", "b")
    ]
    calls = [
        each["messages"][1]["tool_calls"][0]["function"]["arguments"]
        for each in load(write("a.parquet", examples), "text")
    ]
    assert calls == [{"a": 1}, {"b": 1}]
    meant = examples[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    meant["a"] = None
    (read, _) = load(write("a.jsonl", examples), "text")
    assert read["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": None}
