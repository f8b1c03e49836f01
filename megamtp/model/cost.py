"""What a configuration costs: parameters, floating-point operations, kept activations. Used for the model-FLOP share, for planning
and for cutting the layers into pipeline stages.

Source: paper.md, table S5 (F(n) = 3 [L (2 P_layer + 2 T d) + n 2 V d]: causal attention counted at half, norms and the
embedding's lookup not at all, recomputation not at all).
"""

from megamtp.config import ModelConfig

# Dense matrix-product peaks by (part of the device's name, precision), in FLOP/s, without sparsity. Source: NVIDIA data sheets.
PEAK_FLOPS = {
    ("H200", "bf16"): 989.4e12,
    ("H100 PCIe", "bf16"): 756e12,
    ("H100", "bf16"): 989.4e12,
    ("A100", "bf16"): 312e12,
    ("H200", "fp32"): 67e12,
    ("H100 PCIe", "fp32"): 51e12,
    ("H100", "fp32"): 67e12,
    ("A100", "fp32"): 19.5e12,
}


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one transformer layer, its two norms included."""
    return layer_matrices(model) + 2 * model.dim


def layer_matrices(model: ModelConfig) -> int:
    """Those of them that are in matrices."""
    attention = 2 * model.dim * model.dim + 2 * model.dim * model.key_value_heads * model.head_dim
    return attention + 3 * model.dim * model.hidden_dim


def parameters(model: ModelConfig) -> int:
    """Parameters of the whole model: embedding, trunk, heads, norm and unembedding."""
    return model.num_layers * layer_parameters(model) + model.vocab_size * model.dim + unembedding_parameters(model)


def unembedding_parameters(model: ModelConfig) -> int:
    """Parameters of the unembedding, the final norm included."""
    return model.vocab_size * model.dim + model.dim


def layer_flops(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of one layer's forward pass, for one position of a window of `sequence_length`."""
    return 2 * layer_matrices(model) + 2 * sequence_length * model.dim


def unembedding_flops(model: ModelConfig) -> int:
    """Floating-point operations of one projection to the vocabulary, forward only, for one position."""
    return 2 * model.vocab_size * model.dim


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one position of a window of `sequence_length`."""
    layers = model.num_layers * layer_flops(model, sequence_length)
    return 3 * (layers + model.num_future_tokens * unembedding_flops(model))


def layer_activation_bytes(model: ModelConfig, bytes_per_element: int = 2) -> int:
    """What one layer keeps of one position for its backward pass, without recomputation. Fitted to measured steps in bf16."""
    elements = 6 * model.dim + 2 * model.key_value_heads * model.head_dim + 3 * model.hidden_dim
    return elements * bytes_per_element


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a known card at a precision ("bf16", "fp16", "fp32"); None where it is not known."""
    precision = "bf16" if precision == "fp16" else precision
    for (name, known_precision), flops in PEAK_FLOPS.items():
        if precision == known_precision and all(word in device_name for word in name.split()):
            return flops
    return None
