"""The exported model computes and generates what ours does; drafting changes only the number of passes."""

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
    found, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert found.dtype == torch.float32
    return found.eval()


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_every_heads_logits_are_ours(model, exported):
    tokens = prompt(40, batch=2)
    with torch.no_grad():
        expected, found = model.logits(tokens), exported.head_logits(tokens)
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(exported(tokens).logits, expected[0], rtol=0, atol=1e-5)
        loss = exported(tokens, labels=tokens).loss
    expected_loss = torch.nn.functional.cross_entropy(expected[0, :, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss)


def test_losses_of_several_batches_add_up_as_trainer_asks(exported):
    tokens = prompt(12, batch=2)
    labels = tokens.clone()
    labels[0, :7] = -100
    with torch.no_grad():
        whole_loss = exported(tokens, labels=labels).loss
        parts = [
            exported(tokens[row, None], labels=labels[row, None], num_items_in_batch=5 + 11).loss for row in range(2)
        ]
    torch.testing.assert_close(sum(parts), whole_loss)


def test_logits_of_some_positions(exported):
    tokens = prompt(9)
    with torch.no_grad():
        expected = exported(tokens).logits
        for kept, positions in ((2, [7, 8]), (torch.tensor([1, 5]), [1, 5])):
            torch.testing.assert_close(exported(tokens, logits_to_keep=kept).logits, expected[:, positions])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_head_1s_greedy_text(model, exported, use_cache):
    for seed in range(3):
        ids = prompt(7, seed)
        found = exported.generate(ids, max_new_tokens=20, do_sample=False, use_cache=use_cache)
        assert found[0, 7:].tolist() == generate(model, ids[0].tolist(), 20)


def test_texts_of_several_lengths_are_generated_together(exported):
    texts = [prompt(length, length)[0] for length in (3, 9)]
    alone = [exported.generate(text[None], max_new_tokens=12, do_sample=False)[0, -12:] for text in texts]
    padded = torch.stack([torch.cat((torch.zeros(9 - len(text), dtype=torch.long), text)) for text in texts])
    mask = torch.stack([torch.arange(9) >= 9 - len(text) for text in texts]).long()
    together = exported.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, -12:]
    assert torch.equal(together, torch.stack(alone))
    beams = exported.generate(padded, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape == (2, 13)


@pytest.mark.parametrize("num_heads", [None, 1, 2])
def test_drafting_gives_the_greedy_text(model, exported, num_heads):
    for seed in range(4):
        ids = prompt(5, seed)
        found, passes = exported.generate_with_heads(ids, max_new_tokens=25, num_heads=num_heads)
        assert found[0, 5:].tolist() == generate(model, ids[0].tolist(), 25)
        assert passes == 25 if num_heads == 1 else passes <= 25


def test_right_drafts_save_passes(tmp_path):
    """A model that repeats one token: its heads, copies of each other, are right."""
    config = dataclasses.replace(SMALL, num_layers=4)
    weights = {name: torch.zeros_like(weight) for name, weight in random_model(config).state_dict().items()}
    weights["embedding.weight"][:] = 1.0
    weights["unembedding.norm"][:] = 1.0
    weights["unembedding.weight"][7] = 1.0
    hf_mtp.write(contents(config, weights), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    found, passes = exported.generate_with_heads(prompt(5), max_new_tokens=24)
    assert found[0, 5:].tolist() == [7] * 24
    assert passes == 1 + 8  # then three tokens a pass, one of head 1 and two drafted
    ended, _ = exported.generate_with_heads(prompt(5), max_new_tokens=24, eos_token_id=7)
    assert ended[0, 5:].tolist() == [7]
    with pytest.raises(ValueError, match="expected 1 to 3"):
        exported.generate_with_heads(prompt(5), num_heads=4)
