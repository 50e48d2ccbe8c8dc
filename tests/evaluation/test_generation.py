import re

import pytest
import torch
from click.testing import CliRunner

from kanlm import kernels
from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation import decoding, generation
from kanlm.evaluation.generation import generate
from kanlm.kernels import decode
from kanlm.kernels.native import NativeUnavailable
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


def test_several_prompts_are_one_batch_that_changes_none(folder, capsys, caplog, monkeypatch):
    monkeypatch.setattr(decode, "_logged", set())
    prompts = ["the cat", "a much longer prompt, the dog"]
    greedy = SETTINGS | {"temperature": 0.0}
    together = generate(folder, prompts, **greedy)
    assert together == [generate(folder, prompt, **greedy)[0] for prompt in prompts]
    why = [line for line in caplog.messages if "takes one on a CPU" in line]
    assert why == ["decoding: transformers' generate (2 prompts; the native decoder takes one on a CPU)"]
    printed = capsys.readouterr()
    assert "\n\n".join(together) in printed.out
    assert re.search(
        r"^\d+ tokens in [\d.]+ s: [\d,]+ tokens/s \(cpu, \w+ (kernels|decoder)\)$", printed.err, re.M
    )


def test_a_small_top_p_is_greedy(folder):
    assert generate(folder, "the cat", **SETTINGS | {"top_p": 1e-9}) == generate(
        folder, "the cat", **SETTINGS | {"temperature": 0.0}
    )


def test_the_verb_reads_standard_input_and_goes_line_by_line(folder):
    asked = ["generate", folder, "--max-new-tokens", "4", "--temperature", "0"]
    greedy = SETTINGS | {"temperature": 0.0, "max_new_tokens": 4}
    expected = generate(folder, "the cat", **greedy)[0]
    for typed in ("the cat", "the cat\n"):  # echo ends it with a newline
        piped = CliRunner().invoke(cli, asked, input=typed)
        assert piped.exit_code == 0 and piped.stdout == expected + "\n"
    both = CliRunner().invoke(cli, [*asked, "--prompt", "the cat", "-i"], input="the cat\n")
    assert both.exit_code == 0 and both.stdout.count(expected) == 2
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


@pytest.fixture
def compiled():
    try:
        decode.library()
    except NativeUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 0, "top_p": 0.9}, {"top_k": 5}])
def test_native_text_is_that_of_transformers(folder, compiled, monkeypatch, capsys, changes):
    native = generate(folder, "the cat", **SETTINGS | changes)
    assert "(cpu, native decoder)" in capsys.readouterr().err
    monkeypatch.setattr(decoding, "decoder_for", lambda *a: None)
    assert generate(folder, "the cat", **SETTINGS | changes) == native
    assert "native" not in capsys.readouterr().err


def test_int8_weights_say_their_error(folder, compiled, capsys):
    generate(folder, "the cat", **SETTINGS, weights="int8")
    assert re.search(r"native decoder, int8 weights with an rms error of 0\.\d\d%\)", capsys.readouterr().err)


def test_int8_weights_for_a_batch_are_refused(folder):
    with pytest.raises(UserError, match="--weights: int8 needs the native decoder: one prompt"):
        generate(folder, ["the", "cat"], **SETTINGS, weights="int8")


def test_what_computed_is_named(folder, compiled):
    model = KanLMForCausalLM.from_pretrained(folder)
    for backend, words in (("cpu", "fused kernels"), ("recompute", "reference kernels"), ("reference",) * 2):
        kernels.select(model, backend)
        assert words in generation.speed(3, 1.0, model)


def test_a_stop_token_ends_the_text():
    class Counting:
        def prefill(self, ids):
            return self.step(ids[-1])

        def step(self, token):
            return torch.eye(9)[token + 1]

    assert decoding.continue_tokens(Counting(), [1], 7, stop={4}) == [2, 3, 4]
    assert decoding.continue_tokens(Counting(), [1], 3, stop={7}) == [2, 3, 4]


def test_settings_that_only_transformers_knows_go_to_it(folder, caplog):
    model = KanLMForCausalLM.from_pretrained(folder)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.num_beams = 2
    assert decoding.decoder_for(model) is None
    assert "generation_config sets num_beams, repetition_penalty" in caplog.text
