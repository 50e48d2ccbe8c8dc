"""What is no causal language model, or not all of one, is refused in one line; nothing random is run."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation.loading import load_causal_lm

SIZES = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
NO_DECODER = "is an encoder, no causal language model; looked for is_decoder"


@pytest.fixture
def save(tmp_path):
    """save(model): its folder, with a tokenizer."""

    def save(model, tokenizer: bool = True):
        model.save_pretrained(tmp_path)
        if tokenizer:
            trained_tokenizer(iter(["the cat sat on the mat " * 9]), 300).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize(
    "model, words",
    [
        (BertForMaskedLM(BertConfig(**SIZES)), NO_DECODER),
        (
            T5ForConditionalGeneration(
                T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2)
            ),
            "no causal language model; looked for an architecture that AutoModelForCausalLM knows",
        ),
        (
            LlamaModel(LlamaConfig(**SIZES)),
            "no weights that fit for 1 parameters of LlamaForCausalLM, lm_head.weight",
        ),
    ],
    ids=["encoder", "encoder and decoder", "no head"],
)
def test_other_models_are_one_line(save, model, words):
    folder = save(model)
    with pytest.raises(UserError, match=f"^model {folder}: [^\\n]*{words}"):
        load_causal_lm(folder)


def test_a_model_without_a_tokenizer_is_one_line(save):
    folder = save(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer=False)
    with pytest.raises(UserError, match=f"^model {folder}: has no tokenizer"):
        load_causal_lm(folder)


def test_weights_of_another_size_are_one_line(save):
    folder = save(LlamaForCausalLM(LlamaConfig(**SIZES)))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 16', '"intermediate_size": 8'))
    with pytest.raises(UserError, match="no weights that fit for 3 parameters.*down_proj"):
        load_causal_lm(folder)


def test_decoders_of_encoder_families_and_tied_heads_load(save):
    model, _ = load_causal_lm(save(BertLMHeadModel(BertConfig(is_decoder=True, **SIZES))))
    assert isinstance(model, BertLMHeadModel)
    tied = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SIZES)).eval()
    model, _ = load_causal_lm(save(tied))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tied(ids).logits)
