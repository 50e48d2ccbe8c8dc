"""kanlm: language models with Kolmogorov-Arnold (KAN) feed-forward blocks.

`import kanlm` loads no torch: the public names below come on first use. transformers' Auto classes learn of
the models when they are imported themselves, so after `import kanlm` `from_pretrained` asks for no trust.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kanlm import auto_classes

if TYPE_CHECKING:
    from kanlm.config import RunConfig, UserError, load_run_config
    from kanlm.initial import kan_coefficient_names
    from kanlm.kernels import select as select_kernels
    from kanlm.model.configuration_kanlm import KanLMConfig
    from kanlm.model.ffn import build_ffn
    from kanlm.model.kan import KANLinear
    from kanlm.model.learned_function import LearnedFunction
    from kanlm.model.modeling_kanlm import KanLMForCausalLM, KanLMModel
    from kanlm.train.health import kan_health

__version__ = "0.1.0"

__all__ = [
    "KANLinear",
    "KanLMConfig",
    "KanLMForCausalLM",
    "KanLMModel",
    "LearnedFunction",
    "RunConfig",
    "UserError",
    "build_ffn",
    "kan_coefficient_names",
    "kan_health",
    "load_run_config",
    "select_kernels",
]

_HOMES = {
    "KANLinear": "kanlm.model.kan",
    "KanLMConfig": "kanlm.model.configuration_kanlm",
    "KanLMForCausalLM": "kanlm.model.modeling_kanlm",
    "KanLMModel": "kanlm.model.modeling_kanlm",
    "LearnedFunction": "kanlm.model.learned_function",
    "RunConfig": "kanlm.config",
    "UserError": "kanlm.config",
    "build_ffn": "kanlm.model.ffn",
    "kan_coefficient_names": "kanlm.initial",
    "kan_health": "kanlm.train.health",
    "load_run_config": "kanlm.config",
    "select_kernels": "kanlm.kernels",
}
_NAMES_THERE = {"select_kernels": "select"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), _NAMES_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto_classes.register_when_imported()
