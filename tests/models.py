"""Small models in float64, with weights large enough that logits differ from each other."""

import torch

from megamtp.config import ModelConfig
from megamtp.model.initial import initial_value
from megamtp.model.mtp import MTPModel


def model_config(**overrides) -> ModelConfig:
    """Returns a configuration with three trunk layers and two heads of width 32."""
    settings = {"dim": 32, "num_layers": 5, "num_future_tokens": 2, "num_attention_heads": 4, "vocab_size": 50}
    return ModelConfig(**settings | overrides)


def built_model(config: ModelConfig, **options) -> MTPModel:
    """Returns an MTPModel with its initial weights multiplied by 5, except for norms.

    Args:
        options: arguments of MTPModel.
    """
    model = MTPModel(config, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed=0) * (5 if parameter.dim() > 1 else 1))
    return model
