"""Shows the losses of every head after launch/quickstart.sh, compared with the unigram entropy of the corpus.

    bash launch/quickstart.sh && %(prog)s --output results

The unigram entropy is the loss of a model that knows only how often each token occurs. The benchmark reads the metrics
of the finished run and trains nothing.
"""

import platform
from pathlib import Path
from typing import Any

from benchmarks import output
from megamtp.commands.report import draw, read_losses, unigram_entropy
from megamtp.config import RESOLVED, read_config
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS

SMOKE: dict[str, Any] = {}  # the run may have any size


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "quickstart")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the run's folder [runs/quickstart]")
    options = output.parse(parser, arguments, SMOKE)
    output.make_folder(options)
    config = read_config([str(options.run / RESOLVED)])
    training, validation = read_losses(options.run / METRICS, config.model.num_future_tokens)
    entropy = unigram_entropy(config)
    if entropy is None or not len(validation.steps) or validation.steps[-1] != config.train.steps:
        raise InputError(f"{options.run} is not finished or has no validation corpus; expected the quickstart's run")
    results = [
        {"head": index + 1, "training": training.last(index), "validation": loss, "unigram_entropy": entropy}
        for index, loss in enumerate(validation.losses[-1].tolist())
    ]
    settings = {"Python": platform.python_version(), "steps": config.train.steps}
    output.write(options, settings, results, tables(results), draw(training, validation, entropy, "quickstart"))


def tables(results: list[dict]) -> str:
    heads = [f"head {result['head']}" for result in results]
    entropy = results[0]["unigram_entropy"]
    return output.table(
        ["nats per token", f"{heads[0]} (next token)", *heads[1:]],
        [
            ["validation loss", *(f"{result['validation']:.3f}" for result in results)],
            [
                f"unigram entropy ({entropy:.3f}) minus validation loss",
                *(f"{entropy - r['validation']:.3f}" for r in results),
            ],
        ],
    )
