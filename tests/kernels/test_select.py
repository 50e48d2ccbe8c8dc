"""Which implementation `select` chooses, and that it never falls back in silence."""

import copy
import logging

import pytest
import torch
from torch import nn

from kanlm import kernels
from kanlm.kernels import native
from kanlm.model.kan import KANLinear, LearnedFunction


def model():
    return nn.ModuleDict(
        {"edge": KANLinear(4, 3), "other": KANLinear(4, 3, "chebyshev"), "phi": LearnedFunction(4, 2)}
    )


@pytest.fixture
def no_compiler(monkeypatch):
    def missing():
        raise native.NativeUnavailable("no C++ compiler found")

    monkeypatch.setattr(kernels, "library", missing)
    monkeypatch.setattr(kernels, "_logged", set())


def test_reference_removes_kernels():
    layers = model()
    layers["phi"].kernel = lambda *a: None
    assert set(kernels.select(layers, "reference").values()) == {"reference"}
    assert layers["phi"].kernel is None


def test_module_without_a_kernel_keeps_the_reference():
    try:
        native.library()
    except native.NativeUnavailable as error:
        pytest.skip(str(error))
    assert kernels.select(model(), "cpu") == {"edge": "cpu", "other": "reference", "phi": "cpu"}


def test_auto_without_a_compiler_says_once_that_it_uses_the_reference(no_compiler, caplog):
    with caplog.at_level(logging.INFO, logger="kanlm.kernels"):
        for _ in range(2):
            assert set(kernels.select(model(), "auto").values()) == {"reference"}
    assert [record.message for record in caplog.records] == [
        "kernels: reference implementation on cpu (no C++ compiler found)"
    ]


def test_cpu_without_a_compiler_is_an_error(no_compiler):
    with pytest.raises(ValueError, match="'cpu' cannot run here: no C\\+\\+ compiler found"):
        kernels.select(model(), "cpu")


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        kernels.select(model(), "fast")


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("KANLM_KERNEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native.NativeUnavailable, match="does not compile native.cpp: fatal error: broken"):
        native._built()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_choice_is_not_saved_and_survives_a_copy():
    layer = KANLinear(4, 3)
    kernels.select(layer, "auto")
    assert set(layer.state_dict()) == {"spline.weight", "base.weight"}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
