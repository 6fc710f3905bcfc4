"""A small tokenizer, and files of rows that are written where the test wants them."""

import csv
import gzip
import json

import pytest

from rlhf_jax.data import builtin, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """Trained on the embedded corpus; bytes stand in for what that does not know."""
    rows = builtin.texts(0, 300)
    return train_tokenizer([row["prompt"] + row["completion"] for row in rows], 512)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps what the library caches out of the home folder, and rows of other tests out of ours."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def write(tmp_path):
    """write(name, rows) -> path; the extension says how. Rows may also be the raw text."""

    def write_file(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            write_csv(path, rows)
        else:
            text = rows if isinstance(rows, str) else as_json(name, rows)
            data = text.encode()
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write_file


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def as_json(name, rows):
    if ".jsonl" in name:
        return "".join(json.dumps(row) + "\n" for row in rows)
    return json.dumps(rows)
