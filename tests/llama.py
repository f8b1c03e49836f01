"""Saves a Llama of transformers with random weights."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints import VOCABULARY


def save_llama(folder: Path, tied: bool = False, **settings) -> LlamaForCausalLM:
    """Saves a Llama with 4 layers in several files, and returns it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    return model
