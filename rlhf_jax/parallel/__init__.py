"""Where arrays live: the device mesh, and shardings of parameters and batches on it."""

from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_jax.parallel.mesh import make_mesh as make_mesh
    from rlhf_jax.parallel.partition import batch_sharding as batch_sharding
    from rlhf_jax.parallel.partition import replicated as replicated
    from rlhf_jax.parallel.partition import tree_shardings as tree_shardings
    from rlhf_jax.parallel.settings import DistributedSettings as DistributedSettings
    from rlhf_jax.parallel.settings import MeshSettings as MeshSettings

__getattr__, __dir__, __all__ = lazy_names(__name__)
