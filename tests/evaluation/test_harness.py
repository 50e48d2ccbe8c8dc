import importlib.util
import json

import pytest
import torch

from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation.harness import harness_perplexity, write_task
from kanlm.evaluation.perplexity import evaluate
from kanlm.model import KanLMConfig, KanLMForCausalLM

DOCUMENTS = [
    "The wind was cold, and the old house on the hill stood empty. " * 4,
    "x",
    " A short one, with white space at both ends.\n",
    "Naïve café, 日本語 and \U0001f600.",
]
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = trained_tokenizer(iter(DOCUMENTS * 3), vocab_size=300)
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    KanLMForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_task_holds_the_documents_unchanged(tmp_path):
    path = write_task(tmp_path / "tasks", "held_out", DOCUMENTS)
    task = json.loads(path.read_text())
    assert (task["task"], task["output_type"]) == ("held_out", "loglikelihood_rolling")
    with open(task["dataset_kwargs"]["data_files"]["test"], encoding="utf-8") as lines:
        assert [json.loads(line)["text"] for line in lines] == DOCUMENTS


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-evaluation-harness is not installed (pip install lm-eval)")
def test_perplexity_equals_the_harness(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    ours = evaluate(folder, DOCUMENTS, "documents", "test")
    theirs = harness_perplexity(folder, write_task(tmp_path, "held_out", DOCUMENTS), context_length=24)
    assert ours.word_perplexity == pytest.approx(theirs["word_perplexity"], rel=1e-4)
    assert ours.bits_per_byte == pytest.approx(theirs["bits_per_byte"], rel=1e-6)


@pytest.mark.skipif(HAS_HARNESS, reason="lm-evaluation-harness is installed")
def test_a_missing_harness_is_one_clear_line(folder, tmp_path):
    with pytest.raises(UserError, match="pip install lm-eval"):
        harness_perplexity(folder, write_task(tmp_path, "held_out", DOCUMENTS), context_length=24)
