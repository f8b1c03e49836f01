"""Trains tiny models for 12 steps in fp32 on CPU ranks, with every engine and its options, and prints hashes of the
results.

Equal hashes before and after a change of the code show that it changes no result. Run both on the same machine:

    git worktree add ../before main
    python ../before/tools/hash_training.py > before.txt
    python tools/hash_training.py > after.txt
    diff before.txt after.txt

A line has the name of a case and three hashes: of every rank's losses, in each step and in an evaluation after the last
one; of every rank's gradient norms; of the final weights and optimizer state, whole tensors whatever their slices. They
also depend on the processor and on the versions of the libraries, so hashes from different machines are not comparable.
"""

import hashlib
import os
import sys
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the megamtp of this checkout, not an installed one

from megamtp.commands.command_line import Parser, run
from megamtp.config import Config, read_config
from megamtp.errors import InputError

STEPS, LEARNING_RATE = 12, 1e-2
VOCABULARY, TOKENS, DOCUMENT_TOKENS = 97, 6000, 8
# Three trunk layers and three heads. `accumulation` is no key of the configuration:
# the global batch follows from it.
BASE = f"""model.dim=16 model.num_layers=6 model.num_future_tokens=3 model.num_attention_heads=4
    model.num_key_value_heads=2 model.mlp_dim=24 model.vocab_size={VOCABULARY} head_loss.weights=[1,0.5,0.75]
    head_loss.chunk_rows=7 train.steps={STEPS}
    train.micro_batch_size=2 train.sequence_length=12 train.precision=fp32 run.directory=unused accumulation=1"""
EVERYTHING = """accumulation=2 data.documents=isolate train.activation_checkpointing=true head_loss.z_loss=1e-3
    engine.reduce_bucket_size=300 optimizer.gradient_clipping=0.3"""
OPTIONS = {
    "plain": "",
    "accumulation": "accumulation=2",
    "ignored-targets": "data.documents=mask",
    "documents": "data.documents=isolate",
    "checkpointing": "train.activation_checkpointing=true",
    "one-head": "model.num_future_tokens=1 head_loss.weights=[1]",
    "everything": EVERYTHING,
}
ZERO1_OPTIONS = OPTIONS | {
    "deferred": "engine.head_schedule=deferred",
    "deferred-everything": f"{EVERYTHING} engine.head_schedule=deferred",
    "offload": "engine.offload_optimizer=true",
}
ZERO3_OPTIONS = ZERO1_OPTIONS | {
    "offload": "engine.offload_optimizer=true engine.offload_parameters=true",
    "persistent": "engine.param_persistence_threshold=100",
}
GROUPED_OPTIONS = ZERO3_OPTIONS | {"persistent": f"{ZERO3_OPTIONS['persistent']} engine.prefetch_modules=0"}
PIPELINE_OPTIONS = OPTIONS | {"everything": f"{EVERYTHING} accumulation=4"}
FEW_OPTIONS = {option: PIPELINE_OPTIONS[option] for option in ("plain", "everything")}
PIPELINES = {  # name: (ranks, settings, options)
    "heads-on-one-stage": (2, "engine.num_stages=2 engine.stage_layers=[3,3]", PIPELINE_OPTIONS),
    "heads-on-two-stages": (2, "engine.num_stages=2 engine.stage_layers=[4,2]", PIPELINE_OPTIONS),
    "heads-on-two-of-three": (3, "engine.num_stages=3 engine.stage_layers=[3,1,2]", FEW_OPTIONS),
    "two-pipelines": (4, "engine.num_stages=2 engine.stage_layers=[4,2]", FEW_OPTIONS),
    "planned-cut": (2, "engine.num_stages=2", FEW_OPTIONS),
}
# By the plan its passes take longer than transfers, so that forward, loss and backward passes take turns.
TAKING_TURNS = """engine.num_stages=2 engine.stage_layers=[2,1] accumulation=24 model.dim=128 model.num_layers=3
    model.mlp_dim=256 model.num_future_tokens=2 model.vocab_size=1024 head_loss.weights=[1,0.5] head_loss.chunk_rows=512
    train.micro_batch_size=4 train.sequence_length=256"""
ENGINES = {
    "zero1": (2, "engine.kind=zero1", ZERO1_OPTIONS),
    "zero3-grouped": (2, "engine.kind=zero3 engine.communication=grouped", GROUPED_OPTIONS),
    "zero3-deepspeed": (2, "engine.kind=zero3 engine.communication=deepspeed", ZERO3_OPTIONS),
    "spread/taking-turns": (2, f"engine.kind=pipeline engine.spread_losses=true {TAKING_TURNS}", {"plain": ""}),
}
for _name, (_ranks, _settings, _options) in PIPELINES.items():
    ENGINES[f"pipeline/{_name}"] = (_ranks, f"engine.kind=pipeline {_settings}", _options)
    ENGINES[f"spread/{_name}"] = (_ranks, f"engine.kind=pipeline engine.spread_losses=true {_settings}", _options)
CASES = {
    f"{engine}/{option}": (ranks, f"{settings} {more}")
    for engine, (ranks, settings, options) in sorted(ENGINES.items(), key=lambda item: item[1][0])
    for option, more in options.items()
}


def config_of(ranks: int, settings: str, corpus: str) -> Config:
    """BASE with `settings`, which override it."""
    values = dict(word.split("=", 1) for word in f"{BASE} {settings} data.train={corpus}".split())
    tokens = int(values.pop("accumulation")) * ranks // int(values.get("engine.num_stages", 1))
    tokens *= int(values["train.micro_batch_size"]) * int(values["train.sequence_length"])
    return read_config([*(f"{key}={value}" for key, value in values.items()), f"train.global_batch_tokens={tokens}"])


def train(config: Config) -> tuple[str, str, str] | None:
    """Hashes of the losses, gradient norms and final state of a training, on rank 0; None on other ranks.
    Collective.
    """
    import torch.distributed as dist

    from megamtp.data.indexed_dataset import IndexedDataset
    from megamtp.data.loader import TrainLoader
    from megamtp.data.windows import Windows
    from megamtp.engines.base import count_targets
    from megamtp.engines.build import build_engine

    engine, model, settings = build_engine(config), config.model, config.train
    windows = Windows(
        IndexedDataset(config.data.train),
        settings.sequence_length,
        model.num_future_tokens,
        settings.seed,
        0,
        model.vocab_size,
        config.data.documents,
    )
    share = (engine.data_parallel_rank, engine.data_parallel_size)
    loader = TrainLoader(windows, config.global_batch_windows, settings.micro_batch_size, *share)
    losses, norms = [], []
    for step in range(STEPS):
        batches = loader.read(step)
        counts = count_targets(batches, windows.targets_can_be_ignored, engine.data_parallel_size, engine.device)
        result = engine.train_batch(batches, counts, LEARNING_RATE / (1 + step))
        losses.append(_bytes(result.nll_sums))
        norms.append(result.gradient_norm.hex())
    losses.append(_bytes(engine.evaluate(iter(loader.read(STEPS)))))
    state = {key: _bytes(tensor) for key, tensor in engine.state().tensors.items() if not key.startswith("random/")}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((losses, norms, state), of_ranks if engine.rank == 0 else None)
    return hashes(of_ranks) if engine.rank == 0 else None


def hashes(of_ranks: list[tuple[list[bytes], list[str], dict[str, bytes]]]) -> tuple[str, str, str]:
    """Of (losses, norms, state) of each rank.

    A state's keys are KIND/NAME@START. Slices are joined into whole tensors first: how ranks share a tensor does not
    matter.
    """
    slices = []
    for _, _, state in of_ranks:
        for key, content in state.items():
            name, start = key.rsplit("@", 1)
            slices.append((name, int(start), content))
    tensors = [
        (name, b"".join(content for *_, content in own)) for name, own in groupby(sorted(slices), key=itemgetter(0))
    ]
    losses, norms, _ = zip(*of_ranks, strict=True)
    return _hash(losses), _hash(norms), _hash(tensors)


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def _bytes(tensor: Any) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def _run_rank(rank: int, ranks: int, store: str, corpus: str, names: list[str]) -> None:
    """Trains the cases one after the other; rank 0 prints their lines."""
    import torch
    import torch.distributed as dist

    from megamtp.cluster.environment import Place
    from megamtp.engines.deepspeed.join import join_peers

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engines print goes to stderr
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for name in names:
        config = config_of(*CASES[name], corpus)
        join_peers(Place(rank, rank, ranks), config.cluster)
        if found := train(config):
            print(f"{name:42s} {' '.join(found)}", file=lines, flush=True)
    dist.barrier()
    os._exit(0)  # as megamtp.pretrain does: while Python shuts down, gloo's threads may abort the process


def main() -> None:
    """Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=list(CASES), help="train these only [all]")
    parser.add_argument("--list", action="store_true", help="print the names of all cases and train none")
    options = parser.parse_args()
    for name in options.cases:
        if name not in CASES:
            raise InputError(f"--cases {name}; expected names that --list prints")
    if options.list:
        print("\n".join(CASES))
        return
    import torch.multiprocessing
    from benchmarks.corpora import write_random

    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "DS_IGNORE_CUDA_DETECTION": "TRUE",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "corpus", TOKENS, DOCUMENT_TOKENS, VOCABULARY)
        for ranks, names in groupby(filter(options.cases.__contains__, CASES), key=lambda name: CASES[name][0]):
            arguments = (ranks, f"{folder}/store{ranks}", f"{folder}/corpus", list(names))
            torch.multiprocessing.spawn(_run_rank, arguments, nprocs=ranks)


if __name__ == "__main__":  # the ranks import this file, too
    run(main)
