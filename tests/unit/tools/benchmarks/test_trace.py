"""The verdict on exposed communication in an invented trace."""

import json

import pytest
from benchmarks import emulation, exposure, output, trace, variants

from tests.measurements import invented_trace, rows


@pytest.mark.parametrize(("exposed", "status", "word"), [(1.0, 0, "holds"), (8.5, 1, "FAILS")])
def test_trace_fails_if_too_much_of_the_head_phase_is_exposed(tmp_path, monkeypatch, exposed, status, word, capsys):
    class Invented(variants.Variant):
        def __init__(self, config):
            self.prefetches = config.engine.prefetch_modules > 0

        def trace(self, times=3):
            return invented_trace(exposed if self.prefetches else 9.5)

    class InventedPlain(Invented):
        def trace(self, times=3):
            return exposure.Trace([(0.0, 300.0), (302.0, 590.0)], [], [], {"step": [(0.0, 590.0)]})

    def measure(makers, rounds, steps):
        return {name: variants.Measurement([600.0] * steps) for name in makers}

    monkeypatch.setattr(variants, "Ours", Invented)
    monkeypatch.setattr(variants, "Plain", InventedPlain)
    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "traces", lambda makers: {name: make().trace() for name, make in makers.items()})
    monkeypatch.setattr(emulation, "join", lambda config: None)
    monkeypatch.setattr(output, "require_gpu", lambda options, smoke_on_cpu: None)
    try:
        trace.main(["--output", str(tmp_path), "--limit", "6"])
        exit_status = 0
    except SystemExit as end:
        exit_status = end.code
    assert exit_status == status
    shown = capsys.readouterr().out
    share = exposed + 9 * 0.5
    assert f"prefetch as configured: head phase: exposed {share:.2f} % <= 6 %: {word}" in shown
    assert "no prefetch (control): head phase: exposed 14.00 % > 6 %: as expected" in shown
    assert [row[1] for row in rows(shown)[1:]] == [*["step", "head phase", "trunk"] * 2, "step"]
    transferring, long = 9 * 5.0 + max(exposed, 5.0), share  # pieces of at least 0.5 ms are long
    expected = ["100.0", f"{100 - share:.1f}", f"{transferring:.1f}", f"{share:.2f}", f"{long:.2f}"]
    assert rows(shown)[2][2:10] == [*expected, "0.25", f"{share:.2f}%", "0.00"]
    assert rows(shown)[-1][2:10] == ["590.0", "588.0", "0.0", "0.00", "0.00", "0.00", "0.00%", "2.00"]
    assert json.loads((tmp_path / "trace.json").read_text())["results"][1]["prefetch_modules"] == 0
    assert (tmp_path / "trace.png").stat().st_size > 10_000


def test_a_limit_that_the_control_does_not_exceed_is_too_high():
    heads = {"exposed": 1.0, "total": 100.0}
    result = {"variant": trace.NO_PREFETCH, "exposure": {"heads": heads}, "limit_percent": 3.0}
    assert trace._verdict(result) == (
        "no prefetch (control): head phase: exposed 1.00 % <= 3 %: the limit is too high to detect missing prefetch"
    )
