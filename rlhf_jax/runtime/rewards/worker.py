"""A process of a pool: it calls one function for one response after another, without jax."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import FunctionError, InputError
from rlhf_jax.runtime.rewards.functions import (
    NotFiniteError,
    ScoreFunction,
    load_function,
    scores_of,
)

SECONDS_BETWEEN_CHECKS = 1.0


class Call(NamedTuple):
    """A prompt, a completion, and a value of each column."""

    prompt: Any
    completion: Any
    columns: dict[str, Any]


class Reply(NamedTuple):
    """The outcome of a call.

    Attributes:
      kind: "ready" once, after the function is imported; "score"; "raised", where the function
        raised or gave NaN for this response; "lost", where its process was ended; "refused", where
        it is no reward at all.
      value: the score, NaN where it does not count, or a sentence.
    """

    kind: Literal["ready", "score", "raised", "lost", "refused"]
    value: Any = None


def bound(name: str, kwargs: dict[str, Any]) -> ScoreFunction:
    """The function that "module:function" names, with keyword arguments."""
    function = load_function(name)
    if not kwargs:
        return function
    partial: Callable[..., Any] = functools.partial(function, **kwargs)
    vars(partial)["__name__"] = getattr(function, "__name__", name.rpartition(":")[2])
    return partial


def serve(descriptor: int, name: str, kwargs: dict[str, Any]) -> None:
    """Answers the calls that arrive at a connection until the other end is closed."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with Connection(descriptor) as connection:
        function = bound(name, kwargs)
        connection.send(Reply("ready"))
        while True:
            try:
                call = connection.recv()
            except EOFError:
                return
            connection.send(_reply(function, call))


def _reply(function: ScoreFunction, call: Call) -> Reply:
    prompt, completion, columns = call
    listed = {key: [value] for key, value in columns.items()}
    try:
        (score,) = scores_of(function, [prompt], [completion], listed, allow_none=True)
    except (FunctionError, NotFiniteError) as error:
        return Reply("raised", str(error))
    except InputError as error:
        return Reply("refused", str(error))
    return Reply("score", score)


def _end_with(parent: int) -> None:
    """Ends this process and those that it started, whatever it does, when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_CHECKS)
    os.killpg(0, signal.SIGKILL)  # of the session that the pool gave it
