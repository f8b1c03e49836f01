"""The training loop: data, engine, metrics, evaluation, checkpoints, and an orderly end.

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

MAX_SKIPPED = 10  # steps in a row whose gradients are not finite
# of an evaluation, which are read before the ranks agree to run them: whether to stop, and if any is damaged
BATCHES_UNASKED = 8


def evaluation_due(config: Config, step: int) -> bool:
    """Whether an evaluation follows this step."""
    due = step % config.run.evaluate_every_steps == 0 or step == config.train.steps
    return config.data.validation is not None and step > 0 and due


def leave_to_collections_what_is_to_come() -> None:
    """Python's garbage collections look no more at what exists by now.

    There are hundreds of thousands of objects, libraries' most of them; looking through them takes a rank a tenth of a
    second, at a time of its own, and all others wait for it: the more ranks, the more steps are lengthened.
    """
    gc.collect()
    gc.freeze()


class Training:
    """One run on all ranks, from its newest checkpoint (or the beginning) to its last step."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        train: TrainLoader,
        position: DataPosition,
        validation: Windows | None,
        stop: StopRequest,
        first_step: int,
        owes_evaluation: bool = False,
    ):
        """
        Args:
            position: in the data, from which `train` reads.
            first_step: steps already taken; the engine has loaded the checkpoint of that step if it is not 0.
            owes_evaluation: of that step, which the job before was stopped amid or before.
        """
        self.config, self.engine, self.train, self.validation, self.stop = config, engine, train, validation, stop
        self.position = position
        self.step, self.owes_evaluation = first_step, owes_evaluation
        self.num_skipped = 0  # of the last steps, in a row, for what is not finite
        self._damage: str | None = None  # what is wrong with this rank's data that is needed next
        self.metrics = Metrics(config, first_step, engine.rank, engine.world_size, engine.device)
        self.saver = Saver(config, engine, self.metrics)

    def run(self) -> bool:
        """Trains. False if it ended early, saved, because a rank was asked to stop. Collective.

        Raises:
            InputError: some rank's data of the next step, or of an evaluation, is damaged; the steps before it are
                saved. Or, step after step, gradients are not finite; these are not saved. On ranks other than 0 a
                SystemExit instead, so that it is said once.
        """
        try:
            finished = self._run()
        except BaseException:
            with suppress(OSError, InputError):  # a full disk, say, is what ends the run
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
        due, stopped, (damaged,) = False, False, self._anywhere(self._is_damaged())
        first_step = self.step + 1
        if self.owes_evaluation and not damaged:
            stopped, damaged = self._evaluate()
        while self.step < steps and not stopped and not damaged:
            self.step += 1
            self._must_end()
            stopped, damaged = self._train_step()
            if self.step == first_step:
                leave_to_collections_what_is_to_come()
            if not stopped and evaluation_due(self.config, self.step):
                stopped, found = self._evaluate()
                damaged = damaged or found
            due = due or self.step % run.save_every_steps == 0 or self.step == steps or stopped or damaged
            if due and not self.num_skipped:  # or bad weights might outlive good ones
                self._save()
                due = False
        self._must_end()
        self.saver.finish()
        if damaged:
            self._fail(next(error for error in of_all_ranks(self._damage) if error))
        if stopped:
            saved = (
                "these steps, which are not finite, are not saved" if self.num_skipped else f"saved at step {self.step}"
            )
            self.metrics.say(f"asked to stop: {saved}")
        return not stopped

    def _must_end(self) -> None:
        """From here on this rank has run.stall_seconds until the next call: a peer that hangs, not dies, would keep it
        for ever.

        The watch is a thread of faulthandler's, which needs nothing of Python to print all tracebacks and to end the
        process; the launcher then ends the others.
        """
        if self.config.run.stall_seconds:
            faulthandler.dump_traceback_later(self.config.run.stall_seconds, exit=True)

    def _train_step(self) -> tuple[bool, bool]:
        """One optimizer step and its report: whether any rank was asked to stop, and cannot read the next step's
        data.
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
            damaged = self._is_damaged()
        with self.metrics.phase("report"):
            totals = torch.zeros(n + 4, dtype=torch.float64, device=engine.device)
            totals[:n] = result.nll_sums
            others = (result.gradient_norm, self.stop.asked, damaged, self.saver.has_written)
            totals[n:] = torch.tensor(others, dtype=torch.float64)
            # of the losses and, with them, of the gradient's norm, of the wish to stop, of damage ahead and of the
            # ranks that have written
            dist.all_reduce(totals)
            *nll_sums, norms, wishes, damaged_ranks, written = totals.tolist()
        by_loss_scale = result.skipped and self.config.train.precision == "fp16"  # which is found so
        if all(map(math.isfinite, [*nll_sums, norms])) or by_loss_scale or self.config.cluster.emulate:
            self.num_skipped = 0
        else:
            self._note_not_finite(result.nll_sums, result.skipped)
        losses = [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)]
        self.metrics.training(self.step, losses, result.gradient_norm, lr, result.skipped)
        if written == engine.world_size:
            self.saver.finish()
        return wishes > 0, damaged_ranks > 0

    def _is_damaged(self) -> bool:
        """Whether this rank's data of the next step is, if there is a next step; waits until it is read, as that
        step would.
        """
        self._damage = self.train.read_error(self.step) if self.step < self.config.train.steps else None
        return self._damage is not None

    def _anywhere(self, *found: bool) -> list[bool]:
        """Whether each was found on any rank. Collective."""
        ranks = torch.tensor(found, dtype=torch.float32, device=self.engine.device)
        dist.all_reduce(ranks)
        return [number > 0 for number in ranks.tolist()]

    def _note_not_finite(self, nll_sums: Tensor, skipped: bool) -> None:
        """Says whose losses are not finite: a bad card is as likely as a bad setting. Collective.

        Raises:
            InputError: there are too many in a row, this is the run's last, or it has changed the weights; as `run`
                raises it.
        """
        self.num_skipped += 1
        finite = bool(nll_sums.isfinite().all())
        place = f"rank {self.engine.rank} ({socket.gethostname()}, local rank {find_place().local_rank})"
        told = of_all_ranks((self.engine.data_parallel_rank, finite, place))
        readers = sorted({reader for reader, finite, _ in told if not finite})
        # In a pipeline, stages that have no losses may be where it began.
        first = ", ".join(place for reader, _, place in told if readers and reader == readers[0])
        others = f" and of {len(readers) - 1} others" if len(readers) > 1 else ""
        found = f"step {self.step}: not finite: " + (
            f"the losses of {first}{others}" if first else "the gradient; all losses are"
        )
        if skipped and self.num_skipped < MAX_SKIPPED and self.step < self.config.train.steps:
            self.metrics.say(f"megamtp: warning: {found}; the weights stay as they were")
            return
        self.saver.finish()
        saved = checkpoints(Path(self.config.run.directory))
        self._fail(
            f"{found}; such steps in a row: {self.num_skipped}. Started again, the run goes on from "
            f"{saved[-1].name if saved else 'its beginning'}: if that fails at the same step, lower optimizer.lr or "
            "remove the newest checkpoint; else have that machine looked at"
        )

    def _fail(self, error: str) -> NoReturn:
        """Ends every rank: with an InputError on rank 0, with SystemExit on the others."""
        raise InputError(error) if self.engine.rank == 0 else SystemExit(2)

    def _evaluate(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any rank's data is damaged: both end the evaluation
        without a result.
        """
        engine, config, validation = self.engine, self.config, self.validation
        assert validation is not None  # as evaluation_due sees to it
        stopped = damaged = False

        def agreed_batches() -> Iterator[Batch]:
            """This rank's batches, each read once: a group is run when all ranks have read theirs.

            A rank that met damage amid a group would leave the others waiting; and an evaluation may take longer than a
            job has from the signal to its end.
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
                self._must_end()
                group, error = read_group(batches, BATCHES_UNASKED)
                stopped, damaged = self._anywhere(self.stop.asked, error is not None)
                self._damage = self._damage or error
                if stopped or damaged or not group:
                    return
                yield from group

        totals = engine.evaluate(agreed_batches())
        if stopped or damaged:
            return stopped, damaged
        dist.all_reduce(totals)
        nll_sums, counts = totals.view(2, -1).tolist()
        self.metrics.validation(self.step, [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)])
        return False, False

    def _save(self) -> None:
        if self.config.cluster.emulate:
            self.metrics.say("an emulated cluster's weights are not trained ones: no checkpoint is written")
            return
        self._must_end()
        blend = self.train.windows
        assert isinstance(blend, Blend)  # which pretraining makes of any number of corpora
        position = self.position.advanced(blend, self.train.windows_before(self.step))
        self.saver.begin(self.step, position.to_json())
