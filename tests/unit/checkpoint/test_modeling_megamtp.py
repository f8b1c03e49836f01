"""The exported model computes the same logits and generates the same text as ours, with and without drafting."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamtp.checkpoint import hf_mtp
from megamtp.decoding.generate import generate
from megamtp.model.mtp import MTPModel
from tests.checkpoints import SMALL, VOCABULARY, contents, random_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return random_model(SMALL)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf-mtp") / "exported"
    hf_mtp.write(contents(SMALL, model.state_dict()), folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    return loaded.eval()


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits_of_all_heads_equal_ours(model, exported):
    tokens = prompt(40, batch=2)
    with torch.no_grad():
        expected, logits = model.logits(tokens), exported.head_logits(tokens)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(exported(tokens).logits, expected[0], rtol=0, atol=1e-5)
        loss = exported(tokens, labels=tokens).loss
    expected_loss = torch.nn.functional.cross_entropy(expected[0, :, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss)


def test_losses_with_num_items_in_batch_add_up(exported):
    """Trainer passes this argument for gradient accumulation."""
    tokens = prompt(12, batch=2)
    labels = tokens.clone()
    labels[0, :7] = -100
    with torch.no_grad():
        whole_loss = exported(tokens, labels=labels).loss
        losses = [
            exported(tokens[row, None], labels=labels[row, None], num_items_in_batch=5 + 11).loss for row in range(2)
        ]
    torch.testing.assert_close(sum(losses), whole_loss)


def test_logits_to_keep(exported):
    tokens = prompt(9)
    with torch.no_grad():
        expected = exported(tokens).logits
        for kept, positions in ((2, [7, 8]), (torch.tensor([1, 5]), [1, 5])):
            torch.testing.assert_close(exported(tokens, logits_to_keep=kept).logits, expected[:, positions])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_the_greedy_text_of_head_1(model, exported, use_cache):
    for seed in range(3):
        ids = prompt(7, seed)
        generated = exported.generate(ids, max_new_tokens=20, do_sample=False, use_cache=use_cache)
        assert generated[0, 7:].tolist() == generate(model, ids[0].tolist(), 20)


def test_padded_batch_gives_the_same_text_as_single_prompts(exported):
    texts = [prompt(length, length)[0] for length in (3, 9)]
    single = [exported.generate(text[None], max_new_tokens=12, do_sample=False)[0, -12:] for text in texts]
    padded = torch.stack([torch.cat((torch.zeros(9 - len(text), dtype=torch.long), text)) for text in texts])
    mask = torch.stack([torch.arange(9) >= 9 - len(text) for text in texts]).long()
    batched = exported.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, -12:]
    assert torch.equal(batched, torch.stack(single))
    beams = exported.generate(padded, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape == (2, 13)


@pytest.mark.parametrize("num_heads", [None, 1, 2])
def test_drafting_gives_the_same_greedy_text(model, exported, num_heads):
    for seed in range(4):
        ids = prompt(5, seed)
        generated, num_passes = exported.generate_with_heads(ids, max_new_tokens=25, num_heads=num_heads)
        assert generated[0, 5:].tolist() == generate(model, ids[0].tolist(), 25)
        assert num_passes == 25 if num_heads == 1 else num_passes <= 25


def test_correct_drafts_save_passes(tmp_path):
    """The model repeats one token, so all drafts are correct."""
    config = dataclasses.replace(SMALL, num_layers=4)
    weights = {name: torch.zeros_like(weight) for name, weight in random_model(config).state_dict().items()}
    weights["embedding.weight"][:] = 1.0
    weights["unembedding.norm"][:] = 1.0
    weights["unembedding.weight"][7] = 1.0
    hf_mtp.write(contents(config, weights), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    generated, num_passes = exported.generate_with_heads(prompt(5), max_new_tokens=24)
    assert generated[0, 5:].tolist() == [7] * 24
    assert num_passes == 1 + 8  # after the first pass, three tokens per pass: one of head 1 and two drafts
    ended, _ = exported.generate_with_heads(prompt(5), max_new_tokens=24, eos_token_id=7)
    assert ended[0, 5:].tolist() == [7]
    with pytest.raises(ValueError, match="expected 1 to 3"):
        exported.generate_with_heads(prompt(5), num_heads=4)
