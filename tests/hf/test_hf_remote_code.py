"""An exported folder in processes where kanlm cannot be imported and nothing outside can be reached."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import kanlm.model
from kanlm.model import KanLMForCausalLM

CAPSULE = Path(kanlm.model.__file__).parent
SHIPPED = {path.name for path in CAPSULE.glob("*.py")} - {"__init__.py", "modeling_converted.py"}
BARRED = """
import socket, sys

class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kanlm":
            raise ModuleNotFoundError(f"barred in this test: {name}")

sys.meta_path.insert(0, Barred())

def no_network(*arguments, **settings):
    raise AssertionError("tried to reach the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
"""


def run_clean(program: str, tmp_path: Path, *arguments: object) -> str:
    """The output of `program` in a process of its own, after BARRED, with an empty cache of remote code."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-c", BARRED + program, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_clean_process_gives_the_same_logits_saves_and_reloads(exported, arm, ids, tmp_path):
    folder = exported(arm)
    reference = KanLMForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = {"ids": ids, "logits": reference(ids).logits}
        expected["hidden"] = reference.model(ids).last_hidden_state
    expected["generated"] = reference.generate(ids, max_new_tokens=8, do_sample=False)
    torch.save(expected, tmp_path / "expected.pt")
    program = """
folder, expected, again = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3]
ids = expected["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected["logits"])
    assert torch.equal(base(ids).last_hidden_state, expected["hidden"])
assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected["generated"])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer.decode(tokenizer("naïve ☃")["input_ids"]) == "naïve ☃"

model.save_pretrained(again, max_shard_size="30KB")
tokenizer.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(reloaded(ids).logits, expected["logits"])

torch.manual_seed(0)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
attention = AutoModelForCausalLM.from_config(config, trust_remote_code=True).model.layers[0].self_attn
scale = attention.o_proj.weight.std() / attention.q_proj.weight.std()
assert 0.4 < scale < 0.6, scale  # 1 / sqrt(2 * 2 layers): a remote model starts as a local one does
print("done")
"""
    assert run_clean(program, tmp_path, folder, tmp_path / "expected.pt", tmp_path / "again").endswith(
        "done\n"
    )
    with torch.no_grad():
        resaved = KanLMForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(resaved(ids).logits, expected["logits"])
    assert SHIPPED <= {path.name for path in (tmp_path / "again").iterdir()}
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    "arm", ["kan_glu", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("swiglu", "kan"))]
)
def test_the_harness_scores_the_folder_as_we_do(exported, arm, tmp_path):
    """lm-evaluation-harness, offline, without kanlm, on a local task."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    from kanlm.evaluation.harness import write_task
    from kanlm.evaluation.perplexity import evaluate

    documents = [
        "old cats see 12 birds, été ☃.\n" * 5,
        "x",
        " new cats \n see\tnothing",
        "日本語 and \U0001f600.",
    ]
    folder = exported(arm)
    ours = evaluate(folder, documents, "documents", "test", context_length=24)
    write_task(tmp_path / "tasks", "held_out", documents)
    program = """
import json
import lm_eval
from lm_eval.tasks import TaskManager
settings = {"pretrained": sys.argv[1], "trust_remote_code": True, "dtype": "float32", "max_length": 24}
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
settings |= {"batch_size": 4, "device": "cpu"}
found = lm_eval.simple_evaluate("hf", settings, tasks=["held_out"], task_manager=tasks, bootstrap_iters=0)
scores = found["results"]["held_out"]
print()
print(json.dumps({name.split(",")[0]: scores[name] for name in scores}, default=str))
"""
    theirs = json.loads(run_clean(program, tmp_path, folder, tmp_path / "tasks").splitlines()[-1])
    for metric in ("word_perplexity", "bits_per_byte"):
        assert getattr(ours, metric) == pytest.approx(theirs[metric], rel=1e-6)


def test_a_clean_process_also_names_missing_parameters(build, tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    from kanlm.export import export_model

    folder = export_model(build("kan_glu"), tokenizer, tmp_path / "model", {})
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.phi.coefficients"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    program = """
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
"""
    assert "checkpoint lacks model.layers.0.mlp.phi.coefficients" in run_clean(program, tmp_path, folder)


def test_the_folder_asks_for_trust_where_kanlm_is_not_imported(exported, tmp_path):
    """Its model does; its tokenizer has no code and works without. The lines on its card say so, and run."""
    folder = exported("kan_glu")
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    assert "AutoTokenizer.from_pretrained(path, trust_remote_code=False)" in lines
    program = f"""
path, text = sys.argv[1], "old cats"
{lines}
print(tokenizer.decode(tokenizer("old cats<|endoftext|>")["input_ids"]))
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print(error)
"""
    said = run_clean(program, tmp_path, folder)
    assert said.startswith("old cats") and "\nold cats<|endoftext|>\n" in said
    assert "trust_remote_code=True" in said.rpartition("<|endoftext|>")[2]


def test_no_trust_is_needed_after_import_kanlm(exported, tmp_path):
    program = """
import sys
import kanlm
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
print(type(model).__module__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported("kan_glu"))], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "kanlm.model.modeling_kanlm", done.stderr[-2000:]


def test_shipped_files_import_only_flat_siblings_torch_and_transformers(exported):
    folder = exported("kan_glu")
    assert {path.name for path in folder.glob("*.py")} == SHIPPED
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import)\s+kanlm", text, re.M), f"{path.name} imports the package"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (
                    f"{path.name}: {ast.unparse(node)}"
                )
                assert f"{node.module}.py" in SHIPPED


def test_auto_map_of_the_folder(exported, arm):
    config = json.loads((exported(arm) / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_kanlm.KanLMConfig",
        "AutoModel": "modeling_kanlm.KanLMModel",
        "AutoModelForCausalLM": "modeling_kanlm.KanLMForCausalLM",
        "AutoModelForSequenceClassification": "modeling_kanlm.KanLMForSequenceClassification",
    }
    assert config["architectures"] == ["KanLMForCausalLM"] and config["model_type"] == "kanlm"
    assert not {"kernel", "kernels", "device", "compile"} & set(config)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "naïve café\r\n\ttabs\x00\x7f",
        "日本語 🧑🏽‍🚀 עברית",
        "  leading and trailing  ",
        "<|endoftext|> in the text",
    ],
)
def test_the_tokenizer_gives_every_text_back(exported, text):
    tokenizer = AutoTokenizer.from_pretrained(exported("kan_glu"))
    assert tokenizer.is_fast
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_special_tokens_are_declared(build, tokenizer, tmp_path):
    from kanlm.export import export_model

    model = build("kan_glu", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    folder = export_model(model, tokenizer, tmp_path / "model", {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = KanLMForCausalLM.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = {getattr(holder, name) for holder in (tokenizer, model.config, model.generation_config)}
        assert ids == {tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_a_chat_template_is_kept(build, tokenizer, tmp_path):
    import copy

    from kanlm.export import export_model

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    folder = export_model(build("kan_glu"), chatty, tmp_path / "chat", {})
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"
