"""Tiny models of the three arms that stand for all: a gated MLP, a gated KAN, edge functions."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from kanlm.export import export_model
from kanlm.model import KanLMConfig, KanLMForCausalLM

torch.set_num_threads(1)
ARMS = ("swiglu", "kan_glu", "kan", "kan_act")  # kan_act with the hidden norm, as it ships
TEXTS = [f"{age} cats see {count} birds, été ☃.\n" for age in ("old", "new") for count in range(200)]


@pytest.fixture(params=ARMS)
def arm(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def build():
    """build(ffn_type, **fields): a model in eval mode, every parameter away from its initial value."""

    def build(ffn_type: str = "kan_glu", seed: int = 0, **fields) -> KanLMForCausalLM:
        sizes = dict(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            kan_grid_size=5,
            kan_num_groups=4,
            hidden_norm=ffn_type == "kan_act",
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        torch.manual_seed(seed)
        model = KanLMForCausalLM(KanLMConfig(ffn_type=ffn_type, **(sizes | fields)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 20], none of them special."""
    return torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer():
    from kanlm.data.tokenizer import trained_tokenizer

    return trained_tokenizer(iter(TEXTS), 300)


@pytest.fixture(scope="session")
def exported(build, tokenizer, tmp_path_factory):
    """exported(arm): the folder of an exported model, written once."""
    folders = {}

    def exported(ffn_type: str):
        if ffn_type not in folders:
            out = tmp_path_factory.mktemp("exported") / ffn_type
            folders[ffn_type] = export_model(build(ffn_type), tokenizer, out, {"name": f"tiny-{ffn_type}"})
        return folders[ffn_type]

    return exported
