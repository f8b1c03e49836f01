"""Decoding with a cache against decoding without it and against transformers; sampling."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamtp.checkpoint import hf
from megamtp.decoding.generate import _sample, generate
from megamtp.errors import InputError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import HEADS, TEXT_MODEL, contents, text_model

PROMPT = [5, 17, 300, 42]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return text_model()


def greedy_without_cache(model: MTPModel, ids: list[int], count: int) -> list[int]:
    """Returns the next `count` likeliest tokens, each computed from the whole window."""
    ids, following = list(ids), torch.zeros(1, 1, dtype=torch.long)  # head 1 reads no token that follows
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(torch.tensor([ids]), following)[0, 0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("heads", HEADS)
def test_the_cache_changes_no_token(heads):
    model = text_model(dataclasses.replace(TEXT_MODEL, **HEADS[heads]))
    ids = generate(model, PROMPT, 40)
    assert ids == greedy_without_cache(model, PROMPT, 40)
    assert len(set(ids)) > 5
    assert ids != generate(model, [6, *PROMPT[1:]], 40)


@pytest.mark.parametrize("heads", ["parallel", "causal", "anticausal"])
def test_transformers_generates_the_same_tokens(heads, tmp_path):
    config = dataclasses.replace(TEXT_MODEL, **HEADS[heads])
    model = text_model(config)
    hf.export(contents(config, model.state_dict()), tmp_path / "exported")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    expected = llama.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)[0, len(PROMPT) :].tolist()
    assert generate(model, PROMPT, 40) == expected


def test_sampling_from_one_candidate_is_greedy(model):
    greedy = generate(model, PROMPT, 20)
    assert generate(model, PROMPT, 20, temperature=1.0, top_k=1) == greedy
    assert generate(model, PROMPT, 20, temperature=1.0, top_p=1e-9) == greedy
    assert generate(model, PROMPT, 20, temperature=1e-30) == greedy
    assert generate(model, PROMPT, 20, temperature=1e-300) == greedy  # 0 in fp32


def test_weights_that_are_not_finite_raise_an_input_error(model):
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.unembedding.weight[3, 5] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match=rf"logits after {len(PROMPT)} tokens are not finite"):
            generate(damaged, PROMPT, 20, temperature=temperature)


def test_the_same_seed_draws_the_same_sample(model):
    samples = [generate(model, PROMPT, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.5), (7, 0.5)])
def test_samples_follow_the_truncated_distribution(model, top_k, top_p):
    """Compares the frequencies of 4000 samples with probabilities computed token by token."""
    with torch.no_grad():
        logits = model.logits(torch.tensor([PROMPT]))[0, 0, -1]
    probabilities = (logits / 0.7).softmax(0).tolist()
    kept, total = {}, 0.0
    ranked = sorted(enumerate(probabilities), key=lambda pair: -pair[1])[:top_k]
    mass = sum(probability for _, probability in ranked)
    for token, probability in ranked:
        if top_p is None or total < top_p * mass:
            kept[token] = probability
        total += probability
    generator = torch.Generator().manual_seed(0)
    samples = [_sample(logits, 0.7, top_k, top_p, generator) for _ in range(4000)]
    assert set(samples) <= kept.keys()
    for token, probability in kept.items():
        expected = probability / sum(kept.values())
        error = 5 * (expected * (1 - expected) / len(samples)) ** 0.5 + 1 / len(samples)
        assert abs(samples.count(token) / len(samples) - expected) < error


def test_decoding_stops_at_the_end_id_and_does_not_return_it(model):
    greedy = generate(model, PROMPT, 40)
    end_id = greedy[10]
    assert generate(model, PROMPT, 40, end_id=end_id) == greedy[: greedy.index(end_id)]


def test_an_empty_prompt_starts_after_the_end_id(model):
    end_id = next(token for token in range(500) if token not in greedy_without_cache(model, [token], 10))
    assert generate(model, [], 10, end_id=end_id) == greedy_without_cache(model, [end_id], 10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
        {"prompt_ids": []},
        {"prompt_ids": [500]},
        {"prompt_ids": [-1]},
    ],
)
def test_arguments_out_of_range_raise_an_input_error(model, arguments):
    with pytest.raises(InputError, match="expected"):
        generate(**{"model": model, "prompt_ids": PROMPT, "max_new_tokens": 3} | arguments)
