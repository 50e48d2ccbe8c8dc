"""The capsule: everything that a loaded model needs, flat, on torch and transformers alone.

Importing it registers `kanlm` with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_kanlm import KanLMConfig
from .modeling_kanlm import KanLMForCausalLM, KanLMModel

AutoConfig.register(KanLMConfig.model_type, KanLMConfig)
AutoModel.register(KanLMConfig, KanLMModel)
AutoModelForCausalLM.register(KanLMConfig, KanLMForCausalLM)

# save_pretrained then copies these files beside the weights.
KanLMConfig.register_for_auto_class()
KanLMModel.register_for_auto_class("AutoModel")
KanLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["KanLMConfig", "KanLMForCausalLM", "KanLMModel"]
