"""Small models whose weights make errors visible, and the contents of their checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from megamtp.checkpoint.contents import WEIGHT, Contents
from megamtp.checkpoint.state import OptimizerState, RunState
from megamtp.checkpoint.tensors import InMemory
from megamtp.config import ModelConfig
from megamtp.model.initial import initial_value
from megamtp.model.mtp import MTPModel
from tests.cases import HEAD_KINDS

VOCABULARY = 300
SMALL = ModelConfig(
    dim=32,
    num_layers=5,
    num_future_tokens=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    mlp_dim=48,
    vocab_size=VOCABULARY,
    rope_theta=500.0,
    norm_eps=1e-3,
)

TEXT_MODEL = ModelConfig(
    dim=32, num_layers=5, num_future_tokens=2, num_attention_heads=4, num_key_value_heads=2, mlp_dim=48, vocab_size=500
)
REPLICATED = {"match_parameters": False, "unembedding": "replicated"}
HEADS = HEAD_KINDS | {
    "parallel, all trunk layers": {"match_parameters": False},
    "parallel, replicated": REPLICATED,
    "deepseek, replicated": REPLICATED | HEAD_KINDS["deepseek"],
}
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = RunState(OptimizerState("adamw", MOMENTS, (7,)), {"global_steps": 9, "global_samples": 18, "skipped_steps": 2})


def random_model(config: ModelConfig) -> MTPModel:
    """Returns a model with larger weights than the initial ones, so that logits and attention scores differ clearly."""
    model = MTPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed=1) * (8 if parameter.dim() == 2 else 1))
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def text_model(config: ModelConfig = TEXT_MODEL) -> MTPModel:
    """Returns a model whose most likely next token depends on the whole prompt."""
    model = MTPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, parameter.shape, config, seed=2)
            parameter.copy_(value * (8 if parameter.dim() == 2 else 1))
    return model


def contents(config: ModelConfig, weights: dict[str, Tensor], tokenizer: Path | None = None) -> Contents:
    return Contents(config, {WEIGHT: InMemory(weights)}, sequence_length=64, tokenizer=tokenizer)


def with_moments(config: ModelConfig) -> Contents:
    """Returns contents with weights and moments in [0, 1), at step 9, of which Adam has taken 7 and skipped 2."""
    weights = random_model(config).state_dict()
    generator = torch.Generator().manual_seed(5)
    sources = {WEIGHT: InMemory(weights)}
    for kind in MOMENTS:
        sources[kind] = InMemory(
            {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        )
    return Contents(config, sources, step=9, state=STATE, sequence_length=64)
