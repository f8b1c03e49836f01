"""Small configurations and those of configs/, and batches whose targets are unevenly IGNORED."""

from pathlib import Path

import torch

from megamtp.config import Config, read_config
from megamtp.config.fields import shown
from megamtp.data.loader import Batch
from megamtp.targets import IGNORED

ROOT = Path(__file__).parents[1]
VOCABULARY, POSITIONS, WINDOWS = 97, 12, 2
HEAD_KINDS = {
    "parallel": {},
    "linear": {"head_kind": "linear"},
    "linear, head 1 a layer": {"head_kind": "linear", "first_head": "layer"},
    "causal": {"head_kind": "causal"},
    "anticausal": {"head_kind": "anticausal"},
    "deepseek": {"head_kind": "chained"},
    "deepseek, shared": {"head_kind": "chained", "chain_weights": "shared"},
    "eagle3": {"head_kind": "chained", "chain_form": "eagle3"},
}


def small_config(world_size: int = 2, accumulation: int = 1, **overrides) -> Config:
    """Returns a configuration of a 5-layer model of width 16, with any key overridden as `section__key=value`.

    Args:
        world_size: number of ranks that read different data.
        accumulation: micro-batches per rank and step.
    """
    settings = {
        "model.dim": 16,
        "model.num_layers": 5,
        "model.num_future_tokens": 2,
        "model.num_attention_heads": 2,
        "model.mlp_dim": 24,
        "model.vocab_size": VOCABULARY,
        "head_loss.chunk_rows": 7,
        "optimizer.lr": 1e-2,
        "optimizer.warmup_steps": 0,
        "train.steps": 20,
        "train.micro_batch_size": WINDOWS,
        "train.sequence_length": POSITIONS,
        "train.precision": "fp32",
        "train.global_batch_tokens": POSITIONS * WINDOWS * world_size * accumulation,
        "data.train": "unused",
        "run.directory": "unused",
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return read_config([f"{key}={shown(value)}" for key, value in settings.items()])


def published_config(size: str, heads: int | str, *settings: str) -> Config:
    """The configuration of configs/ for this size and number of heads, with neither data nor a run's directory.

    Args:
        heads: their number, followed by `_` and their kind unless they are parallel.
    """
    return read_config(
        [str(ROOT / f"configs/{size}_n{heads}.yaml"), "data.train=none", "run.directory=none", *settings]
    )


def pipeline_config(size: str, num_stages: int, *settings: str) -> Config:
    """Four heads in a pipeline, with micro-batches of one window."""
    pipeline = ["engine.kind=pipeline", f"engine.num_stages={num_stages}", "train.micro_batch_size=1"]
    return published_config(size, 4, *pipeline, *settings)


def paper_config(size: str, *settings: str) -> Config:
    """Four heads in eight pipeline stages, 32 micro-batches of one window."""
    return pipeline_config(size, 8, f"train.global_batch_tokens={32 * 4096}", *settings)


def global_batch(config: Config, step: int, num_micro_batches: int) -> list[Batch]:
    """Returns the micro-batches of all ranks, each with different targets IGNORED for each head.

    If there are several micro-batches, all targets of one are IGNORED.
    """
    n = config.model.num_future_tokens
    generator = torch.Generator().manual_seed(1000 + step)
    batches = []
    for index in range(num_micro_batches):
        tokens = torch.randint(VOCABULARY, (WINDOWS, POSITIONS + n), generator=generator)
        targets = torch.stack([tokens[:, 1 + head : 1 + head + POSITIONS] for head in range(n)])
        ignored = torch.rand(targets.shape, generator=generator) < 0.1 + 0.3 * torch.rand(n, 1, 1, generator=generator)
        targets[ignored] = IGNORED
        if num_micro_batches > 1 and index == (step + 1) % num_micro_batches:
            targets[:] = IGNORED
        batches.append(Batch(tokens[:, :POSITIONS].contiguous(), targets, following=tokens[:, POSITIONS:-1]))
    return batches


def own_share(batches: list[Batch], rank: int, world_size: int) -> list[Batch]:
    """Returns a rank's micro-batches, in the loader's order."""
    return batches[rank::world_size]
