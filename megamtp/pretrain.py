"""Pretrains a multi-token model.

    deepspeed --module megamtp.pretrain configs/quickstart.yaml model.num_future_tokens=4 optimizer.lr=3e-4
    torchrun --nproc-per-node 8 -m megamtp.pretrain configs/1.3b_n4.yaml data.train=corpus/train run.directory=runs/1.3b
    %(prog)s configs/quickstart.yaml          (one rank)

Later arguments override earlier arguments. If the run directory holds checkpoints, the run resumes from the newest
intact checkpoint, with any engine and any number of ranks.
"""

import sys

# First: this import looks up the launcher, which may exit during the slow imports that follow.
from megamtp.cluster.signals import StopRequest

# isort: split
from megamtp.cluster.environment import Place, errors_shared, find_place, place_in_cluster, raised_by_all
from megamtp.cluster.exiting import as_rank, close_communicators
from megamtp.commands import command_line
from megamtp.config import print_help, read_config
from megamtp.engines.deepspeed.join import join_peers
from megamtp.training.preflight import CheckedRun, check
from megamtp.training.starting import check_agreement, engine_config, find_start, open_loader, prepare


def main(arguments: list[str]) -> int:
    """Trains. Returns the exit status: 0, or run.requeue_exit_code after an early stop. Raises InputError."""
    if print_help(arguments, __doc__.replace("%(prog)s", command_line.command_as_called())):
        return 0
    place = find_place()
    with errors_shared(place):
        config = read_config([argument for argument in arguments if not argument.startswith("--local_rank")])
        place_of_run = place_in_cluster(place, config.cluster)
        run = check(config, place_of_run)
    finished = _train(run, place_of_run)
    close_communicators()
    return 0 if finished else config.run.requeue_exit_code


def _train(run: CheckedRun, place: Place) -> bool:
    """Trains to the last step. Returns False if a rank was asked to stop; the run is then saved. Collective."""
    stop = StopRequest(has_launcher=place.world_size > 1 and not run.config.cluster.emulate)
    join_peers(place, run.config.cluster)
    stop.listen()
    check_agreement(run)
    # Imported late: these imports take seconds, and a mistake in the arguments is reported before them.
    from megamtp.engines.build import build_engine
    from megamtp.training.loop import Training

    start = find_start(run, place)
    if start is None:
        return True
    with raised_by_all():
        loader = open_loader(run, start)
    engine = build_engine(engine_config(run, start), run.partition)
    with raised_by_all():
        prepare(run, start, loader, place)
    if start.checkpoint:
        engine.load(start.checkpoint)
    with raised_by_all():
        training = Training(
            run.config, engine, loader, start.position, run.validation, stop, start.step, start.evaluate_first
        )
    return training.run()


def entry() -> None:
    """Runs the command line.

    An InputError becomes one line on stderr, once per node, and exit status 2. Ctrl-C becomes exit status 130.
    """
    command_line.ignore_deprecated_collectives()
    command_line.run(as_rank(lambda: main(sys.argv[1:])))


if __name__ == "__main__":
    entry()
