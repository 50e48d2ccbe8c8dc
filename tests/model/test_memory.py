"""Peak memory of a KAN layer's forward and backward beside an MLP's with as many parameters."""

import pytest
import torch

from kanlm import kernels
from kanlm.bench.layer import TwoLayerMLP
from kanlm.bench.measure import Arm, peak_memory
from kanlm.kernels import native
from kanlm.model.kan import KANLinear

TOKENS, WIDTH, FUNCTIONS = 4096, 512, 11
PARAMETERS = WIDTH * WIDTH * (FUNCTIONS + 1)


def arm(form: dict | None, backend: str) -> Arm:
    """A step of the layer of `form`, or of the MLP."""
    torch.manual_seed(0)
    if form is None:
        layer = TwoLayerMLP(WIDTH, WIDTH, PARAMETERS)
    else:
        layer = KANLinear(WIDTH, WIDTH, **form)
        assert layer.num_functions == FUNCTIONS
        kernels.select(layer, backend)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert parameters == PARAMETERS
    x, gradient = torch.randn(TOKENS, WIDTH).requires_grad_(), torch.randn(TOKENS, WIDTH)

    def step():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(gradient)

    return Arm("layer", step, TOKENS, parameters)


def has_native_kernels() -> bool:
    try:
        native.library()
    except native.NativeUnavailable:
        return False
    return True


@pytest.mark.slow
def test_peak_memory_is_within_one_and_a_half_of_the_mlps():
    if (mlp := peak_memory(arm, None, "reference")) is None:
        pytest.skip("this system does not tell a process's peak memory")
    cases = [("recompute", {"grid_size": 8}), ("recompute", {"basis": "wavelet", "grid_size": 10})]
    cases += [("recompute", {"grid_size": 8, "conditioning": "whitened"})]
    if has_native_kernels():
        cases += [("cpu", {"grid_size": 8})]
    ratios = {
        f"{backend} {form}": peak_memory(arm, form, backend)["peak_bytes"] / mlp["peak_bytes"]
        for backend, form in cases
    }
    assert max(ratios.values()) <= 1.5, ratios
