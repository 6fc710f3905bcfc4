"""Work in a process of its own, which leaves no memory of a device behind."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def apart(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """function(*args, **kwargs), on an accelerator by a process that ends with it.

    What JAX has once taken of a GPU's memory it gives back to no other process while it lives. On
    the CPU it does, and the function is just called.

    Args:
      function: that another process can import by its name.
    """
    if jax.default_backend() == "cpu":
        return function(*args, **kwargs)
    return in_process(function, *args, **kwargs)


def in_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same on any device; the process ends as well where this one is interrupted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
