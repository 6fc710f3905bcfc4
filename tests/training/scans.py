"""Which loops a program has, read off what it was traced to."""

import jax


def scans(jaxpr, inside=()):
    """(length of each scan, lengths of those around it) in a jaxpr and all that it calls."""
    for equation in jaxpr.eqns:
        within = inside
        if equation.primitive.name == "scan":
            yield equation.params["length"], inside
            within = (*inside, equation.params["length"])
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner, within)
