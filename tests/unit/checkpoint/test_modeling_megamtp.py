"""The exported model computes the same logits and generates the same text as ours, with and without drafting."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamtp.checkpoint import hf_mtp
from megamtp.checkpoint.modeling_megamtp import DraftingDecoder, MegamtpForCausalLM
from megamtp.config import ModelConfig
from megamtp.decoding.generate import generate
from megamtp.model.mtp import MTPModel
from tests.cases import HEAD_KINDS
from tests.checkpoints import HEADS, SMALL, VOCABULARY, contents, random_model

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


def export(config: ModelConfig, weights: dict[str, torch.Tensor], folder) -> MegamtpForCausalLM:
    """Exports the model, and loads it without transformers' copy of the code."""
    hf_mtp.write(contents(config, weights), folder)
    loaded, info = MegamtpForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


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


@pytest.mark.parametrize("heads", HEADS)
def test_logits_of_every_kind_equal_ours(tmp_path, heads):
    """Chained heads read the tokens that follow, and token 0 beyond the end."""
    config = dataclasses.replace(SMALL, **HEADS[heads])
    model = random_model(config)
    hf_mtp.write(contents(config, model.state_dict()), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    tokens = prompt(20, batch=2)
    with torch.no_grad():
        expected, logits = model.logits(tokens, torch.zeros(2, 2, dtype=torch.long)), exported.head_logits(tokens)
        assert expected[0].std() > 0.5 and (expected[1:] - expected[:-1]).std() > 0.5
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(exported(tokens).logits, expected[0], rtol=0, atol=1e-5)
        # Without the tokens that follow, only the last positions of chained heads change.
        longer = model.logits(tokens[:, :15], tokens[:, 15:17])
    for index in range(3):
        torch.testing.assert_close(logits[index, :, :15], longer[index], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("heads", ["linear", "causal", "anticausal", "eagle3"])
def test_generate_gives_the_greedy_text_of_head_1_of_other_kinds(tmp_path, heads):
    config = dataclasses.replace(SMALL, **HEADS[heads])
    model, ids = random_model(config), prompt(7)
    exported = export(config, model.state_dict(), tmp_path / "exported")
    generated = exported.generate(ids, max_new_tokens=12, do_sample=False)
    assert generated[0, 7:].tolist() == generate(model, ids[0].tolist(), 12)


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


def drafts_from_whole_windows(model: MTPModel, ids: list[int], num_heads: int) -> list[int]:
    """Returns the drafts after the verified tokens `ids`: each head reads all tokens again.

    They come from the position before the last token. Head i of a chain reads the draft of head i - 1.
    """
    drafts: list[int] = []
    for index in range(1, num_heads):
        following = (ids[-1:] + drafts + [0] * len(model.head_order))[: len(model.head_order) - 1]
        logits = model.logits(torch.tensor([ids[:-1]]), torch.tensor([following]))
        drafts.append(int(logits[index, 0, -1].argmax()))
    return drafts


@pytest.mark.parametrize("heads", HEAD_KINDS)
def test_every_kind_drafts_what_its_heads_predict(tmp_path, heads):
    """And the text is head 1's greedy text, whichever number of drafts is correct in each pass."""
    settings = {"num_layers": 2, "num_future_tokens": 4} | HEADS[heads] | {"match_parameters": False}
    config = dataclasses.replace(SMALL, **settings)
    model = random_model(config)
    exported = export(config, model.state_dict(), tmp_path / "exported")
    texts = {length: (ids := prompt(length)[0].tolist()) + generate(model, ids, 20) for length in (1, 5)}
    for num_heads, length in ((1, 5), (2, 5), (3, 1), (4, 1), (4, 5)):
        text = texts[length]
        generated, num_passes = exported.generate_with_heads(prompt(length), max_new_tokens=14, num_heads=num_heads)
        assert generated[0].tolist() == text[: length + 14]
        assert num_passes == 14 if num_heads == 1 else num_passes <= 14
        decoder, position, drafts = DraftingDecoder(exported, num_heads), length, []
        for num_correct in (0, 1, 0, 2, 3, 3, 1, 2):
            num_correct = min(num_correct, len(drafts))
            drafts[:num_correct] = text[position : position + num_correct]
            if num_correct < len(drafts):
                drafts[num_correct] = (text[position + num_correct] + 1) % VOCABULARY
            with torch.no_grad():
                verified, drafts = decoder.step(text[:position], drafts)
                assert verified == text[position : position + num_correct + 1]
                position += len(verified)
                assert drafts == drafts_from_whole_windows(model, text[:position], num_heads)


@pytest.mark.parametrize("heads", HEADS)
def test_correct_drafts_save_passes(tmp_path, heads):
    """The model repeats one token, so all drafts are correct."""
    config = dataclasses.replace(SMALL, num_layers=4, **HEADS[heads])
    weights = {name: torch.zeros_like(weight) for name, weight in random_model(config).state_dict().items()}
    for name, weight in weights.items():
        if name.endswith(("matrix.weight", "projection.weight")):
            weight[:, : config.dim] = torch.eye(config.dim)
        elif name == "embedding.weight" or name.endswith(("state_norm.weight", ".norm")):
            weight[:] = 1.0
        elif name.startswith("unembedding"):
            weight[7] = 1.0
    exported = export(config, weights, tmp_path / "exported")
    generated, num_passes = exported.generate_with_heads(prompt(5), max_new_tokens=24)
    assert generated[0, 5:].tolist() == [7] * 24
    assert num_passes == 1 + 8  # after the first pass, three tokens per pass: one of head 1 and two drafts
    ended, _ = exported.generate_with_heads(prompt(5), max_new_tokens=24, eos_token_id=7)
    assert ended[0, 5:].tolist() == [7]
    with pytest.raises(ValueError, match="expected 1 to 3"):
        exported.generate_with_heads(prompt(5), num_heads=4)
