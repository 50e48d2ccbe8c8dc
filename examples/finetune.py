"""Fine-tune an exported model by transformers' Trainer with a LoRA adapter of PEFT, merge it, load it again.

    python examples/finetune.py runs/tiny-kan_glu/hf tuned     a model of yours (pip install peft)
    python examples/finetune.py                                a small untrained one, to see that it runs

Only public interfaces of transformers and peft are used: kanlm is imported so that no trust is asked for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import kanlm

FACTS = [f"Question: {a} plus {b}? Answer: {a + b}." for a in range(10) for b in range(10)]


class Texts(Dataset):
    """Texts, each with the tokenizer's EOS at its end so that the model learns to stop; all are targets."""

    def __init__(self, tokenizer, texts: list[str], length: int):
        eos = tokenizer.eos_token_id
        self.rows = []
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1], eos]
            padding = length - len(ids)
            self.rows.append(
                {
                    "input_ids": torch.tensor(ids + [eos] * padding),
                    "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
                    "labels": torch.tensor(ids + [-100] * padding),
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self.rows[place]


def small_model(folder: Path) -> Path:
    """An exported model with random weights."""
    from kanlm.data.tokenizer import trained_tokenizer
    from kanlm.export import export_model

    tokenizer = trained_tokenizer(iter(FACTS), 300)
    config = kanlm.KanLMConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, ffn_type="kan_glu",
    )  # fmt: skip
    torch.manual_seed(0)
    return export_model(kanlm.KanLMForCausalLM(config), tokenizer, folder / "model", {"name": "small"})


def loss_on(model, dataset: Texts) -> float:
    """Nats/token over `dataset`."""
    model.eval()
    rows = [dataset[place] for place in range(len(dataset))]
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return float(model(**batch).loss)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of an exported model")
    parser.add_argument("out", nargs="?", help="folder for the tuned model")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(options.model) if options.model else small_model(Path(scratch))
        out = Path(options.out) if options.out else Path(scratch) / "tuned"
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source)
        data = Texts(tokenizer, FACTS, length=32)
        before = loss_on(model, data)

        # Every linear layer gets an adapter, the edge functions of `kan` too: their coefficients are one.
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = get_peft_model(model, adapter)
        tuned.print_trainable_parameters()
        settings = TrainingArguments(
            output_dir=str(Path(scratch) / "trainer"), max_steps=options.steps, learning_rate=1e-2,
            per_device_train_batch_size=16, lr_scheduler_type="cosine", logging_steps=20, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(model=tuned, args=settings, train_dataset=data).train()

        merged = tuned.merge_and_unload().to("cpu")
        merged.save_pretrained(out)
        tokenizer.save_pretrained(out)
        again = AutoModelForCausalLM.from_pretrained(out)
        after = loss_on(again, data)
        print(f"nats/token before {before:.3f}, after {after:.3f}")
        return {"before": before, "after": after}


if __name__ == "__main__":
    main()
