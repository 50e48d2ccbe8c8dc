"""Legend: B windows, T tokens, V vocabulary."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from kanlm import metrics
from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation import perplexity
from kanlm.model import KanLMConfig, KanLMForCausalLM

DOCUMENTS = [
    "The wind was cold, and the old house on the hill stood empty; nobody went there after dark. " * 3,
    "x",
    "",
    "A short one.\n",
    "Naïve café, 日本語 and \U0001f600: bytes are not characters. <|endoftext|> is text here.",
    "def area(width, height):\n    return width * height\n" * 4,
]


class Letters:
    """A tokenizer of the letters a, b, ...; `</s>` is the last id."""

    def __init__(self, size: int, bos_token_id: int | None = None, eos_token_id: int | None = None):
        self.size, self.bos_token_id, self.eos_token_id = size, bos_token_id, eos_token_id

    def __call__(self, text: str, **settings) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


class Bigram(nn.Module):
    """A language model of one table: p(next | this)."""

    def __init__(self, probabilities: list[list[float]], positions: int = 8):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())  # [V, V]
        self.config = KanLMConfig(vocab_size=len(probabilities), max_position_embeddings=positions)

    def get_input_embeddings(self):
        return None

    get_output_embeddings = get_input_embeddings

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.table[input_ids])  # [B, T, V]


# p(a) and p(b) after a, after b, after the end of a document (id 2).
TABLE = [[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 2, 3 / 8], [1 / 4, 1 / 2, 1 / 4]]


def test_parts_of_a_text_add_up_to_it():
    model, tokenizer = Bigram(TABLE), Letters(3, eos_token_id=2)
    score = perplexity.score(model, tokenizer, ["aab", "b", "bbba"] * 9, context_length=2)
    for most in (1, 4, 100):
        parts = score.parts(most)
        assert len(parts) == min(most, len(score.window_nll))
        assert sum(tokens for tokens, _ in parts) == score.tokens
        assert math.fsum(nll for _, nll in parts) == pytest.approx(score.nll_nats, rel=1e-12)
    assert [round(nll / math.log(2)) for nll in score.window_nll[:5]] == [3, 2, 1, 2, 4]


def test_hand_worked_corpus():
    # "aab": </s>a 2 bits, aa 1, ab 2. "b": </s>b 1. "bbba": </s>b 1, bb 1, bb 1, ba 3. Together 12 bits.
    documents = ["aab", "b", "bbba"]
    model, tokenizer = Bigram(TABLE), Letters(2, eos_token_id=2)
    for context_length, stride, batch_size in [(8, 8, 4), (2, 1, 1), (3, 2, 2), (1, 1, 3)]:
        score = perplexity.score(
            model, tokenizer, documents, context_length=context_length, stride=stride, batch_size=batch_size
        )
        assert score.nll_nats == pytest.approx(12 * math.log(2), rel=1e-6)
        assert [nll / math.log(2) for nll in score.document_nll] == pytest.approx([5, 1, 6], rel=1e-6)
        assert (score.tokens, score.counts) == (8, metrics.TextCounts(3, 8, 3, 0))


def test_report_of_the_hand_worked_corpus():
    report = perplexity.evaluate_model(
        Bigram(TABLE),
        Letters(2, eos_token_id=2),
        ["aab", "b", "bbba"],
        name="table",
        dataset="letters",
        split="test",
        words=6,
    )
    assert report.loss == pytest.approx(12 / 8 * math.log(2), rel=1e-6)
    assert report.perplexity == pytest.approx(2**1.5, rel=1e-6)
    assert report.word_perplexity == pytest.approx(2**2, rel=1e-6)
    assert report.bits_per_byte == pytest.approx(12 / 8, rel=1e-6)
    assert (report.context_length, report.stride, report.documents) == (8, 8, 3)
    assert report.perplexity == pytest.approx(math.exp(report.loss), rel=1e-12)


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer(iter(DOCUMENTS * 3), vocab_size=320)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.2,  # far from uniform, so that context matters
        eos_token_id=tokenizer.eos_token_id,
    )
    return KanLMForCausalLM(config).eval()


def direct_nll(model, tokens: list[int], prefix: int, context_length: int, stride: int) -> list[float]:
    """-ln p of each token, one forward pass a token, with the context that the definition gives it."""
    sequence, nll = [prefix, *tokens], []
    for place, token in enumerate(tokens):
        if place < context_length:
            start = 0
        else:
            moves = (place - context_length) // stride + 1
            start = min(moves * stride, len(tokens) - context_length)
        with torch.inference_mode():
            logits = model(torch.tensor([sequence[start : place + 1]])).logits[0, -1].double()
        nll.append(-logits.log_softmax(-1)[token].item())
    return nll


@pytest.mark.parametrize(("context_length", "stride"), [(24, 24), (24, 7), (9, 4), (9, 1)])
def test_every_token_is_scored_as_one_by_one(model, tokenizer, context_length, stride):
    score = perplexity.score(
        model, tokenizer, DOCUMENTS, context_length=context_length, stride=stride, batch_size=3
    )
    for text, nll in zip(DOCUMENTS, score.document_nll, strict=True):
        tokens = perplexity.token_ids(tokenizer, text)
        direct = direct_nll(model, tokens, tokenizer.eos_token_id, context_length, stride)
        assert nll == pytest.approx(sum(direct), rel=1e-5, abs=1e-9)
    assert score.tokens == sum(len(perplexity.token_ids(tokenizer, text)) for text in DOCUMENTS)


def test_more_context_changes_the_score(model, tokenizer):
    scores = [
        perplexity.score(model, tokenizer, DOCUMENTS, context_length=24, stride=stride).nll_nats
        for stride in (24, 12, 1)
    ]
    assert len({round(score, 3) for score in scores}) == 3


def test_batching_does_not_change_the_score(model, tokenizer):
    scores = [
        perplexity.score(model, tokenizer, DOCUMENTS, context_length=24, stride=5, batch_size=batch_size)
        for batch_size in (1, 2, 7, 100)
    ]
    for score in scores[1:]:
        assert score.document_nll == pytest.approx(scores[0].document_nll, rel=1e-6)
        assert score.tokens == scores[0].tokens and score.sha256 == scores[0].sha256


def test_windows_score_each_token_once_for_every_length_and_stride():
    for length in range(30):
        tokens = list(range(100, 100 + length))
        for context_length in (1, 2, 5, 16):
            for stride in range(1, context_length + 1):
                found = list(perplexity.windows(tokens, 0, context_length, stride))
                assert [token for window in found for token in window.targets] == tokens
                for window in found:
                    assert len(window.targets) <= len(window.inputs) <= context_length
                    # The input before each target is the token before it.
                    aligned = window.inputs[len(window.inputs) - len(window.targets) :]
                    assert aligned[1:] == window.targets[:-1]


def test_the_data_hash_tells_documents_apart(model, tokenizer):
    def sha256(documents):
        return perplexity.score(model, tokenizer, documents, context_length=24).sha256

    assert sha256(["ab", "c"]) != sha256(["a", "bc"])
    assert sha256(["ab", "c"]) == sha256(iter(["ab", "c"]))


def test_prefix_is_bos_then_eos_then_the_config():
    model = Bigram(TABLE)
    assert perplexity.prefix_token(model, Letters(2, bos_token_id=0, eos_token_id=1)) == 0
    assert perplexity.prefix_token(model, Letters(2, eos_token_id=1)) == 1
    model.config.eos_token_id = [1, 2]
    assert perplexity.prefix_token(model, Letters(2)) == 1


def test_a_model_without_any_prefix_needs_one_to_be_named():
    model, tokenizer = Bigram(TABLE), Letters(2)
    with pytest.raises(UserError, match="prefix_token_id"):
        perplexity.score(model, tokenizer, ["ab"], context_length=4)
    score = perplexity.score(model, tokenizer, ["ab"], context_length=4, prefix_token_id=2)
    assert score.nll_nats == pytest.approx(4 * math.log(2), rel=1e-6)  # </s>a 2 bits, ab 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": 9}, "unscored"),
        ({"context_length": 0}, "context_length"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        perplexity.score(
            Bigram(TABLE), Letters(2, eos_token_id=2), ["ab"], **{"context_length": 8} | settings
        )


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_a_text_without_tokens_is_an_error(documents):
    with pytest.raises(UserError, match="empty"):
        perplexity.score(Bigram(TABLE), Letters(2, eos_token_id=2), documents, context_length=8)


def test_a_context_longer_than_the_model_is_an_error(model, tokenizer):
    with pytest.raises(UserError, match="max_position_embeddings 24"):
        perplexity.evaluate_model(
            model, tokenizer, ["ab"], name="m", dataset="d", split="test", context_length=25
        )


def test_parameters_leave_out_embeddings_tied_or_not():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    for tied in (True, False):
        config = KanLMConfig(
            **sizes, num_attention_heads=2, ffn_type="swiglu", kan_num_groups=1, tie_word_embeddings=tied
        )
        total, non_embedding = perplexity.parameter_numbers(KanLMForCausalLM(config))
        assert non_embedding == 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
        assert total == non_embedding + 50 * 16 * (1 if tied else 2)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_on_disk_scores_as_the_model_in_memory(folder, model, tokenizer, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text(DOCUMENTS[0] + "\n" + DOCUMENTS[4], encoding="utf-8")
    report = perplexity.evaluate(folder, *perplexity.held_out_documents(text), stride=12, batch_size=2)
    score = perplexity.score(
        model, tokenizer, [text.read_text(encoding="utf-8")], context_length=24, stride=12
    )
    assert report.nll_nats == pytest.approx(score.nll_nats, rel=1e-6)
    assert (report.tokens, report.bytes, report.words) == (
        score.tokens,
        text.stat().st_size,
        score.counts.words,
    )
    assert report.data_sha256 == score.sha256
    assert (report.dataset, report.split, report.dtype) == (str(text), "all", "float32")
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_documents_of_a_file_are_scored_apart(folder, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("One.\n<|endoftext|>\nTwo, longer.\n", encoding="utf-8")
    whole = perplexity.evaluate(folder, *perplexity.held_out_documents(text))
    parts = perplexity.held_out_documents(text, document_separator="<|endoftext|>")
    apart = perplexity.evaluate(folder, *parts)
    assert (whole.documents, apart.documents) == (1, 2)
    assert apart.bytes == len("One.\n") + len("Two, longer.\n")


def test_a_byte_model_from_elsewhere_is_judged_by_the_same_bytes(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = trained_tokenizer(iter(["no merges"]), vocab_size=257)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = perplexity.evaluate(tmp_path, iter(DOCUMENTS), "texts", "test")
    assert report.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert report.context_length == 16
    assert report.tokens >= report.bytes  # a vocabulary of bytes


@pytest.mark.parametrize("name", ["", "hf"])
def test_a_folder_without_a_model_is_an_error(tmp_path, name):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=r"no config.json there"):
        perplexity.load_causal_lm(tmp_path / name)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        perplexity.load_causal_lm(tmp_path / "absent")


def test_a_run_is_not_a_model(tmp_path):
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="a run, not a model; run `kanlm export`"):
        perplexity.load_causal_lm(tmp_path)


def test_an_unknown_dtype_is_an_error(folder):
    with pytest.raises(UserError, match="dtype.*'float33'"):
        perplexity.load_causal_lm(folder, dtype="float33")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(folder, device):
    with pytest.raises(UserError, match=f"--device: '{device}' cannot be used here .*; give cpu"):
        perplexity.load_causal_lm(folder, device=device)


def test_a_hub_data_set_needs_a_split():
    with pytest.raises(UserError, match="needs a split"):
        perplexity.held_out_documents("someone/corpus")


def test_embedded_text_is_evaluated_on_its_held_out_part():
    documents, name, split = perplexity.held_out_documents("stories", max_documents=3)
    assert (name, split) == ("stories", "validation")
    held_out = list(documents)
    assert len(held_out) == 3 and all(held_out)
    training = set(perplexity.held_out_documents("stories", "train")[0])
    assert not training & set(held_out)
    with pytest.raises(UserError, match="train and validation"):
        perplexity.held_out_documents("stories", "test")


class Cache:
    """The token cache's face, in memory."""

    def __init__(self, ids: np.ndarray, document_starts: list[int], num_bytes: int):
        self.ids = ids
        self.document_starts = np.array(document_starts)
        self.manifest = {"tokens": len(ids), "bytes": num_bytes}

    def __len__(self):
        return len(self.ids)

    def tokens(self, start, stop):
        return self.ids[start:stop].astype(np.int64)


@pytest.fixture
def cache(tokenizer):
    texts = [text for text in DOCUMENTS if text]
    pieces = [[tokenizer.eos_token_id, *perplexity.token_ids(tokenizer, text)] for text in texts]
    starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]]).tolist()
    num_bytes = sum(len(text.encode()) for text in texts)
    return Cache(np.concatenate(pieces).astype(np.uint16), starts, num_bytes)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_validation_loss_scores_each_block_from_its_own_start(model, cache, batch_size):
    found = perplexity.validation_loss(model, cache, block_size=16, batch_size=batch_size)
    expected = 0.0
    with torch.inference_mode():
        for start in range(0, len(cache) - 1, 16):
            block = torch.from_numpy(cache.tokens(start, min(start + 17, len(cache))))[None]
            logits = model(block[:, :-1]).logits.double()
            expected += nn.functional.cross_entropy(logits[0], block[0, 1:], reduction="sum").item()
    assert found["nll_nats"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == len(cache) - 1
    assert found["loss"] == pytest.approx(expected / (len(cache) - 1), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) / cache.manifest["bytes"], rel=1e-5)


def test_validation_loss_keeps_documents_apart_on_request(model, cache):
    together = perplexity.validation_loss(model, cache, block_size=24)
    apart = perplexity.validation_loss(model, cache, block_size=24, cross_document_attention=False)
    expected = 0.0
    ends = [*cache.document_starts[1:].tolist(), len(cache)]
    with torch.inference_mode():
        for start in range(0, len(cache) - 1, 24):
            stop = min(start + 24, len(cache) - 1)
            while start < stop:  # the pieces of documents in this block, each on its own
                end = min(stop, next(end for end in ends if end > start))
                piece = torch.from_numpy(cache.tokens(start, end + 1))[None]
                logits = model(piece[:, :-1]).logits.double()
                expected += nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
                start = end
    assert apart["nll_nats"] == pytest.approx(expected, rel=1e-5)
    assert abs(apart["nll_nats"] - together["nll_nats"]) > 0.01


def test_positions_start_anew_with_each_block_and_document():
    cache = Cache(np.arange(1, 21), [0, 3, 11], num_bytes=20)
    _, _, positions = perplexity.stream_blocks(cache, range(0, 19, 6), 6, 19, cross_document_attention=False)
    assert positions[:3].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]


def test_validation_loss_of_the_first_tokens_alone(model, cache):
    whole = perplexity.validation_loss(model, cache, block_size=16)
    first = perplexity.validation_loss(model, cache, block_size=16, max_tokens=40)
    assert first["tokens"] == 40
    assert 0 < first["nll_nats"] < whole["nll_nats"]


def test_validation_loss_restores_training_mode(model, cache):
    model.train()
    perplexity.validation_loss(model, cache, block_size=16, max_tokens=20)
    assert model.training
    model.eval()
    perplexity.validation_loss(model, cache, block_size=16, max_tokens=20)
    assert not model.training


def test_validation_text_of_one_token_is_an_error(model):
    with pytest.raises(UserError, match="at least 2"):
        perplexity.validation_loss(model, Cache(np.array([1]), [0], 1), block_size=16)


def test_text_that_spells_a_special_token_is_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = perplexity.token_ids(tokenizer, f"a{tokenizer.eos_token}b")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"a{tokenizer.eos_token}b"
