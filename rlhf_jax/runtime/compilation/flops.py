"""FLOPs of the products of a traced function, loops counted in full."""

import math
from typing import Any

from rlhf_jax.models.cudnn_attention import BACKWARD, FORWARD


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all `dot_general` of a jaxpr: 2 for each product of two numbers that is added up.

    Scans count as often as they run. A `while` counts as the bound that its condition compares with
    (decoding may end before), a `cond` as its dearest branch. All devices together; what a
    rematerialisation computes again counts again. cuDNN's attention counts as its products, of
    which a causal mask leaves half.

    Args:
      jaxpr: open or closed, such as `jax.jit(f).trace(*args).jaxpr`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((4, 4))
    >>> def f(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
    >>> count_flops(jax.make_jaxpr(f)(x)) == 3 * 2 * 4**3
    True
    """
    return sum(_of_equation(equation) for equation in _open(jaxpr).eqns)


# Forwards the logits and what is attended; backwards the logits again, and four gradients.
_FUSED = {FORWARD: 2, BACKWARD: 5}


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name in _FUSED:
        (rows, queries, heads, width), keys = equation.invars[0].aval.shape, equation.invars[1].aval
        pairs = queries * keys.shape[1]
        if params["mask_type"].name == "CAUSAL":
            pairs = queries * (queries + 1) // 2
        return _FUSED[name] * 2 * rows * heads * pairs * width
    if name == "scan":
        return params["length"] * count_flops(params["jaxpr"])
    if name == "while":
        return _most_rounds(params["cond_jaxpr"]) * count_flops(params["body_jaxpr"])
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    return sum(count_flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = [x for value in params.values() for x in (value if type(value) is tuple else (value,))]
    return [value for value in values if hasattr(_open(value), "eqns")]


def _most_rounds(condition: Any) -> int:
    """The number that the counter of a loop has to stay below; 1 where there is none."""
    for equation in _open(condition).eqns:
        if equation.primitive.name == "lt" and hasattr(equation.invars[1], "val"):
            return int(equation.invars[1].val)
    return 1
