"""Tests of how a rank ends: its exit status is known before Python shuts down, and rank 0 reports first."""

import errno
from types import SimpleNamespace

import pytest

from megamtp.cluster import exiting
from megamtp.errors import InputError


@pytest.fixture
def ending(monkeypatch) -> dict[str, list]:
    """Records the exit status of the process (outcome) and the seconds that it waits for rank 0's report (waited)."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    calls: dict[str, list] = {"waited": []}
    monkeypatch.setattr(exiting, "atexit", SimpleNamespace(register=lambda end, outcome: calls.update(outcome=outcome)))
    monkeypatch.setattr(exiting, "_wait_to_be_ended", calls["waited"].append)
    return calls


def raising(error: BaseException):
    """Returns a main function of a rank that raises `error`."""

    def main() -> int:
        raise error

    return exiting.as_rank(main)


def test_status_of_main_is_the_exit_status(ending):
    assert exiting.as_rank(lambda: 3)() == 3
    assert ending == {"outcome": [3], "waited": []}


@pytest.mark.parametrize(("code", "status"), [(0, 0), (None, 0), (1, 1), ("words", 1)])
def test_rank_that_exits_with_an_error_waits_for_the_report_of_rank_0(ending, code, status):
    assert raising(SystemExit(code))() == status
    assert ending == {"outcome": [status], "waited": [exiting.REPORT_SECONDS] * bool(status)}


def test_ctrl_c_is_status_130(ending):
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt())()
    assert ending == {"outcome": [130], "waited": []}


@pytest.mark.parametrize("local_rank", [0, 2])
def test_only_the_first_rank_of_a_node_reports_an_error_at_once(ending, monkeypatch, local_rank):
    for name, value in (("RANK", 4 + local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 8)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="found this"):
        raising(InputError("found this"))()
    assert ending == {"outcome": [2], "waited": [exiting.REPORT_SECONDS + local_rank] if local_rank else []}


def test_oserror_that_a_user_can_remedy_becomes_an_input_error(ending):
    with pytest.raises(InputError, match="file cannot be written: full; make room on its disk"):
        raising(OSError(errno.ENOSPC, "full", "file"))()
    assert ending["outcome"] == [2]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken", "file"), RuntimeError("a defect")])
def test_unexpected_error_is_raised_unchanged(ending, error):
    with pytest.raises(type(error)) as caught:
        raising(error)()
    assert caught.value is error
    assert ending == {"outcome": [], "waited": []}
