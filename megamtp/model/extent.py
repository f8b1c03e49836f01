"""Which modules of the model a part (part.py) holds.

Tests: tests/unit/model/test_part.py.
"""

from dataclasses import dataclass

from megamtp.config import ModelConfig
from megamtp.model.heads import head_class


@dataclass(frozen=True)
class Extent:
    """The layers, heads and rows of the unembedding that a part holds.

    The part with trunk layer 0 also holds the embedding, and so does every part with a head that reads tokens. Every
    part with heads holds the final norms that they use.

    Attributes:
        trunk: indices of trunk layers, from 0.
        heads: indices of heads, from 0, contiguous: index i - 1 is head i.
        rows: rows of the unembedding: all rows in a part that computes its own heads' losses, a slice in a part of a
            pipeline with spread losses.
        spread: whether losses are spread: if each head has its own unembedding, the part then holds the rows for all
            heads, and otherwise for its own.
    """

    trunk: range
    heads: range
    rows: range
    spread: bool = False

    @classmethod
    def whole(cls, model: ModelConfig) -> "Extent":
        """Returns the extent of the whole model."""
        return cls(range(model.num_trunk_layers), range(model.num_future_tokens), range(model.vocab_size))

    def has_embedding(self, model: ModelConfig) -> bool:
        """Returns whether the part holds the embedding, or a copy of it."""
        return 0 in self.trunk or (head_class(model).reads_tokens and any(self.heads))
