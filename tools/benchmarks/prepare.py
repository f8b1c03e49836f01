"""Preparation's throughput on this machine's CPU: one worker beside bare SentencePiece, and more workers beside one.

    %(prog)s --input TEXT ... --output results

Each round measures, one after another in turn: `sentencepiece.encode` of all texts, which are in memory already, on one
thread; tokenising the same files into parts by one worker; and by 2 and more workers. The tokenizer is trained before.
"Per core" divides by the seconds of all cores together, which other programs on the machine disturb less than the
clock's.
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

BARE = "sentencepiece"
SMOKE = {"input": [corpora.SMOKE_TEXT], "vocab_size": 400, "rounds": 1}


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = output.parser(__doc__, "prepare")
    parser.add_argument(
        "--input", nargs="+", type=Path, metavar="PATH", help="text, without: Python's standard library"
    )
    parser.add_argument("--vocab-size", type=output.positive, default=4096, help="of the tokenizer [4096]")
    parser.add_argument("--workers", nargs="+", type=output.positive, default=[1, 2], help="numbers of processes [1 2]")
    parser.add_argument("--rounds", type=output.positive, default=5)
    options = output.parse(parser, arguments, SMOKE)
    if 1 not in options.workers:
        raise InputError(f"--workers {options.workers}; expected 1 among them: it is what others are compared to")
    output.start(options, on_gpu=False)
    source = find_source(options.input) if options.input else standard_library()
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        times, num_bytes = measure(source, Path(folder), options.vocab_size, options.workers, options.rounds)
    settings = {"text": f"{num_bytes / 1e6:.1f} MB", "vocabulary": options.vocab_size, "rounds": options.rounds}
    results = [
        {"variant": name, "bytes": num_bytes, "seconds": own.wall, "cpu_seconds": own.cpu}
        for name, own in times.items()
    ]
    output.write(options, settings, results, tables(results), picture(times, num_bytes))


@dataclass
class Times:
    """Of one variant, seconds in each round: on the clock, and of all cores together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(
    source: Source, folder: Path, vocab_size: int, numbers: list[int], rounds: int
) -> tuple[dict[str, Times], int]:
    """(times of each variant, bytes of text)."""
    texts = [text for _, text in source.documents()]
    model = folder / "tokenizer.model"
    train_sentencepiece(texts, model, vocab_size, seed=0)
    variants: dict[str, Callable[[], None]] = {BARE: _bare(texts, model)}
    for number in numbers:
        variants[_name(number)] = _ours(source, folder / "parts", model, number)
    times = {name: Times() for name in variants}
    for round_number in range(rounds + 1):
        for name, variant in variants.items():
            shutil.rmtree(folder / "parts", ignore_errors=True)
            (folder / "parts").mkdir()
            start, cpu_start = time.perf_counter(), _cpu_seconds()
            variant()
            if round_number:  # the first one reads files and libraries from the disk
                times[name].wall.append(time.perf_counter() - start)
                times[name].cpu.append(_cpu_seconds() - cpu_start)
    return times, sum(len(text.encode()) for text in texts)


def _cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _bare(texts: list[str], model: Path) -> Callable[[], None]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    batches = [texts[start : start + BATCH_DOCUMENTS] for start in range(0, len(texts), BATCH_DOCUMENTS)]

    def encode() -> None:
        for batch in batches:
            processor.encode(batch, out_type=int, num_threads=1)

    return encode


def _ours(source: Source, parts: Path, model: Path, number: int) -> Callable[[], None]:
    job = TokenisationTask(parts, str(model), "", source.json_key, 0, False, False)
    return lambda: workers.tokenise_all(shards.cut_into_shards(source.files, cuts_documents=False), job, number)


def _name(number: int) -> str:
    return f"{number} worker{'s' if number > 1 else ''}"


def tables(results: list[dict]) -> str:
    """Speed of each variant, and what it is of SentencePiece's and of one worker's, round by round."""
    by_name, rows = {result["variant"]: result for result in results}, []
    for name, own in by_name.items():
        by_clock = output.spread([own["bytes"] / 1e6 / value for value in own["seconds"]], 2)
        by_core = output.spread([own["bytes"] / 1e6 / value for value in own["cpu_seconds"]], 2)
        bare = _ratio(own["cpu_seconds"], by_name[BARE]["cpu_seconds"]) if name != BARE else ""
        one = _ratio(own["seconds"], by_name[_name(1)]["seconds"]) if name not in (BARE, _name(1)) else ""
        rows.append([name, by_clock, by_core, bare, one])
    return output.table(["variant", "MB/s", "MB/s per core", "per core, x sentencepiece", "MB/s, x 1 worker"], rows)


def _ratio(own: list[float], others: list[float]) -> str:
    return output.spread([other / value for value, other in zip(own, others, strict=True)], 2)


def picture(times: dict[str, Times], num_bytes: int) -> Figure:
    """Bars of each variant's median speeds."""
    figure, (axes,) = output.figure(5, 3.5)
    speeds = {
        label: {name: num_bytes / 1e6 / statistics.median(getattr(own, kind)) for name, own in times.items()}
        for label, kind in (("by the clock", "wall"), ("per core", "cpu"))
    }
    output.bars(axes, list(times), speeds)
    axes.set_ylabel("MB/s")
    axes.legend(frameon=False)
    return figure
