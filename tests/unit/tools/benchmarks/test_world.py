"""Step time against the number of ranks, on invented times."""

from benchmarks import output, world

from tests.measurements import rows

MEASURED = {"ours": 150.0, "fsdp2 one backward": 190.0, "deepspeed as shipped": 250.0}


def test_world_goes_up_and_down_and_divides_by_the_first(tmp_path, monkeypatch, capsys):
    """A step as long as it was given, and longer by the number of times that its process was made."""
    made = []

    class Invented:
        def __init__(self, function, config, names, num_steps):
            made.append(config.cluster.emulate)
            slower = {"deepspeed as shipped": config.cluster.emulate / 8}
            self.answer = {name: [MEASURED[name] * slower.get(name, 1.0) + len(made)] * num_steps for name in names}

        def result(self):
            return self.answer

    monkeypatch.setattr(world, "Fresh", Invented)
    monkeypatch.setattr(output, "start", lambda options: None)
    world.main(["--world-sizes", "8", "64", "512", "--output", str(tmp_path), "--steps", "3"])
    assert made == [8, 64, 512, 512, 64, 8]
    header, *found = rows(capsys.readouterr().out)
    assert header[1:3] == ["ours, ms", "over 8 ranks"]
    assert [row[0] for row in found] == ["8", "64", "512"]
    assert [row[1] for row in found] == ["153.5 [151.0, 156.0]", "153.5 [152.0, 155.0]", "153.5 [153.0, 154.0]"]
    assert [row[2] for row in found] == ["1.000"] * 3
    assert [row[6] for row in found] == ["1.000", "-", f"{16003.5 / 253.5:.3f}"]
    assert (tmp_path / "world.png").stat().st_size > 10_000
