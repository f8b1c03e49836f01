"""Wrong arguments, or a machine without a GPU, end a benchmark with one line and exit status 2."""

import subprocess
import sys

import pytest
from benchmarks import data, layer, links, loss, output, overhead, pipeline, trace, world

from megamtp.errors import InputError
from tests.cases import ROOT


@pytest.mark.skipif(output.torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["overhead", "world", "trace", "layer", "loss", "pipeline"])
def test_without_a_gpu_benchmarks_exit_with_one_line_and_status_2(name, tmp_path):
    command = [sys.executable, "tools/benchmark.py", name, "--output", str(tmp_path / "results")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == "megamtp: error: no GPU; expected one: benchmarks measure a GPU's time\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (overhead, ["--sizes", "7b"], "invalid choice: '7b'.*see .*overhead --help"),
        (overhead, ["--heads", "4", "1"], "--heads 4 1; expected 1 first"),
        (overhead, ["--heads", "1", "18", "--sizes", "0.3b"], "num_future_tokens=18 .*expected fewer"),
        (overhead, ["--set", "engine.head_schedule=deferred"], "head_schedule=deferred; expected sequential"),
        (world, ["--world-sizes", "8", "0"], "--world-sizes: 0; expected a whole number, 1 or more"),
        (world, ["--world-sizes", "8", "many"], "--world-sizes: many; expected a whole number"),
        (
            world,
            ["--variants", "deepspeed as shipped", "--shipped-at", "8"],
            "nothing to measure at 16 ranks; expected",
        ),
        (world, ["--bandwidth", "fast"], "flat_bandwidth=fast"),
        (trace, ["--world-size", "-4"], "--world-size: -4; expected"),
        (trace, ["--sms", "0"], "communication_sms=0; expected at least 1"),
        (trace, ["--limit", "low"], "--limit: invalid float value"),
        (layer, ["--sizes", "7b"], "invalid choice: '7b'.*see .*layer --help"),
        (loss, ["--rows", "1.5"], "--rows: 1.5; expected"),
        (pipeline, ["--heads", "4", "1"], "--heads 4 1; expected 1 first"),
        (pipeline, ["--stages", "33"], "engine.num_stages=33 with 32 trunk layers and heads; expected no more stages"),
        (pipeline, ["--link-bandwidth", "0"], "--link-bandwidth 0 --latency 2e-05; expected bytes/s above 0"),
        (data, ["--sizes", "1e9", "1e14"], r"--sizes 1e\+14; expected 1e5 to 1e13 tokens"),
        (data, ["--read-tokens", "nan"], "--read-tokens nan; expected"),
        (links, [], "one process; expected several ranks"),
    ],
)
def test_bad_arguments_are_refused_before_the_gpu_is_checked(module, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        module.main(arguments)
    assert "\n" not in str(error.value)
