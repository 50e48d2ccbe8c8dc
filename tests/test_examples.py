"""The examples run as they stand, in this process; only the longer two with fewer steps."""

import math
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]


def test_every_example_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'main_of("{path.name}")' in text for path in EXAMPLES.glob("*.py"))


def test_regression_finds_the_formula():
    found = main_of("regression.py")([])
    assert found["fine grid"] < found["coarse grid"] < 0.05
    assert found["formula's error"] < 1e-3 and "exp" in found["formula"] and "sin" in found["formula"]


def test_a_block_in_a_plain_transformer_learns():
    found = main_of("transformer_block.py")(["--steps", "40"])
    assert all(loss < 0.75 * math.log(256) for loss in found.values())
    assert found["learned"] != found["gelu"]


def test_an_exported_model_is_fine_tuned(tmp_path):
    out = tmp_path / "tuned"
    model = main_of("finetune.py").__globals__["small_model"](tmp_path)
    found = main_of("finetune.py")([str(model), str(out), "--steps", "30"])
    assert found["after"] < found["before"] - 0.5
    assert (out / "modeling_kanlm.py").is_file() and (out / "tokenizer.json").is_file()
