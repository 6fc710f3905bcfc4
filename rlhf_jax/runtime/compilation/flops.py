"""FLOPs of a traced function, loops counted in full.

XLA's `cost_analysis` counts the body of a loop once. Here a scan counts as often as it runs, a
`while` as the bound that its condition compares with (decoding may end before), a `cond` as its
most expensive branch, and recomputation by a rematerialization again.
"""

import math
from typing import Any

from rlhf_jax.models.cudnn_attention import BACKWARD, FORWARD

# Products of cuDNN's attention: forwards the logits and the weighted values; backwards the logits
# again, and four gradients.
_FUSED = {FORWARD: 2, BACKWARD: 5}


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all products on all devices: 2 for each multiplication and addition.

    cuDNN's attention counts as its products, of which a causal mask leaves half.

    Args:
      jaxpr: open or closed, such as `jax.jit(f).trace(*args).jaxpr`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((4, 4))
    >>> def f(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
    >>> count_flops(jax.make_jaxpr(f)(x)) == 3 * 2 * 4**3
    True
    """
    total = 0
    for equation in _open(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        inner = [count_flops(each) for each in _inner(params)]
        if name == "while":
            inner = [_bound(params["cond_jaxpr"]) * count_flops(params["body_jaxpr"])]
        elif name == "cond":
            inner = [max(inner)]
        rounds = params["length"] if name == "scan" else 1
        if name == "shard_map":  # its body is of one device; JAX 0.12 calls the axes newly_manual
            axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
            rounds = math.prod(params["mesh"].shape[axis] for axis in axes)
        total += _own_flops(equation) + rounds * sum(inner)
    return total


def _own_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name not in _FUSED:
        return 0
    (batch, queries, heads, width), keys = equation.invars[0].aval.shape, equation.invars[1].aval
    pairs = queries * keys.shape[1]
    if params["mask_type"].name == "CAUSAL":
        pairs = queries * (queries + 1) // 2
    return _FUSED[name] * 2 * batch * heads * pairs * width


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = [x for value in params.values() for x in (value if type(value) is tuple else (value,))]
    return [value for value in values if hasattr(_open(value), "eqns")]


def _bound(condition: Any) -> int:
    """The number that the counter of a loop has to stay below; 1 where there is none."""
    for equation in _open(condition).eqns:
        if equation.primitive.name == "lt" and hasattr(equation.invars[1], "val"):
            return int(equation.invars[1].val)
    return 1
