"""A KAN feed-forward block in a plain torch transformer that knows nothing else of kanlm.

    python examples/transformer_block.py     under a minute on a CPU

A byte-level decoder is trained on the sources of Python's own library, once with GELU and once with a
`LearnedFunction` in its place that starts as GELU; both see the same batches. What to take from it:

    LearnedFunction(channels, groups=...)    in place of an activation
    KANLinear(inputs, outputs)               in place of a linear layer
    kan_coefficient_names(model)             the parameters to train without weight decay
    select_kernels(model)                    fused kernels for these layers, where there are some
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanlm import LearnedFunction, kan_coefficient_names, select_kernels

WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 64


class Block(nn.Module):
    """Pre-norm attention and W2 f(W1 x): x [B, T, D] to [B, T, D]."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), activation, nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, E]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm_2(x))


class Decoder(nn.Module):
    """Bytes [B, T] to logits [B, T, 256]."""

    def __init__(self, learned: bool):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(
            *(
                Block(LearnedFunction(4 * WIDTH, groups=4, initial="gelu") if learned else nn.GELU())
                for _ in range(LAYERS)
            )
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.blocks(x))


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; the coefficients of learned functions are not decayed."""
    names = kan_coefficient_names(model)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name in names].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[False], "weight_decay": 0.1},
            {"params": groups[True], "weight_decay": 0.0},
        ],
        lr=learning_rate,
    )


def text() -> Tensor:
    """About half a megabyte of Python sources as bytes [N]."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("a*.py")))[:500_000]
    return torch.frombuffer(bytearray(sources), dtype=torch.uint8).long()


def trained(learned: bool, steps: int) -> tuple[Decoder, float]:
    """The model and its loss in nats/byte over the last tenth of the text, which it never saw."""
    data = text()
    split = len(data) * 9 // 10
    torch.manual_seed(0)
    model = Decoder(learned)
    chosen = select_kernels(model)
    optimizer = optimizer_of(model, learning_rate=3e-3)
    random = torch.Generator().manual_seed(1)  # the same batches for both
    for _ in range(steps):
        starts = torch.randint(split - CONTEXT - 1, (16, 1), generator=random)
        rows = data[starts + torch.arange(CONTEXT + 1)]  # [B, T + 1]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = data[split:][: 200 * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    with torch.no_grad():
        held_out_loss = F.cross_entropy(model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten())
    kernels = ", ".join(sorted(set(chosen.values()))) or "none needed"
    print(f"{'learned' if learned else 'GELU':8} {held_out_loss:.4f} nats/byte; kernels: {kernels}")
    return model, float(held_out_loss)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    _, gelu = trained(False, options.steps)
    model, learned = trained(True, options.steps)
    function = model.blocks[0].feed_forward[1]
    x = torch.linspace(-3, 3, 5).unsqueeze(1).expand(-1, 4 * WIDTH)
    with torch.no_grad():
        print("one learned function at -3, -1.5, 0, 1.5, 3:", function(x)[:, 0].tolist())
    return {"gelu": gelu, "learned": learned}


if __name__ == "__main__":
    main()
