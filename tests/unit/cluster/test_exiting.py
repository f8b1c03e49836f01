"""How a rank ends: its exit status is known before Python's own teardown, and rank 0 reports first."""

import errno
from types import SimpleNamespace

import pytest

from megamtp.cluster import exiting
from megamtp.errors import InputError


@pytest.fixture
def ended(monkeypatch) -> dict[str, list]:
    """outcome: the status with which the process would end; waited: seconds given to rank 0 for its report."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found: dict[str, list] = {"waited": []}
    monkeypatch.setattr(exiting, "atexit", SimpleNamespace(register=lambda end, outcome: found.update(outcome=outcome)))
    monkeypatch.setattr(exiting, "_wait_to_be_ended", found["waited"].append)
    return found


def raising(error: BaseException):
    def main() -> int:
        raise error

    return exiting.as_rank(main)


def test_a_status_is_returned_and_is_the_outcome(ended):
    assert exiting.as_rank(lambda: 3)() == 3
    assert ended == {"outcome": [3], "waited": []}


@pytest.mark.parametrize(("code", "status"), [(0, 0), (None, 0), (1, 1), ("words", 1)])
def test_a_rank_that_exits_with_an_error_waits_for_the_report_of_rank_0(ended, code, status):
    assert raising(SystemExit(code))() == status
    assert ended == {"outcome": [status], "waited": [exiting.REPORT_SECONDS] * bool(status)}


def test_ctrl_c_has_its_own_status(ended):
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt())()
    assert ended == {"outcome": [130], "waited": []}


@pytest.mark.parametrize("local_rank", [0, 2])
def test_the_first_rank_of_a_node_reports_an_error_at_once(ended, monkeypatch, local_rank):
    for name, value in (("RANK", 4 + local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 8)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="found this"):
        raising(InputError("found this"))()
    assert ended == {"outcome": [2], "waited": [exiting.REPORT_SECONDS + local_rank] if local_rank else []}


def test_an_error_of_the_system_that_a_user_can_remedy_is_one_of_the_input(ended):
    with pytest.raises(InputError, match="file cannot be written: full; make room on its disk"):
        raising(OSError(errno.ENOSPC, "full", "file"))()
    assert ended["outcome"] == [2]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken", "file"), RuntimeError("a defect")])
def test_a_defect_keeps_its_exception(ended, error):
    with pytest.raises(type(error)) as caught:
        raising(error)()
    assert caught.value is error
    assert ended == {"outcome": [], "waited": []}
