import pytest
import torch

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
    texts = [generate(folder, "the cat", **SETTINGS | {"seed": seed}) for seed in (1, 1, 2)]
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
