import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kanlm.evaluation.perplexity import validation_loss
from kanlm.model import KanLMConfig, KanLMForCausalLM


class Cache:
    """The token cache's face, in memory: 14 blocks of 16, so that processes have unequal shares."""

    ids = np.random.default_rng(0).integers(0, 90, 217)
    document_starts = np.array([0, 50, 51])
    manifest = {"tokens": 217, "bytes": 500}

    def __len__(self):
        return len(self.ids)

    def tokens(self, start, stop):
        return self.ids[start:stop]


def found(batch_size: int) -> dict[str, float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = KanLMForCausalLM(KanLMConfig(vocab_size=90, initializer_range=0.3, **sizes))
    return validation_loss(model, Cache(), block_size=16, batch_size=batch_size)


def process(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([found(batch_size) for batch_size in (1, 2, 5, 20)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_find_the_same(tmp_path):
    mp.start_processes(process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert first == second
    alone = found(4)
    for together in first:
        assert together["tokens"] == alone["tokens"] == 216
        assert together == pytest.approx(alone, rel=1e-6)
