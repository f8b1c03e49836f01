"""Which rank this process is, as each launcher says it."""

import pytest

from megamtp.cluster.environment import Place, find_place


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place(0, 0, 1)),
        ({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, Place(9, 1, 16)),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
            Place(3, 1, 4),
        ),
        ({"PMI_RANK": "5", "MPI_LOCALRANKID": "2", "PMI_SIZE": "6"}, Place(5, 2, 6)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 1, 2)),
        ({"WORLD_SIZE": "8"}, Place(0, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": "", "PMI_RANK": "", "PMI_SIZE": ""}, Place(0, 0, 1)),
        ({"PMI_RANK": "9", "PMI_SIZE": "16", "SLURM_LOCALID": "1"}, Place(9, 1, 16)),
    ],
)
def test_place_under_each_launcher(variables, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place() == expected
