"""Tests of bad input: one clear line, exit status 2, and no partial output."""

import functools
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamtp.checkpoint import canonical
from megamtp.checkpoint.shards import shard_name
from megamtp.checkpoint.store import MANIFEST, newest_checkpoint, read_manifest
from megamtp.commands import convert_checkpoint, generate
from megamtp.config import read_config
from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.data.windows import CHECKED_TOKENS, Windows
from tests.checkpoints import SMALL, contents, random_model
from tests.end_to_end import faulty_pretrain
from tests.end_to_end.jobs import MODULE, damage, deepspeed, pretrain, records, run, start_pretrain, wait_for

ONE_RANK = ["-m", MODULE]  # without a launcher


def full(*values: object) -> object:
    """Returns a parameter set that runs only with --full."""
    return pytest.param(*values, marks=pytest.mark.full)


def truncated(corpus: Path, folder: Path, suffix: str) -> Path:
    """Copies a corpus's training split and truncates its .bin or .idx file."""
    for end in (".bin", ".idx"):
        shutil.copy(corpus / f"train{end}", folder / f"train{end}")
    content = (folder / f"train{suffix}").read_bytes()
    (folder / f"train{suffix}").write_bytes(content[: len(content) - 10])
    return folder / "train"


def with_wrong_checksums(corpus: Path, folder: Path) -> Path:
    """Copies the training split with the checksums of the validation split."""
    for file in ("train.bin", "train.idx"):
        shutil.copy(corpus / file, folder / file)
    shutil.copy(corpus / "validation.crc", folder / "train.crc")
    return folder / "train"


def flipped(corpus: Path, folder: Path) -> Path:
    """Copies the validation split with another valid token in its first window."""
    for end in (".bin", ".idx", ".crc"):
        shutil.copy(corpus / f"validation{end}", folder / f"validation{end}")
    content = bytearray((folder / "validation.bin").read_bytes())
    content[0] ^= 1
    (folder / "validation.bin").write_bytes(content)
    return folder / "validation"


def foreign(folder: Path) -> Path:
    """Writes files that are not a corpus under the names of one."""
    (folder / "foreign.bin").write_bytes(b"\x00" * 64)
    (folder / "foreign.idx").write_bytes(b"something else altogether" * 9)
    return folder / "foreign"


def tiny(folder: Path, tokens: list[int]) -> Path:
    """Writes a corpus of one document, or of none."""
    with IndexedDatasetWriter(folder / "tiny", np.uint16) as writer:
        if tokens:
            writer.add_document(tokens)
    return folder / "tiny"


def initial_weights(folder: Path) -> Path:
    canonical.write(contents(SMALL, random_model(SMALL).state_dict()), folder / "initial")
    return folder / "initial"


def summarised(folder: Path, vocab_size: int) -> Path:
    """Writes a corpus whose summary has this vocabulary size."""
    (folder / "corpus.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return tiny(folder, [1, 2] * 50)


def pipeline(num_stages: int) -> list[str]:
    return ["engine.kind=pipeline", f"engine.num_stages={num_stages}"]


CASES = {
    "unknown key": (lambda corpus, tmp: ["model.dmi=32"], ["model.dmi", "did you mean model.dim?"]),
    "wrong type": (lambda corpus, tmp: ["model.dim=wide"], ["model.dim", "wide", "expected int"]),
    "no heads": (lambda corpus, tmp: ["model.num_future_tokens=0"], ["model.num_future_tokens=0", "at least 1"]),
    "as many heads as layers": (
        lambda corpus, tmp: ["model.num_future_tokens=4"],
        ["model.num_future_tokens=4", "model.num_layers=4"],
    ),
    "sequence longer than corpus": (
        lambda corpus, tmp: ["train.sequence_length=10000000", "train.global_batch_tokens=20000000"],
        ["tokens", "10000001", "sequence_length"],
    ),
    "empty corpus": (lambda corpus, tmp: [f"data.train={tiny(tmp, [])}"], ["0 tokens", "expected at least 33"]),
    "vocabulary of the tokenizer": (
        lambda corpus, tmp: ["model.vocab_size=300"],
        ["400 pieces", "model.vocab_size is 300"],
    ),
    "vocabulary of the corpus": (
        lambda corpus, tmp: [f"data.train={tiny(tmp, [1, 400] * 50)}"],
        ["token 400", "model.vocab_size is 400"],
    ),
    "vocabulary in the corpus's summary": (
        lambda corpus, tmp: [f"data.train={summarised(tmp, 300)}"],
        ["corpus.json", "vocabulary of 300", "has 400 pieces"],
    ),
    "blend with a missing corpus": (
        lambda corpus, tmp: [f"data.train=0.5 {corpus}/train 0.5 /nowhere/train"],
        ["/nowhere/train", "No such file"],
    ),
    "truncated .bin file": (
        lambda corpus, tmp: [f"data.train={truncated(corpus, tmp, '.bin')}"],
        ["train.bin", "bytes"],
    ),
    "truncated .idx file": (
        lambda corpus, tmp: [f"data.train={truncated(corpus, tmp, '.idx')}"],
        ["train.idx", "bytes"],
    ),
    "checksums of another .bin file": (
        lambda corpus, tmp: [f"data.train={with_wrong_checksums(corpus, tmp)}"],
        ["train.crc: it was written for", "train.bin has", "remove it"],
    ),
    "flipped bit in the validation split": (
        lambda corpus, tmp: [f"data.validation={flipped(corpus, tmp)}"],
        ["validation.bin: the checksum of bytes 0", "differs from"],
    ),
    "foreign .idx file": (lambda corpus, tmp: [f"data.train={foreign(tmp)}"], ["foreign.idx", "MMIDIDX"]),
    "missing corpus": (lambda corpus, tmp: ["data.train=/nowhere/train"], ["/nowhere/train", "No such file"]),
    "folder of a corpus": (
        lambda corpus, tmp: [f"data.train={corpus}"],
        ["is a folder; expected the prefix of a corpus's .bin and .idx files, such as", "/train or", "/validation"],
    ),
    "corpora without weights": (
        lambda corpus, tmp: [f"data.train={corpus}/train {corpus}/validation"],
        ["No such file", "WEIGHT PREFIX WEIGHT PREFIX"],
    ),
    "line break in a name": (lambda corpus, tmp: ['data.train="a\\nb"'], ["a\\nb.bin and .idx: No such file"]),
    "missing tokenizer": (lambda corpus, tmp: ["data.tokenizer=/nowhere/model"], ["/nowhere/model", "No such file"]),
    "batch not divisible": (
        lambda corpus, tmp: ["train.micro_batch_size=3"],
        ["train.global_batch_tokens=256", "multiple of 96"],
    ),
    "unexpanded home directory": (lambda corpus, tmp: ["run.directory=~/run"], ["~/run", "$HOME"]),
    "output is a file": (
        lambda corpus, tmp: [f"run.directory={foreign(tmp)}.bin"],
        ["foreign.bin", "cannot be written"],
    ),
    "output whose name is too long": (
        lambda corpus, tmp: [f"run.directory={tmp}/{'x' * 300}"],
        ["cannot be written to: File name too long"],
    ),
    "output cannot be created": (lambda corpus, tmp: ["run.directory=/proc/run"], ["/proc/run", "cannot be written"]),
    "DeepSpeed setting that megamtp sets": (
        lambda corpus, tmp: ["engine.deepspeed.zero_optimization.stage=2"],
        ["zero_optimization.stage", "conflicts"],
    ),
    "CUDA graphs on a CPU": (lambda corpus, tmp: ["train.cuda_graphs=true"], ["cuda_graphs=true", "without a GPU"]),
    "fp16 on a CPU": (lambda corpus, tmp: ["train.precision=fp16"], ["fp16", "without a GPU"]),
    "infinite learning rate": (lambda corpus, tmp: ["optimizer.lr=inf"], ["optimizer.lr=inf", "a finite number"]),
    "infinite z-loss": (lambda corpus, tmp: ["head_loss.z_loss=inf"], ["head_loss.z_loss=inf", "a finite number"]),
    "all head weights are zero": (
        lambda corpus, tmp: ["head_loss.weights=[0,0]"],
        ["head_loss.weights=[0.0, 0.0]", "at least one above 0"],
    ),
    "list of DeepSpeed settings": (
        lambda corpus, tmp: ["engine.deepspeed=[1,2]"],
        ["engine.deepspeed", "expected mapping"],
    ),
    "DeepSpeed section is a number": (
        lambda corpus, tmp: ["engine.deepspeed.zero_optimization=3"],
        ["zero_optimization is 3", "expected a mapping"],
    ),
    "DeepSpeed value that DeepSpeed rejects": (
        lambda corpus, tmp: ["engine.deepspeed.comms_logger=5"],
        ["DeepSpeed rejects engine.deepspeed"],
    ),
    "rope_theta is zero": (lambda corpus, tmp: ["model.rope_theta=0"], ["model.rope_theta=0", "above 0"]),
    "interpolation of a missing key": (
        lambda corpus, tmp: ["run.directory=${nothing}"],
        ["nothing", "expected a value"],
    ),
    "unknown DeepSpeed section": (
        lambda corpus, tmp: ["engine.deepspeed.amp2.enabled=true"],
        ["amp2", "not supported"],
    ),
    "unknown DeepSpeed key": (
        lambda corpus, tmp: ["engine.deepspeed.zero_optimization.no_such_key=1"],
        ["no_such_key", "not permitted"],
    ),
    "DeepSpeed value of the wrong type": (
        lambda corpus, tmp: ["engine.deepspeed.zero_optimization.allgather_partitions=perhaps"],
        ["allgather_partitions", "perhaps", "boolean"],
    ),
    "stages without a pipeline": (
        lambda corpus, tmp: ["engine.num_stages=2"],
        ["engine.num_stages=2", "engine.kind=pipeline"],
    ),
    "pipeline without stages": (lambda corpus, tmp: ["engine.kind=pipeline"], ["engine.num_stages=null", "at least 2"]),
    "more stages than layers": (
        lambda corpus, tmp: [*pipeline(5)],
        ["engine.num_stages=5", "4 trunk layers and heads", "no more stages than these"],
    ),
    "ranks that do not divide among stages": (
        lambda corpus, tmp: [*pipeline(2)],
        ["1 ranks", "engine.num_stages=2", "a multiple"],
    ),
    "cut that does not cover the layers": (
        lambda corpus, tmp: [*pipeline(2), "engine.stage_layers=[2,1]"],
        ["[2, 1]", "sum to the 4 trunk layers and heads"],
    ),
    "cut with too few stages": (
        lambda corpus, tmp: [*pipeline(2), "engine.stage_layers=[4]"],
        ["engine.stage_layers=[4]", "2 numbers"],
    ),
    "cut with an empty stage": (
        lambda corpus, tmp: [*pipeline(2), "engine.stage_layers=[4,0]"],
        ["engine.stage_layers[1]=0", "at least 1"],
    ),
    "ZeRO-3's offload with a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "engine.offload_parameters=true"],
        ["engine.offload_parameters", "engine.kind=zero3"],
    ),
    "offload with a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "engine.offload_optimizer=true"],
        ["engine.offload_optimizer", "engine.kind=pipeline"],
    ),
    "ZeRO-3's settings with a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size=9"],
        ["stage3_prefetch_bucket_size", "engine.kind=pipeline", "engine.kind=zero3"],
    ),
    "ZeRO-3 with a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "engine.deepspeed.zero_optimization.stage=3"],
        ["zero_optimization.stage", "engine.kind=pipeline", "engine.kind=zero3"],
    ),
    "DeepSpeed's timers with a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "engine.deepspeed.wall_clock_breakdown=true"],
        ["engine.deepspeed.wall_clock_breakdown", "engine.kind=pipeline", "expected false"],
    ),
    "deferred heads in a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "engine.head_schedule=deferred"],
        ["engine.head_schedule=deferred", "engine.kind=zero3 or zero1"],
    ),
    "fp16 in a pipeline": (
        lambda corpus, tmp: [*pipeline(2), "train.precision=fp16"],
        ["train.precision=fp16", "bf16, fp32 or fp8"],
    ),
    "initial weights are not a checkpoint": (
        lambda corpus, tmp: [f"run.initial_weights={corpus}"],
        ["run.initial_weights", "canonical.json", "cannot be read"],
    ),
    "initial weights of another model": (
        lambda corpus, tmp: [f"run.initial_weights={initial_weights(tmp)}"],
        ["run.initial_weights", "model.num_layers=5, expected 4", "set model.num_layers=5"],
    ),
    "DeepCompile": (lambda corpus, tmp: ["engine.deepspeed.compile.deepcompile=true"], ["compile", "DeepCompile"]),
}


def assert_one_line(finished, words: list[str]) -> None:
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("megamtp: error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_one_line(case, arguments, corpus, tmp_path):
    make, words = CASES[case]
    folder = tmp_path / "made"
    folder.mkdir()
    finished = pretrain([*arguments, f"run.directory={tmp_path}/run", *make(corpus, folder)])
    assert_one_line(finished, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "case", ["truncated .bin file", full("unknown key"), full("batch not divisible"), full("no cut that fits")]
)
def test_mistake_is_one_line_under_a_launcher(case, arguments, corpus, tmp_path):
    if case == "batch not divisible":  # depends on the number of ranks
        make, words = (lambda *_: ["train.micro_batch_size=8"]), ["multiple of 512", "2 ranks"]
    elif case == "no cut that fits":
        make, words = (
            (lambda *_: [*pipeline(2), "engine.stage_memory_bytes=1000"]),
            ["no partition of 4 layers into 2 stages fits"],
        )
    else:
        make, words = CASES[case]
    finished = run([*deepspeed(2), *arguments, f"run.directory={tmp_path}/run", *make(corpus, tmp_path)])
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("megamtp: error: ")]
    assert len(lines) == 1, output
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("detected_by", [full("bounds"), "checksum"])
def test_damage_inside_a_corpus_ends_all_ranks_before_they_train_on_it(detected_by, arguments, tmp_path):
    """The second of two ranks would read the damaged record in step 4. The three steps before it are saved."""
    tokens = np.random.default_rng(0).integers(400, size=3_000_000, dtype=np.uint16)
    with IndexedDatasetWriter(tmp_path / "train", np.uint16) as writer:
        for document in np.split(tokens, 3000):
            writer.add_document(document)
    windows = Windows(IndexedDataset(tmp_path / "train"), 32, 2, seed=0)
    places = windows.epoch_order(0)(np.array([26, 27, 30, 31]))  # the windows of the second rank in step 4
    (place, *_) = (
        int(place) * 32 + 7 for place in places if CHECKED_TOKENS < place * 32 < 3_000_000 - CHECKED_TOKENS - 32
    )
    wrong = 65535 if detected_by == "bounds" else tokens[place] ^ 1
    with open(tmp_path / "train.bin", "r+b") as stream:
        stream.seek(2 * place)
        stream.write(int(wrong).to_bytes(2, "little"))
    if detected_by == "bounds":
        (tmp_path / "train.crc").unlink()
        words = f"train.bin holds token 65535 in document {place // 1000}, but model.vocab_size is 400"
    else:
        first = 2 * place // 4096 * 4096
        documents = f"documents {first // 2000} to {(first + 4095) // 2000}"
        words = (
            f"train.bin: the checksum of bytes {first} to {first + 4096}, in {documents}, differs from "
            f"{tmp_path}/train.crc"
        )
    finished = pretrain([*arguments, f"data.train={tmp_path}/train", f"run.directory={tmp_path}/run"], 2)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("megamtp: error: "))
    assert f"{tmp_path}/{words}" in line
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]
    assert read_manifest(newest_checkpoint(tmp_path / "run")).step == 3


def test_damage_of_the_validation_corpus_during_a_run_ends_all_ranks_after_a_save(arguments, corpus, tmp_path):
    """A bit flips after the run has started and before its next evaluation."""
    shutil.copytree(corpus, tmp_path / "corpus")
    many = ["train.steps=1000000", "run.evaluate_every_steps=5", f"data.validation={tmp_path}/corpus/validation"]
    with start_pretrain([*arguments, *many, f"run.directory={tmp_path}/run"], 2) as job:
        wait_for(lambda: records(tmp_path / "run", "validation"))
        with open(tmp_path / "corpus/validation.bin", "r+b") as stream:
            first = stream.read(1)[0]
            stream.seek(0)
            stream.write(bytes([first ^ 1]))
        finished = job.wait(timeout=120)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("megamtp: error: "))
    assert f"{tmp_path}/corpus/validation.bin: the checksum of bytes 0 to" in line
    step = records(tmp_path / "run")[-1]["step"]
    assert step % 5 == 0 and read_manifest(newest_checkpoint(tmp_path / "run")).step == step
    assert records(tmp_path / "run", "validation")[-1]["step"] < step


@pytest.mark.parametrize(
    ("failing", "settings"),
    [
        (("megamtp.checkpoint.shards", "ShardedTensors.read"), []),  # while a run resumes
        full(("megamtp.engines.initial_weights", "initial_value"), []),
        (("megamtp.engines.initial_weights", "initial_value"), pipeline(2)),
    ],
)
def test_error_of_one_rank_ends_both_ranks(failing, settings, trained, arguments, tmp_path):
    """Rank 1 fails and rank 0 prints the error. There is no launcher, which would end the other rank."""
    if "ShardedTensors.read" in failing:
        shutil.copytree(trained, tmp_path / "run")
    arguments = [*arguments, *settings, "train.steps=2", f"run.directory={tmp_path}/run"]
    with start_pretrain(arguments, 2, functools.partial(faulty_pretrain.fail_on_rank_1, *failing)) as job:
        outputs = job.join(timeout=120)
    assert [rank.exitcode for rank in job.ranks] == [2, 2], outputs
    assert "Traceback" not in "".join(outputs)
    lines = [line for line in outputs[0].splitlines() if line.startswith("megamtp: error: ")]
    assert lines == ["megamtp: error: damaged since the run began"] and "megamtp: error" not in outputs[1]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    finished = pretrain([*arguments, "train.steps=1", f"run.directory={directory}"])
    assert finished.returncode == 0, finished.stderr
    return directory


def test_checkpoint_of_another_model(trained, arguments):
    before = sorted(path.name for path in trained.rglob("*"))
    finished = pretrain([*arguments, f"run.directory={trained}", "model.mlp_dim=64"])
    assert_one_line(finished, ["another model", "model.mlp_dim=48", "expected 64"])
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_checkpoint_of_a_newer_format(trained, arguments, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    manifest = newest_checkpoint(tmp_path / "run") / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    finished = pretrain([*arguments, f"run.directory={tmp_path}/run"])
    assert_one_line(finished, ["manifest.json is of format 3", "expected format 2", "newer megamtp"])


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_damage_of_the_only_checkpoint_is_an_error(kind, trained, arguments, tmp_path):
    """The run must not silently start over."""
    shutil.copytree(trained, tmp_path / "run")
    file = newest_checkpoint(tmp_path / "run") / shard_name(0)
    damage(file, kind)
    finished = pretrain([*arguments, "train.steps=2", f"run.directory={tmp_path}/run"])
    assert finished.returncode == 2, finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if "megamtp: error: " in line]
    assert "none of 1 checkpoints is intact" in line and file.name in line
    assert "remove them, or choose another run.directory" in line and "older" not in line
    assert "Traceback" not in finished.stderr
    assert len(records(tmp_path / "run")) == 1


def test_model_name_that_is_too_long(tmp_path, call_command):
    finished = CompletedProcess([], *call_command(generate, tmp_path / ("x" * 300), "--prompt", "a"))
    assert_one_line(finished, ["cannot be read: File name too long"])


@pytest.mark.parametrize(("command", "rest"), [(convert_checkpoint, ["{}/hf"]), (generate, ["--prompt", "a"])])
def test_missing_checkpoint(command, rest, tmp_path, call_command):
    finished = CompletedProcess([], *call_command(command, tmp_path, *(word.format(tmp_path) for word in rest)))
    expected = f"{tmp_path} is not a checkpoint of a known format; expected one of these: run, canonical"
    assert_one_line(finished, [expected])
    assert list(tmp_path.iterdir()) == []


def test_finished_run_does_nothing(trained, arguments, tmp_path):
    (tmp_path / "entraîné").symlink_to(trained)
    arguments = [*ONE_RANK, *arguments, "train.steps=1", f"run.directory={tmp_path}/entraîné"]
    finished = run(arguments, PYTHONIOENCODING="ascii")  # as in a terminal that cannot show these letters
    assert finished.returncode == 0, finished.stderr
    assert "entra\\xeen\\xe9 already has all 1 steps; nothing to do" in finished.stdout


def test_job_exits_before_python_shuts_down(trained, arguments):
    """While Python shuts down, a thread of gloo can abort the process. Here the destructor of an object would."""
    program = (
        "import os\nfrom megamtp import pretrain\nclass Late:\n    def __del__(self, abort=os.abort):\n        "
        "abort()\n"
    )
    arguments = [*arguments, "train.steps=1", f"run.directory={trained}"]
    finished = run(["-c", f"{program}late = Late()\npretrain.entry()", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert "nothing to do" in finished.stdout
    assert_one_line(
        run(["-c", f"{program}late = Late()\npretrain.entry()", *arguments, "model.dim=wide"]), ["expected int"]
    )


def test_damaged_metrics(trained, arguments, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text("{not json\n" + metrics.read_text())
    before = metrics.read_text()
    assert_one_line(pretrain([*arguments, f"run.directory={tmp_path}/run"]), ["metrics.jsonl, line 1", "damaged"])
    assert metrics.read_text() == before


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_file_in_the_place_of_a_folder(arguments, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert_one_line(pretrain([*arguments, f"run.directory={tmp_path}/run"]), [f"run/{name} is a file", "folder"])
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_full_disk_while_saving(trained, arguments, tmp_path):
    """A limit of 100 KiB per file acts as the full disk: the save of step 2 fails in the background and ends the run.

    TensorBoard's thread, slowed down here, has not yet written all events when the run fails. No event may be lost.
    """
    shutil.copytree(trained, tmp_path / "run")
    settings = [
        "train.steps=1000000",
        "run.save_every_steps=2",
        "run.tensorboard=true",
        f"run.directory={tmp_path}/run",
    ]
    entry = functools.partial(faulty_pretrain.limit_files_and_slow_tensorboard, 102400)
    finished = pretrain([*arguments, *settings], entry=entry)
    assert finished.returncode == 2, finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if "megamtp: error" in line]
    assert "step-0000002 cannot be written (File too large); allow larger files (ulimit -f), and start" in line
    assert "Traceback" not in finished.stderr
    assert_same_checkpoints(tmp_path / "run", trained)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    reported = [record["step"] for record in records(tmp_path / "run") if record["step"] > 1]
    assert reported and [event.step for event in events.Scalars("train/lr")] == reported
    finished = pretrain([*arguments, "train.steps=2", f"run.directory={tmp_path}/run"])
    assert finished.returncode == 0, finished.stderr


def assert_same_checkpoints(run_directory: Path, expected: Path) -> None:
    newest, expected_newest = (newest_checkpoint(directory) for directory in (run_directory, expected))
    assert newest.name == expected_newest.name
    assert read_manifest(newest) == read_manifest(expected_newest)


@pytest.mark.parametrize("content", [full(""), full("model: ["), "model: {no_such_key: 1}"])
def test_damaged_configuration_of_a_run_is_replaced(content, trained, arguments, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(content)
    finished = pretrain([*arguments, "train.steps=2", f"run.directory={tmp_path}/run"])
    assert finished.returncode == 0, finished.stderr
    assert "the run's settings cannot be compared with the earlier ones" in finished.stdout
    assert read_config([str(tmp_path / "run/config.yaml")]).train.steps == 2


def test_lock_that_cannot_be_opened(arguments, tmp_path):
    (tmp_path / "run/lock").mkdir(parents=True)
    assert_one_line(pretrain([*arguments, f"run.directory={tmp_path}/run"]), ["run/lock", "Is a directory"])


def test_disk_is_full_at_the_start(arguments, tmp_path):
    entry = functools.partial(faulty_pretrain.limit_files, 4096)
    finished = pretrain([*arguments, f"run.directory={tmp_path}/run"], entry=entry)
    assert_one_line(finished, [f"{tmp_path}/run", "cannot be written to"])


def test_second_job_under_a_launcher_ends_soon(arguments, tmp_path, start):
    endless = [*arguments, "train.steps=1000000", f"run.directory={tmp_path}/run"]
    with start_pretrain(endless) as first:
        wait_for(lambda: records(tmp_path / "run"))
        os.kill(first.ranks[0].pid, signal.SIGSTOP)  # leaves the processors to the second job
        process = start([*deepspeed(2), *endless])
        lines, reported = [], None
        for line in process.stdout:
            lines.append(line)
            if "belongs to a running job" in line:
                assert reported is None
                reported = time.monotonic()
        assert process.wait() == 2
    assert reported is not None and "Traceback" not in "".join(lines)
    # The launcher kills ranks that do not end within 30 s.
    assert time.monotonic() - reported < 25


def test_second_job_in_one_run_directory_is_an_error(arguments, tmp_path):
    endless = [*arguments, "train.steps=1000000", f"run.directory={tmp_path}/run"]
    with start_pretrain(endless) as first:
        wait_for(lambda: records(tmp_path / "run"))
        words = [f"{tmp_path}/run belongs to a running job", f"process {first.ranks[0].pid}"]
        assert_one_line(pretrain(endless), words)
        assert first.ranks[0].is_alive()
    finished = pretrain([*arguments, "train.steps=2", f"run.directory={tmp_path}/run"])
    assert finished.returncode == 0, finished.stderr  # the lock was released when the first job died


def test_resumed_run_prints_changed_settings(trained, arguments, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    finished = pretrain([*arguments, "train.steps=2", "optimizer.lr=0.5", f"run.directory={tmp_path}/run"])
    assert finished.returncode == 0, finished.stderr
    changes = [line for line in finished.stdout.splitlines() if line.startswith("changed since the run began: ")]
    assert any("optimizer.lr: 0.01 -> 0.5" in line for line in changes) and any(
        "train.steps: 1 -> 2" in line for line in changes
    )
    assert len(changes) == 3  # and run.directory, because the run is a copy


def test_too_large_learning_rate_ends_the_run(arguments, tmp_path):
    finished = pretrain([*arguments, "optimizer.lr=1e36", "run.save_every_steps=2", f"run.directory={tmp_path}/run"])
    assert finished.returncode == 2
    *_, line = finished.stderr.splitlines()
    problem = "step 11: all losses are finite, but the gradient is not; non-finite steps in a row: 10"
    assert line.startswith(f"megamtp: error: {problem}. A new job")
    assert "resumes from the beginning" in line and not (tmp_path / "run/checkpoints").exists()
    assert [record["skipped"] for record in records(tmp_path / "run")] == [False] + 9 * [True]
    assert "step 10: all losses are finite, but the gradient is not; the weights are unchanged" in finished.stdout


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_one_rank_needs_no_address(arguments, tmp_path, taken_port):
    """No host has the address 192.0.2.1. A rank that tried to connect to it would wait for half an hour."""
    arguments = [*arguments, "train.steps=1", f"run.directory={tmp_path}/run"]
    finished = pretrain(arguments, timeout=90, MASTER_ADDR="192.0.2.1", MASTER_PORT=taken_port)
    assert finished.returncode == 0, finished.stderr
    assert len(records(tmp_path / "run")) == 1


def test_taken_port(arguments, tmp_path, taken_port):
    finished = pretrain([*arguments, f"run.directory={tmp_path}/run"], 2, MASTER_PORT=taken_port)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("megamtp: error: "))
    assert f"MASTER_PORT={taken_port}: address already in use; expected" in line and "--master_port" in line


def test_launcher_variables_without_a_valid_rank(tmp_path):
    finished = pretrain(["configs/quickstart.yaml", f"run.directory={tmp_path}/run"], RANK="first", WORLD_SIZE="2")
    assert_one_line(finished, ["RANK=first", "expected 0 to"])
    assert not (tmp_path / "run").exists()


def test_wrong_number_of_ranks():
    finished = run(["-m", "megamtp.commands.local", "configs/quickstart.yaml"], MEGAMTP_RANKS="x")
    assert_one_line(finished, ["MEGAMTP_RANKS=x", "expected a number"])
