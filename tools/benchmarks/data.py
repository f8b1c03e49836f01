"""What a corpus costs to open and to read: our windows beside megatron-core's GPTDataset, where it is installed.

    %(prog)s --output results

Corpora of documents of 1000 tokens; the largest, 10^12 tokens by default, has 10^9 documents in a sparse index, and 2
GB of checksums. Opening is what a job does before its first batch: ours, and GPTDataset without its cache and with it.
Memory is anonymous (RssAnon) and of the process's peak while it opens, above what the imports left.
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
from benchmarks.processes import Fresh
from megamtp.data.blend import Blend
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.loader import TrainLoader
from megamtp.data.windows import Windows
from megamtp.errors import InputError

T, HEADS, VOCABULARY, DOCUMENT_TOKENS = 4096, 4, 32000, 1000
LARGEST_INDEX = 10**11  # tokens up to which the index is written in full
MICRO_BATCH, READ_STEPS = 8, 400
SMOKE = {"sizes": [1e5], "megatron_limit": 0.0, "read_tokens": 1e5, "read_steps": 2}
OURS, FIRST, AGAIN = "ours", "GPTDataset, first time", "GPTDataset, from its cache"
# (which corpus, data.documents) of each
READERS = {
    "ours, continue": ("random", "continue"),
    "ours, continue, no .crc": ("unchecked", "continue"),
    "ours, mask": ("random", "mask"),
    "ours, isolate": ("random", "isolate"),
}


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    options = parse(arguments)
    output.make_folder(options)
    megatron, load = find_spec("megatron") is not None, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        opened = [result for size in options.sizes for result in measure_opening(Path(folder), size, megatron, options)]
        read = measure_reading(Path(folder), options.read_tokens, options.read_steps, megatron)
    output.write(
        options,
        {"T": T, "n": HEADS, "micro-batch": MICRO_BATCH, "load of the machine": f"{load:.1f}"},
        opened + read,
        tables(opened + read),
        draw(opened),
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = output.parser(__doc__, "data")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1e8, 1e9, 1e10, 1e12], help="tokens [1e8 1e9 1e10 1e12]"
    )
    parser.add_argument(
        "--megatron-limit", type=float, default=1e10, help="largest size that GPTDataset opens, too [1e10]"
    )
    parser.add_argument("--read-tokens", type=float, default=1e8, help="of the corpus that is read [1e8]")
    parser.add_argument("--scratch", type=Path, help="folder for the corpora [the system's]")
    parser.set_defaults(read_steps=READ_STEPS)
    options = output.parse(parser, arguments, SMOKE)
    for name in ("sizes", "read_tokens"):
        for value in np.atleast_1d(getattr(options, name)):
            if not 1e5 <= value <= 1e13:
                raise InputError(f"--{name.replace('_', '-')} {value:g}; expected 1e5 to 1e13 tokens")
    return options


def measure_opening(folder: Path, size: float, megatron: bool, options: argparse.Namespace) -> Iterator[dict]:
    prefix, number = folder / f"tokens{size:.0f}", round(size)
    sparse = number > LARGEST_INDEX
    (write_sparse if sparse else write_even)(prefix, number, number // DOCUMENT_TOKENS if sparse else DOCUMENT_TOKENS)
    variants = [OURS, *([FIRST, AGAIN] if megatron and size <= options.megatron_limit else [])]
    for name in variants:
        seconds, mebibytes = Fresh(_opening, open_ours if name == OURS else open_megatron, str(prefix)).result()
        yield {"part": "opening", "tokens": number, "name": name, "seconds": seconds, "mebibytes": mebibytes}
    for path in folder.glob(f"{prefix.name}*.*"):
        path.unlink()


def measure_reading(folder: Path, read_tokens: float, read_steps: int, megatron: bool) -> list[dict]:
    write_random(folder / "random", round(read_tokens), DOCUMENT_TOKENS, VOCABULARY)
    for end in (".bin", ".idx"):
        os.link(folder / f"random{end}", folder / f"unchecked{end}")
    results = []
    for name, (corpus, documents) in (READERS | ({"GPTDataset": ("random", None)} if megatron else {})).items():
        rate = Fresh(_reading, str(folder / corpus), documents, read_steps).result()
        results.append({"part": "reading", "name": name, "tokens_per_second": rate})
    return results


def open_ours(prefix: str, documents: str = "continue") -> TrainLoader:
    """As megamtp.pretrain does."""
    windows = Windows(IndexedDataset(prefix), T, HEADS, seed=0, vocab_size=VOCABULARY, documents=documents)
    windows.check_ends()
    return TrainLoader(Blend([windows], [1.0]), MICRO_BATCH, MICRO_BATCH, 0, 1)


class NoTokenizer:
    """What GPTDataset asks of a tokenizer when it opens a corpus."""

    eod, pad, vocab_size = 0, -1, VOCABULARY
    unique_identifiers = {"class": "none"}  # noqa: RUF012 - an attribute that it serialises


def open_megatron(prefix: str) -> Dataset[object]:
    """One epoch of all documents, as Megatron-LM's training split."""
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


def _opening(open_corpus: Callable[[str], TrainLoader | Dataset[object]], prefix: str) -> tuple[float, float]:
    """(seconds, mebibytes) until the first batch or sample is there."""
    _import_all(open_corpus)
    with _peak_mebibytes() as peak:
        start = time.perf_counter()
        corpus = open_corpus(prefix)
        corpus.read(0) if isinstance(corpus, TrainLoader) else corpus[0]
        seconds = time.perf_counter() - start
    return seconds, peak[0]


def _reading(prefix: str, documents: str | None, read_steps: int) -> float:
    """Tokens per second of one core, whatever else the machine does, of a file in the page cache."""
    read: Callable[[int], object]
    if documents is None:
        _import_all(open_megatron)
        dataset = open_megatron(prefix)
        read = lambda step: [dataset[step * MICRO_BATCH + index] for index in range(MICRO_BATCH)]  # noqa: E731
    else:
        read = open_ours(prefix, documents).read
    Path(f"{prefix}.bin").read_bytes()
    read(0)
    start = time.process_time()
    for step in range(1, read_steps + 1):
        read(step)
    return read_steps * MICRO_BATCH * T / (time.process_time() - start)


def _import_all(open_corpus: Callable) -> None:
    warnings.simplefilter("ignore")  # megatron-core's, of what else it would like to find
    if open_corpus is open_megatron:
        import megatron.core.datasets.gpt_dataset  # noqa: F401


@contextmanager
def _peak_mebibytes() -> Iterator[list[float]]:
    """A list whose one number is, afterwards, the most anonymous memory that was added meanwhile."""
    before, peak, over = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], _anonymous() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    over.set()
    thread.join()
    peak[0] = max(peak[0], _anonymous() - before)


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def tables(results: list[dict]) -> str:
    opened, read = ([r for r in results if r["part"] == part] for part in ("opening", "reading"))
    opening = output.table(
        ["tokens", "opened by", "seconds", "memory, MiB"],
        [[f"{r['tokens']:.0e}", r["name"], f"{r['seconds']:.3f}", f"{r['mebibytes']:.1f}"] for r in opened],
    )
    reading = output.table(
        ["read by", "million tokens per second of one core"],
        [[r["name"], f"{r['tokens_per_second'] / 1e6:.1f}"] for r in read],
    )
    compared = any(r["name"] in (FIRST, AGAIN) for r in opened)
    note = "" if compared else "\n\nmegatron-core is not installed: nothing to compare with."
    return f"{opening}\n\n{reading}{note}"


def draw(results: list[dict]) -> Figure:
    """Seconds and memory against tokens."""
    picture, (seconds, memory) = output.figure(10, 4, columns=2)
    for name in dict.fromkeys(result["name"] for result in results):
        own = [result for result in results if result["name"] == name]
        sizes = [result["tokens"] for result in own]
        seconds.loglog(sizes, [result["seconds"] for result in own], "o-", label=name)
        memory.loglog(sizes, [max(result["mebibytes"], 0.1) for result in own], "o-", label=name)
    for axes, label in ((seconds, "seconds to the first batch"), (memory, "memory, MiB")):
        axes.set_xlabel("tokens of the corpus")
        axes.set_ylabel(label)
    seconds.legend(frameon=False)
    return picture
