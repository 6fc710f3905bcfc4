"""The output of `generate`: checked before the work, and safe for terminals and encodings."""

import io
import json
import os
import sys

import pytest

from rlhf_jax.runtime import run_evaluate, run_generate
from rlhf_jax.runtime.commands import generate, terminal
from tests.runtime.messages import message

NOWHERE = {"model": {"path": "./nowhere"}, "prompt": "p"}  # an error once the model is read

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")


@needs_full
def test_a_full_standard_output_is_named_before_the_model_is_read(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert message(run_generate, NOWHERE) == (
            "cannot write to standard output: No space left on device; give --output a file that "
            "can be written."
        )
        assert message(run_evaluate, {"model": NOWHERE["model"]}) == (
            "cannot write to standard output: No space left on device; redirect it to a file that "
            "can be written."
        )


def test_a_closed_standard_output_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert message(run_generate, NOWHERE).startswith(
        "cannot write to standard output: it is closed; give --output a file"
    )


@needs_full
def test_a_file_that_cannot_be_written_is_named_before_the_model_is_read(tmp_path):
    for output, reason in (("/dev/full", "No space left"), (tmp_path, "Is a directory")):
        error = message(run_generate, NOWHERE | {"output": str(output)})
        assert error.startswith(f"cannot write to {output}: {reason}")


def test_the_check_leaves_a_file_as_it_was(tmp_path):
    (tmp_path / "old").write_text("old")
    assert "nowhere" in message(run_generate, NOWHERE | {"output": str(tmp_path / "old")})
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_lines_are_json_in_any_encoding(monkeypatch, encoding):
    text = "é € \U0001f600 \x9b31m \x7f \ud800 \x1b"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    generate.write_lines(None, [{"prompt": text}] * 2)
    lines = written.getvalue().decode(encoding).splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": text}] * 2
    assert not set("\x9b\x7f\x1b\ud800") & set(lines[0])
    assert ("é" in lines[0]) == (encoding == "utf-8")


@needs_full
def test_an_error_on_the_way_ends_the_command_at_once(monkeypatch):
    """The next batch is not generated, and the interpreter does not write again at its end."""
    generated = []
    entries = ({"n": generated.append(n)} for n in range(3))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "No space left on device" in message(generate.write_lines, None, entries)
    assert len(generated) == 1


def test_a_table_can_be_printed_in_ascii(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert terminal.run(lambda: sys.stdout.write("a –\n")) == 0
    assert written.getvalue() == b"a ?\n"
