"""Every kind of heads on every engine: gradients and losses equal the float64 reference, which runs the same heads.

tests/unit/model/test_heads.py compares the heads with other implementations. Targets are ignored unevenly, and one
micro-batch has no valid target. Pairs of all factors run by default, and the whole product with --full.
"""

import dataclasses
import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megamtp.checkpoint import store
from megamtp.data.loader import Batch
from megamtp.model.head import Head
from megamtp.model.heads import AnticausalHead, CausalHead
from megamtp.model.part import ModelPart
from tests.cases import HEAD_KINDS, POSITIONS, WINDOWS, global_batch, small_config
from tests.distributed.test_checkpoints import BOUND, _train
from tests.distributed.test_gradients import BF16_BOUND, BF16_LOSS_BOUND, FP32_BOUND, pairwise, selected_cases
from tests.engine_steps import errors_of_step
from tests.ranks import run_ranks
from tests.reference import reference_model, reference_step
from tests.saved import save

PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2}
BF16 = {"train__precision": "bf16"}
# The trunk has two layers, so the first head to run is layer 3 of a pipeline.
ENGINES = {
    "zero1": {"engine__kind": "zero1"},
    "zero1, bf16": {"engine__kind": "zero1"} | BF16,
    "zero3": {"engine__kind": "zero3"},
    "zero3, bf16": {"engine__kind": "zero3"} | BF16,
    "zero3 of DeepSpeed": {"engine__kind": "zero3", "engine__communication": "deepspeed"},
    "pipeline, heads on one stage": PIPELINE,
    "pipeline, heads on two stages": PIPELINE,
    "spread losses, heads on one stage": PIPELINE | {"engine__spread_losses": True},
    "spread losses, heads on two stages": PIPELINE | {"engine__spread_losses": True},
}
FACTORS = {
    "kind": tuple(HEAD_KINDS),
    "engine": tuple(ENGINES),
    "num_future_tokens": (2, 4),
    "accumulation": (1, 2),
    "activation_checkpointing": (False, True),
    "isolated documents": (False, True),
    "unembedding": ("shared", "replicated"),
}
SHARED = ("deepseek, shared", "eagle3")  # refused with DeepSpeed's communication
# (kind, stage layers, whether losses are spread, unembedding) with heads on three stages
THREE_STAGES = [
    ("causal", [3, 2, 1], False, "shared"),
    ("anticausal", [1, 2, 3], True, "shared"),
    ("anticausal", [3, 1, 2], False, "shared"),
    ("deepseek", [3, 1, 2], False, "shared"),
    ("deepseek", [2, 2, 2], True, "shared"),
    ("eagle3", [2, 1, 3], False, "shared"),
    ("linear", [3, 1, 2], True, "shared"),
    ("anticausal", [3, 1, 2], True, "replicated"),
    ("deepseek", [3, 1, 2], False, "replicated"),
]


def _config(kind: str, n: int, data_parallel_size: int, accumulation: int = 2, unembedding: str = "shared", **settings):
    heads = {f"model__{key}": value for key, value in HEAD_KINDS[kind].items()}
    return small_config(
        data_parallel_size,
        accumulation,
        model__num_future_tokens=n,
        model__num_layers=3,
        model__match_parameters=False,
        model__unembedding=unembedding,
        head_loss__weights=[1.0, 0.5, 0.75, 0.25][:n],
        **heads,
        **settings,
    )


def _case_config(kind: str, engine: str, n: int, accumulation: int, checkpointing: bool, _: bool, unembedding: str):
    settings = ENGINES[engine] | {"train__activation_checkpointing": checkpointing}
    if settings["engine__kind"] == "pipeline":
        num_first = 3 if engine.endswith("two stages") else 1
        settings |= {"engine__stage_layers": [num_first, 2 + n - num_first]}
    data_parallel_size = 1 if settings["engine__kind"] == "pipeline" else 2
    return _config(kind, n, data_parallel_size, accumulation, unembedding, **settings)


def _with_documents(batch: Batch, step: int) -> Batch:
    """Returns the batch with two documents in each window. Targets in the other document are kept, as is allowed."""
    starts = (torch.arange(WINDOWS) * 3 + step) % (POSITIONS - 2) + 1
    return dataclasses.replace(batch, documents=(torch.arange(POSITIONS) >= starts[:, None]).long())


def _largest_errors(config, num_steps: int = 2, documents: bool = False) -> tuple[float, float]:
    """Returns the largest relative (gradient error, loss error). Under ZeRO-3 the second step prefetches weights."""
    from megamtp.engines.build import build_engine

    engine, model, errors = build_engine(config), reference_model(config), []
    for step in range(num_steps):
        num_micro_batches = config.num_micro_batches(engine.data_parallel_size) * engine.data_parallel_size
        batches = global_batch(config, step, num_micro_batches)
        if documents:
            batches = [_with_documents(batch, step) for batch in batches]
        errors.append(errors_of_step(engine, batches, reference_step(config, model, batches))[1:])
    gradient_errors, loss_errors = zip(*errors, strict=True)
    return max(gradient_errors), max(loss_errors)


def _errors_of_cases(cases: list[tuple]) -> list[tuple[float, float]]:
    return [_largest_errors(_case_config(*case), documents=case[-2]) for case in cases]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        cases = list(itertools.product(*FACTORS.values())) if full else pairwise(FACTORS)
        # Other tests have parallel heads that share the unembedding.
        cases = [case if case[0] != "parallel" else (*case[:-1], "replicated") for case in cases]
        cases = [case for case in dict.fromkeys(cases) if not (case[0] in SHARED and case[1] == "zero3 of DeepSpeed")]
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture(scope="module")
def errors_of_all(request) -> dict[tuple, tuple[float, float]]:
    """Returns the errors of all selected cases on the worst rank. All cases run in one group of ranks.

    Pipelines run last: after one, DeepSpeed builds no other engine in the same process.
    """
    cases = selected_cases(request)
    cases.sort(key=lambda case: "engine__num_stages" in ENGINES[case[1]])
    ranks = run_ranks(_errors_of_cases, 2, cases, timeout_seconds=20 * len(cases) + 60)
    return {case: tuple(map(max, zip(*errors, strict=True))) for case, *errors in zip(cases, *ranks, strict=True)}


@pytest.mark.timeout(4000)
def test_gradients_equal_the_reference(case, errors_of_all):
    gradient_error, loss_error = errors_of_all[case]
    in_bf16 = case[1].endswith("bf16")
    assert gradient_error < (BF16_BOUND if in_bf16 else FP32_BOUND)
    assert loss_error < (BF16_LOSS_BOUND if in_bf16 else FP32_BOUND)


def _errors_on_three_stages() -> list[tuple[float, float]]:
    pipeline = {"engine__kind": "pipeline", "engine__num_stages": 3}
    return [
        _largest_errors(
            _config(kind, 4, 1, 3, unembedding, **pipeline, engine__stage_layers=layers, engine__spread_losses=spread),
            1,
        )
        for kind, layers, spread, unembedding in THREE_STAGES
    ]


def test_gradients_with_heads_on_several_of_three_stages_equal_the_reference():
    for errors in run_ranks(_errors_on_three_stages, 3):
        assert max(max(pair) for pair in errors) < FP32_BOUND


def _without_gradient(index: int, embedded: torch.Tensor, length: int) -> torch.Tensor:
    return embedded[:, index : index + length].detach()


def _shifted(index: int, embedded: torch.Tensor, length: int) -> torch.Tensor:
    """Gives head i the embedding of the (i - 2)-th next token instead of the (i - 1)-th."""
    return embedded[:, index - 1 : index - 1 + length]


def _without_state_gradient(
    head: Head, state_BTD: torch.Tensor, hidden_BTD: torch.Tensor, normed_BTD: torch.Tensor
) -> torch.Tensor:
    """Passes the state on as if each head's backward pass ended before that of the next head, not after it."""
    return hidden_BTD.detach()


FAULTS = {
    "dropped gradient": ("deepseek", ModelPart, "_next_embeddings", staticmethod(_without_gradient)),
    "shifted tokens": ("deepseek", ModelPart, "_next_embeddings", staticmethod(_shifted)),
    "order of backward passes": ("causal", CausalHead, "next_state", _without_state_gradient),
    "order of heads": ("anticausal", AnticausalHead, "farthest_first", False),
}


def _errors_with_faults() -> dict[str, tuple[float, float]]:
    from megamtp.engines.build import build_engine

    errors = {}
    for name, (kind, owner, attribute, fault) in FAULTS.items():
        config = _config(kind, 2, 1, engine__kind="zero1")
        batches = global_batch(config, 0, config.num_micro_batches(1))
        expected = reference_step(config, reference_model(config), batches)
        with patch.object(owner, attribute, fault):
            errors[name] = errors_of_step(build_engine(config), batches, expected)[1:]
    return errors


def test_planted_faults_of_chains_exceed_the_bounds():
    (errors,) = run_ranks(_errors_with_faults, 1)
    for name in ("dropped gradient", "order of backward passes"):
        gradient_error, loss_error = errors[name]
        assert gradient_error > 0.1 and loss_error < FP32_BOUND, name
    for name in ("shifted tokens", "order of heads"):
        assert min(errors[name]) > 10 * FP32_BOUND, name


# Kinds with which checkpoints are saved, and their unembedding. Pipelines with replicated ones hold some rows of each.
RESUMED = {"linear": "shared", "anticausal": "replicated", "deepseek": "shared", "eagle3": "shared"}
STEPS, FURTHER_STEPS = 2, 2


def _resume_config(kind: str, data_parallel_size: int, directory: Path, **settings):
    settings |= {"run__directory": str(directory)}
    return _config(kind, 4, data_parallel_size, 4 // data_parallel_size, RESUMED[kind], **settings)


def _saved(kind: str, directory: Path, data_parallel_size: int, settings: dict) -> list[list[float]]:
    """Saves a checkpoint after STEPS steps; returns the losses of further steps."""
    from megamtp.engines.build import build_engine

    config = _resume_config(kind, data_parallel_size, directory, **settings)
    engine = build_engine(config)
    _train(config, engine, range(STEPS))
    save(config, engine, STEPS)
    return _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def _resumed(kind: str, directory: Path, data_parallel_size: int, settings: dict) -> list[list[float]]:
    """Returns the losses of further steps of a run that resumes from the checkpoint."""
    from megamtp.engines.build import build_engine

    config = _resume_config(kind, data_parallel_size, directory, **settings)
    engine = build_engine(config)
    engine.load(store.newest_checkpoint(directory))
    return _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def _zero3_saves_and_resumes(folder: Path) -> list[tuple]:
    settings = {"engine__kind": "zero3"}
    return [(_saved(kind, folder / kind, 2, settings), _resumed(kind, folder / kind, 2, settings)) for kind in RESUMED]


def _pipeline_resumes_and_saves(folder: Path) -> list[tuple]:
    losses = []
    for kind, unembedding in RESUMED.items():
        settings = PIPELINE | {"engine__stage_layers": [3, 3], "engine__spread_losses": unembedding == "replicated"}
        resumed = _resumed(kind, folder / kind, 1, settings)
        losses.append((resumed, _saved(kind, folder / f"{kind}, pipeline", 1, settings)))
    return losses


def _zero1_resumes_the_pipelines_runs(folder: Path) -> list[list]:
    return [_resumed(kind, folder / f"{kind}, pipeline", 1, {"engine__kind": "zero1"}) for kind in RESUMED]


def test_runs_resume_bit_for_bit_and_on_other_engines(tmp_path):
    """All runs of one kind have the same losses. BOUND allows for fp32 sums in another order."""
    zero3 = run_ranks(_zero3_saves_and_resumes, 2, tmp_path)[0]
    pipeline = run_ranks(_pipeline_resumes_and_saves, 2, tmp_path)[0]
    zero1 = run_ranks(_zero1_resumes_the_pipelines_runs, 1, tmp_path)[0]
    for (uninterrupted, resumed), others, zero1_losses in zip(zero3, pipeline, zero1, strict=True):
        assert resumed == uninterrupted
        for losses in (*others, zero1_losses):
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(uninterrupted), rtol=BOUND, atol=0)
