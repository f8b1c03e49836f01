"""A byte-level run: text to a corpus of bytes, to a model, to text; and where bytes are refused by name."""

from transformers import AutoTokenizer

from megamtp.data.tokenizer import ByteTokenizer
from tests.end_to_end.jobs import ROOT, run

MODEL = [
    "model.dim=32", "model.num_layers=3", "model.num_future_tokens=2", "model.num_attention_heads=2", "train.steps=2",
    "train.global_batch_tokens=128", "train.micro_batch_size=2", "train.sequence_length=32", "train.precision=fp32",
    "run.tensorboard=false",
]  # fmt: skip


def test_prepared_trained_and_generated(tmp_path):
    corpus, directory = tmp_path / "corpus", tmp_path / "run"
    prepared = run(
        ["-m", "megamtp.commands.prepare_data", "--input", str(ROOT / "configs"), "--tokenizer", "bytes", "--output", str(corpus)]
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "257 pieces, 1.00 bytes per token" in prepared.stdout
    assert not (corpus / "tokenizer.model").exists()
    arguments = [*MODEL, f"data.train={corpus}/train", "data.tokenizer=bytes", f"run.directory={directory}"]
    refused = run(["-m", "megamtp.pretrain", *arguments, "model.vocab_size=256"])
    assert refused.returncode == 2
    assert "bytes has 257 pieces, model.vocab_size is 256" in refused.stderr
    trained = run(["-m", "megamtp.pretrain", *arguments, "model.vocab_size=257"])
    assert trained.returncode == 0, trained.stderr
    generated = run(["-m", "megamtp.commands.generate", str(directory), "--prompt", "caf\u00e9", "--max-new-tokens", "4"])
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("caf\u00e9")
    exported = run(["-m", "megamtp.commands.convert_checkpoint", str(directory), str(tmp_path / "hf"), "--to", "hf"])
    assert exported.returncode == 0, exported.stderr
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), ByteTokenizer()
    for text in ("caf\u00e9 \t\r\n  x</s><|end|>\0\u2581", "".join(map(chr, range(512)))):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (256, 257)
    prompted = ["--prompt", "caf\u00e9", "--max-new-tokens", "4"]
    refused = run(["-m", "megamtp.commands.generate", str(tmp_path / "hf"), *prompted])
    assert refused.returncode == 2 and "--tokenizer bytes" in refused.stderr
    again = run(["-m", "megamtp.commands.generate", str(tmp_path / "hf"), *prompted, "--tokenizer", "bytes"])
    assert again.stdout == generated.stdout
