"""Language models as pure functions over pytrees of parameters."""

from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_jax.models.adapter_folders import save_adapter as save_adapter
    from rlhf_jax.models.adapter_settings import LoraSettings as LoraSettings
    from rlhf_jax.models.adapters import merge_adapter as merge_adapter
    from rlhf_jax.models.cache import Cache as Cache
    from rlhf_jax.models.huggingface import load_pretrained as load_pretrained
    from rlhf_jax.models.huggingface import load_reward_model as load_reward_model
    from rlhf_jax.models.huggingface import save_pretrained as save_pretrained
    from rlhf_jax.models.huggingface import save_reward_model as save_reward_model
    from rlhf_jax.models.interface import Model as Model
    from rlhf_jax.models.interface import ModelConfig as ModelConfig
    from rlhf_jax.models.interface import SharedPrompt as SharedPrompt
    from rlhf_jax.models.interface import positions_from as positions_from
    from rlhf_jax.models.settings import ModelSettings as ModelSettings

__getattr__, __dir__, __all__ = lazy_names(__name__)
