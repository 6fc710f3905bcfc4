"""What several processes of one run share: arrays that span them, one that writes, one end.

All processes run the same program. Those that are more than the first write nothing, and what hangs
on one of them alone (a file, a clock, a function in Python) is told to all before it decides
anything. With a single process nothing here does more than its plain form.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Result = TypeVar("Result")

WAIT = 7 * 24 * 3600 * 1000  # milliseconds: as long as a function in Python may take
GRACE = 15.0  # seconds that a process has for ending by itself after another one has failed
_numbers = itertools.count()  # of what the processes tell each other, in the same order on all


def several() -> bool:
    """Whether this process is one of several; asks for no device where it has joined none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that logs, samples and exports."""
    return not several() or jax.process_index() == 0


# Arrays


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, whole on every host; all hosts have to call it.

    Meant for what is small: metrics, tokens, scores. One host's alone come as by `jax.device_get`.
    """
    if several():
        leaves, form = jax.tree.flatten(tree)
        split = [place for place, leaf in enumerate(leaves) if _is_split(leaf)]
        if split:
            whole = NamedSharding(leaves[split[0]].sharding.mesh, PartitionSpec())
            gathered = jax.jit(_same, out_shardings=whole)([leaves[place] for place in split])
            for place, leaf in zip(split, gathered, strict=True):
                leaves[place] = leaf
        tree = jax.tree.unflatten(form, leaves)
    return jax.device_get(tree)


def _is_split(leaf: Any) -> bool:
    """Whether an array lies on several hosts, none of which has all of it."""
    is_array = isinstance(leaf, jax.Array)
    return is_array and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _same(tree: Any) -> Any:
    return tree


def from_host(tree: Any, sharding: NamedSharding) -> Any:
    """NumPy arrays that are the same on all hosts, as arrays that span them.

    One host's alone stay as they are: its compiled functions place them.
    """
    if not several():
        return tree
    return jax.tree.map(functools.partial(_spanning, sharding), tree)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """The same, but placed on the devices with one host as well."""
    return jax.device_put(tree, sharding) if not several() else from_host(tree, sharding)


def _spanning(sharding: NamedSharding, array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def from_rows(read: Callable[[int, int], Any], num_examples: int, sharding: NamedSharding) -> Any:
    """A batch that spans the hosts, of which each reads only the rows that its devices hold.

    Args:
      read: (start, stop) -> these rows of the batch, a named tuple of NumPy arrays.
      num_examples: of the whole batch.
      sharding: of the rows, as by `batch_sharding`.
    """
    held = sharding.addressable_devices_indices_map((num_examples,)).values()
    ranges = sorted({_ends(index, num_examples) for index in held})
    parts = [read(*ends) for ends in ranges]

    def array(*pieces):
        found = dict(zip(ranges, pieces, strict=True))
        shape = (num_examples, *pieces[0].shape[1:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: found[_ends(index, num_examples)]
        )

    return jax.tree.map(array, *parts)


def _ends(index: Any, num_examples: int) -> tuple[int, int]:
    """The first and the last row, not counting itself, of an index such as (slice(0, 4), ...)."""
    start, stop, _ = index[0].indices(num_examples)
    return start, stop


# What is known to one process alone


def from_first(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), called by the first process alone and told to all; they wait for it.

    What it raises is raised by all. All hosts have to call this, in the same order.
    """
    if not several():
        return function(*args)
    key = f"rlhf_jax/told/{next(_numbers)}"
    client = _client()
    if not is_first():
        result, error = pickle.loads(client.blocking_key_value_get_bytes(key, WAIT))
        client.wait_at_barrier(key, WAIT)
        if error is not None:
            raise error
        return result
    told = _outcome(function, *args)
    client.key_value_set_bytes(key, _pickled(*told))
    client.wait_at_barrier(key, WAIT)
    client.key_value_delete(key)
    if told[1] is not None:
        raise told[1]
    return told[0]


def _outcome(function: Callable[..., Any], *args: Any) -> tuple[Any, BaseException | None]:
    try:
        return function(*args), None
    except Exception as error:
        return None, _marked(error)


def _pickled(result: Any, error: BaseException | None) -> bytes:
    try:
        data = pickle.dumps((result, error))
        pickle.loads(data)  # some exceptions can be written and not read
        return data
    except Exception:
        text = f"{type(error).__name__}: {error}" if error is not None else "no plain result"
        return pickle.dumps((None, _marked(RuntimeError(text))))


def _marked(error: BaseException) -> BaseException:
    error.raised_on_all_hosts = True  # type: ignore[attr-defined]
    return error


def is_raised_on_all_hosts(error: BaseException) -> bool:
    """Whether all processes raise this, so that the first one speaks for them."""
    return several() and getattr(error, "raised_on_all_hosts", False)


def reach_barrier(name: str, seconds: float) -> bool:
    """Whether all processes call this within so many seconds."""
    if not several():
        return True
    try:
        _client().wait_at_barrier(f"rlhf_jax/{name}", int(1000 * seconds))
    except RuntimeError:
        return False
    return True


class Agreement:
    """Flags that any of several processes may raise, and that all lower or heed in the same step.

    Each call takes this process's flags and returns those that any process gave in the call
    before: the devices add them up behind the step that was just begun, and nobody waits. A single
    process's own come back at once.
    """

    def __init__(self, count: int) -> None:
        self._several = several()
        self._before: jax.Array | None = None
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), ("devices",))
            self._rows = NamedSharding(mesh, PartitionSpec("devices"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._any = jax.jit(functools.partial(jnp.any, axis=0), out_shardings=whole)
            self._shape = (len(jax.devices()), count)

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        if not self._several:
            return flags
        row = np.asarray([flags], bool)
        given = jax.make_array_from_callback(self._shape, self._rows, lambda _: row)
        before, self._before = self._before, self._any(given)
        if before is None:
            return (False,) * len(flags)
        return tuple(np.asarray(before).tolist())


# One end for all


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Around what all processes do: if one of them leaves it by an error, the others end too.

    They would wait for it for ever. One that has not come to an end of its own within `GRACE`
    seconds, say because it raised the same error, is ended with the exit status 1.
    """
    if not several():
        yield
        return
    number, left = next(_numbers), threading.Event()
    key = f"rlhf_jax/failed/{number}"
    threading.Thread(target=_watch, args=(key, left), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not is_raised_on_all_hosts(error):
            _tell_failure(key, error)
        raise
    finally:
        left.set()


def _tell_failure(key: str, error: BaseException) -> None:
    """Lets the others end, unless all raise an error here, say for a setting that is wrong."""
    if reach_barrier(f"ended/{key}", GRACE / 3):
        _marked(error)
        return
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    with contextlib.suppress(RuntimeError):  # another one was faster
        _client().key_value_set(key, f"process {jax.process_index()}: {text}")


def _watch(key: str, left: threading.Event) -> None:
    """Ends this process some time after another one has failed, unless it has `left` by then."""
    while not left.wait(1.0):
        with contextlib.suppress(RuntimeError):
            failed = _client().key_value_try_get(key)
            if not left.wait(GRACE):
                sys.stderr.write(f"error: stopped, as another process failed ({failed})\n")
                sys.stderr.flush()
                os._exit(1)


def leave(error: BaseException, status: int) -> None:
    """Ends this process after an error, without waiting for others that do not come.

    At its exit JAX waits for all processes, for minutes. A process that is alone, and one of which
    the others share the error, returns from here and ends as any other.
    """
    if not several() or is_raised_on_all_hosts(error):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(GRACE / 5)  # the others ask it once a second for what has happened
    os._exit(status)


def _client() -> Any:
    """The way to tell other processes something that is no array; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
