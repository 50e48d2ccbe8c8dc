"""A short fp32 loss curve of every arm on the CPU, committed: a refactor leaves it as it is.

A change of numerics regenerates it (`python tests/test_golden_losses.py`) and says why in CHANGELOG.md.
"""

import json
from pathlib import Path

import pytest
import torch

from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.configuration_kanlm import FFN_TYPES

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 6


def losses(ffn_type: str) -> list[float]:
    """Training losses in nats/token on random tokens, plain PyTorch, AdamW."""
    torch.manual_seed(0)
    config = KanLMConfig(
        ffn_type=ffn_type,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        kan_grid_size=6,
        kan_num_groups=4,
        kan_conditioning="whitened",
    )
    model = KanLMForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(1))
    curve = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_losses_are_the_committed_ones(ffn_type):
    golden = json.loads(GOLDEN.read_text())[ffn_type]
    # Other processors round otherwise, and six steps of Adam amplify that.
    assert losses(ffn_type) == pytest.approx(golden, rel=1e-3)


def test_every_arm_learns_and_no_two_are_the_same():
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(FFN_TYPES)
    assert all(curve[-1] < curve[0] for curve in golden.values())
    assert len({tuple(curve) for curve in golden.values()}) == len(FFN_TYPES)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({kind: losses(kind) for kind in FFN_TYPES}, indent=1) + "\n")
