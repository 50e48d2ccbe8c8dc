"""Muon with the matrices of one shape orthogonalised together.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) spends its time in the Newton-Schulz
iteration, and on the matrices of a small model that time is overhead of many small products. Stacked, a
model's matrices are a handful of batched products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, matrices of equal shape (or transposed) stacked; the same state and settings.

    On a CPU the iteration runs in fp32: few CPUs multiply bf16 natively, and there it takes ten times as
    long. On a GPU it runs in bf16, as torch's. Parameters that FSDP2 has sharded are left to torch.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stacks = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = (min(parameter.shape), max(parameter.shape), parameter.device)
                    stacks[shape].append(parameter)
            for parameters in stacks.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices that have one shape up to transposition."""
        momentum, lr = group["momentum"], float(group["lr"])
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter, grad) for parameter, grad in zip(parameters, grads, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        wide = torch.stack([update.mT if is_tall(update) else update for update in updates])
        wide = orthogonalize(wide, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        for parameter, update in zip(parameters, wide, strict=True):
            scale = lr * update_scale(parameter, group["adjust_lr_fn"])
            parameter.add_(update.mT if is_tall(parameter) else update, alpha=-scale)

    def _buffer(self, parameter: Tensor, grad: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        return state["momentum_buffer"]


def is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices [B, R, C], R <= C, with their singular values brought near 1 (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # the largest singular value is at most 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def update_scale(parameter: Tensor, rule: str | None) -> float:
    """Factor of the learning rate by the matrix's shape; see torch.optim.Muon's `adjust_lr_fn`."""
    rows, columns = parameter.shape
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    if rule in (None, "original"):
        return max(1, rows / columns) ** 0.5
    return 1.0
