"""DeepSpeed's members that are not in its documentation and that this package uses, each named once with what it is.

tests/distributed/test_members.py looks for all of them in the installed DeepSpeed. Checked against DeepSpeed 0.19.
"""

from torch import nn

# Attributes that ZeRO-3 adds to each parameter. Source: deepspeed/runtime/zero/partition_parameters.py.
SHARDED_PARAMETER = {
    "ds_id": "number of the parameter, in the order of construction",
    "ds_shape": "shape of the whole parameter",
    "ds_numel": "elements of the whole parameter",
    "ds_tensor": "this rank's shard, padded",
    "ds_status": "whether the whole parameter is there",
    "ds_persist": "the parameter stays whole on all ranks between a step's uses",
    "ds_process_group": "the ranks that share it",
    "ds_active_sub_modules": "the modules that use it now; it is released when there is none",
    "all_gather": "makes parameters whole",
    "partition": "lets the whole parameter go",
}
# Read by DeepSpeed, set here.
SET_ON_PARAMETERS = {
    "ds_grad_is_ready": "False keeps a gradient out of the reduction buckets. Source: deepspeed/runtime/zero/stage3.py",
    "ds_pipe_replicated": "True leaves a copy out of the gradient's norm. Source: deepspeed/runtime/utils.py",
}


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape in the model, also where ZeRO-3 holds it in shards, or a pipeline's stage some rows of it."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "whole_shape", parameter.shape)))
