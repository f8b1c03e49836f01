"""The base class of all heads. heads.py has the kinds.

Tests: tests/unit/model/test_heads.py.
"""

from typing import ClassVar

from torch import Tensor, nn

from megamtp.config import ModelConfig
from megamtp.errors import InputError
from megamtp.model.attention import DocumentMask, KeyValueCache
from megamtp.model.layers import LayerCost, LayerOptions


class Head(nn.Module):
    """One head: maps the state to the hidden state from which the unembedding predicts a token.

    The model constructs a subclass as `Kind(model, index, options)`: the ModelConfig, the head's index from 0, and the
    LayerOptions of the run, which a head of your own may ignore. Initial values follow from the parameters' names: see
    initial.py. ZeRO-3 gathers all parameters of a head before `forward`, except for those that a TransformerLayer uses
    in fp8: see TransformerLayer.quantised.

    Attributes, which a kind sets:
        is_chain: whether a head may read the output of another head. The backward passes of all heads then run after
            all losses, and the activations of all heads are alive. Otherwise a head's backward pass follows its loss.
        farthest_first: whether head n runs first and head 1 last.
        reads_tokens: whether head i reads the embedding of the (i - 1)-th next token, which is then the third argument
            of `forward` and `extend`. Head 1 never does.
    """

    is_chain: ClassVar[bool] = False
    farthest_first: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    @classmethod
    def make(cls, model: ModelConfig, index: int, options: LayerOptions) -> "Head":
        """Returns the head at `index`."""
        return cls(model, index, options)

    @classmethod
    def module_index(cls, model: ModelConfig, index: int) -> int:
        """Returns the index of the head whose module the head at `index` uses: its own, unless heads share weights."""
        return index

    def forward(self, state_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """Returns the hidden state [B, T, D] before the final norm.

        Args:
            state_BTD: z, or what the head before returned from next_state.
            document_mask: keeps attention inside documents; None: a position attends to all earlier positions.
        """
        raise NotImplementedError

    def next_state(self, state_BTD: Tensor, hidden_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """Returns the state for the next head. It may differ from state_BTD only if `is_chain`.

        Args:
            hidden_BTD, normed_BTD: the head's output, before and after the final norm.
        """
        return state_BTD

    def cost(self, sequence_length: int) -> LayerCost:
        """Returns the forward cost of one position of a window of `sequence_length`."""
        raise NotImplementedError

    def extend(self, state_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """Returns the hidden states of T positions that follow the cached positions, and the extended cache.

        Decoding calls this method.

        Raises:
            InputError: this head kind does not implement decoding.
        """
        raise InputError(
            f"{type(self).__name__} does not decode; expected a head kind with a method `extend`, such as parallel"
        )
