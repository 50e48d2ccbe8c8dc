"""The capsule: everything that a loaded model needs, flat, on torch and transformers alone.

Importing it registers `kanlm` with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_kanlm import KanLMConfig
from .modeling_kanlm import KanLMForCausalLM, KanLMForSequenceClassification, KanLMModel

AutoConfig.register(KanLMConfig.model_type, KanLMConfig)
AutoModel.register(KanLMConfig, KanLMModel)
AutoModelForCausalLM.register(KanLMConfig, KanLMForCausalLM)
AutoModelForSequenceClassification.register(KanLMConfig, KanLMForSequenceClassification)

# save_pretrained then copies these files beside the weights.
KanLMConfig.register_for_auto_class()
KanLMModel.register_for_auto_class("AutoModel")
KanLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
KanLMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["KanLMConfig", "KanLMForCausalLM", "KanLMForSequenceClassification", "KanLMModel"]
