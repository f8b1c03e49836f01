"""What a run looks at before it begins."""

from pathlib import Path

import pytest

from megamtp.config import read_config, write_config
from megamtp.errors import InputError
from megamtp.pretrain import _check_vocabulary, _spare_real_run

CONFIG = str(Path(__file__).parents[2] / "configs/quickstart.yaml")


def test_vocabulary_of_a_corpus(tmp_path):
    config = read_config([CONFIG, "run.directory=r", "data.train=a", "data.tokenizer=null", "model.vocab_size=400"])
    summary = tmp_path / "corpus.json"
    for another_programs in ("", "[]", "{}", '{"vocab_size": "many"}', '{"vocab_size": null}', '{"vocab_size": 400}'):
        summary.write_text(another_programs)
        assert _check_vocabulary(config, summary) is None
    summary.write_text('{"vocab_size": 401}')
    with pytest.raises(InputError, match=r"corpus\.json tells of a vocabulary of 401, model\.vocab_size is 400; expected no more"):
        _check_vocabulary(config, summary)


def test_an_emulated_rank_spares_a_real_runs_folder(tmp_path):
    _spare_real_run(tmp_path)
    settings = [CONFIG, "run.directory=r", "data.train=a"]
    write_config(read_config([*settings, "cluster.emulate=4"]), tmp_path / "config.yaml")
    _spare_real_run(tmp_path)
    write_config(read_config(settings), tmp_path / "config.yaml")
    with pytest.raises(InputError, match="holds a real run"):
        _spare_real_run(tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.seed=20251125123456", "train.seed=20251125123456; expected at most 549755813887"),
        ("cluster.efficiency={all_gather: 0}", "cluster.efficiency of all_gather=0.0; expected a share of the bandwidth"),
        ("cluster.efficiency={gather: 0.5}", "cluster.efficiency=gather; expected all_gather or reduce_scatter"),
        ("run.stall_seconds=0", "run.stall_seconds=0; expected at least 1"),
    ],
)
def test_numbers_out_of_bounds(setting, words):
    with pytest.raises(InputError) as caught:
        read_config([CONFIG, "run.directory=r", "data.train=a", setting])
    assert words in str(caught.value)
