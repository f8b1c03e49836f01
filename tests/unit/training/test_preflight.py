"""What a run looks at before it begins."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megamtp.cluster.environment import Place
from megamtp.config import read_config, write_config
from megamtp.data.indexed_dataset import IndexedDatasetWriter
from megamtp.data.tokenizer import SentencePieceTokenizer
from megamtp.errors import InputError
from megamtp.training.preflight import (
    _check_float8,
    _check_tokenizer,
    _check_vocabulary,
    _refuse_run_without_emulation,
    check,
    report_vocabulary,
)
from tests import tokenizer_kinds
from tests.cases import published_config

CONFIG = str(Path(__file__).parents[3] / "configs/quickstart.yaml")


SMALL_MICRO_BATCHES = ["train.micro_batch_size=1", "train.sequence_length=64"]
FP8 = [CONFIG, "run.directory=r", "data.train=a", "train.precision=fp8"]


def test_fp8_on_a_cpu_is_emulated_which_rank_0_says(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for rank in (0, 1):
        _check_float8(read_config(FP8), Place(rank, rank, 2))
    assert capsys.readouterr().err == (
        "megamtp: warning: train.precision=fp8 without a GPU: fp8 products are emulated, slowly\n"
    )


@pytest.mark.parametrize("key", ["train.precision", "head_loss.precision"])
def test_fp8_on_a_gpu_without_it_is_refused(key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    config = read_config([*FP8[:3], "train.precision=bf16", f"{key}=fp8"])
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if not refused:
            _check_float8(config, Place(0, 0, 1))
            continue
        with pytest.raises(
            InputError, match=rf"^{key}=fp8 on NVIDIA A100; expected a GPU with fp8 products .*to bf16$"
        ):
            _check_float8(config, Place(0, 0, 1))


def test_fp8_that_is_slower_than_bf16_is_reported_by_rank_0(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for rank in (1, 0):
        _check_float8(published_config("0.3b", 4, "train.precision=fp8", *SMALL_MICRO_BATCHES), Place(rank, rank, 64))
        _check_float8(published_config("6.7b", 4, "train.precision=fp8"), Place(rank, rank, 64))
    warning = capsys.readouterr().err
    assert warning.startswith("megamtp: warning: train.precision=fp8 on NVIDIA H200: train.precision=bf16 is predicted")
    assert warning.count("\n") == 1


def test_vocabulary_of_a_corpus(tmp_path):
    config = read_config([CONFIG, "run.directory=r", "data.train=a", "data.tokenizer=null", "model.vocab_size=400"])
    summary = tmp_path / "corpus.json"
    for another_programs in ("", "[]", "{}", '{"vocab_size": "many"}', '{"vocab_size": null}', '{"vocab_size": 400}'):
        summary.write_text(another_programs)
        assert _check_vocabulary(config, summary) is None
    summary.write_text('{"vocab_size": 401}')
    with pytest.raises(
        InputError, match=r"corpus\.json has a vocabulary of 401, model\.vocab_size is 400; expected no more"
    ):
        _check_vocabulary(config, summary)


def test_a_vocabulary_larger_than_the_tokenizers(tmp_path, capsys):
    prepared, model = tmp_path / "corpus.json", tokenizer_kinds.train_kind("ours", tmp_path / "tokenizer.model")
    settings = [CONFIG, "run.directory=r", f"data.train={tmp_path}/train"]
    ours = [*settings, f"data.tokenizer={model}"]
    prepared.write_text('{"vocab_size": 500}')
    for larger in ([*ours, "model.vocab_size=512"], [*settings, "data.tokenizer=null", "model.vocab_size=512"]):
        config = read_config(larger)
        _check_vocabulary(config, prepared)
        report_vocabulary(config)
        words = "model.vocab_size is 512, the tokenizer has 500 pieces: 12 rows have no token; "
        words += "they are part of every softmax\n"
        assert tuple(capsys.readouterr()) == (words, "")
    _check_tokenizer(read_config([*ours, "model.vocab_size=512"]))
    report_vocabulary(read_config([*ours, "model.vocab_size=500"]))
    assert tuple(capsys.readouterr()) == ("", "")
    with pytest.raises(
        InputError, match=r"500 pieces, model\.vocab_size is 499; expected as many rows or more: set model"
    ):
        _check_tokenizer(read_config([*ours, "model.vocab_size=499"]))
    prepared.write_text('{"vocab_size": 400}')
    with pytest.raises(InputError, match=r"vocabulary of 400, .*tokenizer\.model has 500 pieces; expected the same"):
        _check_vocabulary(read_config([*ours, "model.vocab_size=512"]), prepared)


def test_a_tokenizer_that_cannot_be_exported_is_said_before_training(tmp_path, capsys):
    model = tokenizer_kinds.train_kind("unigram", tmp_path / "tokenizer.model")
    pieces = SentencePieceTokenizer(model).vocab_size
    settings = [CONFIG, "run.directory=r", "data.train=a", f"model.vocab_size={pieces}"]
    report_vocabulary(read_config([*settings, f"data.tokenizer={model}"]))
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    words = f"training works, but {model} cannot be exported to hf or hf-mtp: it is a unigram model; expected"
    assert err.startswith(f"megamtp: warning: {words}")


def test_an_emulated_rank_spares_a_real_runs_folder(tmp_path):
    _refuse_run_without_emulation(tmp_path)
    settings = [CONFIG, "run.directory=r", "data.train=a"]
    write_config(read_config([*settings, "cluster.emulate=4"]), tmp_path / "config.yaml")
    _refuse_run_without_emulation(tmp_path)
    write_config(read_config(settings), tmp_path / "config.yaml")
    with pytest.raises(InputError, match=r"holds a run without cluster\.emulate"):
        _refuse_run_without_emulation(tmp_path)


def test_each_rank_checks_its_own_share_of_the_validation_windows(tmp_path, monkeypatch):
    """A wrong token in the second rank's share, far from both ends."""
    monkeypatch.setattr("megamtp.data.windows.CHECKED_TOKENS", 100)
    with IndexedDatasetWriter(tmp_path / "validation", np.uint16) as writer:
        for number in range(10):
            writer.add_document([5] * 65 + [300 if number == 5 else 5] + [5] * 34)
    settings = ["run.directory=" + str(tmp_path / "run"), f"data.train={tmp_path}/validation", "data.tokenizer=null"]
    model = [
        "model.vocab_size=300",
        "train.sequence_length=16",
        "train.global_batch_tokens=64",
        "train.micro_batch_size=2",
    ]
    config = read_config([CONFIG, *settings, *model, f"data.validation={tmp_path}/validation"])
    assert check(config, Place(0, 0, 2)).data_parallel_rank_and_size == (0, 2)
    with pytest.raises(InputError, match=r"validation\.bin holds token 300 in document 5"):
        check(config, Place(1, 1, 2))
