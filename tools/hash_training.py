"""Trains tiny models with all engines and options on CPU ranks and prints hashes of the results.

Each case trains 12 steps, in fp32 unless its name says fp8. If a change of the code leaves all hashes as they were, it
changes no result. Run both versions on the same machine:

    git worktree add ../before main
    python ../before/tools/hash_training.py > before.txt
    %(prog)s > after.txt
    diff before.txt after.txt

A line has the name of a case and three hashes. The first is of all ranks' losses in each step and in an evaluation
after the last step. The second is of all ranks' gradient norms. The third is of the final weights and optimizer state,
as whole tensors: it does not depend on how the ranks slice them. Hashes also depend on the processor and the versions
of the libraries, so hashes from different machines cannot be compared.
"""

import hashlib
import os
import sys
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's megamtp, not an installed one

from megamtp.commands.command_line import Parser, run
from megamtp.config import Config, read_config
from megamtp.errors import InputError

STEPS, LEARNING_RATE = 12, 1e-2
VOCABULARY, TOKENS, DOCUMENT_TOKENS = 97, 6000, 8
# Three trunk layers and three heads. `accumulation` is not a key of the configuration: config_of computes the global
# batch size from it.
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
FLOAT8 = """train.precision=fp8 model.dim=32 model.mlp_dim=48 model.vocab_size=112 train.sequence_length=16
    head_loss.chunk_rows=16"""
ZERO1_OPTIONS = OPTIONS | {
    "fp8": FLOAT8,
    "deferred": "engine.head_schedule=deferred",
    "deferred-everything": f"{EVERYTHING} engine.head_schedule=deferred",
    "offload": "engine.offload_optimizer=true",
}
ZERO3_OPTIONS = {name: settings for name, settings in ZERO1_OPTIONS.items() if name != "fp8"} | {
    "offload": "engine.offload_optimizer=true engine.offload_parameters=true",
    "persistent": "engine.param_persistence_threshold=100",
}
GROUPED_OPTIONS = ZERO3_OPTIONS | {
    "persistent": f"{ZERO3_OPTIONS['persistent']} engine.prefetch_modules=0",
    "fp8": FLOAT8,
}
PIPELINE_OPTIONS = OPTIONS | {"everything": f"{EVERYTHING} accumulation=4", "fp8": FLOAT8}
FEW_OPTIONS = {option: PIPELINE_OPTIONS[option] for option in ("plain", "everything")}
PIPELINES = {  # name: (ranks, settings, options)
    "heads-on-one-stage": (2, "engine.num_stages=2 engine.stage_layers=[3,3]", PIPELINE_OPTIONS),
    "heads-on-two-stages": (2, "engine.num_stages=2 engine.stage_layers=[4,2]", PIPELINE_OPTIONS),
    "heads-on-two-of-three": (3, "engine.num_stages=3 engine.stage_layers=[3,1,2]", FEW_OPTIONS),
    "two-pipelines": (4, "engine.num_stages=2 engine.stage_layers=[4,2]", FEW_OPTIONS),
    "planned-cut": (2, "engine.num_stages=2", FEW_OPTIONS),
}
# The passes are planned to take longer than the transfers, so that forward, loss and backward passes alternate.
ALTERNATING_PASSES = """engine.num_stages=2 engine.stage_layers=[2,1] accumulation=24 model.dim=128 model.num_layers=3
    model.mlp_dim=256 model.num_future_tokens=2 model.vocab_size=1024 head_loss.weights=[1,0.5] head_loss.chunk_rows=512
    train.micro_batch_size=4 train.sequence_length=256"""
ENGINES = {
    "zero1": (2, "engine.kind=zero1", ZERO1_OPTIONS),
    "zero3-grouped": (2, "engine.kind=zero3 engine.communication=grouped", GROUPED_OPTIONS),
    "zero3-deepspeed": (2, "engine.kind=zero3 engine.communication=deepspeed", ZERO3_OPTIONS),
    "spread/taking-turns": (2, f"engine.kind=pipeline engine.spread_losses=true {ALTERNATING_PASSES}", {"plain": ""}),
}
for _name, (_ranks, _settings, _options) in PIPELINES.items():
    ENGINES[f"pipeline/{_name}"] = (_ranks, f"engine.kind=pipeline {_settings}", _options)
    ENGINES[f"spread/{_name}"] = (_ranks, f"engine.kind=pipeline engine.spread_losses=true {_settings}", _options)
CASES = {
    f"{engine}/{option}": (ranks, f"{settings} {more}")
    for engine, (ranks, settings, options) in sorted(ENGINES.items(), key=lambda item: item[1][0])
    for option, more in options.items()
}


def config_of(num_ranks: int, settings: str, corpus: str) -> Config:
    """Returns the configuration of a case: BASE, overridden by `settings`."""
    values = dict(word.split("=", 1) for word in f"{BASE} {settings} data.train={corpus}".split())
    tokens = int(values.pop("accumulation")) * num_ranks // int(values.get("engine.num_stages", 1))
    tokens *= int(values["train.micro_batch_size"]) * int(values["train.sequence_length"])
    return read_config([*(f"{key}={value}" for key, value in values.items()), f"train.global_batch_tokens={tokens}"])


def train(config: Config) -> tuple[str, str, str] | None:
    """Trains, and returns hashes of losses, gradient norms and final state on rank 0, None elsewhere. Collective."""
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
    results: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((losses, norms, state), results if engine.rank == 0 else None)
    return hashes(results) if engine.rank == 0 else None


def hashes(results: list[tuple[list[bytes], list[str], dict[str, bytes]]]) -> tuple[str, str, str]:
    """Returns hashes of the losses, gradient norms and states of all ranks.

    The keys of a state are KIND/NAME@START. The slices of a tensor are joined before hashing, so the hash does not
    depend on how the ranks slice it.

    Args:
        results: (losses, gradient norms, state) of each rank.
    """
    slices = []
    for _, _, state in results:
        for key, content in state.items():
            name, start = key.rsplit("@", 1)
            slices.append((name, int(start), content))
    tensors = [
        (name, b"".join(content for *_, content in group)) for name, group in groupby(sorted(slices), key=itemgetter(0))
    ]
    losses, norms, _ = zip(*results, strict=True)
    return _hash(losses), _hash(norms), _hash(tensors)


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def _bytes(tensor: Any) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def _run_rank(rank: int, num_ranks: int, store: str, corpus: str, names: list[str]) -> None:
    """Trains the named cases. Rank 0 prints a line for each."""
    import torch
    import torch.distributed as dist

    from megamtp.cluster.environment import Place
    from megamtp.engines.deepspeed.join import join_peers

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engines print to stdout; redirect that to stderr
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    for name in names:
        config = config_of(*CASES[name], corpus)
        join_peers(Place(rank, rank, num_ranks), config.cluster)
        if result := train(config):
            print(f"{name:42s} {' '.join(result)}", file=lines, flush=True)
    dist.barrier()
    os._exit(0)  # as megamtp.pretrain exits: gloo's threads may abort the process while Python shuts down


def main() -> None:
    """Trains the requested cases in new processes. Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=list(CASES), help="train only these cases [all]")
    parser.add_argument("--list", action="store_true", help="print the names of all cases and exit")
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
        for num_ranks, names in groupby(filter(options.cases.__contains__, CASES), key=lambda name: CASES[name][0]):
            arguments = (num_ranks, f"{folder}/store{num_ranks}", f"{folder}/corpus", list(names))
            torch.multiprocessing.spawn(_run_rank, arguments, nprocs=num_ranks)


if __name__ == "__main__":  # the ranks import this file
    run(main)
