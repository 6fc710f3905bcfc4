"""Several processes in one run: arrays that span them, values of the first one, failures.

All processes, one a host, run the same program. Only the first one writes, and a value that one
process alone has (from a file, a clock, a function in Python) is broadcast before the program
depends on it. With a single process each function reduces to its plain form.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rlhf_jax.parallel import messages

Result = TypeVar("Result")

WAIT = 7 * 24 * 3600 * 1000  # milliseconds; limits the time of a function in Python
GRACE = 15.0  # seconds in which a process may end by itself after another one has failed
_numbers = itertools.count()  # of messages between processes, in the same order on all


def several() -> bool:
    """Whether this process is one of several; initializes no device if it has joined none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the first one, which logs, samples and exports."""
    return not several() or jax.process_index() == 0


# Arrays


def to_host(tree: Any) -> Any:
    """The arrays of a tree as full NumPy arrays on every host; all hosts have to call it.

    For small arrays: metrics, tokens, scores. With one host the same as `jax.device_get`.
    """
    if several():
        leaves, structure = jax.tree.flatten(tree)
        split = {index: leaf for index, leaf in enumerate(leaves) if _is_split(leaf)}
        if split:
            mesh = next(iter(split.values())).sharding.mesh
            all_gather = jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))
            for index, leaf in all_gather(split).items():
                leaves[index] = leaf
        tree = jax.tree.unflatten(structure, leaves)
    return jax.device_get(tree)


def _is_split(leaf: Any) -> bool:
    """Whether an array is split over several hosts."""
    is_array = isinstance(leaf, jax.Array)
    return is_array and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _identity(tree: Any) -> Any:
    return tree


def from_host(tree: Any, sharding: NamedSharding) -> Any:
    """NumPy arrays that are the same on all hosts, as JAX arrays that span the hosts.

    With one host they are returned as they are: compiled functions place them.
    """
    if not several():
        return tree
    return jax.tree.map(functools.partial(spanning_array, sharding), tree)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """As `from_host`, but with one host the arrays are placed on its devices as well."""
    return jax.device_put(tree, sharding) if not several() else from_host(tree, sharding)


def spanning_array(sharding: Sharding, array: Any) -> jax.Array:
    """An array that is the same on all hosts, placed on their devices."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def spanning_batch(read: Callable[[int, int], Any], size: int, sharding: NamedSharding) -> Any:
    """A batch that spans the hosts; each host reads only the examples that its devices hold.

    Args:
      read: (start, stop) -> these examples of the batch, a named tuple of NumPy arrays.
      size: of the full batch.
      sharding: of the batch, as `batch_sharding` returns.
    """
    held = sharding.addressable_devices_indices_map((size,)).values()
    ranges = sorted({_bounds(index, size) for index in held})
    parts = [read(*bounds) for bounds in ranges]

    def array(*pieces):
        def piece(index):
            return pieces[ranges.index(_bounds(index, size))]

        return jax.make_array_from_callback((size, *pieces[0].shape[1:]), sharding, piece)

    return jax.tree.map(array, *parts)


def _bounds(index: Any, size: int) -> tuple[int, int]:
    """(start, stop) on axis 0 of an index such as (slice(0, 4), ...)."""
    start, stop, _ = index[0].indices(size)
    return start, stop


# Values of the first process


def from_first(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), called by the first process and broadcast to the others, which wait.

    Its exception is raised by all. All hosts have to call this, in the same order.

    Args:
      function: its result is one that `messages.encode` accepts.
    """
    if not several():
        return function(*args)
    key = f"rlhf_jax/from_first/{next(_numbers)}"
    client = _client()
    result, error = None, None
    if is_first():
        try:
            result = function(*args)
            message = messages.encode(result)
        except Exception as raised:
            error, message = raised, messages.encode(None, raised)
        client.key_value_set_bytes(key, message)
    else:
        result, error = messages.decode(client.blocking_key_value_get_bytes(key, WAIT))
    client.wait_at_barrier(key, WAIT)
    if is_first():
        client.key_value_delete(key)
    if error is not None:
        raise _marked(error)
    return result  # type: ignore[return-value]


def _marked(error: BaseException) -> BaseException:
    error.raised_on_all_hosts = True  # type: ignore[attr-defined]
    return error


def is_raised_on_all_hosts(error: BaseException) -> bool:
    """Whether all processes raise this error, so that only the first one reports it."""
    return several() and getattr(error, "raised_on_all_hosts", False)


def reach_barrier(name: str, seconds: float) -> bool:
    """Whether all processes call this within a number of seconds."""
    if not several():
        return True
    try:
        _client().wait_at_barrier(f"rlhf_jax/{name}", int(1000 * seconds))
    except RuntimeError:
        return False
    return True


class Agreement:
    """The logical or of flags of several processes, the same for all in each step.

    A call returns the flags that any process had in the call before: the devices combine them after
    the step that was just dispatched, and no process waits. With a single process it returns its
    arguments.
    """

    def __init__(self, count: int) -> None:
        self._several = several()
        self._before: jax.Array | None = None
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), ("devices",))
            self._split = NamedSharding(mesh, PartitionSpec("devices"))
            replicated = NamedSharding(mesh, PartitionSpec())
            self._any = jax.jit(functools.partial(jnp.any, axis=0), out_shardings=replicated)
            self._shape = (len(jax.devices()), count)

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        if not self._several:
            return flags
        own = np.asarray([flags], bool)
        by_device = jax.make_array_from_callback(self._shape, self._split, lambda _: own)
        before, self._before = self._before, self._any(by_device)
        if before is None:
            return (False,) * len(flags)
        return tuple(np.asarray(before).tolist())


# Failures


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A context that all processes enter: if one leaves it with an error, the others end too.

    Otherwise they would wait for it forever. A process that has not ended by itself within `GRACE`
    seconds, e.g. because it raised the same error, exits with the status 1.
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
            _publish_failure(key, error)
        raise
    finally:
        left.set()


def _publish_failure(key: str, error: BaseException) -> None:
    """Ends the other processes, unless all raise an error here, e.g. for a wrong setting."""
    if reach_barrier(f"ended/{key}", GRACE / 3):
        _marked(error)
        return
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    with contextlib.suppress(RuntimeError):  # another process was faster
        _client().key_value_set(key, f"process {jax.process_index()}: {text}")


def _watch(key: str, left: threading.Event) -> None:
    """Ends this process `GRACE` seconds after another one has failed, unless it has `left`."""
    while not left.wait(1.0):
        with contextlib.suppress(RuntimeError):
            failed = _client().key_value_try_get(key)
            if not left.wait(GRACE):
                sys.stderr.write(f"error: stopped, as another process failed ({failed})\n")
                sys.stderr.flush()
                os._exit(1)


def leave(error: BaseException, status: int) -> None:
    """Ends this process after an error, without waiting for the others.

    At its exit JAX waits for all processes, for minutes. With a single process, and with an error
    that all raise, this function returns and the process ends as usual.
    """
    if not several() or is_raised_on_all_hosts(error):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(GRACE / 5)  # the others poll it once a second
    os._exit(status)


def _client() -> Any:
    """JAX's key-value store of all processes, which has no public name."""
    from jax._src import distributed

    return distributed.global_state.client
