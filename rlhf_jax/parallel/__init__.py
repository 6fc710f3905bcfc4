"""Where arrays live: the device mesh, and the rules that place parameters on it."""

from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import batch_sharding, replicated, tree_shardings

__all__ = ["batch_sharding", "make_mesh", "replicated", "tree_shardings"]
