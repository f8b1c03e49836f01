"""The configuration of a run. schema.py lists every setting; reader.py reads YAML files and overrides."""

from megamtp.config.cluster_schema import ClusterConfig, EfficiencyConfig
from megamtp.config.model_schema import MAX_LAYERS, ModelConfig
from megamtp.config.reader import (
    RESOLVED,
    describe_keys,
    differences,
    print_help,
    read_config,
    with_absolute_paths,
    write_config,
)
from megamtp.config.schema import (
    BYTES,
    FLOAT8_MULTIPLE,
    Config,
    DataConfig,
    HeadLossConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "BYTES",
    "FLOAT8_MULTIPLE",
    "MAX_LAYERS",
    "RESOLVED",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EfficiencyConfig",
    "HeadLossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "describe_keys",
    "differences",
    "print_help",
    "read_config",
    "with_absolute_paths",
    "write_config",
]
