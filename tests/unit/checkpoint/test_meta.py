"""The format of the released models: Meta's arithmetic gives the same logits, and round trips are bit-exact."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamtp.checkpoint import formats, hf, meta
from megamtp.checkpoint.contents import resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.data.tokenizer import train_sentencepiece
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import SMALL, VOCABULARY, contents, random_model


def released_logits(params: dict, weights: dict[str, Tensor], tokens_BT: Tensor) -> list[Tensor]:
    """Computes the logits of all heads from weights in Meta's format.

    As in Meta's code, neighbouring elements are pairs that the rotary embedding multiplies as complex numbers.
    """
    num_heads, theta, eps, n = params["n_heads"], params["rope_theta"], params["norm_eps"], params["n_future_tokens"]
    width = params["dim"] // num_heads
    frequencies = theta ** (-torch.arange(0, width, 2) / width)
    rotations_TK = torch.polar(torch.ones(()), torch.outer(torch.arange(tokens_BT.shape[1]), frequencies))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def rotate(x_BTHK: Tensor) -> Tensor:
        rotated = torch.view_as_complex(x_BTHK.unflatten(-1, (-1, 2))) * rotations_TK[:, None]
        return torch.view_as_real(rotated).flatten(-2)

    def layer(x: Tensor, prefix: str) -> Tensor:
        w = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        normed = norm(x, w["attention_norm.weight"])
        q, k, v = ((normed @ w[f"attention.w{which}.weight"].T).unflatten(-1, (-1, width)) for which in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(num_heads // part.shape[2], dim=2) for part in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / width**0.5
        scores += torch.full(scores.shape[-2:], float("-inf")).triu(1)
        x = x + torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(-2) @ w["attention.wo.weight"].T
        normed = norm(x, w["ffn_norm.weight"])
        gated = torch.nn.functional.silu(normed @ w["feed_forward.w1.weight"].T) * (
            normed @ w["feed_forward.w3.weight"].T
        )
        return x + gated @ w["feed_forward.w2.weight"].T

    z = weights["tok_embeddings.weight"][tokens_BT]
    num_trunk = params["n_layers"] - n
    for index in range(num_trunk):
        z = layer(z, f"layers.{index}.")
    heads = [f"layers.{num_trunk}.", *(f"extra_heads.{index}." for index in range(n - 1))]
    return [norm(layer(z, head), weights["norm.weight"]) @ weights["output.weight"].T for head in heads]


def test_metas_arithmetic_gives_the_logits_of_all_heads(tmp_path):
    model = random_model(SMALL)
    meta.write(contents(SMALL, model.state_dict()), tmp_path / "meta")
    params = json.loads((tmp_path / "meta/params.json").read_text())
    weights = torch.load(tmp_path / "meta/consolidated.pth", weights_only=True)
    assert (params["n_layers"], params["n_future_tokens"]) == (5, 3)
    assert {name.split(".")[1] for name in weights if name.startswith("extra_heads")} == {"0", "1"}
    tokens = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model.logits(tokens), released_logits(params, weights, tokens)
    for head, head_logits in enumerate(logits):
        torch.testing.assert_close(head_logits, expected[head], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mlp_dim", [None, 48, 100, 85, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_bit_exact(tmp_path, mlp_dim, dtype):
    config = dataclasses.replace(SMALL, mlp_dim=mlp_dim)
    weights = {name: weight.to(dtype) for name, weight in random_model(config).state_dict().items()}
    meta.write(contents(config, weights), tmp_path / "meta", dtype)
    read = meta.read(tmp_path / "meta")
    assert read.model == resolve_defaults(config)
    assert read.weights.shapes.keys() == weights.keys()
    assert all(torch.equal(read_tensor(read.weights, name), weights[name]) for name in weights)


def test_llama_becomes_a_multi_token_model(tmp_path):
    config = dataclasses.replace(SMALL, num_layers=3, num_future_tokens=1)
    model = random_model(config)
    meta.write(contents(config, model.state_dict()), tmp_path / "meta")
    path = tmp_path / "meta/params.json"
    params = json.loads(path.read_text())
    del params["n_future_tokens"], params["rope_theta"]
    path.write_text(json.dumps(params | {"vocab_size": -1}))
    weights = torch.load(tmp_path / "meta/consolidated.pth")
    torch.save(weights | {"rope.freqs": torch.zeros(4)}, tmp_path / "meta/consolidated.00.pth")
    read = meta.read(tmp_path / "meta", num_future_tokens=4)
    assert read.model == dataclasses.replace(
        resolve_defaults(config), num_layers=6, num_future_tokens=4, rope_theta=10000.0
    )
    ours = MTPModel(read.model)
    ours.load_state_dict({name: read_tensor(read.weights, name) for name in read.weights.shapes}, strict=True)
    for head in ours.heads:
        for weight, expected in zip(head.weights, model.heads[0].weights, strict=True):
            assert torch.equal(weight, expected)


def remove(weights: dict) -> None:
    del weights["extra_heads.1.ffn_norm.weight"]


def add(weights: dict) -> None:
    weights["extra_heads.2.ffn_norm.weight"] = torch.ones(32)


def reshape(weights: dict) -> None:
    weights["output.weight"] = weights["output.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "no tensor extra_heads.1.ffn_norm.weight"),
        (add, "unknown tensor extra_heads.2.ffn_norm.weight"),
        (reshape, r"tensor output.weight has shape \[299, 32\], expected \[300, 32\]"),
    ],
)
def test_wrong_tensor_is_refused(tmp_path, damage, message):
    meta.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "meta")
    weights = torch.load(tmp_path / "meta/consolidated.pth")
    damage(weights)
    torch.save(weights, tmp_path / "meta/consolidated.pth")
    with pytest.raises(CheckpointError, match=message):
        meta.read(tmp_path / "meta")


def test_several_files_and_scaled_rope_are_refused(tmp_path):
    meta.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "meta")
    (tmp_path / "meta/consolidated.01.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="weights for several GPUs"):
        meta.read(tmp_path / "meta")
    path = tmp_path / "meta/params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_scaled_rope": True}))
    with pytest.raises(CheckpointError, match="use_scaled_rope is true"):
        meta.read(tmp_path / "meta")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": "32"}, "params.json: dim is '32'; expected a whole number"),
        ({"n_layers": None}, "n_layers is None; expected a whole number"),
        ({"n_layers": 3}, "n_layers is 3; expected more than n_future_tokens"),
        ({"n_future_tokens": 0}, "n_future_tokens is 0; expected a whole number of at least 1"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier is -1.0; expected a number above 0"),
        ({"norm_eps": None}, "model.norm_eps is None; expected a number"),
        ({"n_kv_heads": 3}, "num_key_value_heads=3; expected a divisor"),
        ({"n_kv_heads": "2"}, "model.num_key_value_heads is '2'; expected a number"),
    ],
)
def test_invalid_numbers_are_refused(tmp_path, settings, message):
    meta.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "meta")
    path = tmp_path / "meta/params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        meta.read(tmp_path / "meta")


def test_a_trunk_that_keeps_its_layers_is_read_as_the_same_model(tmp_path):
    """params.json counts the layers of trunk and heads."""
    config = dataclasses.replace(SMALL, match_parameters=False)
    expected = random_model(config).state_dict()
    meta.write(contents(config, expected), tmp_path / "meta")
    read = meta.read(tmp_path / "meta")
    assert read.model == dataclasses.replace(config, num_layers=7, match_parameters=True)
    assert all(torch.equal(read_tensor(read.weights, name), weight) for name, weight in expected.items())


@pytest.mark.parametrize("parent", ["meta", "."])
def test_tokenizer_of_metas_releases_is_found_in_the_folder_or_its_parent(tmp_path, monkeypatch, parent):
    texts = [Path(module.__file__).read_text() for module in (dataclasses, json, formats)]
    train_sentencepiece(texts, tmp_path / "made.model", vocab_size=500, seed=0)
    config = dataclasses.replace(SMALL, vocab_size=500)
    meta.write(contents(config, random_model(config).state_dict()), tmp_path / "meta")
    path = (tmp_path / "made.model").rename(tmp_path / parent / "tokenizer.model")
    monkeypatch.chdir(tmp_path / "meta")
    for folder in (tmp_path / "meta", Path(".")):
        read = meta.read(folder)
        assert read.tokenizer.samefile(path) and read.notes == ()
    hf.export(read, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] is not None
    path.write_text("tiktoken")
    read = meta.read(Path("."))
    assert read.tokenizer is None and [note.split(" is not ")[0] for note in read.notes] == [str(path)]
