"""Parameters in two halves: lower layers and embeddings that are frozen, and layers that train.

With `num_layers_unfrozen = None` there is no frozen half, and the trained one is the whole model.
"""

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params


def check_unfrozen(model: Model, num_layers_unfrozen: int | None, section: str) -> None:
    """Raises an InputError if more layers are to be trained than the model has.

    Args:
      section: where the setting stands, "ppo" or "reward".
    """
    layers = model.config.n_layer
    if num_layers_unfrozen is not None and not 0 <= num_layers_unfrozen <= layers:
        raise InputError(
            f"{section}.num_layers_unfrozen must be from 0 to the model's n_layer = {layers}, but "
            f"is {num_layers_unfrozen}; null trains all layers and the embeddings."
        )


def split_params(
    model: Model, params: Params, num_layers_unfrozen: int | None, section: str
) -> tuple[Params | None, Params]:
    """(frozen, trained) halves of a whole model's parameters; (None, params) where all train.

    Raises:
      InputError: more layers are to be trained than the model has.
    """
    check_unfrozen(model, num_layers_unfrozen, section)
    if num_layers_unfrozen is None:
        return None, params
    return model.split(params, num_layers_unfrozen)


def full_params(model: Model, frozen: Params | None, trained: Params) -> Params:
    """What `split_params` took apart, whole again; under jit, what is not read costs nothing."""
    return trained if frozen is None else model.merge(frozen, trained)
