"""tools/benchmarks/learning.py on invented metrics: reading, table, verdicts, plot, and which trainings run."""

import json
import threading
import time
from pathlib import Path

import pytest
from benchmarks import comparison, learning, trainings
from benchmarks.trainings import LOG, TrainingRun

from megamtp.config import RESOLVED, read_config, write_config
from megamtp.errors import InputError
from tests.cases import small_config

STEPS = 240
FINISHED = "finished"


def write_metrics(directory: Path, factor: float = 1.0, steps: int = STEPS, growth: float = 0.0) -> Path:
    """Writes metrics of two heads. The losses fall from 10 to 4 and 5.

    Args:
        factor: multiplies the losses.
        growth: how much larger the factor is at step STEPS; it grows evenly.
    """
    lines = []
    for step in range(1, steps + 1):
        factor_of_step = factor + growth * step / STEPS
        losses = [factor_of_step * max(last, 10 - 0.05 * step) for last in (4.0, 5.0)]
        lines.append({"kind": "train", "step": step, "losses": losses})
        if step % 60 == 0:
            lines.append({"kind": "validation", "step": step, "losses": [loss + 0.5 for loss in losses]})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def rows(tmp_path: Path, **metrics: dict) -> list[dict]:
    """Returns results of trainings whose metrics are given as VARIANT_SEED=arguments of write_metrics."""
    losses = {}
    for name, arguments in metrics.items():
        variant, seed = name.split("_")
        directory, last_step = write_metrics(tmp_path / name, **arguments), arguments.get("steps", STEPS)
        losses[int(seed), variant] = TrainingRun(directory, list, last_step).read()
    return comparison.results(losses)


def verdicts(results: list[dict]) -> list[str]:
    return comparison.tables(results).split("\n\n")[1:]


def test_the_table_compares_variants_with_the_first(tmp_path):
    results = rows(tmp_path, bf16_0={}, fp8_0={"factor": 1.002})
    *_, head_1, head_2 = comparison.tables(results).split("\n\n")[0].splitlines()
    thirds = "+0.200% ± 0.000% | +0.200% ± 0.000%"
    assert head_1 == f"| 0 | fp8 | 1 | 4.0080 | +0.20% | 4.5080 | +0.18% | {thirds} |"
    assert head_2 == f"| 0 | fp8 | 2 | 5.0100 | +0.20% | 5.5100 | +0.18% | {thirds} |"
    first = results[0]
    assert first["training_difference"] == first["validation_difference"] == 0
    assert len(first["curve"]) == STEPS // comparison.POINT_STEPS
    assert first["curve"][0] == pytest.approx(sum(10 - 0.05 * step for step in range(1, 21)) / 20, abs=1e-4)


def test_a_curve_has_at_most_150_points():
    assert [comparison.steps_a_point(steps) for steps in (40, 3000, 3001, 30000)] == [20, 20, 21, 200]


def test_thirds_have_the_mean_and_the_standard_error_of_their_steps(tmp_path):
    """The difference grows evenly, by 0.1 % in each third: from its mean to its end are half of that."""
    row = rows(tmp_path, bf16_0={}, fp8_0={"growth": 0.003})[2]
    # The 80 steps of a third are four means of 20 steps.
    spread = 0.001 * (4**2 - 1) ** 0.5 / (12**0.5 * 4) * (4 / 3) ** 0.5
    for third, mean in (("middle_third", 0.0015), ("last_third", 0.0025)):
        assert row[third][0] == pytest.approx(mean, rel=0.01)
        assert row[third][1] == pytest.approx(spread / 4**0.5, rel=1e-6)


def test_verdicts_that_hold(tmp_path):
    different = {"factor": 1.002}
    bound, gap, seeds = verdicts(
        rows(tmp_path, bf16_0={}, fp8_0=different, bf16_1={"factor": 1.1}, fp8_1={"factor": 1.1022})
    )
    assert bound == "fp8: validation loss within 0.5% of bf16: in 4 of 4 rows; largest difference 0.18%: holds"
    assert gap == (
        "fp8: gap of the training loss in the last third 0.200% <= in the middle third 0.200% + 2 standard errors of "
        "0.000%: holds"
    )
    assert seeds == "bf16: difference of the validation loss between seeds: head 1 8.89%, head 2 9.09%"


@pytest.mark.parametrize("sign", [1, -1])
def test_verdicts_that_fail(sign, tmp_path):
    """The sign of the differences does not matter. One head of one seed beyond the bound is enough."""
    growing = {"growth": sign * 0.003}
    bound, gap, _ = verdicts(rows(tmp_path, bf16_0={}, fp8_0=growing, bf16_1={}, fp8_1={"factor": 1 + sign * 0.00553}))
    assert bound == "fp8: validation loss within 0.5% of bf16: in 3 of 4 rows; largest difference 0.50%: FAILS"
    assert gap.startswith("fp8: gap of the training loss in the last third 0.4") and gap.endswith(": FAILS"), gap


def test_the_gap_may_grow_by_two_standard_errors():
    def verdict(last: float, error: float) -> str:
        row = {"variant": "fp8", "seed": 0, "middle_third": [0.001, error], "last_third": [last, error]}
        return comparison._gap_verdict([row, row])

    # the error of the difference between two thirds is sqrt(2) * 0.0001
    assert verdict(0.00128, 0.0001).endswith("0.014%: holds")
    assert verdict(0.00129, 0.0001).endswith("0.014%: FAILS")
    assert verdict(0.00129, 0.0002).endswith("holds")


def test_errors_of_heads_are_added_and_those_of_seeds_are_independent():
    def error(seeds: tuple[int, ...]) -> float:
        results = [
            {"variant": "fp8", "seed": seed, "middle_third": [0.001, 0.0001], "last_third": [0.001, 0.0]}
            for seed in seeds
        ]
        return float(comparison._gap_verdict(results).split("errors of ")[1].split("%")[0])

    assert error((0, 0, 0, 0)) == error((0,)) == 0.01
    assert error((0, 0, 1, 1)) == 0.007


def test_a_fault_should_exceed_the_bound(tmp_path):
    """It is compared at its own last step, and has no other verdict."""
    (verdict,) = verdicts(rows(tmp_path, bf16_0={}, fault_0={"factor": 1.5, "steps": 120}))
    assert verdict == (
        "fault (control): largest difference of a validation loss from bf16: 45.45% (seed 0, step 120); exceeds 0.5%, "
        "as it should: holds"
    )
    noticed_once = rows(tmp_path, bf16_0={}, fault_0={"factor": 1.5}, bf16_1={}, fault_1={"factor": 1.001})
    assert "0.09% (seed 1, step 240); exceeds 0.5%, as it should: FAILS" in verdicts(noticed_once)[0]


def write_log(directory: Path) -> None:
    (directory / LOG).write_text("megamtp: error: step 72: ...; non-finite steps in a row: 1. A new job ...")


@pytest.mark.parametrize("steps", [72, 3])
def test_a_fault_that_ends_because_its_loss_is_not_finite_exceeds_the_bound(steps, tmp_path):
    first = TrainingRun(write_metrics(tmp_path / "bf16"), list, STEPS)
    fault = TrainingRun(write_metrics(tmp_path / "fault", steps=steps), list, STEPS, may_diverge=True)
    assert not fault.finished
    with pytest.raises(InputError, match=f"has {steps} training steps"):
        fault.read()
    write_log(fault.directory)
    assert fault.finished
    results = comparison.results({(0, "bf16"): first.read(), (0, "fault"): fault.read()})
    (verdict,) = verdicts(results)
    step = steps - steps % 60
    assert verdict.endswith(f": not finite (seed 0, step {step}); exceeds 0.5%, as it should: holds")
    assert (results[2]["validation"] is None) is (step == 0)
    assert "NaN" not in json.dumps(results)


def test_results_without_seeds_and_thirds_are_readable(tmp_path):
    results = rows(tmp_path, bf16_0={}, fp8_0={"factor": 1.002})
    for row in results:
        for key in ("seed", "step", "diverged", "middle_third", "last_third"):
            del row[key]
    table, bound = comparison.tables(results).split("\n\n")
    assert table.splitlines()[-1] == "| 0 | fp8 | 2 | 5.0100 | +0.20% | 5.5100 | +0.18% | - | - |"
    assert bound.endswith("largest difference 0.18%: holds")


def test_the_plot(tmp_path):
    losses = {
        (seed, name): TrainingRun(write_metrics(tmp_path / f"{name}{seed}", 1 + i / 500), list, STEPS).read()
        for seed in (0, 1)
        for i, name in enumerate(learning.VARIANTS)
    }
    figure = learning.draw(losses, "0.3B")
    loss_axes, difference_axes = figure.axes
    assert len(loss_axes.lines) == 2 * 5 and len(difference_axes.lines) == 2 * 3 + 1  # without bf16 and the fault
    assert difference_axes.lines[0].get_ydata() == pytest.approx(0.2)  # percent
    figure.savefig(tmp_path / "learning.png")
    content = (tmp_path / "learning.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 20_000


def test_an_unfinished_run_is_refused(tmp_path):
    directory = write_metrics(tmp_path / "run", steps=STEPS - 1)
    with pytest.raises(InputError, match=f"has 239 training steps; expected {STEPS}, and a validation"):
        TrainingRun(directory, list, STEPS).read()


def write_runs(tmp_path: Path, steps: int) -> list[str]:
    """Writes finished trainings of so many steps. Returns options of the benchmark."""
    (tmp_path / "corpus.json").write_text('{"vocab_size": 512}')
    options = ["--data", str(tmp_path), "--runs", str(tmp_path), "--output", str(tmp_path)]
    parsed = learning._parser().parse_args([*options, "--steps", str(steps)])
    for name in ("bf16", "fp8"):
        directory = write_metrics(tmp_path / "0.3b_seed0" / name, steps=steps)
        settings = [*learning._settings(parsed, 0, name), f"run.directory={directory}"]
        write_config(read_config(settings), directory / RESOLVED)
    return options


def test_finished_trainings_are_only_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainings, "call", lambda *arguments, **_: pytest.fail(f"called {arguments}"))
    learning.main([*write_runs(tmp_path, STEPS), "--steps", str(STEPS)])
    shown = capsys.readouterr().out
    assert "model 0.3B, n = 4, seeds 0, steps 240, tokens a step 8192, " in shown
    assert "| 0 | fp8 | 1 | 4.0000 | +0.00% | 4.5000 | +0.00% | +0.000% ± 0.000% | +0.000% ± 0.000% |" in shown


def test_trainings_with_other_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "call", lambda *arguments, **_: pytest.fail(f"called {arguments}"))
    options = write_runs(tmp_path, STEPS)
    with pytest.raises(InputError, match=r"0.3b_seed0/bf16 has .*train.steps: 240 -> 120.*another folder with --runs"):
        learning.main([*options, "--steps", "120"])
    with pytest.raises(InputError, match=r"bf16 has .*train.sequence_length: 2048 -> 1024"):
        learning.main([*options, "--steps", str(STEPS), "--set", "train.sequence_length=1024"])


def test_after_an_error_no_further_training_starts(tmp_path, monkeypatch):
    """The first training runs until the second has failed."""
    started, failed = [], threading.Event()

    def call(module, *arguments, log, environment):
        started.append(log.parent.name)
        if log.parent.name == "b":
            failed.set()
            raise InputError("b failed")
        assert failed.wait(60)
        time.sleep(0.5)

    monkeypatch.setattr(trainings, "call", call)
    runs = [TrainingRun(tmp_path / name, list, STEPS) for name in "abcdef"]
    with pytest.raises(InputError, match=r"^b failed$"):
        trainings.train_all(runs, jobs=2)
    assert started[:2] == ["a", "b"] and len(started) <= 3  # c may start before the error is known


def settings_of(arguments: list[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments if "=" in argument)


def test_variants_of_a_seed_differ_in_nothing_but_their_precision(tmp_path, monkeypatch):
    """Each training starts once. The fault runs through its own module, with the same train.steps and its last step."""
    calls = []

    def call(module, *arguments, log, environment):
        settings = settings_of(arguments)
        calls.append((module, arguments, log))
        directory = Path(settings.pop("run.directory"))
        write_config(small_config(1, 4), write_metrics(directory, float(settings["train.seed"]) + 1) / RESOLVED)

    monkeypatch.setattr(trainings, "call", call)
    (tmp_path / "corpus.json").write_text('{"vocab_size": 512}')
    options = ["--variants", "bf16", "all-fp8", "fault", "--seeds", "0", "3", "--size", "1.3b", "--fault-steps", "120"]
    options += ["--steps", str(STEPS), "--data", str(tmp_path), "--output", str(tmp_path)]
    learning.main([*options, "--runs", str(tmp_path / "runs")])
    assert [module for module, *_ in calls] == ["megamtp.pretrain"] * 2 + [
        "benchmarks.unscaled_gradients",
        *["megamtp.pretrain"] * 2,
        "benchmarks.unscaled_gradients",
    ]
    assert [log is not None for *_, log in calls] == [False, False, True] * 2
    assert [arguments[0] for _, arguments, _ in calls[::3]] == [str(learning.emulation.CONFIGS / "1.3b_n4.yaml")] * 2
    assert [arguments[0] for _, arguments, _ in calls[2::3]] == ["120", "120"]
    settings = [settings_of(arguments) for _, arguments, _ in calls]
    directories = [Path(each.pop("run.directory")).relative_to(tmp_path / "runs") for each in settings]
    assert list(map(str, directories[1:4])) == ["1.3b_seed0/all-fp8", "1.3b_seed0/fault", "1.3b_seed3/bf16"]
    assert settings[2] == settings[1] == settings[0] | {"train.precision": "fp8"}
    assert settings[3] == settings[0] | {"train.seed": "3"}
    assert (settings[0]["train.seed"], settings[0]["train.steps"]) == ("0", str(STEPS))


def test_several_trainings_run_at_a_time_each_on_one_gpu(tmp_path, monkeypatch):
    """A barrier ends the test with an error if two trainings do not run at the same time."""
    barrier, calls = threading.Barrier(2, timeout=60), []

    def call(module, *arguments, log, environment):
        barrier.wait()
        calls.append((environment["CUDA_VISIBLE_DEVICES"], log))

    monkeypatch.setattr(trainings, "call", call)
    monkeypatch.setattr(trainings.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    write_metrics(tmp_path / FINISHED)
    runs = [TrainingRun(tmp_path / name, list, STEPS) for name in ("a", FINISHED, "b", "c", "d")]
    trainings.train_all(runs, jobs=2)
    assert sorted(log for _, log in calls) == [tmp_path / name / LOG for name in "abcd"]
    assert sorted(gpu for gpu, _ in calls) == ["4", "4", "6", "6"]


def test_jobs_share_gpus_in_turn_and_need_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, expected in ((2, ["0", "1", "0"]), (0, [None] * 3)):
        monkeypatch.setattr(trainings.torch.cuda, "device_count", lambda count=count: count)
        assert [each.get("CUDA_VISIBLE_DEVICES") for each in trainings._environments(3)] == expected


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_training_ends_the_benchmark_but_a_fault_may_diverge(jobs, tmp_path, monkeypatch):
    def call(module, *arguments, log, environment=None):
        if log:
            log.parent.mkdir()
            write_log(log.parent)
        raise InputError(f"{module} failed")

    monkeypatch.setattr(trainings, "call", call)
    trainings.train_all([TrainingRun(tmp_path / "fault", list, STEPS, may_diverge=True)], jobs)
    with pytest.raises(InputError, match=r"^megamtp.pretrain failed$"):
        trainings.train_all([TrainingRun(tmp_path / "bf16", list, STEPS)], jobs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "--seeds 1 1; expected each only once"),
        (["--seeds", "one"], "--seeds: invalid int value: 'one'"),
        (["--variants", "bf16", "bf16"], "--variants bf16 bf16; expected each only once"),
        (["--variants", "fault", "bf16"], "--variants fault bf16; expected another variant before fault"),
        (["--steps", "5"], "--steps 5; expected at least 6"),
        (["--size", "7b"], "invalid choice: '7b'"),
        (["--jobs", "0"], "--jobs: 0; expected a whole number, 1 or more"),
        (["--fault-steps", "10"], "--fault-steps 10 .*expected at most --steps, and the variant fault"),
        (["--variants", "bf16", "fault", "--fault-steps", "9", "--steps", "8"], "--fault-steps 9 with --steps 8 "),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        learning.main([*arguments, "--data", "none", "--output", str(tmp_path)])


def test_an_unwritable_output_is_refused_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trainings, "call", lambda *arguments, **_: pytest.fail(f"called {arguments}"))
    with pytest.raises(InputError, match=r"--output .*file: File exists; expected a folder"):
        learning.main(["--data", "none", "--prepare", "text", "--output", str(tmp_path / "file")])


def test_a_missing_corpus_is_refused(tmp_path):
    with pytest.raises(InputError, match="see --prepare"):
        learning.main(["--data", str(tmp_path), "--output", str(tmp_path)])
