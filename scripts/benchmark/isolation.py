"""Functions called in a subprocess, whose device memory is freed when it ends."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def isolated(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """function(*args, **kwargs), called in a subprocess unless JAX runs on a CPU.

    JAX returns GPU memory to other processes only when its own process ends. On a CPU it frees
    memory at once, and the function is called here.

    Args:
      function: importable by its name in another process.
    """
    if jax.default_backend() == "cpu":
        return function(*args, **kwargs)
    return in_subprocess(function, *args, **kwargs)


def in_subprocess(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) in a subprocess, which is killed if this process is interrupted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
