"""Checkpoint folders: visible at once or not at all, old ones removed, damage named."""

import dataclasses
from pathlib import Path

import pytest

from megamtp.checkpoint import store
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

MODEL = ModelConfig(dim=8, num_layers=2, num_future_tokens=1, num_attention_heads=1, vocab_size=10)


def publish(run: Path, step: int, keep: int = 2, content: bytes = b"weights", fail: bool = False) -> Path:
    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine/rank0").write_bytes(content)
        if fail:
            raise KeyboardInterrupt

    manifest = store.Manifest(step, 1, "zero3", "fp32", dataclasses.asdict(MODEL), {})
    return store.publish(run, manifest, keep, 0, lambda: None, write)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_are_kept_and_ordered_by_step(tmp_path):
    for step in (9, 10, 9_999_999, 10_000_000):
        publish(tmp_path, step)
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-9999999", "step-10000000"]
    assert store.newest_checkpoint(tmp_path).name == "step-10000000"
    assert store.read_manifest(store.newest_checkpoint(tmp_path)).file_bytes == {"engine/rank0": 7}


def test_an_interrupted_save_is_no_checkpoint_and_leaves_the_older_one(tmp_path):
    publish(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 2, fail=True)
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-0000001"]
    publish(tmp_path, 3)
    assert names(tmp_path) == ["step-0000001", "step-0000003"]


def test_the_same_step_is_replaced(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 1, content=b"other weights")
    assert names(tmp_path) == ["step-0000001"]
    assert store.read_manifest(store.newest_checkpoint(tmp_path)).file_bytes == {"engine/rank0": 13}


def damage(checkpoint: Path, kind: str) -> None:
    file = checkpoint / "engine/rank0"
    match kind:
        case "truncated":
            file.write_bytes(b"weig")
        case "missing":
            file.unlink()
        case "no manifest":
            (checkpoint / store.MANIFEST).unlink()
        case "foreign manifest":
            (checkpoint / store.MANIFEST).write_text('{"step": 1}')


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ["engine/rank0 has 4 bytes", "expected 7"]),
        ("missing", ["engine/rank0 is missing", "expected 7"]),
        ("no manifest", ["not a checkpoint", "manifest.json"]),
        ("foreign manifest", ["manifest.json cannot be read", "remove"]),
    ],
)
def test_damage_is_named_in_one_line(kind, words, tmp_path):
    checkpoint = publish(tmp_path, 1)
    damage(checkpoint, kind)
    with pytest.raises(CheckpointError) as error:
        store.read_manifest(checkpoint)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_run_without_checkpoint_is_named(tmp_path):
    assert store.checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint; expected"):
        store.newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ((dataclasses.replace(MODEL, dim=16), 1, "zero3", "fp32"), "model.dim=8, expected 16"),
        ((MODEL, 2, "zero3", "fp32"), "world size 1, expected 2"),
        ((MODEL, 1, "zero1", "fp32"), "engine kind zero3, expected zero1"),
        ((MODEL, 1, "zero3", "bf16"), "precision fp32, expected bf16"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused(job, words, tmp_path):
    checkpoint = publish(tmp_path, 1)
    manifest = store.read_manifest(checkpoint)
    store.check_fits(checkpoint, manifest, MODEL, 1, "zero3", "fp32")
    with pytest.raises(CheckpointError, match=words):
        store.check_fits(checkpoint, manifest, *job)
