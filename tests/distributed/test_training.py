"""Tests of the training loop on two ranks: non-finite steps, and a stop request or damaged data during evaluation."""

import gc
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from benchmarks.trainings import DIVERGED
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
from megamtp.training.loop import BATCHES_PER_CHECK, MAX_NONFINITE_STEPS, Training
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
    return Training(config, engine, loader, position, windows, **({"stop": StopRequest(False), "step": 0} | job))


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
    """Trains with NaN activations on rank 1 in `bad_steps`.

    Returns:
        The exception that ended the run, the lines it printed, and the weights after each step.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    from megamtp.engines.build import build_engine

    config = _config(directory, kind, **settings)
    engine, weights, printed, rank = build_engine(config), [], [], dist.get_rank()
    Metrics.print_line = lambda self, line: printed.append(line)
    training = _training(config, engine)
    engine.model.trunk[0].register_forward_hook(
        lambda module, inputs, output: output * float("nan") if rank == 1 and training.step in bad_steps else output
    )
    train_batch = engine.train_batch

    def recording_train_batch(*arguments):
        result = train_batch(*arguments)
        named = engine.model.named_parameters()
        weights.append({name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named})
        return result

    engine.train_batch = recording_train_batch
    try:
        training.run()
    except (InputError, SystemExit) as error:
        return f"{type(error).__name__}: {error}", printed, weights
    return None, printed, weights


def _equal_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


# With offloading, DeepSpeed keeps the gradients of a skipped step.
OFFLOADED = {"train__precision": "bf16", "engine__offload_optimizer": True}


@pytest.mark.parametrize(
    ("kind", "settings"), [("zero1", {}), ("zero3", {}), ("zero1", OFFLOADED), ("zero3", OFFLOADED)]
)
def test_nonfinite_step_changes_no_weight_and_names_the_rank(kind, settings, tmp_path):
    (error, printed, weights), (other_error, _, _) = run_ranks(_train, 2, str(tmp_path), kind, [3, 4], settings)
    assert error is other_error is None
    warnings = [line for line in printed if line.startswith("megamtp: warning")]
    assert len(warnings) == 2
    for step, line in zip((3, 4), warnings, strict=True):
        assert line.startswith(f"megamtp: warning: step {step}: the losses of rank 1 (")
        assert line.endswith(") are not finite; the weights are unchanged") and "rank 0" not in line
    changed = [not _equal_weights(before, after) for before, after in itertools.pairwise(weights)]
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
    assert saved == [2, 5, *range(6, STEPS + 1, 2)]  # the save that was due in step 4 follows in step 5


def _train_pipeline(directory: str) -> tuple[list[str], list[bool]]:
    """Trains a pipeline for 4 steps, with NaN activations in the first stage in step 3.

    Returns:
        The printed lines, and for each step whether it changed this stage's weights.
    """
    from megamtp.engines.build import build_engine

    settings = {"train__steps": 4, "engine__num_stages": 2, "data__validation": "null", "train__precision": "bf16"}
    engine, printed, changed = build_engine(config := _config(directory, "pipeline", **settings)), [], []
    Metrics.print_line = lambda self, line: printed.append(line)
    training = _training(config, engine)
    layers = [module for module in engine.model.modules() if isinstance(module, TransformerLayer)]
    layers[0].register_forward_hook(
        lambda module, inputs, output: output * float("nan") if dist.get_rank() == 0 and training.step == 3 else output
    )
    train_batch = engine.train_batch

    def recording_train_batch(*arguments):
        before = [parameter.clone() for parameter in layers[0].parameters()]
        result = train_batch(*arguments)
        changed.append(any(not torch.equal(*pair) for pair in zip(before, layers[0].parameters(), strict=True)))
        return result

    engine.train_batch = recording_train_batch
    training.run()
    return printed, changed


def test_nonfinite_step_of_a_pipeline_names_all_its_stages(tmp_path):
    """The fault is in the first stage, although only the last stage computes losses."""
    (printed, changed), (_, changed_on_rank_1) = run_ranks(_train_pipeline, 2, str(tmp_path))
    (warning,) = [line for line in printed if line.startswith("megamtp: warning")]
    assert "step 3: the losses of rank 0 (" in warning and "), rank 1 (" in warning
    assert changed == changed_on_rank_1 == [True, True, False, True]
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000002", "step-0000004"]


def test_checkpoint_due_in_a_nonfinite_step_is_saved_after_the_next_finite_one(tmp_path):
    run_ranks(_train, 2, str(tmp_path), "zero3", [10, 11], {"run__save_every_steps": 10})
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000012", "step-0000016"]


def test_run_fails_if_its_last_step_is_not_finite(tmp_path):
    (error, _, _), (other_error, _, _) = run_ranks(
        _train, 2, str(tmp_path), "zero3", [STEPS], {"run__save_every_steps": 10}
    )
    assert error.startswith(f"InputError: step {STEPS}: the losses of rank 1 (") and other_error == "SystemExit: 2"
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000010"]


def test_run_ends_after_too_many_nonfinite_steps(tmp_path):
    (error, _, weights), (other_error, _, _) = run_ranks(
        _train, 2, str(tmp_path), "zero3", list(range(3, STEPS + 1)), {}
    )
    assert other_error == "SystemExit: 2"
    assert error.startswith(f"InputError: step {2 + MAX_NONFINITE_STEPS}: the losses of rank 1 (")
    assert f"; non-finite steps in a row: {MAX_NONFINITE_STEPS}. A new job resumes from step-0000002: " in error
    assert DIVERGED in error  # by which the benchmark `learning` knows such a run
    assert _equal_weights(weights[1], weights[-1]) and len(weights) == 2 + MAX_NONFINITE_STEPS
    assert [path.name for path in (Path(tmp_path) / "checkpoints").iterdir()] == ["step-0000002"]


def _count_objects(directory: str) -> tuple[list[int], list[int]]:
    """Returns the numbers of objects that garbage collections scan and skip, before each step and after the last."""
    from megamtp.engines.build import build_engine

    gc.unfreeze()  # what tests/ranks.py has frozen
    config = _config(directory, "zero3", train__steps=4)
    engine, objects, frozen = build_engine(config), [], []
    train_batch = engine.train_batch

    def counting_train_batch(*arguments):
        objects.append(len(gc.get_objects()))
        frozen.append(gc.get_freeze_count())
        return train_batch(*arguments)

    engine.train_batch = counting_train_batch
    _training(config, engine).run()
    return [*objects, len(gc.get_objects())], [*frozen, gc.get_freeze_count()]


def test_garbage_collections_scan_only_new_objects(tmp_path):
    for objects, frozen in run_ranks(_count_objects, 2, str(tmp_path)):
        assert frozen[0] == frozen[-1] == 0 and objects[0] > 100_000 and objects[-1] > 100_000
        assert min(frozen[1:-1]) > 100_000 > 20 * max(objects[1:-1])


class StopDuringEvaluation:
    """A StopRequest that rank 1 receives after it has read `num_batches` batches of an evaluation."""

    asked = False

    def __init__(self, engine: Engine, num_batches: int):
        self.num_read, evaluate = 0, engine.evaluate

        def counting_evaluate(batches):
            def counted():
                for batch in batches:
                    self.num_read += 1
                    self.asked = dist.get_rank() == 1 and self.num_read >= num_batches
                    yield batch

            return evaluate(counted())

        engine.evaluate = counting_evaluate


def _stop_and_resume(directory: str) -> tuple[int, bool, list[bool]]:
    """Runs a whole job, a job that is stopped during its first evaluation, and the job that resumes it.

    Returns:
        The number of batches read before the stop, whether the stopped run lacks an evaluation, and what each job's
        Training.run returned.
    """
    from megamtp.engines.build import build_engine

    settings = {"run__evaluate_every_steps": 3, "run__save_every_steps": 100, "train__steps": 6}
    config, finished = _config(f"{directory}/whole", "zero3", **settings), []
    finished.append(_training(config, build_engine(config)).run())
    config = _config(f"{directory}/stopped", "zero3", **settings)
    engine = build_engine(config)
    stop = StopDuringEvaluation(engine, BATCHES_PER_CHECK + 1)
    finished.append(_training(config, engine, stop=stop).run())
    lacks = lacks_validation(Path(config.run.directory) / FILE, 3)
    (checkpoint,) = store.checkpoints(Path(config.run.directory))
    engine = build_engine(config)
    engine.load(checkpoint)
    finished.append(_training(config, engine, step=store.read_manifest(checkpoint).step, evaluate_first=lacks).run())
    return stop.num_read, lacks, finished


def test_stopped_evaluation_is_repeated_by_the_next_job(tmp_path):
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    results = run_ranks(_stop_and_resume, 2, str(tmp_path))
    assert results == 2 * [(2 * BATCHES_PER_CHECK, True, [True, False, True])]  # an evaluation has 25 batches
    read = [(tmp_path / folder / FILE).read_text().splitlines() for folder in ("whole", "stopped")]
    whole, stopped = (
        [record for line in lines if (record := json.loads(line))["kind"] == "validation"] for lines in read
    )
    assert [record["step"] for record in whole] == [3, 6] and stopped == whole
    assert [path.name for path in store.checkpoints(tmp_path / "stopped")] == ["step-0000003", "step-0000006"]


class CountedWindows(Windows):
    """Windows that record which of them were read. Reading the window `damaged` fails."""

    damaged = -1

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def __getitem__(self, index: int) -> Window:
        self.read.append(index)
        if index == self.damaged:
            raise InputError(f"window {index} is damaged")
        return super().__getitem__(index)


def _train_and_evaluate(directory: str, damaged: int) -> tuple[str | None, list[int]]:
    """Trains two steps with an evaluation after each.

    Returns:
        The exception that ended the run, and the validation windows that this rank read.
    """
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


def test_evaluation_reads_each_window_once(tmp_path):
    (error, first), (_, second) = run_ranks(_train_and_evaluate, 2, str(tmp_path), -1)
    assert error is None and sorted({*first, *second}) == list(range(len(set(first)) + len(set(second))))
    assert not set(first) & set(second)
    assert first[: len(first) // 2] == first[len(first) // 2 :] == sorted(set(first))


def test_damage_during_an_evaluation_ends_both_ranks_after_a_save(tmp_path):
    """The damaged window is in the second group of batches, so that both ranks have evaluated some."""
    damaged = 2 * WINDOWS * (BATCHES_PER_CHECK + 2) + WINDOWS
    (error, first), (other_error, second) = run_ranks(_train_and_evaluate, 2, str(tmp_path), damaged)
    assert (error, other_error) == (f"InputError: window {damaged} is damaged", "SystemExit: 2")
    assert damaged in second and len(first) > WINDOWS * BATCHES_PER_CHECK
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000001"]
    assert {json.loads(line)["kind"] for line in (tmp_path / FILE).read_text().splitlines()} == {"train", "checkpoint"}


def _check_arguments(lrs: list[float], num_tokens: list[int]) -> str:
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
        ([0.1, 0.2], [7, 7], "rank 1 was not started like rank 0 (optimizer.lr: 0.1 -> 0.2)"),
        ([0.1, 0.1], [7, 8], "rank 1 was not started like rank 0 (corpora of [100, 7] -> [100, 8] tokens)"),
    ],
)
def test_ranks_with_different_settings_or_corpora_are_an_error(lrs, num_tokens, words):
    first, second = run_ranks(_check_arguments, 2, lrs, num_tokens)
    assert first == second and first.startswith(words) and bool(first) == bool(words)
