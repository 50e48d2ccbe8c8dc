"""Training by others: transformers' Trainer, and LoRA by PEFT on projections and KAN coefficients."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from kanlm.model import KanLMForCausalLM

peft = pytest.importorskip("peft")

FFN_TARGETS = {
    "swiglu": ["gate_proj", "up_proj", "down_proj"],
    "kan_glu": ["gate_proj", "up_proj", "down_proj"],
    "kan_act": ["up_proj", "down_proj"],
    "kan": ["spline", "base"],
}


def trainer(model, folder, **settings):
    rows = torch.randint(1, 40, (48, 16), generator=torch.Generator().manual_seed(5))
    rows[:, 8:] = rows[:, :8]  # the second half repeats the first: there is something to learn
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    arguments = dict(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=6,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
    )
    return Trainer(model=model, args=TrainingArguments(**(arguments | settings)), train_dataset=data)


def test_trainer_trains_saves_and_resumes_exactly(build, arm, tmp_path):
    first = trainer(build(arm), tmp_path / "a")
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    second = trainer(build(arm, seed=9), tmp_path / "b")
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    resumed = [entry["loss"] for entry in second.state.log_history if "loss" in entry]
    assert resumed[-6:] == pytest.approx(losses[-6:], abs=1e-5)
    for name, parameter in second.model.named_parameters():
        torch.testing.assert_close(parameter, first.model.get_parameter(name), atol=1e-6, rtol=1e-5)
    saved = KanLMForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-12")
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, first.model.get_parameter(name)), name


def test_trainer_honours_the_number_of_items(build, tmp_path):
    """Two micro-batches of 4 or one of 8: with uneven labels one step only if losses are sums over n."""
    stepped = []
    for batch, accumulation in ((8, 1), (4, 2)):
        run = trainer(
            build("kan_glu"),
            tmp_path / str(batch),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            save_strategy="no",
        )
        masked = [[-100] * (i % 13) + row["labels"][i % 13 :] for i, row in enumerate(run.train_dataset)]
        run.train_dataset = run.train_dataset.remove_columns("labels").add_column("labels", masked)
        run.train()
        stepped.append([parameter.detach().clone() for parameter in run.model.parameters()])
    for whole, accumulated in zip(*stepped, strict=True):
        torch.testing.assert_close(whole, accumulated, atol=1e-5, rtol=1e-4)


def test_trainer_predicts_logits_alone(build, tmp_path):
    run = trainer(build("kan_glu"), tmp_path)
    found = run.predict(run.train_dataset.select(range(6)))
    assert found.predictions.shape == (6, 16, 300)  # a cache among the outputs would make it a tuple
    with torch.no_grad():
        ids = torch.tensor(run.train_dataset[:6]["input_ids"])
        expected = run.model(ids).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected, atol=1e-5, rtol=1e-5)


def test_trainer_with_gradient_checkpointing(build, arm, tmp_path):
    losses = []
    for checkpointing in (False, True):
        run = trainer(
            build(arm), tmp_path / str(checkpointing), max_steps=3, gradient_checkpointing=checkpointing
        )
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("targets", ["ffn", "all-linear"])
def test_lora_starts_neutral_trains_reloads_and_merges(build, arm, ids, tmp_path, targets):
    plain = build(arm)
    with torch.no_grad():
        before = plain(ids).logits
    chosen = FFN_TARGETS[arm] if targets == "ffn" else "all-linear"
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=chosen, task_type="CAUSAL_LM", init_lora_weights=True
    )
    model = peft.get_peft_model(plain, settings)
    adapted = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert all(any(f".{target}" in name for name in adapted) for target in FFN_TARGETS[arm])
    with torch.no_grad():
        start = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, start)
        # The plain model may add up in another order where no adapter sits between features and coefficients.
        torch.testing.assert_close(start, before, atol=1e-6, rtol=1e-6)

    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trainable.items() if "lora_B" in name)
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
    assert (trained - before).abs().max() > 0.01

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(arm), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained)
    merged = again.merge_and_unload()
    assert type(merged) is KanLMForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        reloaded = KanLMForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(reloaded(ids).logits, merged(ids).logits)


def test_lora_on_the_learned_functions_themselves(build, ids):
    """Their coefficients are a parameter, not a linear layer: PEFT trains such whole, as modules to save."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["phi"], task_type="CAUSAL_LM")
    plain = build("kan_glu")
    with torch.no_grad():
        before = plain(ids).logits
    model = peft.get_peft_model(plain, settings)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    names = [name for name, p in model.named_parameters() if p.requires_grad and "coefficients" in name]
    assert len(names) == 2 and all(model.get_parameter(name).grad.abs().max() > 0 for name in names)


def test_a_trained_folder_is_self_contained(build, tmp_path):
    """What the Trainer writes holds the code too."""
    trainer(build("kan_glu"), tmp_path, max_steps=1, save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / "modeling_kanlm.py").is_file()
    assert "AutoModelForCausalLM" in json.loads((folder / "config.json").read_text())["auto_map"]
