"""Step times at several numbers of ranks, on invented times."""

from benchmarks import output, world

from tests.measurements import rows

MEASURED = {"ours": 150.0, "fsdp2 one backward": 190.0, "deepspeed as shipped": 250.0}


def test_rounds_alternate_their_order_and_ratios_are_to_the_first_number_of_ranks(tmp_path, monkeypatch, capsys):
    """Each later process takes 1 ms longer, so the order of the rounds shows in the times."""
    ranks_of_processes = []

    class Invented:
        def __init__(self, function, config, names, num_steps):
            ranks_of_processes.append(config.cluster.emulate)
            slower = {"deepspeed as shipped": config.cluster.emulate / 8}
            self.answer = {
                name: [MEASURED[name] * slower.get(name, 1.0) + len(ranks_of_processes)] * num_steps for name in names
            }

        def run(self):
            return self.answer

    monkeypatch.setattr(world, "ProcessCall", Invented)
    monkeypatch.setattr(output, "require_gpu", lambda options: None)
    world.main(["--world-sizes", "8", "64", "512", "--output", str(tmp_path), "--steps", "3"])
    assert ranks_of_processes == [8, 64, 512, 512, 64, 8]
    header, *table_rows = rows(capsys.readouterr().out)
    assert header[1:3] == ["ours, ms", "step / step at 8 ranks"]
    assert [row[0] for row in table_rows] == ["8", "64", "512"]
    assert [row[1] for row in table_rows] == ["153.5 [151.0, 156.0]", "153.5 [152.0, 155.0]", "153.5 [153.0, 154.0]"]
    assert [row[2] for row in table_rows] == ["1.000"] * 3
    assert [row[6] for row in table_rows] == ["1.000", "-", f"{16003.5 / 253.5:.3f}"]
    assert (tmp_path / "world.png").stat().st_size > 10_000
