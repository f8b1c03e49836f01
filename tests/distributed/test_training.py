"""The training loop on two ranks: steps that are not finite, and an evaluation amid which the job is asked to stop."""

import gc
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.cluster.signals import StopRequest
from megamtp.config import Config
from megamtp.data.blend import Blend
from megamtp.data.loader import TrainLoader
from megamtp.data.position import new_position
from megamtp.data.windows import Window, Windows
from megamtp.engines.base import Engine
from megamtp.errors import InputError
from megamtp.model.layers import TransformerLayer
from megamtp.training.loop import BATCHES_UNASKED, MAX_SKIPPED, Training
from megamtp.training.metrics import FILE, Metrics, lacks_validation
from megamtp.training.starting import check_agreement
from tests.cases import POSITIONS, VOCABULARY, WINDOWS, small_config
from tests.ranks import run_ranks
from tests.unit.data.test_windows import Tokens

STEPS = 16


def _training(config: Config, engine: Engine, **job) -> Training:
    tokens = [position % VOCABULARY for position in range(100 * POSITIONS)]
    windows = Windows(Tokens(len(tokens), tokens), POSITIONS, config.model.num_future_tokens, 0)
    readers = engine.data_parallel_rank, engine.data_parallel_size
    loader = TrainLoader(Blend([windows], [1.0]), 2 * WINDOWS, WINDOWS, *readers)
    position = new_position([windows], [1.0])
    return Training(config, engine, loader, position, windows, **({"stop": StopRequest(False), "first_step": 0} | job))


def _config(directory: str, kind: str, **settings) -> Config:
    run = {
        "run__save_every_steps": 2,
        "run__keep_checkpoints": 9,
        "run__tensorboard": False,
        "run__directory": directory,
    }
    return small_config(engine__kind=kind, **{"train__steps": STEPS, "data__validation": "unused"} | run | settings)


def _train(
    directory: str, kind: str, bad_steps: list[int], settings: dict
) -> tuple[str | None, list[str], list[dict[str, Tensor]]]:
    """(how the run ended, what it said, the weights after each step), with rank 1's card bad in `bad_steps`."""
    from deepspeed.utils import safe_get_full_fp32_param

    from megamtp.engines.build import build_engine

    config = _config(directory, kind, **settings)
    engine, weights, said, rank = build_engine(config), [], [], dist.get_rank()
    Metrics.say = lambda self, line: said.append(line)
    training = _training(config, engine)
    engine.model.trunk[0].register_forward_hook(
        lambda module, inputs, output: output * float("nan") if rank == 1 and training.step in bad_steps else output
    )
    train_batch = engine.train_batch

    def watched(*arguments):
        result = train_batch(*arguments)
        named = engine.model.named_parameters()
        weights.append({name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named})
        return result

    engine.train_batch = watched
    try:
        training.run()
    except (InputError, SystemExit) as error:
        return f"{type(error).__name__}: {error}", said, weights
    return None, said, weights


def _same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


# where DeepSpeed keeps a skipped step's gradients
OFFLOADED = {"train__precision": "bf16", "engine__offload_optimizer": True}


@pytest.mark.parametrize(
    ("kind", "settings"), [("zero1", {}), ("zero3", {}), ("zero1", OFFLOADED), ("zero3", OFFLOADED)]
)
def test_a_bad_step_changes_nothing_and_names_the_rank(kind, settings, tmp_path):
    (error, said, weights), (other, _, _) = run_ranks(_train, 2, str(tmp_path), kind, [3, 4], settings)
    assert error is other is None
    warnings = [line for line in said if line.startswith("megamtp: warning")]
    assert [line.split(": not finite")[0] for line in warnings] == [
        "megamtp: warning: step 3",
        "megamtp: warning: step 4",
    ]
    assert all("the losses of rank 1 (" in line and "rank 0" not in line and "others" not in line for line in warnings)
    changed = [not _same(before, after) for before, after in itertools.pairwise(weights)]
    assert changed == [step not in (3, 4) for step in range(2, STEPS + 1)]
    assert all(value.isfinite().all() for value in weights[-1].values())
    records = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    trained = {record["step"]: record for record in records if record["kind"] == "train"}
    assert [step for step, record in trained.items() if record["skipped"]] == [3, 4]
    for step, record in trained.items():
        assert (record["losses"] == [None, None]) == (record["gradient_norm"] is None) == (step in (3, 4))
    saved = [store.read_manifest(checkpoint).step for checkpoint in store.checkpoints(tmp_path)]
    assert saved == [2, 5, *range(6, STEPS + 1, 2)]  # step 4's follows


def _said_by_a_pipeline(directory: str) -> tuple[list[str], list[bool]]:
    """(what was said, which steps changed this stage's weights) when the first stage's card is bad in step 3 of 4."""
    from megamtp.engines.build import build_engine

    settings = {"train__steps": 4, "engine__num_stages": 2, "data__validation": "null", "train__precision": "bf16"}
    engine, said, changed = build_engine(config := _config(directory, "pipeline", **settings)), [], []
    Metrics.say = lambda self, line: said.append(line)
    training = _training(config, engine)
    layers = [module for module in engine.model.modules() if isinstance(module, TransformerLayer)]
    layers[0].register_forward_hook(
        lambda module, inputs, output: output * float("nan") if dist.get_rank() == 0 and training.step == 3 else output
    )
    train_batch = engine.train_batch

    def watched(*arguments):
        before = [parameter.clone() for parameter in layers[0].parameters()]
        result = train_batch(*arguments)
        changed.append(any(not torch.equal(*pair) for pair in zip(before, layers[0].parameters(), strict=True)))
        return result

    engine.train_batch = watched
    training.run()
    return said, changed


def test_all_stages_of_a_bad_pipeline_are_named(tmp_path):
    """The losses are the last stage's alone."""
    (said, changed), (_, changed_there) = run_ranks(_said_by_a_pipeline, 2, str(tmp_path))
    (warning,) = [line for line in said if line.startswith("megamtp: warning")]
    assert "step 3: not finite: the losses of rank 0 (" in warning and "), rank 1 (" in warning
    assert changed == changed_there == [True, True, False, True]
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000002", "step-0000004"]


def test_a_checkpoint_due_in_a_bad_step_follows(tmp_path):
    run_ranks(_train, 2, str(tmp_path), "zero3", [10, 11], {"run__save_every_steps": 10})
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000012", "step-0000016"]


def test_a_run_does_not_end_in_a_bad_step(tmp_path):
    (error, _, _), (other, _, _) = run_ranks(_train, 2, str(tmp_path), "zero3", [STEPS], {"run__save_every_steps": 10})
    assert (
        error.startswith(f"InputError: step {STEPS}: not finite: the losses of rank 1 (") and other == "SystemExit: 2"
    )
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000010"]


def test_a_run_of_nothing_but_bad_steps_ends(tmp_path):
    (error, _, weights), (other, _, _) = run_ranks(_train, 2, str(tmp_path), "zero3", list(range(3, STEPS + 1)), {})
    assert other == "SystemExit: 2"
    assert error.startswith(f"InputError: step {2 + MAX_SKIPPED}: not finite: the losses of rank 1 (")
    assert f"; such steps in a row: {MAX_SKIPPED}. Started again, the run goes on from step-0000002: " in error
    assert _same(weights[1], weights[-1]) and len(weights) == 2 + MAX_SKIPPED
    assert [path.name for path in (Path(tmp_path) / "checkpoints").iterdir()] == ["step-0000002"]


def _looked_at(directory: str) -> tuple[list[int], list[int]]:
    """How many objects a garbage collection had to look at, and how many it had not, before each step and after the
    last.
    """
    from megamtp.engines.build import build_engine

    config = _config(directory, "zero3", train__steps=4)
    engine, objects, frozen = build_engine(config), [], []
    train_batch = engine.train_batch

    def watched(*arguments):
        objects.append(len(gc.get_objects()))
        frozen.append(gc.get_freeze_count())
        return train_batch(*arguments)

    engine.train_batch = watched
    _training(config, engine).run()
    return [*objects, len(gc.get_objects())], [*frozen, gc.get_freeze_count()]


def test_garbage_collections_look_at_what_is_new(tmp_path):
    for objects, frozen in run_ranks(_looked_at, 2, str(tmp_path)):
        assert frozen[0] == frozen[-1] == 0 and objects[0] > 100_000 and objects[-1] > 100_000
        assert min(frozen[1:-1]) > 100_000 > 20 * max(objects[1:-1])


class AskedAmidEvaluation:
    """A StopRequest of rank 1's, once `num_batches` of an evaluation have been read."""

    asked = False

    def __init__(self, engine: Engine, num_batches: int):
        self.read, evaluate = 0, engine.evaluate

        def watched(batches):
            def counted():
                for batch in batches:
                    self.read += 1
                    self.asked = dist.get_rank() == 1 and self.read >= num_batches
                    yield batch

            return evaluate(counted())

        engine.evaluate = watched


def _stopped_and_resumed(directory: str) -> tuple[int, bool, list[bool]]:
    """(batches read before the stop, whether the run then lacks an evaluation, whether each job came to its end)."""
    from megamtp.engines.build import build_engine

    settings = {"run__evaluate_every_steps": 3, "run__save_every_steps": 100, "train__steps": 6}
    config, ended = _config(f"{directory}/whole", "zero3", **settings), []
    ended.append(_training(config, build_engine(config)).run())
    config = _config(f"{directory}/stopped", "zero3", **settings)
    engine = build_engine(config)
    stop = AskedAmidEvaluation(engine, BATCHES_UNASKED + 1)
    ended.append(_training(config, engine, stop=stop).run())
    lacks = lacks_validation(Path(config.run.directory) / FILE, 3)
    (checkpoint,) = store.checkpoints(Path(config.run.directory))
    engine = build_engine(config)
    engine.load(checkpoint)
    ended.append(
        _training(config, engine, first_step=store.read_manifest(checkpoint).step, owes_evaluation=lacks).run()
    )
    return stop.read, lacks, ended


def test_an_evaluation_stops_at_once_and_is_made_good(tmp_path):
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    results = run_ranks(_stopped_and_resumed, 2, str(tmp_path))
    assert results == 2 * [(2 * BATCHES_UNASKED, True, [True, False, True])]  # of 25 batches
    read = [(tmp_path / folder / FILE).read_text().splitlines() for folder in ("whole", "stopped")]
    whole, stopped = (
        [record for line in lines if (record := json.loads(line))["kind"] == "validation"] for lines in read
    )
    assert [record["step"] for record in whole] == [3, 6] and stopped == whole
    assert [path.name for path in store.checkpoints(tmp_path / "stopped")] == ["step-0000003", "step-0000006"]


class CountedWindows(Windows):
    """Which windows were read; `damaged` cannot be."""

    damaged = -1

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def __getitem__(self, index: int) -> Window:
        self.read.append(index)
        if index == self.damaged:
            raise InputError(f"window {index} is damaged")
        return super().__getitem__(index)


def _evaluated(directory: str, damaged: int) -> tuple[str | None, list[int]]:
    """(how a run with an evaluation after each of two steps ended, the windows that this rank read for them)."""
    from megamtp.engines.build import build_engine

    config = _config(directory, "zero3", run__evaluate_every_steps=1, run__save_every_steps=100, train__steps=2)
    training = _training(config, build_engine(config))
    tokens = training.validation.dataset
    training.validation = CountedWindows(tokens, POSITIONS, config.model.num_future_tokens, 0)
    training.validation.damaged = damaged
    try:
        training.run()
    except (InputError, SystemExit) as error:
        return f"{type(error).__name__}: {error}", training.validation.read
    return None, training.validation.read


def test_an_evaluation_reads_each_window_once(tmp_path):
    (error, first), (_, second) = run_ranks(_evaluated, 2, str(tmp_path), -1)
    assert error is None and sorted({*first, *second}) == list(range(len(set(first)) + len(set(second))))
    assert not set(first) & set(second)
    assert first[: len(first) // 2] == first[len(first) // 2 :] == sorted(set(first))


def test_damage_amid_an_evaluation_ends_both_ranks_with_the_step_saved(tmp_path):
    """In a later group of batches than the first, so that both ranks have run some."""
    damaged = 2 * WINDOWS * (BATCHES_UNASKED + 2) + WINDOWS
    (error, first), (other, second) = run_ranks(_evaluated, 2, str(tmp_path), damaged)
    assert (error, other) == (f"InputError: window {damaged} is damaged", "SystemExit: 2")
    assert damaged in second and len(first) > WINDOWS * BATCHES_UNASKED
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000001"]
    assert {json.loads(line)["kind"] for line in (tmp_path / FILE).read_text().splitlines()} == {"train", "checkpoint"}


def _disagreement(lrs: list[float], num_tokens: list[int]) -> str:
    config = small_config(optimizer__lr=lrs[dist.get_rank()])
    sizes = [100, num_tokens[dist.get_rank()]]
    corpora = [SimpleNamespace(dataset=SimpleNamespace(num_tokens=size)) for size in sizes]
    try:
        check_agreement(SimpleNamespace(config=config, train=corpora, validation=None))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("lrs", "num_tokens", "words"),
    [
        ([0.1, 0.1], [7, 7], ""),
        ([0.1, 0.2], [7, 7], "rank 1 is not started as rank 0 is (optimizer.lr: 0.1 -> 0.2)"),
        ([0.1, 0.1], [7, 8], "rank 1 is not started as rank 0 is (corpora of [100, 7] -> [100, 8] tokens)"),
    ],
)
def test_ranks_started_differently_are_told(lrs, num_tokens, words):
    first, second = run_ranks(_disagreement, 2, lrs, num_tokens)
    assert first == second and first.startswith(words) and bool(first) == bool(words)
