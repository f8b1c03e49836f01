"""What a run looks at before it begins."""

from pathlib import Path

import pytest

from megamtp.config import read_config
from megamtp.errors import InputError
from megamtp.pretrain import _check_vocabulary

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
