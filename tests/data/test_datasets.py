"""Data sets: every format, splits and hold-outs, and every error a user can meet."""

import pytest

from rlhf_jax.data import builtin, load_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

TEXTS = [{"text": f"text {i}"} for i in range(20)]
PAIRS = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
ONE_FILE = {"eval_rows": 0}


def load(path, kind, **settings):
    return load_examples(DataSettings(path=path, **{**ONE_FILE, **settings}), kind)[0]


@pytest.mark.parametrize(
    ("kind", "example", "column"),
    [
        ("text", {"text": "a \ud83d b"}, "text"),
        ("text", {"messages": [{"role": "user", "content": "\udc00"}]}, "messages"),
        ("prompts", {"prompt": "a", "tags": ["\ud83d"]}, "tags"),
    ],
)
def test_half_of_a_surrogate_pair_names_the_line(write, kind, example, column):
    good = {**example, column: "😀" if column == "text" else [{"role": "user", "content": "😀"}]}
    path = write("a.jsonl", [good, example])
    with pytest.raises(InputError, match=f"^Line 2 of .*: column '{column}' has half of a surrog"):
        load(path, kind)


def test_messages_name_the_line_of_the_file_after_the_hold_out(write):
    """The index among the shuffled rest of a file helps nobody."""
    examples = [{"text": f"text {i}"} for i in range(30)]
    train, held = load_examples(DataSettings(path=write("a.jsonl", examples), eval_rows=9), "text")
    for example in train + held:
        assert example.place.startswith(f"line {int(example['text'][5:]) + 1} of ")


@pytest.mark.parametrize("margin", [10**400, True], ids=["huge", "true"])
def test_margins_without_bounds(write, margin):
    path = write("a.jsonl", [{"chosen": "a", "rejected": "b", "margin": margin}])
    if margin is True:
        assert load(path, "pairs")[0]["margin"] == 1.0
        return
    with pytest.raises(InputError, match=r"Line 1 of .*'margin' holds 10{59}, no finite number"):
        load(path, "pairs")


@pytest.mark.parametrize(
    "examples",
    [
        [{"text": "a"}, {"text": ""}],
        [{"prompt": "a", "completion": "b"}],
        [{"messages": CHAT}, {"messages": CHAT[:1]}],
    ],
)
def test_text_formats(write, examples):
    assert load(write("a.jsonl", examples), "text") == examples


def test_prompt_and_completion_win_over_text_and_other_columns_go(write):
    examples = [{"text": "t", "prompt": "p", "completion": "c", "label": 1}]
    assert load(write("a.jsonl", examples), "text") == [{"prompt": "p", "completion": "c"}]


def test_pairs_get_what_is_optional(write):
    examples = [{"chosen": "a", "rejected": "b", "id": 3}]
    expected = [{"prompt": "", "chosen": "a", "rejected": "b", "margin": 0.0}]
    assert load(write("a.jsonl", examples), "pairs") == expected
    examples = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}]
    assert load(write("b.jsonl", examples), "pairs") == [{**examples[0], "margin": 2.0}]


def test_ranked_responses_become_all_their_pairs(write):
    path = write("a.jsonl", [{"prompt": "p", "responses": ["a", "b", "c"]}])
    result = [(example["chosen"], example["rejected"]) for example in load(path, "pairs")]
    assert result == [("a", "b"), ("a", "c"), ("b", "c")]


def test_prompts_keep_all_columns(write):
    examples = [{"prompt": "p", "answer": 42, "tags": ["x"]}]
    assert load(write("a.jsonl", examples), "prompts") == examples
    examples = [{"text": "t", "label": 1}]
    assert load(write("b.jsonl", examples), "prompts") == examples


def test_columns_are_mapped(write):
    path = write("a.jsonl", [{"question": "q", "answer": "a", "completion": "old"}])
    columns = {"prompt": "question", "completion": "answer"}
    assert load(path, "text", columns=columns) == [{"prompt": "q", "completion": "a"}]


def test_hold_out_is_seeded_disjoint_and_in_file_order(write):
    path = write("a.jsonl", TEXTS)
    train, held = load_examples(DataSettings(path=path, eval_rows=6), "text")
    assert (len(train), len(held)) == (14, 6)
    assert sorted(train + held, key=TEXTS.index) == TEXTS
    assert train == sorted(train, key=TEXTS.index)
    again = load_examples(DataSettings(path=path, eval_rows=6), "text")
    other = load_examples(DataSettings(path=path, eval_rows=6, seed=1), "text")
    assert again == (train, held)
    assert other[1] != held
    fewer, same = load_examples(DataSettings(path=path, eval_rows=6, max_rows=5), "text")
    assert same == held
    assert len(fewer) == 5
    assert all(example in train for example in fewer)


def test_by_default_a_tenth_is_held_out(write):
    train, held = load_examples(DataSettings(path=write("a.jsonl", TEXTS)), "text")
    assert (len(train), len(held)) == (18, 2)


def test_a_file_for_evaluation(write):
    path, other = write("a.jsonl", TEXTS), write("b.jsonl", [{"text": "x"}, {"text": "y"}])
    train, held = load_examples(DataSettings(path=path, eval_path=other), "text")
    assert train == TEXTS
    assert held == [{"text": "x"}, {"text": "y"}]
    for count in (0, 1):
        settings = DataSettings(path=path, eval_path=other, eval_rows=count)
        assert load_examples(settings, "text")[1] == held[:count]


def test_a_folder_with_named_splits(write):
    write("set/train-00000-of-00002.jsonl", TEXTS[:3])
    write("set/train-00001-of-00002.jsonl", TEXTS[3:5])
    folder = write("set/validation.jsonl", TEXTS[5:7]).rsplit("/", 1)[0]
    write("set/README.md", "no data")
    settings = DataSettings(path=folder, eval_split="validation")
    assert load_examples(settings, "text") == (TEXTS[:5], TEXTS[5:7])
    assert load_examples(DataSettings(path=folder, eval_path=folder), "text")[1] == TEXTS[5:7]
    with pytest.raises(InputError, match=r"no file for the split 'test': there are train-00000"):
        load(folder, "text", split="test")


def test_a_folder_without_split_names_and_slices(write):
    write("set/a.jsonl", TEXTS[:3])
    folder = write("set/b.jsonl", TEXTS[3:5]).rsplit("/", 1)[0]
    assert load(folder, "text") == TEXTS[:5]
    assert load(folder, "text", split="train[:2]") == TEXTS[:2]
    settings = DataSettings(path=folder, split="train[:80%]", eval_split="train[80%:]")
    assert load_examples(settings, "text") == (TEXTS[:4], TEXTS[4:5])
    assert load(folder, "text", split="train[:1]+train[4:]") == [TEXTS[0], TEXTS[4]]
    with pytest.raises(InputError, match=r"The split 'train\[x\]' does not fit 5 examples \("):
        load(folder, "text", split="train[x]")


def test_data_of_the_hub_is_loaded_by_name(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = DataSettings(path="some/set", name="plain", eval_split="test", eval_rows=3)
    assert load_examples(settings, "text") == (TEXTS, TEXTS[:3])
    assert calls == [("some/set", "plain", "train"), ("some/set", "plain", "test")]


def test_a_data_set_of_the_hub_that_the_library_cannot_build(monkeypatch):
    import datasets

    def refuse(path, name, split):
        cause = TypeError("Couldn't cast array of type string to null")
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from cause

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"^The data set some/set cannot be read: Couldn't cast"):
        load("some/set", "text")


def test_an_unreachable_hub_name(monkeypatch):
    import datasets

    def refuse(path, name, split):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"some/set .* offline give a local file \(Couldn't reach"):
        load("some/set", "text")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["{}/no.jsonl", "{}/no", "./no", "no.csv", "a/b/c"])
def test_missing_file(tmp_path, path):
    with pytest.raises(InputError, match="There is no file or folder .*no|a/b/c"):
        load(path.format(tmp_path), "text")


def test_missing_column_names_those_that_are_there(write):
    path = write("a.jsonl", [{"question": "q", "label": 1}])
    with pytest.raises(InputError) as caught:
        load(path, "text")
    assert str(caught.value) == (
        f"{path} has the columns question, label, but text examples need `prompt` and "
        "`completion`, or `messages`, or `text`: name the right ones in data.columns."
    )
    with pytest.raises(
        InputError, match="pairs examples need `chosen` and `rejected`, or `responses`"
    ):
        load(path, "pairs")
    with pytest.raises(InputError, match="prompts examples need `prompt`, or `text`"):
        load(path, "prompts")
    with pytest.raises(InputError, match="maps 'text' to 'body', but .* has the columns question"):
        load(path, "text", columns={"text": "body"})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "column 'text' holds nothing"),
        (3, r"column 'text' holds a number \(3\), not text"),
        (1.5, r"column 'text' holds a number \(1.5\), not text"),
        (True, "column 'text' holds a truth value"),
        (["x"], "column 'text' holds a list"),
        ({"a": 1}, "column 'text' holds an object"),
    ],
)
def test_an_example_that_is_no_text(write, value, what):
    path = write("a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": value}, {"text": "c"}])
    with pytest.raises(InputError, match=rf"^Line 3 of .*a\.jsonl: {what}"):
        load(path, "text")


@pytest.mark.parametrize("value", [3, [1, 2]])
def test_a_column_without_any_text(write, value):
    path = write("a.jsonl", [{"prompt": "a", "completion": value}] * 2)
    with pytest.raises(InputError, match=r"^Line 1 of .*a\.jsonl: column 'completion' holds a "):
        load(path, "text")


def test_an_example_that_lacks_the_column(write):
    path = write("a.jsonl", [{"text": "a"}, {"other": "b"}])
    with pytest.raises(InputError, match="Line 2 of .*: column 'text' holds nothing"):
        load(path, "text")


@pytest.mark.parametrize("margin", ["much", float("inf")])
def test_a_margin_that_is_no_number(write, margin):
    path = write("a.jsonl", [{"chosen": "a", "rejected": "b", "margin": margin}])
    with pytest.raises(InputError, match=r"Line 1 of .*'margin' holds .*, no finite number"):
        load(path, "pairs")


@pytest.mark.parametrize("margin", ["much", "nan", "inf"])
def test_a_margin_of_a_csv_file_that_is_no_number(write, margin):
    path = write("a.csv", [{"chosen": "a", "rejected": "b", "margin": margin}])
    with pytest.raises(
        InputError, match=rf"Line 2 of .*'margin' holds '{margin}', no finite number"
    ):
        load(path, "pairs")


@pytest.mark.parametrize("messages", [[], [{"content": "x"}], [{"role": 1, "content": "x"}], "hi"])
def test_messages_that_are_none(write, messages):
    path = write("a.jsonl", [{"messages": messages}])
    with pytest.raises(InputError, match="Line 1 of .*'messages' is no list of turns"):
        load(path, "text")


@pytest.mark.parametrize("responses", [["only one"], "text"])
def test_responses_that_are_none(write, responses):
    path = write("a.jsonl", [{"responses": responses}])
    with pytest.raises(InputError, match="Line 1 of .*'responses' is no list of two or more"):
        load(path, "pairs")


def test_a_response_that_is_no_text(write):
    path = write("a.jsonl", [{"responses": ["a", None]}])
    with pytest.raises(InputError, match="Line 1 of .*'responses' holds nothing"):
        load(path, "pairs")


def test_a_single_file_is_the_split_train(write):
    path = write("a.jsonl", TEXTS)
    with pytest.raises(InputError, match="The split 'validation' of .* does not exist"):
        load_examples(DataSettings(path=path, eval_split="validation"), "text")


def test_holding_out_everything(write):
    path = write("a.jsonl", TEXTS)
    with pytest.raises(
        InputError, match="data.eval_rows holds out 20 of the 20 examples of .* lower"
    ):
        load_examples(DataSettings(path=path, eval_rows=20), "text")


def test_unknown_kind():
    with pytest.raises(InputError, match="kind of examples is 'images': it is one of text, pairs"):
        load_examples(DataSettings(), "images")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"builtin_rows": 0}, "data.builtin_rows must be above 0, but is 0"),
        ({"max_length": 1}, "data.max_length must be at least 2, but is 1"),
        ({"max_prompt_length": 0}, "data.max_prompt_length must be above 0, but is 0"),
        ({"max_response_length": 1}, "data.max_response_length must be at least 2, but is 1"),
        ({"max_rows": 0}, "data.max_rows must be above 0, but is 0"),
        ({"eval_rows": -1}, "data.eval_rows must not be negative, but is -1"),
        ({"seed": -1}, "data.seed must not be negative, but is -1"),
        ({"length_buckets": 5}, "data.length_buckets must be from 1 to 4, but is 5"),
        ({"path": ""}, "data.path and data.split must not be empty"),
        ({"columns": {"rating": "x"}}, "data.columns maps 'rating', which is not a known column"),
        ({"prompt_tokens": (3, 2)}, r"data.prompt_tokens is \(3, 2\): give \(low, high\)"),
        ({"prompt_tokens": (0, 2)}, "1 <= low <= high"),
        ({"prompt_tokens": (2, 129)}, r"data.max_prompt_length \(128\)"),
        ({"prompt_tokens": (1, 2, 3)}, r"data.prompt_tokens is .*: give \(low, high\)"),
        ({"split": "test"}, "data.split and data.name select"),
        ({"name": "plain"}, "data.split and data.name select"),
        ({"eval_split": "test"}, "data.eval_split needs data.eval_path here"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        DataSettings(**settings)


# --- the embedded corpus -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make"),
    [("text", builtin.texts), ("pairs", builtin.pairs), ("prompts", builtin.prompts)],
)
def test_the_embedded_corpus_is_a_path(kind, make):
    settings = DataSettings(builtin_rows=40, eval_rows=10, seed=3)
    assert load_examples(settings, kind) == (make(3, 40), make(3, 10, "eval"))
    fewer, _ = load_examples(DataSettings(builtin_rows=40, max_rows=7, eval_rows=10, seed=3), kind)
    assert fewer == make(3, 40)[:7]


def test_the_embedded_corpus_with_a_file(write):
    path = write("a.jsonl", PAIRS)
    train, held = load_examples(DataSettings(builtin_rows=5, eval_path=path), "pairs")
    assert train == builtin.pairs(0, 5)
    assert held == [{**example, "margin": 0.0} for example in PAIRS]
    train, held = load_examples(DataSettings(path=path, eval_path="builtin", eval_rows=4), "pairs")
    assert len(train) == 20
    assert held == builtin.pairs(0, 4, "eval")
