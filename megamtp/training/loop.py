"""Runs the training loop: reads data, steps the engine, reports metrics, evaluates and saves checkpoints.

Tests: tests/distributed/test_training.py.
"""

import faulthandler
import gc
import math
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint.store import checkpoints
from megamtp.cluster.environment import find_place, of_all_ranks
from megamtp.cluster.signals import StopRequest
from megamtp.config import Config
from megamtp.data.blend import Blend
from megamtp.data.loader import Batch, TrainLoader, evaluation_batches, read_group
from megamtp.data.position import DataPosition
from megamtp.data.windows import Windows
from megamtp.engines.base import Engine, count_targets
from megamtp.errors import InputError
from megamtp.optimizers.schedule import learning_rate
from megamtp.training.metrics import Metrics
from megamtp.training.saving import Saver

MAX_NONFINITE_STEPS = 10  # consecutive steps with a non-finite gradient before the run ends
# Batches of an evaluation between two checks whether a rank must stop. A check is an all-reduce, so it costs time.
BATCHES_PER_CHECK = 8


def is_evaluation_step(config: Config, step: int) -> bool:
    """Returns whether an evaluation follows this step."""
    is_multiple_or_last = step % config.run.evaluate_every_steps == 0 or step == config.train.steps
    return config.data.validation is not None and step > 0 and is_multiple_or_last


def freeze_garbage_collector() -> None:
    """Excludes all existing objects from Python's garbage collections.

    Libraries create hundreds of thousands of objects. A collection that scans them pauses a rank for a tenth of a
    second, and all other ranks wait. Each rank pauses at a different time, so more ranks mean more slow steps.
    """
    gc.collect()
    gc.freeze()


class Training:
    """Trains on all ranks, from a run's newest checkpoint (or from the beginning) to its last step."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        train: TrainLoader,
        position: DataPosition,
        validation: Windows | None,
        stop: StopRequest,
        step: int,
        evaluate_first: bool = False,
    ):
        """
        Args:
            position: the position in the data that `train` reads from.
            step: number of steps taken so far. If it is not 0, the engine has loaded the checkpoint of this step.
            evaluate_first: evaluate before the first step, because the previous job was stopped before or during the
                evaluation after `step`.
        """
        self.config, self.engine, self.train, self.validation, self.stop = config, engine, train, validation, stop
        self.position = position
        self.step, self.evaluate_first = step, evaluate_first
        self.num_nonfinite_steps = 0  # consecutive steps with a non-finite gradient, up to the current step
        self._data_error: str | None = None  # what is wrong with the data that this rank needs next
        self.metrics = Metrics(config, step, engine.rank, engine.world_size, engine.device)
        self.saver = Saver(config, engine, self.metrics)

    def run(self) -> bool:
        """Trains to the last step. Returns False if a rank was asked to stop: the run is saved and ends early.

        Collective.

        Raises:
            InputError: on rank 0; other ranks raise SystemExit, so that the error is printed once. Either the data of
                the next step or of an evaluation is damaged on some rank, after the steps before it were saved. Or
                too many consecutive steps had a non-finite gradient; these steps are not saved.
        """
        try:
            finished = self._run()
        except BaseException:
            with suppress(OSError, InputError):  # the original error, such as a full disk, matters more
                self.metrics.close()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            gc.unfreeze()
            self.train.close()
        self.metrics.close()
        return finished

    def _run(self) -> bool:
        run, steps = self.config.run, self.config.train.steps
        must_save = stopped = False
        (data_is_damaged,) = self._on_any_rank(self._next_data_is_damaged())
        first_step = self.step + 1
        if self.evaluate_first and not data_is_damaged:
            stopped, data_is_damaged = self._evaluate()
        while self.step < steps and not stopped and not data_is_damaged:
            self.step += 1
            self._restart_stall_timer()
            stopped, data_is_damaged = self._train_step()
            if self.step == first_step:
                freeze_garbage_collector()
            if not stopped and is_evaluation_step(self.config, self.step):
                stopped, validation_is_damaged = self._evaluate()
                data_is_damaged = data_is_damaged or validation_is_damaged
            ends = self.step == steps or stopped or data_is_damaged
            must_save = must_save or ends or self.step % run.save_every_steps == 0
            if must_save and not self.num_nonfinite_steps:  # bad weights must not replace good checkpoints
                self._save()
                must_save = False
        self._restart_stall_timer()
        self.saver.finish()
        if data_is_damaged:
            self._end_all_ranks(next(error for error in of_all_ranks(self._data_error) if error))
        if stopped:
            outcome = f"saved at step {self.step}"
            if self.num_nonfinite_steps:
                outcome = "not saved, because the gradient of the last step is not finite"
            self.metrics.print_line(f"asked to stop: {outcome}")
        return not stopped

    def _restart_stall_timer(self) -> None:
        """Restarts the timer of run.stall_seconds. When it ends, the process prints all tracebacks and exits.

        A peer that hangs but does not exit would otherwise block this rank forever. The timer is a thread of
        faulthandler, which works without Python's interpreter lock. When this rank exits, the launcher ends the others.
        """
        if self.config.run.stall_seconds:
            faulthandler.dump_traceback_later(self.config.run.stall_seconds, exit=True)

    def _train_step(self) -> tuple[bool, bool]:
        """Takes one optimizer step and reports it.

        Returns:
            Whether any rank was asked to stop, and whether the next step's data is damaged on any rank.
        """
        engine, n = self.engine, self.config.model.num_future_tokens
        with self.metrics.phase("data"):
            micro_batches = self.train.micro_batches(self.step - 1)
        with self.metrics.phase("train"):
            can_be_ignored = self.train.windows.targets_can_be_ignored
            counts = count_targets(micro_batches, can_be_ignored, engine.data_parallel_size, engine.device)
            lr = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
            result = engine.train_batch(micro_batches, counts, lr)
        with self.metrics.phase("data"):
            is_damaged = self._next_data_is_damaged()
        with self.metrics.phase("report"):
            # One all-reduce for all values that every rank needs.
            totals = torch.zeros(n + 4, dtype=torch.float64, device=engine.device)
            totals[:n] = result.nll_sums
            own = (result.gradient_norm, self.stop.asked, is_damaged, self.saver.has_written)
            totals[n:] = torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(totals)
            *nll_sums, sum_of_norms, num_stop_requests, num_damaged, num_written = totals.tolist()
        # fp16 adjusts its loss scale by skipping steps, and an emulated cluster computes meaningless gradients.
        nonfinite_is_expected = (
            result.skipped and self.config.train.precision == "fp16"
        ) or self.config.cluster.emulate
        # The sum of the gradient norms is finite only if every norm is.
        if all(map(math.isfinite, [*nll_sums, sum_of_norms])) or nonfinite_is_expected:
            self.num_nonfinite_steps = 0
        else:
            self._report_nonfinite_step(result.nll_sums, result.skipped)
        losses = [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)]
        self.metrics.report_step(self.step, losses, result.gradient_norm, lr, result.skipped)
        if num_written == engine.world_size:
            self.saver.finish()
        return num_stop_requests > 0, num_damaged > 0

    def _next_data_is_damaged(self) -> bool:
        """Returns whether this rank's data of the next step is damaged. Waits until the data is read."""
        self._data_error = self.train.read_error(self.step) if self.step < self.config.train.steps else None
        return self._data_error is not None

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether any rank has set it. Collective."""
        num_ranks = torch.tensor(flags, dtype=torch.float32, device=self.engine.device)
        dist.all_reduce(num_ranks)
        return [number > 0 for number in num_ranks.tolist()]

    def _report_nonfinite_step(self, nll_sums: Tensor, skipped: bool) -> None:
        """Prints which ranks have non-finite losses: a faulty GPU is as likely a cause as a bad setting. Collective.

        Raises:
            InputError: on rank 0, as in `run`, if one of these conditions holds: the step has changed the weights, it
                is the last step of the run, or it is number MAX_NONFINITE_STEPS of consecutive non-finite steps.
        """
        self.num_nonfinite_steps += 1
        all_finite = bool(nll_sums.isfinite().all())
        place = f"rank {self.engine.rank} ({socket.gethostname()}, local rank {find_place().local_rank})"
        reports = of_all_ranks((self.engine.data_parallel_rank, all_finite, place))
        bad_ranks = sorted({data_parallel_rank for data_parallel_rank, all_finite, _ in reports if not all_finite})
        # Names all stages of a pipeline: the fault may lie in a stage that computes no losses.
        bad_places = ", ".join(
            place for data_parallel_rank, _, place in reports if bad_ranks and data_parallel_rank == bad_ranks[0]
        )
        more = f" and of {len(bad_ranks) - 1} more data-parallel ranks" if len(bad_ranks) > 1 else ""
        problem = f"step {self.step}: all losses are finite, but the gradient is not"
        if bad_places:
            problem = f"step {self.step}: the losses of {bad_places}{more} are not finite"
        if skipped and self.num_nonfinite_steps < MAX_NONFINITE_STEPS and self.step < self.config.train.steps:
            self.metrics.print_line(f"megamtp: warning: {problem}; the weights are unchanged")
            return
        self.saver.finish()
        saved = checkpoints(Path(self.config.run.directory))
        self._end_all_ranks(
            f"{problem}; non-finite steps in a row: {self.num_nonfinite_steps}. A new job resumes from "
            f"{saved[-1].name if saved else 'the beginning'}: if it fails at the same step, lower optimizer.lr or "
            "remove the newest checkpoint; otherwise have that machine checked"
        )

    def _end_all_ranks(self, error: str) -> NoReturn:
        """Raises InputError on rank 0 and SystemExit on the others. All ranks call it."""
        raise InputError(error) if self.engine.rank == 0 else SystemExit(2)

    def _evaluate(self) -> tuple[bool, bool]:
        """Evaluates and reports the validation losses.

        Returns:
            Whether any rank was asked to stop, and whether any rank's data is damaged. Both end the evaluation without
            a report.
        """
        engine, config, validation = self.engine, self.config, self.validation
        assert validation is not None  # is_evaluation_step requires it
        stopped = damaged = False

        def batches_until_stop() -> Iterator[Batch]:
            """Yields this rank's batches in groups, each after all ranks have read their group.

            All ranks stop after the same group: if only one rank stopped at damaged data, the others would wait in a
            collective. A stop request also ends the evaluation, which may take longer than the time between a signal
            and the job's end.
            """
            nonlocal stopped, damaged
            batches = evaluation_batches(
                validation,
                config.train.micro_batch_size,
                engine.data_parallel_rank,
                engine.data_parallel_size,
                config.run.evaluation_windows,
            )
            while True:
                self._restart_stall_timer()
                group, error = read_group(batches, BATCHES_PER_CHECK)
                stopped, damaged = self._on_any_rank(self.stop.asked, error is not None)
                self._data_error = self._data_error or error
                if stopped or damaged or not group:
                    return
                yield from group

        totals = engine.evaluate(batches_until_stop())
        if stopped or damaged:
            return stopped, damaged
        dist.all_reduce(totals)
        nll_sums, counts = totals.view(2, -1).tolist()
        losses = [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)]
        self.metrics.report_evaluation(self.step, losses)
        return False, False

    def _save(self) -> None:
        if self.config.cluster.emulate:
            self.metrics.print_line("no checkpoint is written: an emulated cluster does not train its weights")
            return
        self._restart_stall_timer()
        blend = self.train.windows
        assert isinstance(blend, Blend)  # starting.py makes a blend even of a single corpus
        position = self.position.advanced(blend, self.train.first_window(self.step))
        self.saver.begin(self.step, position.to_json())
