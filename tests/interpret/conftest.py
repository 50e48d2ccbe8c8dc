import random

import pytest
import torch

from kanlm.model import KanLMConfig, KanLMForCausalLM


class Letters:
    """A tokenizer of letters, enough for what reads only ids."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 64 for letter in text]}

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


@pytest.fixture
def letters():
    return Letters()


@pytest.fixture
def text():
    return ["".join(random.Random(0).choices("etaoinshrdlcumwfgypbvk     ", k=1400))]


@pytest.fixture
def model():
    def build(ffn_type: str, **settings) -> KanLMForCausalLM:
        torch.manual_seed(3)
        config = KanLMConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 12,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "ffn_type": ffn_type,
                "kan_num_groups": 4,
                "kan_grid_size": 5,
                **settings,
            }
        )
        network = KanLMForCausalLM(config).eval()
        with torch.no_grad():  # learned functions that are no longer what they started as
            for name, parameter in network.named_parameters():
                if name.endswith(("spline.weight", "coefficients")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return network

    return build
