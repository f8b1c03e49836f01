"""Measures the throughput of corpus preparation on the CPU, with one and more workers, and of SentencePiece alone.

    %(prog)s --input TEXT ... --output results

Each round measures every variant once: `sentencepiece.encode` of all texts, already in memory, on one thread; one
worker that tokenises the same files into parts; and several workers. The tokenizer is trained before the first round.
"Per core" is MB per second of CPU time, summed over all cores. CPU time depends less on other programs than wall time.
"""

import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
from matplotlib.figure import Figure

from benchmarks import corpora, output
from megamtp.data import shards, workers
from megamtp.data.input_files import Source, find_source, standard_library
from megamtp.data.tokenisation import TokenisationTask
from megamtp.data.tokenised_shards import BATCH_DOCUMENTS
from megamtp.data.tokenizer import train_sentencepiece
from megamtp.errors import InputError

SENTENCEPIECE = "sentencepiece"
SMOKE = {"input": [corpora.SMOKE_TEXT], "vocab_size": 400, "rounds": 1}


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "prepare")
    parser.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="text [Python's standard library]")
    parser.add_argument(
        "--vocab-size", type=output.positive, default=4096, help="vocabulary size of the tokenizer [4096]"
    )
    parser.add_argument("--workers", nargs="+", type=output.positive, default=[1, 2], help="numbers of processes [1 2]")
    parser.add_argument("--rounds", type=output.positive, default=5, help="rounds over all variants [5]")
    options = output.parse(parser, arguments, SMOKE)
    if 1 not in options.workers:
        raise InputError(f"--workers {options.workers}; expected 1 among them: the others are compared with it")
    output.make_folder(options)
    source = find_source(options.input) if options.input else standard_library()
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        times, num_bytes = measure(source, Path(folder), options.vocab_size, options.workers, options.rounds)
    settings = {"text": f"{num_bytes / 1e6:.1f} MB", "vocabulary": options.vocab_size, "rounds": options.rounds}
    results = [
        {"variant": name, "bytes": num_bytes, "seconds": variant_times.wall, "cpu_seconds": variant_times.cpu}
        for name, variant_times in times.items()
    ]
    output.write(options, settings, results, tables(results), draw(times, num_bytes))


@dataclass
class Times:
    """Seconds of one variant in each round: wall time, and CPU time of all cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(
    source: Source, folder: Path, vocab_size: int, worker_counts: list[int], rounds: int
) -> tuple[dict[str, Times], int]:
    """Returns (times of each variant, bytes of text)."""
    texts = [text for _, text in source.documents()]
    model = folder / "tokenizer.model"
    train_sentencepiece(texts, model, vocab_size, seed=0)
    variants: dict[str, Callable[[], None]] = {SENTENCEPIECE: _sentencepiece(texts, model)}
    for num_workers in worker_counts:
        variants[_name(num_workers)] = _workers(source, folder / "parts", model, num_workers)
    times = {name: Times() for name in variants}
    for round_number in range(rounds + 1):
        for name, variant in variants.items():
            shutil.rmtree(folder / "parts", ignore_errors=True)
            (folder / "parts").mkdir()
            start, cpu_start = time.perf_counter(), _cpu_seconds()
            variant()
            if round_number:  # the first round reads files and libraries from the disk
                times[name].wall.append(time.perf_counter() - start)
                times[name].cpu.append(_cpu_seconds() - cpu_start)
    return times, sum(len(text.encode()) for text in texts)


def _cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its finished workers."""
    usages = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _sentencepiece(texts: list[str], model: Path) -> Callable[[], None]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    batches = [texts[start : start + BATCH_DOCUMENTS] for start in range(0, len(texts), BATCH_DOCUMENTS)]

    def encode() -> None:
        for batch in batches:
            processor.encode(batch, out_type=int, num_threads=1)

    return encode


def _workers(source: Source, parts: Path, model: Path, num_workers: int) -> Callable[[], None]:
    task = TokenisationTask(
        folder=parts,
        tokenizer=str(model),
        tokenizer_digest="",  # only part of the names of the files in `parts`
        json_key=source.json_key,
        seed=0,
        cuts_documents=False,
        with_text_hashes=False,
    )
    return lambda: workers.tokenise_all(shards.cut_into_shards(source.files, cuts_documents=False), task, num_workers)


def _name(num_workers: int) -> str:
    return f"{num_workers} worker{'s' if num_workers > 1 else ''}"


def tables(results: list[dict]) -> str:
    """Makes a table of speeds. Ratios to SentencePiece and to one worker are computed round by round."""
    by_name, rows = {result["variant"]: result for result in results}, []
    for name, result in by_name.items():
        by_wall_time = output.spread([result["bytes"] / 1e6 / value for value in result["seconds"]], 2)
        per_core = output.spread([result["bytes"] / 1e6 / value for value in result["cpu_seconds"]], 2)
        over_sentencepiece = (
            _speed_ratio(result["cpu_seconds"], by_name[SENTENCEPIECE]["cpu_seconds"]) if name != SENTENCEPIECE else ""
        )
        over_one_worker = (
            _speed_ratio(result["seconds"], by_name[_name(1)]["seconds"])
            if name not in (SENTENCEPIECE, _name(1))
            else ""
        )
        rows.append([name, by_wall_time, per_core, over_sentencepiece, over_one_worker])
    return output.table(
        ["variant", "MB/s", "MB/s per core", "speed per core / sentencepiece", "speed / 1 worker"], rows
    )


def _speed_ratio(seconds: list[float], base_seconds: list[float]) -> str:
    return output.spread([base / value for value, base in zip(seconds, base_seconds, strict=True)], 2)


def draw(times: dict[str, Times], num_bytes: int) -> Figure:
    """Draws bars of the median speeds of each variant."""
    figure, (axes,) = output.figure(5, 3.5)
    speeds = {
        label: {
            name: num_bytes / 1e6 / statistics.median(getattr(variant_times, kind))
            for name, variant_times in times.items()
        }
        for label, kind in (("wall time", "wall"), ("per core", "cpu"))
    }
    output.bars(axes, list(times), speeds)
    axes.set_ylabel("MB/s")
    axes.legend(frameon=False)
    return figure
