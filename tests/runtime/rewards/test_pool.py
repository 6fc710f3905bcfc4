"""Reward functions in other processes: what a slow, dying or raising call costs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax.runtime.rewards.pool import FunctionPool
from rlhf_jax.runtime.rewards.worker import Call
from tests.runtime.messages import message


def obeys(prompts, completions, *, bonus=0.0, **columns):
    """A reward that does what the completion says."""
    (text,) = completions
    if text == "hang":
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    if text == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "raise":
        raise ValueError("no verdict")
    if text == "wrong":
        return [1.0, 2.0]
    values = {"none": None, "nan": float("nan"), "process": float(os.getpid())}
    return [values.get(text, len(text) + bonus)]


def calls(*texts):
    return [Call("p", text, {"answer": 1}) for text in texts]


@pytest.fixture(scope="module")
def pool():
    pool = FunctionPool(
        f"{__name__}:obeys",
        {"bonus": 0.5},
        num_processes=2,
        timeout=0.5,
        failed_score=-1.0,
    )
    yield pool
    pool.close()


def test_failed_calls_have_the_failed_score_and_nothing_else_is_lost(pool, caplog):
    scored = pool(calls("a", "hang", "bb", "die", "raise", "nan", "none", "ccc"))
    assert scored.failed == [False, True, False, True, True, True, False, False]
    assert str(scored.scores) == "[1.5, -1.0, 2.5, -1.0, -1.0, -1.0, nan, 3.5]"
    assert (
        "obeys failed for 4 of 8 responses, which have the score -1: it took more than 0.5 sec"
        in (caplog.text)
    )


def test_processes_are_kept_and_end_with_the_pool(pool):
    first, second = ({*pool(calls(*["process"] * 6)).scores} for _ in range(2))
    assert len(first | second) <= 2
    pool.close()
    for process in first | second:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_a_function_that_is_no_reward_is_one_sentence():
    def of(*texts):
        with_one = FunctionPool(f"{__name__}:obeys", {}, num_processes=1)
        return message(with_one, calls(*texts))

    assert of("a", "wrong").startswith(f"{__name__}:obeys: obeys gave more than 1 scores for 1 com")
    expected = f"{__name__}:obeys failed for each of 2 responses: "
    assert of("raise", "raise").startswith(expected + "obeys (")
    assert of("raise", "raise").endswith(") raised ValueError: no verdict.")
    assert of("die", "die").startswith(expected + "its process ended by status ")


def test_processes_end_when_the_program_is_killed():
    """Also those that the function started: all share the standard error of the program."""
    code = f"""
from {__name__} import calls
from rlhf_jax.runtime.rewards.pool import FunctionPool
pool = FunctionPool("{__name__}:obeys", {{}}, num_processes=1)
print(pool(calls("abc")).scores, flush=True)
pool(calls("hang"))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "[3.0]\n"
    process.kill()
    process.communicate(timeout=20)
