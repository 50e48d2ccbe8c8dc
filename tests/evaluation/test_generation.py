import re

import pytest
import torch
from click.testing import CliRunner

from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation.generation import generate
from kanlm.model import KanLMConfig, KanLMForCausalLM

SETTINGS = {"max_new_tokens": 8, "temperature": 0.8, "top_k": 20, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = trained_tokenizer(iter(["the cat sat on the mat; the dog did not"] * 3), vocab_size=280)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = KanLMConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.3, **sizes
    )
    KanLMForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_seed_repeats_the_text_and_another_does_not(folder, capsys):
    texts = [generate(folder, "the cat", **SETTINGS | {"seed": seed})[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the cat") and texts[0] in capsys.readouterr().out


def test_temperature_zero_is_greedy(folder):
    text = generate(folder, "the cat", **SETTINGS | {"temperature": 0.0})
    assert text == generate(folder, "the cat", **SETTINGS | {"temperature": 0.0, "seed": 9})
    assert text == generate(folder, "the cat", **SETTINGS | {"top_k": 1})


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("", {}, "--prompt"),
        ("the cat", {"max_new_tokens": 32}, r"--max-new-tokens: .* 32 positions; ask for at most \d+"),
    ],
)
def test_impossible_requests_are_one_line(folder, prompt, changes, message):
    with pytest.raises(UserError, match=message):
        generate(folder, prompt, **SETTINGS | changes)


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        generate(str(tmp_path / "absent"), "the cat", **SETTINGS)


def test_several_prompts_are_one_batch_that_changes_none(folder, capsys):
    prompts = ["the cat", "a much longer prompt, the dog"]
    greedy = SETTINGS | {"temperature": 0.0}
    together = generate(folder, prompts, **greedy)
    assert together == [generate(folder, prompt, **greedy)[0] for prompt in prompts]
    printed = capsys.readouterr()
    assert "\n\n".join(together) in printed.out
    assert re.search(r"^\d+ tokens in [\d.]+ s: [\d,]+ tokens/s \(cpu, \w+ kernels\)$", printed.err, re.M)


def test_a_small_top_p_is_greedy(folder):
    assert generate(folder, "the cat", **SETTINGS | {"top_p": 1e-9}) == generate(
        folder, "the cat", **SETTINGS | {"temperature": 0.0}
    )


def test_the_verb_reads_standard_input_and_goes_line_by_line(folder):
    asked = ["generate", folder, "--max-new-tokens", "4", "--temperature", "0"]
    greedy = SETTINGS | {"temperature": 0.0, "max_new_tokens": 4}
    expected = generate(folder, "the cat", **greedy)[0]
    piped = CliRunner().invoke(cli, asked, input="the cat")
    assert piped.exit_code == 0 and piped.stdout == expected + "\n"
    lines = CliRunner().invoke(cli, [*asked, "--interactive"], input=f"the cat\n\n{'x' * 99}\nthe cat\n")
    assert lines.exit_code == 0 and lines.stdout.count(expected) == 2
    assert "give a shorter prompt" in lines.stderr
    empty = CliRunner().invoke(cli, asked, input="")
    assert isinstance(empty.exception, UserError) and "--prompt" in str(empty.exception)


def test_a_run_instead_of_a_model_says_so(tmp_path):
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="a run, not a model; run `kanlm export`"):
        generate(str(tmp_path), "the cat", **SETTINGS)
