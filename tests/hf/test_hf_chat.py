"""Chat and fine-tuning on an exported model: stop token, truncation, LoRA, a head for labels."""

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
ANSWERS = {"old": "cats see", "new": "birds"}


@pytest.fixture
def tokenizer_of(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported("kan_glu"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_special_tokens_in_a_text_are_read_and_long_texts_cut(tokenizer_of):
    eos = tokenizer_of.eos_token_id
    assert tokenizer_of("old<|endoftext|>")["input_ids"][-1] == eos
    assert eos not in tokenizer_of("old<|endoftext|>", split_special_tokens=True)["input_ids"]
    chat = tokenizer_of.apply_chat_template([{"role": "user", "content": "old"}], tokenize=True)["input_ids"]
    assert chat[-1] == eos
    assert tokenizer_of.model_max_length == 64
    assert len(tokenizer_of("cats " * 200, truncation=True)["input_ids"]) == 64
    assert tokenizer_of.add_special_tokens({"additional_special_tokens": ["<|user|>"]}) == 1
    assert tokenizer_of("<|user|>old")["input_ids"][0] == tokenizer_of.convert_tokens_to_ids("<|user|>")


def test_a_model_tuned_with_lora_stops_at_its_eos(exported, tokenizer_of, tmp_path):
    """docs/hf.md's recipe: its collator pads labels by length, so that the stop token is learned."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(exported("kan_glu"))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64))
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    rows = []
    for question, answer in ANSWERS.items():
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = list(tokenizer_of.apply_chat_template(messages, tokenize=True)["input_ids"])
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    settings = TrainingArguments(
        tmp_path, max_steps=110, learning_rate=2e-2, lr_scheduler_type="cosine", use_cpu=True, seed=0,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer_of)
    Trainer(model, settings, train_dataset=rows, data_collator=collator).train()
    for question, answer in ANSWERS.items():
        prompt = tokenizer_of(f"user: {question}<|endoftext|>assistant:", return_tensors="pt")
        new = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer_of.decode(new) == f" {answer}<|endoftext|>"


def test_a_head_for_labels_loads_trains_and_reloads(exported, tmp_path):
    folder = exported("kan_glu")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.norm.weight, base.model.norm.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["old cats see 1 birds", "new"], padding=True, return_tensors="pt")
    found = model(**batch, labels=torch.tensor([0, 2]))
    assert found.logits.shape == (2, 3) and found.loss > 0
    found.loss.backward()
    assert model.score.weight.grad.abs().max() > 0
    alone = model(**tokenizer(["new"], return_tensors="pt")).logits
    torch.testing.assert_close(found.logits[1:], alone, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
