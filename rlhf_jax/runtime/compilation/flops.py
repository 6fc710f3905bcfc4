"""FLOPs and bytes of the products of a traced function, loops counted in full.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs. Here a scan counts
as often as it runs, a `while` as the bound that its condition compares with (decoding may end
before), a `cond` as its most expensive branch, and recomputation by a rematerialization again.
Arguments are jaxprs, open or closed, such as `jax.jit(f).trace(*args).jaxpr`; all devices count
together.
"""

import math
from collections.abc import Callable
from typing import Any

from rlhf_jax.models.cudnn_attention import BACKWARD, FORWARD

# Products of cuDNN's attention: forwards the logits and the weighted values; backwards the logits
# again, and four gradients.
_FUSED = {FORWARD: 2, BACKWARD: 5}


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all products: 2 for each multiplication and addition.

    cuDNN's attention counts as its products, of which a causal mask leaves half.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((4, 4))
    >>> def f(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
    >>> count_flops(jax.make_jaxpr(f)(x)) == 3 * 2 * 4**3
    True
    """
    return _count(jaxpr, _flops)


def count_bytes(jaxpr: Any) -> int:
    """Bytes of the operands and results of all products."""
    return _count(jaxpr, _bytes)


def _count(jaxpr: Any, measure: Callable[[Any], int]) -> int:
    """The sum of a measure over the products."""
    total = 0
    for equation in _open(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general" or name in _FUSED:
            total += measure(equation)
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"], measure)
        elif name == "while":
            total += _bound(params["cond_jaxpr"]) * _count(params["body_jaxpr"], measure)
        elif name == "cond":
            total += max(_count(branch, measure) for branch in params["branches"])
        else:
            total += sum(_count(inner, measure) for inner in _inner(params))
    return total


def _flops(equation: Any) -> int:
    params, shape = equation.params, equation.invars[0].aval.shape
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    batch, queries, heads, width = shape
    pairs = queries * equation.invars[1].aval.shape[1]
    if params["mask_type"].name == "CAUSAL":
        pairs = queries * (queries + 1) // 2
    return _FUSED[equation.primitive.name] * 2 * batch * heads * pairs * width


def _bytes(equation: Any) -> int:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return sum(array.size * array.dtype.itemsize for array in arrays)


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
