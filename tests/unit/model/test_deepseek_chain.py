"""A depth of DeepSeek's chain equals megatron-core's multi-token prediction layer: outputs and gradients, in fp32."""

import contextlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from tests.models import built_model, model_config
from tests.ranks import run_ranks

LENGTH = 7


def _megatron_layer(config):
    """Returns a MultiTokenPredictionLayer on the CPU, for n = 2."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Megatron's attention allocates its scores on the current GPU, and would draw its dropout there.
    torch.cuda.current_device = lambda: torch.device("cpu")
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)
    parallel_state.initialize_model_parallel()
    settings = TransformerConfig(
        num_layers=config.num_trunk_layers + 1,
        hidden_size=config.dim,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.key_value_heads,
        ffn_hidden_size=config.hidden_dim,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        add_bias_linear=False,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mtp_num_layers=1,
    )
    layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    (spec,) = get_gpt_mtp_block_spec(settings, layer_spec, use_transformer_engine=False).layer_specs
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(spec, config=settings, layer_number=1, vp_stage=None, pg_collection=groups)


def _copy_weights(layer, head, final_norm: torch.Tensor, config) -> None:
    """Copies our weights. Megatron's projection reads [embedding, state], ours [state, embedding]."""
    weights = {name: parameter.detach() for name, parameter in head.named_parameters()}
    state, embedding = weights["projection.weight"].chunk(2, dim=1)
    per_group = config.num_attention_heads // config.key_value_heads * config.head_dim
    query_key_value = [
        part
        for parts in zip(
            weights["layer.attention.query.weight"].split(per_group),
            weights["layer.attention.key.weight"].split(config.head_dim),
            weights["layer.attention.value.weight"].split(config.head_dim),
            strict=True,
        )
        for part in parts
    ]
    megatron = {
        "enorm.weight": weights["embedding_norm.weight"],
        "hnorm.weight": weights["state_norm.weight"],
        "eh_proj.weight": torch.cat((embedding, state), dim=1),
        "transformer_layer.input_layernorm.weight": weights["layer.attention_norm.weight"],
        "transformer_layer.self_attention.linear_qkv.weight": torch.cat(query_key_value),
        "transformer_layer.self_attention.linear_proj.weight": weights["layer.attention.output.weight"],
        "transformer_layer.pre_mlp_layernorm.weight": weights["layer.mlp_norm.weight"],
        "transformer_layer.mlp.linear_fc1.weight": torch.cat(
            (weights["layer.mlp.gate.weight"], weights["layer.mlp.up.weight"])
        ),
        "transformer_layer.mlp.linear_fc2.weight": weights["layer.mlp.down.weight"],
        "final_layernorm.weight": final_norm.detach(),
    }
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == megatron.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(megatron[name])


def _outputs_and_gradients() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns (ours, Megatron's) of head 2's normed output and of the gradients of state, embedding and projection."""
    config = model_config(num_future_tokens=2, num_layers=3, num_key_value_heads=2, mlp_dim=48, head_kind="chained")
    model = built_model(config).float()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    layer = _megatron_layer(config)
    _copy_weights(layer, model.head(1), model.unembedding.norm, config)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.vocab_size, (2, LENGTH + 1), generator=generator)
    state = torch.randn(2, LENGTH, config.dim, generator=generator)  # head 1's output after the final norm
    gradient = torch.randn(2, LENGTH, config.dim, generator=generator)
    gradient[:, -1] = 0.0  # Megatron does not know the token after the window
    results = {}
    for name in ("ours", "Megatron's"):
        own_state = state.clone().requires_grad_()
        model.zero_grad()
        if name == "ours":
            hidden = model.head(1)(own_state, None, model.embedding(tokens[:, 1:]))
            output = model.unembedding.normed(hidden)
        else:
            wavelengths = config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
            angles = torch.arange(LENGTH)[:, None] / wavelengths
            rotary = torch.cat((angles, angles), dim=1)[:, None, None]  # Megatron's class for it needs a GPU
            causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
            output, *_ = layer(
                input_ids=tokens[:, :-1],
                position_ids=torch.arange(LENGTH).expand(2, -1),
                hidden_states=own_state.transpose(0, 1),
                attention_mask=causal,
                rotary_pos_emb=rotary,
                embedding=lambda input_ids, position_ids: model.embedding(input_ids).transpose(0, 1),
            )
            output = output.transpose(0, 1)
        output.backward(gradient)
        projection = model.head(1).projection.weight.grad if name == "ours" else layer.eh_proj.weight.grad
        embedding = model.embedding.weight.grad
        results[name] = output.detach()[:, :-1], own_state.grad, embedding.clone(), projection.clone()
    ours, theirs = results["ours"], results["Megatron's"]
    projection_of_theirs = torch.cat(theirs[3].chunk(2, dim=1)[::-1], dim=1)
    names = ("output", "gradient of the state", "gradient of the embedding", "gradient of the projection")
    return dict(zip(names, zip(ours, (*theirs[:3], projection_of_theirs), strict=True), strict=True))


def test_a_depth_equals_the_multi_token_prediction_layer_of_megatron_core():
    (results,) = run_ranks(_outputs_and_gradients, 1)
    for name, (ours, theirs) in results.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
