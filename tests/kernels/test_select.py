"""Which implementation `select` chooses, and that it never falls back in silence."""

import copy
import logging
import shutil

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


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_compiler_suffices_for_the_library_without_which_other_tests_are_skipped():
    native.library()


def test_reference_removes_kernels():
    layers = model()
    layers["phi"].kernel = lambda *a: None
    assert set(kernels.select(layers, "reference").values()) == {"reference"}
    assert layers["phi"].kernel is None


def test_module_without_a_kernel_recomputes():
    try:
        native.library()
    except native.NativeUnavailable as error:
        pytest.skip(str(error))
    assert kernels.select(model(), "cpu") == {"edge": "cpu", "other": "recompute", "phi": "cpu"}


def test_auto_without_a_compiler_says_once_that_it_recomputes(no_compiler, caplog):
    with caplog.at_level(logging.INFO, logger="kanlm.kernels"):
        for _ in range(2):
            assert set(kernels.select(model(), "auto").values()) == {"recompute"}
    assert [record.message for record in caplog.records] == [
        "kernels: recompute on cpu (no C++ compiler found)"
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


@pytest.fixture
def kernel_cache(monkeypatch, tmp_path):
    """A cache of its own, and a compiler that copies: the content of a library does not matter here."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo whole > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("KANLM_KERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("content", ["", "who"])
def test_a_truncated_library_is_built_anew(kernel_cache, content):
    library = native._built()
    assert library.read_text() == "whole\n" and library.stat().st_mode & 0o077 == 0
    library.write_text(content)
    assert native._built() == library and library.read_text() == "whole\n"


def test_a_cache_that_others_may_write_is_refused(kernel_cache):
    library = native._built()
    for place, mode in ((library, 0o722), (kernel_cache, 0o770)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.raises(
            native.NativeUnavailable, match=f"{place} may be written by other users; chmod go-w"
        ):
            native._built()
        place.chmod(before)
    assert native._built() == library


def test_a_cache_of_another_user_is_refused(kernel_cache, monkeypatch):
    native._built()
    monkeypatch.setattr(native.os, "getuid", lambda: 123_456)
    with pytest.raises(native.NativeUnavailable, match="belongs to another user; set KANLM_KERNEL_CACHE"):
        native._built()
