"""The training loop: it reads data, steps the engine, reports metrics, evaluates and saves checkpoints.

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
# During an evaluation the ranks agree once per this many batches whether to stop. An all-reduce per batch costs more.
BATCHES_PER_CHECK = 8


def evaluation_due(config: Config, step: int) -> bool:
    """Returns whether an evaluation follows this step."""
    due = step % config.run.evaluate_every_steps == 0 or step == config.train.steps
    return config.data.validation is not None and step > 0 and due


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
        steps_taken: int,
        evaluate_first: bool = False,
    ):
        """
        Args:
            position: the position in the data that `train` reads from.
            steps_taken: if it is not 0, the engine has loaded the checkpoint of this step.
            evaluate_first: evaluate before the first step, because the previous job was stopped before or during the
                evaluation after step `steps_taken`.
        """
        self.config, self.engine, self.train, self.validation, self.stop = config, engine, train, validation, stop
        self.position = position
        self.step, self.evaluate_first = steps_taken, evaluate_first
        self.num_nonfinite_steps = 0  # in a row, up to the current step
        self._data_error: str | None = None  # what is wrong with the data that this rank needs next
        self.metrics = Metrics(config, steps_taken, engine.rank, engine.world_size, engine.device)
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
        save_due, stopped, (damaged,) = False, False, self._on_any_rank(self._next_data_is_damaged())
        first_step = self.step + 1
        if self.evaluate_first and not damaged:
            stopped, damaged = self._evaluate()
        while self.step < steps and not stopped and not damaged:
            self.step += 1
            self._restart_stall_timer()
            stopped, damaged = self._train_step()
            if self.step == first_step:
                freeze_garbage_collector()
            if not stopped and evaluation_due(self.config, self.step):
                stopped, validation_is_damaged = self._evaluate()
                damaged = damaged or validation_is_damaged
            save_due = save_due or self.step % run.save_every_steps == 0 or self.step == steps or stopped or damaged
            if save_due and not self.num_nonfinite_steps:  # bad weights must not replace good checkpoints
                self._save()
                save_due = False
        self._restart_stall_timer()
        self.saver.finish()
        if damaged:
            self._end_all_ranks(next(error for error in of_all_ranks(self._data_error) if error))
        if stopped:
            outcome = f"saved at step {self.step}"
            if self.num_nonfinite_steps:
                outcome = "not saved, because the gradient of the last step is not finite"
            self.metrics.print_line(f"asked to stop: {outcome}")
        return not stopped

    def _restart_stall_timer(self) -> None:
        """Gives this rank another run.stall_seconds; if they pass, the process prints all tracebacks and exits.

        A peer that hangs without dying would otherwise block this rank forever. The timer is a thread of faulthandler,
        which works without Python's interpreter lock. The launcher then ends the other ranks.
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
            damaged = self._next_data_is_damaged()
        with self.metrics.phase("report"):
            # One all-reduce sums everything that the ranks must agree on.
            totals = torch.zeros(n + 4, dtype=torch.float64, device=engine.device)
            totals[:n] = result.nll_sums
            own = (result.gradient_norm, self.stop.asked, damaged, self.saver.has_written)
            totals[n:] = torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(totals)
            *nll_sums, gradient_norms, num_stop_requests, num_damaged, num_written = totals.tolist()
        # fp16 adjusts its loss scale by skipping steps, and an emulated cluster computes meaningless gradients.
        expected = (result.skipped and self.config.train.precision == "fp16") or self.config.cluster.emulate
        if all(map(math.isfinite, [*nll_sums, gradient_norms])) or expected:
            self.num_nonfinite_steps = 0
        else:
            self._report_nonfinite_step(result.nll_sums, result.skipped)
        losses = [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)]
        self.metrics.report_step(self.step, losses, result.gradient_norm, lr, result.skipped)
        if num_written == engine.world_size:
            self.saver.finish()
        return num_stop_requests > 0, num_damaged > 0

    def _next_data_is_damaged(self) -> bool:
        """Returns whether this rank's data of the next step is damaged. Waits, as that step would, until it is read."""
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
            InputError: as in `run`; this was the last of too many such steps, or the last step of the run, or the step
                has changed the weights.
        """
        self.num_nonfinite_steps += 1
        all_finite = bool(nll_sums.isfinite().all())
        place = f"rank {self.engine.rank} ({socket.gethostname()}, local rank {find_place().local_rank})"
        reports = of_all_ranks((self.engine.data_parallel_rank, all_finite, place))
        bad_readers = sorted({reader for reader, all_finite, _ in reports if not all_finite})
        # Names all stages of a pipeline: the fault may lie in a stage that computes no losses.
        bad_places = ", ".join(place for reader, _, place in reports if bad_readers and reader == bad_readers[0])
        more = f" and of {len(bad_readers) - 1} more data-parallel ranks" if len(bad_readers) > 1 else ""
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
        assert validation is not None  # evaluation_due requires it
        stopped = damaged = False

        def agreed_batches() -> Iterator[Batch]:
            """Yields this rank's batches in groups, each after all ranks have read their group.

            A rank that stopped at damaged data alone would leave its peers waiting in a collective. The ranks also
            check for a stop request, since an evaluation may outlast the time between a signal and the job's end.
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

        totals = engine.evaluate(agreed_batches())
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
        assert isinstance(blend, Blend)  # pretrain.py makes a blend even of one corpus
        position = self.position.advanced(blend, self.train.windows_before(self.step))
        self.saver.begin(self.step, position.to_json())
