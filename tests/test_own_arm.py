"""An arm of another package, one class in one file: planned, trained, compared, exported and loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kanlm.runs import read_json

DOCUMENTED = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
TOY = DOCUMENTED.partition("# my_arms.py\n")[2].partition("```")[0].replace('"sine"', '"toy_sine"')
COMPARISON = """
name = "toy"
reference = "toy_sine"
seeds = [0]
[base.model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 64
[base.tokenizer]
vocab_size = 300
[base.data]
source = "stories"
block_size = 32
max_documents = 200
[base.train]
max_tokens = 2048
batch_size = 8
[evaluation]
baselines = false
max_documents = 5
sample_tokens = 4
[speed]
rounds = 1
[[arms]]
name = "toy_sine"
ffn_type = "toy_sine"
[[arms]]
name = "kan_act"
ffn_type = "kan_act"
[arms.model]
kan_num_groups = 1
kan_grid_size = 5
"""
LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model.model.layers[0].mlp).__name__ == "SineMLP"
print(float(model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss))
"""


@pytest.fixture
def toy(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has installed a package with a toy arm."""
    site = tmp_path / "site"
    (site / "toy_arm-1.0.dist-info").mkdir(parents=True)
    (site / "toy_arm.py").write_text(TOY)
    (site / "toy_arm-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toy-arm\nVersion: 1.0\n"
    )
    (site / "toy_arm-1.0.dist-info" / "entry_points.txt").write_text("[kanlm.arms]\ntoy = toy_arm\n")
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), root])}


def run(environment: dict[str, str], cwd: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_an_arm_in_a_file_of_its_own_goes_all_the_way(tmp_path, toy):
    kanlm = [sys.executable, "-m", "kanlm"]
    (tmp_path / "toy.toml").write_text(COMPARISON)
    run(toy, tmp_path, *kanlm, "compare", "toy.toml")
    report = read_json(tmp_path / "runs" / "toy" / "report.json")
    families = {row["arm"]: row["family"] for row in report["tables"][0]["rows"]}
    assert families == {"toy_sine": "mlp", "kan_act": "kan"}
    [trained] = [path for path in (tmp_path / "runs" / "toy" / "arms").iterdir() if "toy_sine" in path.name]
    exported = trained / "hf"
    assert (exported / "toy_arm.py").is_file()
    assert "toy_sine" in (exported / "README.md").read_text()
    # Where neither kanlm nor the toy can be imported, the folder brings its code.
    bare = {name: value for name, value in toy.items() if name != "PYTHONPATH"}
    bare |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    hide = "import sys; sys.modules['kanlm'] = sys.modules['toy_arm'] = None\n"
    loss = run(bare, tmp_path, sys.executable, "-c", hide + LOAD, str(exported))
    assert float(loss) > 0


def test_a_toy_arm_is_planned_and_an_unknown_one_is_named(tmp_path, toy):
    script = "\n".join([
        "from kanlm.model import KanLMConfig",
        "from kanlm import sizing",
        "config = KanLMConfig(ffn_type='toy_sine', vocab_size=50, hidden_size=32, intermediate_size=64,",
        "                     num_hidden_layers=1, num_attention_heads=2)",
        "assert sizing.parameter_counts(config) == sizing.built_counts(config)",
        "assert sizing.matched_width(config, 'gelu', sizing.parameter_counts(config).non_embedding)[1] == 0",
        "try: KanLMConfig(ffn_type='toy_cosine')",
        "except ValueError as error: print(error)",
    ])  # fmt: skip
    printed = run(toy, tmp_path, sys.executable, "-c", script)
    assert "unknown value 'toy_cosine'; choose one of gelu" in printed and "toy_sine" in printed
