"""Generation: caches, padding, search, streaming, pipelines; cached logits are the uncached ones."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, pipeline

from kanlm.model import KanLMForCausalLM

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def generated(model, ids, **settings):
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | settings))


@pytest.mark.parametrize(
    "chunks", [[1] * 20, [7, 1, 1, 8, 3], [20]], ids=["token by token", "chunked", "at once"]
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_logits_equal_uncached(build, arm, ids, kind, chunks):
    model = build(arm)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(model.config, max_cache_len=24)
    )
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        parts, start = [], 0
        for length in chunks:
            parts.append(model(ids[:, start : start + length], past_key_values=cache, use_cache=True).logits)
            start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), full, **CLOSE)
    assert cache.get_seq_length() == 20


def test_a_wrong_cache_would_show(build, ids):
    model = build("kan_glu")
    with torch.no_grad():
        full = model(ids).logits[:, -1]
        cache = model(ids[:, :-1]).past_key_values
        cache.layers[0].keys = torch.roll(cache.layers[0].keys, 1, dims=2)
        assert (model(ids[:, -1:], past_key_values=cache).logits[:, -1] - full).abs().max() > 1e-3


@pytest.mark.parametrize(
    "search",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"repetition_penalty": 1.3}],
    ids=["greedy", "beam", "prompt lookup", "repetition penalty"],
)
def test_search_is_the_same_with_and_without_cache(build, arm, ids, search):
    model = build(arm)
    ids = ids[:1] if "prompt_lookup_num_tokens" in search else ids
    cached = generated(model, ids, **search)
    if "prompt_lookup_num_tokens" in search:
        assert torch.equal(
            cached, generated(model, ids)
        )  # lookup needs a cache; it must not change the result
        return
    assert torch.equal(cached, generated(model, ids, use_cache=False, **search))
    assert torch.equal(cached, generated(model, ids, cache_implementation="static", **search))


def test_greedy_search_takes_the_likeliest_token(build, arm, ids):
    model = build(arm)
    expected = ids
    for _ in range(12):
        with torch.no_grad():
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
        if (expected[:, -1] == 0).any():
            break
    assert torch.equal(generated(model, ids)[:, : expected.shape[1]], expected)


def test_assisted_generation_changes_nothing(build, arm, ids):
    model, assistant = build(arm), build("swiglu", seed=7, num_hidden_layers=1)
    drafts = []
    assistant.register_forward_pre_hook(lambda *_: drafts.append(1))
    assert torch.equal(generated(model, ids[:1], assistant_model=assistant), generated(model, ids[:1]))
    assert drafts
    assert torch.equal(generated(model, ids[:1], assistant_early_exit=1), generated(model, ids[:1]))


def test_sampling_is_seeded_and_spreads(build, ids):
    model = build("kan_glu")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generated(model, ids, do_sample=True, top_k=50, top_p=0.95, temperature=0.9))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_left_padded_batches_generate_the_same(build, arm, ids):
    model = build(arm)
    short = ids[1:, :13]
    alone = generated(model, short)[:, 13:]
    padded = torch.stack((ids[0], torch.cat((torch.zeros(7, dtype=ids.dtype), short[0]))))
    mask = torch.tensor([[1] * 20, [0] * 7 + [1] * 13])
    together = generated(model, padded, attention_mask=mask)[:, 20:]
    assert torch.equal(together[1:, : alone.shape[1]], alone)
    assert torch.equal(together[:1, : alone.shape[1]], generated(model, ids[:1])[:, 20:][:, : alone.shape[1]])


def test_generation_from_embeddings(build, ids):
    model = build("kan_glu")
    new = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(new, generated(model, ids)[:, 20:])


def test_continuous_batching_equals_generate(build, arm, ids):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = build(arm)
    model.set_attn_implementation("sdpa")
    prompts = [ids[0].tolist(), ids[1, :9].tolist(), ids[0, 3:14].tolist()]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    results = model.generate_batch(
        inputs=prompts, generation_config=settings, continuous_batching_config=small, progress_bar=False
    )
    found = sorted((tuple(result.prompt_ids), tuple(result.generated_tokens)) for result in results.values())
    expected = sorted(
        (
            tuple(prompt),
            tuple(
                generated(model, torch.tensor([prompt]), max_new_tokens=6, eos_token_id=None)[
                    0, len(prompt) :
                ].tolist()
            ),
        )
        for prompt in prompts
    )
    assert found == expected


def test_pipeline_one_and_batched(exported, arm, tokenizer):
    model = KanLMForCausalLM.from_pretrained(exported(arm))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["old cats see", "new", "new cats see 12 birds"]
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [generate(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    batched = [result[0]["generated_text"] for result in generate(prompts, batch_size=3, **settings)]
    assert batched == alone
    ids = tokenizer(prompts[0], return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert alone[0] == tokenizer.decode(new, skip_special_tokens=True)


def test_streaming_gives_the_text_in_pieces(exported, tokenizer):
    from threading import Thread

    model = KanLMForCausalLM.from_pretrained(exported("kan_glu"))
    inputs = tokenizer("old cats", return_tensors="pt")
    settings = {"max_new_tokens": 10, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    new = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(new) and len(pieces) > 1


@pytest.mark.slow
def test_compiled_forward_has_no_graph_break(build, arm, ids):
    model = build(arm)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


SLOW_BUT_ONE = ["kan_glu", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("swiglu", "kan"))]


@pytest.mark.parametrize("arm", SLOW_BUT_ONE)
def test_static_cache_decoding_compiles_once(build, arm, ids):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(arm)
    expected = generated(model, ids)
    from transformers import CompileConfig

    settings = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True, mode=None)}
    settings["compile_config"]._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(generated(model, ids, **settings), expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs >= 1, "nothing was compiled"
        assert torch.equal(generated(model, ids, **settings), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
