"""A small tokenizer, and files of examples that are written where the test wants them."""

import csv
import gzip
import json

import pytest

from rlhf_jax.data import builtin, train_tokenizer
from tests.data.texts import TEMPLATE


@pytest.fixture(scope="session")
def tokenizer():
    """Trained on the embedded corpus; bytes stand in for what that does not know."""
    examples = builtin.texts(0, 300)
    return train_tokenizer([example["prompt"] + example["completion"] for example in examples], 512)


@pytest.fixture
def chat(tokenizer, monkeypatch):
    """The tokenizer with a chat template."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the `datasets` library of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def write(tmp_path):
    """write(name, examples) -> path; the extension says how. Examples may also be the raw text."""

    def write_file(name, examples):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples), path)
        elif name.endswith(".csv"):
            write_csv(path, examples)
        else:
            text = examples if isinstance(examples, str) else as_json(name, examples)
            data = text.encode()
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write_file


def write_csv(path, examples):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, examples[0].keys())
        writer.writeheader()
        writer.writerows(examples)


def as_json(name, examples):
    if ".jsonl" in name.lower():
        return "".join(json.dumps(example) + "\n" for example in examples)
    return json.dumps(examples)
