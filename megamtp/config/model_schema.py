"""Settings of the model, and the arithmetic that gives models with n heads as many parameters as a model with one."""

from dataclasses import dataclass

from megamtp.config.fields import REQUIRED, Section, expect, option

MAX_LAYERS = 1000  # several times as many as the deepest models have; more would take minutes to plan
LINEAR, CHAINED = ("linear",), ("chained",)


@dataclass(frozen=True)
class ModelConfig(Section):
    """A multi-token model of Llama layers. `num_layers` is the number of layers of the model with n = 1 (L)."""

    dim: int = option(REQUIRED, "width of the residual stream", at_least=1, at_most=2**20)
    num_layers: int = option(
        REQUIRED,
        "layers of the model with one head: trunk and head (L); with n parallel heads, the trunk has L - n",
        at_least=1,
        at_most=MAX_LAYERS,
    )
    num_future_tokens: int = option(
        4, "heads (n): head i predicts the i-th next token; 1 is an ordinary model", at_least=1
    )
    head_kind: str = option(
        "parallel",
        "parallel, linear, causal, anticausal or chained (model/heads.py explains them); or MODULE:CLASS of your own",
    )
    first_head: str = option(
        "same",
        "linear: kind of head 1: layer, or the same as the others",
        one_of=("layer", "same"),
        only={"head_kind": LINEAR},
    )
    chain_form: str = option(
        "deepseek",
        "chained: deepseek (DeepSeek-V3's multi-token prediction) or eagle3 (EAGLE-3's draft layer)",
        one_of=("deepseek", "eagle3"),
        only={"head_kind": CHAINED},
    )
    chain_weights: str | None = option(
        None,
        "chained: own, each of heads 2 to n has weights; or shared, one layer is used n - 1 times; null: own for "
        "deepseek, shared for eagle3",
        one_of=("own", "shared", None),
        only={"head_kind": CHAINED},
    )
    unembedding: str = option(
        "shared",
        "final norm and projection to the vocabulary: shared by all heads; or replicated, each head has its own, as in "
        "the paper's byte models",
        one_of=("shared", "replicated"),
    )
    match_parameters: bool = option(
        True,
        "the trunk gets the number of layers with which the parameters are nearest to those of n = 1; false: it keeps "
        "the L - 1 layers of n = 1",
    )
    num_attention_heads: int = option(REQUIRED, "attention heads of a layer", at_least=1)
    num_key_value_heads: int | None = option(
        None, "key/value heads of a layer (GQA); null: one per attention head", at_least=1
    )
    mlp_dim: int | None = option(
        None, "hidden width of SwiGLU; null: 8/3 dim, rounded up to a multiple of 256", at_least=1, at_most=2**24
    )
    vocab_size: int = option(
        REQUIRED,
        "rows of embedding and unembedding; rows that no token uses still take part in the softmax",
        at_least=1,
        at_most=2**24,
    )
    rope_theta: float = option(10000.0, "base of the rotary embedding's wavelengths", above=0)
    norm_eps: float = option(1e-5, "epsilon of RMSNorm", above=0)

    @property
    def num_trunk_layers(self) -> int:
        if not self.match_parameters:
            return self.num_layers - 1
        added = sum(self.head_parameters) - self._layer_parameters
        if self.unembedding == "replicated":
            added += (self.num_future_tokens - 1) * (self.vocab_size * self.dim + self.dim)
        return self.num_layers - 1 - round(added / self._layer_parameters)

    @property
    def num_layers_and_heads(self) -> int:
        """The number of trunk layers and heads: the modules that a pipeline divides among its stages."""
        return self.num_trunk_layers + self.num_future_tokens

    @property
    def shares_chain_weights(self) -> bool:
        """Whether heads 2 to n of the kind `chained` are one module."""
        if self.head_kind != "chained":
            return False
        return (self.chain_weights or {"deepseek": "own", "eagle3": "shared"}[self.chain_form]) == "shared"

    @property
    def inseparable(self) -> range:
        """Numbers of trunk layers and heads after which no stage may end: it would part heads that share weights."""
        return range(self.num_trunk_layers + 2, self.num_layers_and_heads if self.shares_chain_weights else 0)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of SwiGLU (f in the paper's table)."""
        return self.mlp_dim or -(-8 * self.dim // (3 * 256)) * 256

    @property
    def head_parameters(self) -> list[int]:
        """The parameters of each head, without the unembedding. A kind of the user's own counts as a layer."""
        first, others = {
            "linear": (self._layer_parameters if self.first_head == "layer" else self.dim**2, self.dim**2),
            "chained": (self._layer_parameters, self._chain_parameters),
        }.get(self.head_kind, (self._layer_parameters, self._layer_parameters))
        num_others = self.num_future_tokens - 1
        if self.shares_chain_weights:
            return [first, others, *[0] * (num_others - 1)][: self.num_future_tokens]
        return [first] + [others] * num_others

    @property
    def _layer_parameters(self) -> int:
        key_value_dim = self.key_value_heads * self.head_dim
        matrices = 2 * self.dim**2 + 2 * self.dim * key_value_dim + 3 * self.dim * self.hidden_dim
        return matrices + 2 * self.dim

    @property
    def _chain_parameters(self) -> int:
        """A layer with, in the form of DeepSeek, two norms and a projection; in that of EAGLE-3, wider products."""
        key_value_dim = self.key_value_heads * self.head_dim
        if self.chain_form == "deepseek":
            return self._layer_parameters + 2 * self.dim + 2 * self.dim**2
        return self._layer_parameters + self.dim + self.dim * (self.dim + 2 * key_value_dim)

    def check_together(self) -> None:
        """See Section."""
        expect(
            self.dim % self.num_attention_heads == 0 and self.head_dim % 2 == 0,
            f"model.dim={self.dim} with model.num_attention_heads={self.num_attention_heads}",
            "heads of one even width: dim a multiple of 2 x num_attention_heads",
        )
        expect(
            self.num_attention_heads % self.key_value_heads == 0,
            f"model.num_key_value_heads={self.num_key_value_heads}",
            f"a divisor of model.num_attention_heads={self.num_attention_heads}",
        )
        expect(
            self.chain_form != "eagle3" or self.chain_weights != "own",
            "model.chain_weights=own with model.chain_form=eagle3",
            "null or shared: a draft layer of EAGLE-3 has one set of weights",
        )
        expect(
            self.num_trunk_layers >= 1,
            f"model.num_future_tokens={self.num_future_tokens} with model.num_layers={self.num_layers}",
            "fewer heads than layers: num_layers counts trunk and heads together, and the trunk needs one"
            + ("; model.unembedding=replicated takes layers from it, too" if self.unembedding == "replicated" else ""),
        )
