"""The training loop: data, engine, metrics, evaluation, checkpoints, and an orderly end."""

import torch
import torch.distributed as dist

from megamtp.cluster.signals import StopRequest
from megamtp.config import Config
from megamtp.data.loader import TrainLoader, evaluation_batches
from megamtp.data.windows import Windows
from megamtp.engines.base import Engine, count_targets
from megamtp.errors import InputError
from megamtp.training.metrics import Metrics
from megamtp.training.saving import Saver
from megamtp.training.schedule import learning_rate


class Training:
    """One run on all ranks, from its newest checkpoint (or the beginning) to its last step."""

    def __init__(
        self, config: Config, engine: Engine, train: TrainLoader, validation: Windows | None, stop: StopRequest, first_step: int
    ):
        """`first_step`: steps already taken; the engine has loaded the checkpoint of that step if it is not 0."""
        self.config, self.engine, self.train, self.validation, self.stop = config, engine, train, validation, stop
        self.step = first_step
        self._damage: str | None = None  # what is wrong with this rank's data that is needed next
        self.metrics = Metrics(config, first_step, engine.rank, engine.world_size, engine.device)
        self.saver = Saver(config, engine, self.metrics)

    def run(self) -> bool:
        """Trains. False if it ended early, saved, because a rank was asked to stop. Collective.

        Raises:
            InputError: some rank's data of the next step, or of an evaluation, is damaged; the steps before it are saved. On ranks
                other than 0 a SystemExit instead, so that it is said once.
        """
        try:
            return self._run()
        finally:
            self.train.close()

    def _run(self) -> bool:
        run, steps = self.config.run, self.config.train.steps
        stopped, damaged = False, self._anywhere(self._is_damaged())
        while self.step < steps and not stopped and not damaged:
            self.step += 1
            stopped, damaged = self._train_step()
            if self.validation and (self.step % run.evaluate_every_steps == 0 or self.step == steps):
                damaged = not self._evaluate() or damaged
            if self.step % run.save_every_steps == 0 or self.step == steps or stopped or damaged:
                self._save()
        self.saver.finish()
        if damaged:
            self._report_damage()
        if stopped:
            self.metrics.say(f"asked to stop: saved at step {self.step}")
        self.metrics.close()
        return not stopped

    def _train_step(self) -> tuple[bool, bool]:
        """One optimizer step and its report: whether any rank was asked to stop, and cannot read the next step's data."""
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
            totals = torch.zeros(n + 3, dtype=torch.float64, device=engine.device)
            totals[:n] = result.nll_sums
            totals[n], totals[n + 1], totals[n + 2] = self.stop.asked, damaged, self.saver.has_written
            # of the losses and, with them, of the wish to stop, of damage ahead and of the ranks that have written
            dist.all_reduce(totals)
            *nll_sums, wishes, damaged_ranks, written = totals.tolist()
        losses = [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)]
        self.metrics.training(self.step, losses, result.gradient_norm, lr, result.skipped)
        if written == engine.world_size:
            self.saver.finish()
        return wishes > 0, damaged_ranks > 0

    def _is_damaged(self) -> bool:
        """Whether this rank's data of the next step is, if there is a next step; waits until it is read, as that step would."""
        self._damage = self.train.damage(self.step) if self.step < self.config.train.steps else None
        return self._damage is not None

    def _anywhere(self, found: bool) -> bool:
        """Whether it was found on any rank. Collective."""
        ranks = torch.tensor(float(found), device=self.engine.device)
        dist.all_reduce(ranks)
        return ranks.item() > 0

    def _report_damage(self) -> None:
        """Raises the first InputError of any rank's on rank 0, and SystemExit on the others. Collective."""
        self.metrics.close()
        found: list[str | None] = [None] * self.engine.world_size
        dist.all_gather_object(found, self._damage)
        if self.engine.rank:
            raise SystemExit(2)
        raise InputError(next(error for error in found if error))

    def _evaluate(self) -> bool:
        """False if some rank finds its data damaged: a rank that met it amid its batches would leave the others waiting."""
        engine = self.engine
        with self.metrics.phase("evaluate"):
            error = self.validation.damage_of_first(self.config.run.evaluation_windows)
            if self._anywhere(error is not None):
                self._damage = self._damage or error
                return False
        batches = evaluation_batches(
            self.validation,
            self.config.train.micro_batch_size,
            engine.data_parallel_rank,
            engine.data_parallel_size,
            self.config.run.evaluation_windows,
        )
        with self.metrics.phase("evaluate"):
            totals = engine.evaluate(batches)
            dist.all_reduce(totals)
        nll_sums, counts = totals.view(2, -1).tolist()
        self.metrics.validation(self.step, [nll / max(1, count) for nll, count in zip(nll_sums, counts, strict=True)])
        return True

    def _save(self) -> None:
        if self.config.cluster.emulate:
            self.metrics.say("an emulated cluster's weights are not trained ones: no checkpoint is written")
            return
        self.saver.begin(self.step)
