"""Tests of how a process reads its rank from the variables of each launcher."""

import pytest

from megamtp.cluster.environment import Place, find_place, place_in_cluster
from megamtp.config import ClusterConfig
from megamtp.errors import InputError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_LOCALID", "MASTER_PORT")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place(0, 0, 1)),
        ({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, Place(9, 1, 16)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, Place(3, 1, 4)),
        ({"PMI_RANK": "5", "MPI_LOCALRANKID": "2", "PMI_SIZE": "6"}, Place(5, 2, 6)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 1, 2)),
        ({"WORLD_SIZE": "8"}, Place(0, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": "", "PMI_RANK": "", "PMI_SIZE": ""}, Place(0, 0, 1)),
        ({"PMI_RANK": "9", "PMI_SIZE": "16", "SLURM_LOCALID": "1"}, Place(9, 1, 16)),
    ],
)
def test_place_under_each_launcher(variables, expected, monkeypatch):
    set_variables(variables, monkeypatch)
    assert find_place() == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x in the environment; expected 0 to"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 in the environment; expected 0 to"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment; expected 1 to"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "expected 1 to"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2; expected a rank below"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1.0"}, "LOCAL_RANK=1.0 in the environment; expected 0 to"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_LOCALID": "0(x2)"}, "SLURM_LOCALID=0"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "tcp"},
            "MASTER_PORT=tcp in the environment; expected 1 to 65535",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
    ],
)
def test_variables_without_a_valid_rank_are_an_error(variables, words, monkeypatch):
    set_variables(variables, monkeypatch)
    with pytest.raises(InputError, match=words):
        find_place()


def set_variables(variables, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_emulated_cluster_has_one_process():
    assert place_in_cluster(Place(1, 1, 2), ClusterConfig()) == Place(1, 1, 2)
    assert place_in_cluster(Place(0, 0, 1), ClusterConfig(emulate=64)) == Place(0, 0, 64)
    with pytest.raises(InputError, match="expected one process"):
        place_in_cluster(Place(0, 0, 2), ClusterConfig(emulate=64))
