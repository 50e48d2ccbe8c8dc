"""Bytes that an arm keeps for the backward pass, measured for each implementation, beside what it states.

    python scripts/saved_bytes.py [--width 512] [--hidden 1024] [--tokens 512] [--arm kan_glu ...]

One feed-forward block does a forward pass in fp32; autograd's hooks see every tensor that it saves, a fused
kernel's and a recomputation's too. Counted is what grows with the tokens: the bytes of twice as many less
those of as many, each storage once, without the block's own input. `stated` is the arm's `saved_bytes`, which
`kanlm plan` adds up.
"""

from __future__ import annotations

import click
import torch

from kanlm import kernels
from kanlm.model import KanLMConfig
from kanlm.model.ffn import FeedForward, arm_names, build_ffn

BACKENDS = ("reference", "recompute", "cpu")


def saved_bytes(block: FeedForward, tokens: int) -> int:
    """Bytes that a forward pass of `block` leaves for backward, its input aside."""
    u = torch.randn(1, tokens, block.hidden_size).requires_grad_()
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = block(u)
    assert output.requires_grad  # the graph, and with it every storage, is alive while they are counted
    storages.pop(u.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--width", default=512, show_default=True, help="hidden_size of the block.")
@click.option("--hidden", default=1024, show_default=True, help="intermediate_size of the block.")
@click.option("--tokens", default=512, show_default=True)
@click.option("--arm", "arms", multiple=True, help="Of these arms alone; may be repeated.")
def main(width: int, hidden: int, tokens: int, arms: tuple[str, ...]) -> None:
    click.echo(f"bytes a token, D {width}, h {hidden}, fp32")
    click.echo(f"{'arm':<12}{'stated':>10}" + "".join(f"{backend:>12}" for backend in BACKENDS))
    for name in arms or arm_names():
        config = KanLMConfig(ffn_type=name, hidden_size=width, intermediate_size=hidden)
        block = build_ffn(config)
        row = f"{name:<12}{block.saved_bytes(4):>10,}"
        for backend in BACKENDS:
            try:
                kernels.select(block, backend)
            except ValueError:  # no C++ compiler here
                row += f"{'–':>12}"
                continue
            grown = saved_bytes(block, 2 * tokens) - saved_bytes(block, tokens)
            row += f"{grown / tokens:>12,.0f}"
        click.echo(row)


if __name__ == "__main__":
    main()
