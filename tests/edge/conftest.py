"""Small models for the edge: one layer, 256 positions, every parameter away from its initial value."""

import pytest
import torch

from kanlm.edge.onnx_export import write_onnx
from kanlm.model import KanLMConfig, KanLMForCausalLM

torch.set_num_threads(1)
TEXTS = [f"{age} cats see {count} birds, été ☃.\n" for age in ("old", "new") for count in range(200)]


def tiny(ffn_type: str, **fields) -> KanLMForCausalLM:
    sizes = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        kan_grid_size=5,
        kan_num_groups=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = KanLMForCausalLM(KanLMConfig(ffn_type=ffn_type, **(sizes | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def build_tiny():
    return tiny


@pytest.fixture(scope="session")
def tokenizer():
    from kanlm.data.tokenizer import trained_tokenizer

    return trained_tokenizer(iter(TEXTS), 300)


@pytest.fixture(scope="session")
def onnx_of(tokenizer, tmp_path_factory):
    """onnx_of(ffn_type): the model and its ONNX folder with int8 weights, written once."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    made = {}

    def onnx_of(ffn_type: str):
        if ffn_type not in made:
            model = tiny(ffn_type)
            folder = tmp_path_factory.mktemp("edge") / "onnx"
            made[ffn_type] = model, write_onnx(model, tokenizer, folder, int8=True)
        return made[ffn_type]

    return onnx_of
