"""`import kanlm`: light, with public names that come on first use and that type checkers see too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kanlm

SECONDS = "import time; start = time.process_time(); import kanlm; print(time.process_time() - start)"


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_takes_under_a_fifth_of_a_second_of_processor_time():
    assert min(float(run(SECONDS)) for _ in range(3)) < 0.2


def test_public_names_are_those_that_type_checkers_see():
    (block,) = (
        node
        for node in ast.parse(Path(kanlm.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(seen) == sorted(kanlm.__all__)
    assert seen == {name: (home, kanlm._NAMES_THERE.get(name, name)) for name, home in kanlm._HOMES.items()}
    assert (Path(kanlm.__file__).parent / "py.typed").is_file()


def test_every_public_name_is_there():
    for name in kanlm.__all__:
        assert getattr(kanlm, name).__module__ == kanlm._HOMES[name]
    assert set(kanlm.__all__) <= set(dir(kanlm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kanlm.nothing  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "import kanlm",
        "from transformers import AutoModelForCausalLM; import kanlm",
        "import kanlm; import transformers.modeling_layers",  # imports the Auto classes in its middle
        "from kanlm import KanLMForCausalLM",
    ],
)
def test_auto_classes_know_the_models_whatever_is_imported_first(first):
    program = f"""
{first}
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(
    "kanlm", vocab_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1
)
print(type(AutoModelForCausalLM.from_config(config)).__module__)
"""
    assert run(program) == "kanlm.model.modeling_kanlm"
