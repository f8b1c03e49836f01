"""Tests of a byte-level model: prepare, train, generate, export to transformers."""

from transformers import AutoTokenizer

from megamtp.commands import convert_checkpoint, generate, prepare_data
from megamtp.data.tokenizer import ByteTokenizer
from tests.end_to_end.jobs import ROOT, pretrain

MODEL = [
    "model.dim=32",
    "model.num_layers=3",
    "model.num_future_tokens=2",
    "model.num_attention_heads=2",
    "train.steps=2",
    "train.global_batch_tokens=128",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "train.precision=fp32",
    "run.tensorboard=false",
]


def test_byte_level_model_from_text_to_export(call_command, tmp_path):
    corpus, directory, exported = tmp_path / "corpus", tmp_path / "run", tmp_path / "hf"
    status, out, err = call_command(
        prepare_data, "--input", ROOT / "configs", "--tokenizer", "bytes", "--output", corpus
    )
    assert (status, err) == (0, "")
    assert "257 pieces, 1.00 bytes per token" in out
    assert not (corpus / "tokenizer.model").exists()

    arguments = [*MODEL, f"data.train={corpus}/train", "data.tokenizer=bytes", f"run.directory={directory}"]
    refused = pretrain([*arguments, "model.vocab_size=256"])
    assert refused.returncode == 2
    assert "bytes has 257 pieces, model.vocab_size is 256" in refused.stderr
    # 272 is a multiple of 16, as fp8 matrix products require.
    trained = pretrain([*arguments, "model.vocab_size=272"])
    assert trained.returncode == 0, trained.stderr
    assert (
        "model.vocab_size is 272, the tokenizer has 257 pieces: 15 rows have no token; they are part of every softmax"
        in trained.stdout
    )

    prompted = ["--prompt", "caf\u00e9", "--max-new-tokens", "4", "--device", "cpu"]
    status, text, err = call_command(generate, directory, *prompted)
    assert status == 0, err
    assert text.startswith("caf\u00e9")
    status, _, err = call_command(convert_checkpoint, directory, exported, "--to", "hf")
    assert status == 0, err
    assert call_command(generate, exported, *prompted)[:2] == (0, text)

    exported_tokenizer, tokenizer = AutoTokenizer.from_pretrained(exported), ByteTokenizer()
    for text in ("caf\u00e9 \t\r\n  x</s><|end|>\0\u2581", "".join(map(chr, range(512)))):
        ids = exported_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert exported_tokenizer.decode(ids) == text
    assert (exported_tokenizer.eos_token_id, len(exported_tokenizer)) == (256, 257)
