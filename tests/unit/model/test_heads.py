"""The kinds of heads."""

import itertools

import pytest
import torch

from megamtp.config import ModelConfig
from megamtp.errors import InputError
from megamtp.model.cost import num_head_parameters, num_layer_parameters, num_parameters
from megamtp.model.head import Head
from megamtp.model.heads import HEAD_KINDS as CLASSES
from megamtp.model.heads import ParallelHead, head_class
from tests.cases import HEAD_KINDS
from tests.models import built_model, model_config


def test_heads_read_the_same_z():
    model = built_model(model_config())
    tokens = torch.randint(50, (1, 6))
    logits = model.logits(tokens)
    for head, head_logits in zip(model.heads, logits, strict=True):
        torch.testing.assert_close(head_logits, model.unembedding(head(model.z(tokens))))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


class UserHead(Head):
    """A user-defined head kind without decoding."""


def test_a_name_selects_a_built_in_or_a_user_defined_kind():
    assert head_class(model_config()) is ParallelHead
    assert head_class(model_config(head_kind=f"{__name__}:UserHead")) is UserHead
    names = " or ".join(CLASSES)
    with pytest.raises(InputError, match=rf"model\.head_kind=deep; expected {names}, or MODULE:CLASS of your own"):
        head_class(model_config(head_kind="deep"))


def test_decoding_with_a_kind_that_does_not_decode_raises_an_input_error():
    with pytest.raises(InputError, match="UserHead does not decode; expected a head kind with a method `extend`"):
        UserHead().extend(torch.zeros(1, 1, 32), None)


class PlainModel:
    """Another implementation of trunk and heads: one sequence, a loop over attention heads, complex rotations.

    Args:
        parameters: of MTPModel, by name.
    """

    def __init__(self, config: ModelConfig, parameters: dict[str, torch.Tensor]):
        self.config, self.parameters = config, parameters

    def norm(self, x_TD: torch.Tensor, name: str) -> torch.Tensor:
        return x_TD / (x_TD.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.parameters[name]

    def attention(self, inputs: torch.Tensor, layer: str) -> torch.Tensor:
        length, width = len(inputs), self.config.head_dim
        angles = torch.arange(length)[:, None] / self.config.rope_theta ** (torch.arange(0, width, 2) / width)
        turn = torch.polar(torch.ones_like(angles), angles)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            turned = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * turn
            return torch.cat((turned.real, turned.imag), dim=1)

        queries, keys, values = (
            (inputs @ self.parameters[f"{layer}.attention.{name}.weight"].T).split(width, dim=1)
            for name in ("query", "key", "value")
        )
        outputs = []
        for index, query in enumerate(queries):
            group = index * len(keys) // len(queries)
            scores = rotated(query) @ rotated(keys[group]).T / width**0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            outputs.append(scores.softmax(-1) @ values[group])
        return torch.cat(outputs, dim=1) @ self.parameters[f"{layer}.attention.output.weight"].T

    def layer(self, x_TD: torch.Tensor, name: str, attention_inputs: torch.Tensor | None = None) -> torch.Tensor:
        if attention_inputs is None:
            attention_inputs = self.norm(x_TD, f"{name}.attention_norm.weight")
        x_TD = x_TD + self.attention(attention_inputs, name)
        normed = self.norm(x_TD, f"{name}.mlp_norm.weight")
        gate, up, down = (self.parameters[f"{name}.mlp.{part}.weight"] for part in ("gate", "up", "down"))
        gated = normed @ gate.T
        return x_TD + (gated * gated.sigmoid() * (normed @ up.T)) @ down.T

    def hidden_states(self, tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
        """Returns the output of each head, before the final norm, for the first `length` tokens."""
        config, embedded = self.config, self.parameters["embedding.weight"][tokens]
        z = embedded[:length]
        for index in range(config.num_trunk_layers):
            z = self.layer(z, f"trunk.{index}")
        n = config.num_future_tokens
        if config.head_kind == "linear":
            first = [self.layer(z, "heads.0")] if config.first_head == "layer" else []
            return first + [z @ self.parameters[f"heads.{index}.matrix.weight"].T for index in range(len(first), n)]
        if config.head_kind == "causal":
            return list(itertools.accumulate(range(n), lambda x, index: self.layer(x, f"heads.{index}"), initial=z))[1:]
        if config.head_kind == "anticausal":
            reverse = itertools.accumulate(range(n)[::-1], lambda x, index: self.layer(x, f"heads.{index}"), initial=z)
            return list(reverse)[:0:-1]
        if config.head_kind == "parallel":
            return [self.layer(z, f"heads.{index}") for index in range(n)]
        hidden = [self.layer(z, "heads.0")]
        for index in range(1, n):
            name = f"heads.{min(index, 1) if config.shares_chain_weights else index}"
            following = self.norm(embedded[index : index + length], f"{name}.embedding_norm.weight")
            if config.chain_form == "eagle3":
                state = hidden[-1] if index > 1 else z
                inputs = torch.cat((following, self.norm(state, f"{name}.attention_norm.weight")), dim=1)
                hidden.append(self.layer(state, name, inputs))
            else:
                state = self.norm(self.norm(hidden[-1], "unembedding.norm"), f"{name}.state_norm.weight")
                projected = torch.cat((state, following), dim=1) @ self.parameters[f"{name}.projection.weight"].T
                hidden.append(self.layer(projected, f"{name}.layer"))
        return hidden


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_heads_equal_another_implementation(kind):
    config = model_config(
        num_layers=3, num_future_tokens=4, num_key_value_heads=2, mlp_dim=48, match_parameters=False, **HEAD_KINDS[kind]
    )
    model = built_model(config)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:  # norms, which would otherwise all be equal
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model.logits(tokens[:, :6], tokens[:, 6:])
    plain = PlainModel(config, dict(model.named_parameters()))
    for row, row_tokens in enumerate(tokens):
        for head, hidden in enumerate(plain.hidden_states(row_tokens, 6)):
            expected = plain.norm(hidden, "unembedding.norm") @ model.unembedding.weight.T
            # The rotary tables are in fp32: measured 3e-8. Tokens or heads that are mixed up give more than 0.1.
            torch.testing.assert_close(logits[head, row], expected, rtol=1e-5, atol=1e-6)


# Parameters of heads 1 to 4, and trunk layers instead of the 11 of n = 1, for D = 32, two key/value heads of width 8,
# f = 48. A layer has 2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 48 = 7680 weights and two norms: 7744.
# deepseek: + 2 * 32**2 in the projection + 2 norms. eagle3: + 32 * (32 + 2 * 16) for the second input + 1 norm.
COUNTS = {
    "parallel": ([7744] * 4, 8),  # 3 more layers in heads
    "linear": ([1024] * 4, 11),  # 4 * 1024 - 7744 = -3648: less than half a layer fewer
    "linear, head 1 a layer": ([7744, 1024, 1024, 1024], 11),  # 3072 more: less than half a layer
    "causal": ([7744] * 4, 8),
    "anticausal": ([7744] * 4, 8),
    "deepseek": ([7744, 9856, 9856, 9856], 7),  # 29568 more: 3.82 layers
    "deepseek, shared": ([7744, 9856, 0, 0], 10),  # 1.27 layers
    "eagle3": ([7744, 9824, 0, 0], 10),  # 1.27 layers
}


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_parameters_equal_a_table_and_the_trunk_has_the_nearest_number_of_layers(kind):
    settings = {"num_layers": 12, "num_future_tokens": 4, "num_key_value_heads": 2, "mlp_dim": 48} | HEAD_KINDS[kind]
    config, single = (
        model_config(**settings),
        model_config(**settings | {"num_future_tokens": 1, "head_kind": "parallel"}),
    )
    heads, num_trunk_layers = COUNTS[kind]
    assert [num_head_parameters(config, index) for index in range(4)] == heads == config.head_parameters
    assert config.num_trunk_layers == num_trunk_layers
    assert model_config(**settings, match_parameters=False).num_trunk_layers == 11
    assert abs(num_parameters(config) - num_parameters(single)) <= num_layer_parameters(config) / 2
    assert num_parameters(config) - num_parameters(single) == sum(heads) - 7744 - (11 - num_trunk_layers) * 7744
