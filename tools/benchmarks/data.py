"""Measures the time and memory to open and read a corpus, compared with megatron-core's GPTDataset if installed.

    %(prog)s --output results

The documents of a corpus of up to 10^11 tokens have 1000 tokens each. A larger corpus, such as that of 10^12 tokens,
has one document for every 1000 tokens, too, but all tokens are in the last document, so that its index is a sparse
file; the checksums of 10^12 tokens take 2 GB. The corpus that is read has documents of 1 to 2000 random tokens. Opening
is the work that a job does before its first batch; GPTDataset is measured without its cache and with it. Memory is the
peak of the anonymous memory (RssAnon) that opening the corpus adds.
"""

import argparse
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.utils.data import Dataset

from benchmarks import output
from benchmarks.corpora import write_even, write_random, write_sparse
from benchmarks.processes import ProcessCall
from megamtp.data.blend import Blend
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.loader import TrainLoader
from megamtp.data.windows import Windows
from megamtp.errors import InputError

T, HEADS, VOCABULARY, DOCUMENT_TOKENS = 4096, 4, 32000, 1000
MAX_EVEN_TOKENS = 10**11  # all documents of a larger corpus are empty, except the last
MICRO_BATCH, READ_STEPS = 8, 400
SMOKE = {"sizes": [1e5], "megatron_limit": 0.0, "read_tokens": 1e5, "read_steps": 2}
OURS, GPT_FIRST, GPT_CACHED = "ours", "GPTDataset, first time", "GPTDataset, from its cache"
# variant: (corpus, data.documents)
READ_VARIANTS = {
    "ours, continue": ("random", "continue"),
    "ours, continue, no .crc": ("unchecked", "continue"),
    "ours, mask": ("random", "mask"),
    "ours, isolate": ("random", "isolate"),
}


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    options = parse(arguments)
    output.make_folder(options)
    has_megatron, machine_load = find_spec("megatron") is not None, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        opening_results = [
            result for size in options.sizes for result in measure_opening(Path(folder), size, has_megatron, options)
        ]
        reading_results = measure_reading(Path(folder), options.read_tokens, options.read_steps, has_megatron)
    output.write(
        options,
        {"T": T, "n": HEADS, "micro-batch": MICRO_BATCH, "load of the machine": f"{machine_load:.1f}"},
        opening_results + reading_results,
        tables(opening_results + reading_results),
        draw(opening_results),
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = output.parser(__doc__, "data")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1e8, 1e9, 1e10, 1e12], help="numbers of tokens [1e8 1e9 1e10 1e12]"
    )
    parser.add_argument(
        "--megatron-limit", type=float, default=1e10, help="largest size that is also opened with GPTDataset [1e10]"
    )
    parser.add_argument(
        "--read-tokens", type=float, default=1e8, help="number of tokens of the corpus that is read [1e8]"
    )
    parser.add_argument("--scratch", type=Path, help="temporary folder for the corpora [the system's]")
    parser.set_defaults(read_steps=READ_STEPS)
    options = output.parse(parser, arguments, SMOKE)
    for name in ("sizes", "read_tokens"):
        for value in np.atleast_1d(getattr(options, name)):
            if not 1e5 <= value <= 1e13:
                raise InputError(f"--{name.replace('_', '-')} {value:g}; expected 1e5 to 1e13 tokens")
    return options


def measure_opening(folder: Path, size: float, has_megatron: bool, options: argparse.Namespace) -> Iterator[dict]:
    prefix, num_tokens = folder / f"tokens{size:.0f}", round(size)
    if num_tokens > MAX_EVEN_TOKENS:
        write_sparse(prefix, num_tokens, num_documents=num_tokens // DOCUMENT_TOKENS)
    else:
        write_even(prefix, num_tokens, DOCUMENT_TOKENS)
    variants = [OURS, *([GPT_FIRST, GPT_CACHED] if has_megatron and size <= options.megatron_limit else [])]
    for name in variants:
        seconds, mebibytes = ProcessCall(_open, open_ours if name == OURS else open_megatron, str(prefix)).run()
        yield {"part": "opening", "tokens": num_tokens, "name": name, "seconds": seconds, "mebibytes": mebibytes}
    for path in folder.glob(f"{prefix.name}*.*"):
        path.unlink()


def measure_reading(folder: Path, read_tokens: float, read_steps: int, has_megatron: bool) -> list[dict]:
    write_random(folder / "random", round(read_tokens), DOCUMENT_TOKENS, VOCABULARY)
    for end in (".bin", ".idx"):
        os.link(folder / f"random{end}", folder / f"unchecked{end}")
    results = []
    variants = READ_VARIANTS | ({"GPTDataset": ("random", None)} if has_megatron else {})
    for name, (corpus, documents) in variants.items():
        rate = ProcessCall(_read_rate, str(folder / corpus), documents, read_steps).run()
        results.append({"part": "reading", "name": name, "tokens_per_second": rate})
    return results


def open_ours(prefix: str, documents: str = "continue") -> TrainLoader:
    """Opens a corpus as megamtp.pretrain does."""
    windows = Windows(IndexedDataset(prefix), T, HEADS, seed=0, vocab_size=VOCABULARY, documents=documents)
    windows.check_ends()
    return TrainLoader(Blend([windows], [1.0]), MICRO_BATCH, MICRO_BATCH, 0, 1)


class NoTokenizer:
    """The attributes of a tokenizer that GPTDataset reads when it opens a corpus."""

    eod, pad, vocab_size = 0, -1, VOCABULARY
    unique_identifiers = {"class": "none"}  # noqa: RUF012 - GPTDataset serialises this attribute


def open_megatron(prefix: str) -> Dataset[object]:
    """Opens one epoch of all documents as the training split of Megatron-LM."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=T,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(dataset), dtype=np.int32)
    return GPTDataset(dataset, prefix, documents, None, Split.train, config)


def _open(open_corpus: Callable[[str], TrainLoader | Dataset[object]], prefix: str) -> tuple[float, float]:
    """Returns (seconds, mebibytes) from the start to the first batch or sample."""
    _import_all(open_corpus)
    with _peak_mebibytes() as peak:
        start = time.perf_counter()
        corpus = open_corpus(prefix)
        corpus.read(0) if isinstance(corpus, TrainLoader) else corpus[0]
        seconds = time.perf_counter() - start
    return seconds, peak[0]


def _read_rate(prefix: str, documents: str | None, read_steps: int) -> float:
    """Returns tokens per second of CPU time on one core, for a file in the page cache.

    CPU time depends less on other programs than wall time does.
    """
    read: Callable[[int], object]
    if documents is None:
        _import_all(open_megatron)
        dataset = open_megatron(prefix)
        read = lambda step: [dataset[step * MICRO_BATCH + index] for index in range(MICRO_BATCH)]  # noqa: E731
    else:
        read = open_ours(prefix, documents).read
    Path(f"{prefix}.bin").read_bytes()  # into the page cache
    read(0)
    start = time.process_time()
    for step in range(1, read_steps + 1):
        read(step)
    return read_steps * MICRO_BATCH * T / (time.process_time() - start)


def _import_all(open_corpus: Callable) -> None:
    warnings.simplefilter("ignore")  # megatron-core warns about optional packages that are missing
    if open_corpus is open_megatron:
        import megatron.core.datasets.gpt_dataset  # noqa: F401


@contextmanager
def _peak_mebibytes() -> Iterator[list[float]]:
    """Yields a list; after the block, its only number is the peak of the anonymous memory that the block added."""
    before, peak, finished = _anonymous_mebibytes(), [0.0], threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            peak[0] = max(peak[0], _anonymous_mebibytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    finished.set()
    thread.join()
    peak[0] = max(peak[0], _anonymous_mebibytes() - before)


def _anonymous_mebibytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def tables(results: list[dict]) -> str:
    opened, read = ([r for r in results if r["part"] == part] for part in ("opening", "reading"))
    opening_table = output.table(
        ["tokens", "opened with", "seconds", "memory, MiB"],
        [[f"{r['tokens']:.0e}", r["name"], f"{r['seconds']:.3f}", f"{r['mebibytes']:.1f}"] for r in opened],
    )
    reading_table = output.table(
        ["read with", "million tokens per second, one core"],
        [[r["name"], f"{r['tokens_per_second'] / 1e6:.1f}"] for r in read],
    )
    was_compared = any(r["name"] in (GPT_FIRST, GPT_CACHED) for r in opened)
    note = "" if was_compared else "\n\nGPTDataset was not measured: install megatron-core, or raise --megatron-limit."
    return f"{opening_table}\n\n{reading_table}{note}"


def draw(results: list[dict]) -> Figure:
    """Plots seconds and memory over the number of tokens."""
    figure, (seconds, memory) = output.figure(10, 4, columns=2)
    for name in dict.fromkeys(result["name"] for result in results):
        variant_results = [result for result in results if result["name"] == name]
        sizes = [result["tokens"] for result in variant_results]
        seconds.loglog(sizes, [result["seconds"] for result in variant_results], "o-", label=name)
        memory.loglog(sizes, [max(result["mebibytes"], 0.1) for result in variant_results], "o-", label=name)
    for axes, label in ((seconds, "seconds to the first batch"), (memory, "memory, MiB")):
        axes.set_xlabel("tokens in the corpus")
        axes.set_ylabel(label)
    seconds.legend(frameon=False)
    return figure
