"""The dimensions of the encoder."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Dimensions of a BERT encoder with its two pre-training heads. The defaults are the compact model.

    Raises:
        ValueError: a dimension is not positive, or the heads do not divide the hidden size.
    """

    vocab_size: int = 50_261  # GPT-2's 50,257 and [CLS] [SEP] [MASK] [PAD]
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    intermediate_size: int = field(default=None)  # type: ignore[assignment]  # None: 4 x hidden_size
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    dropout: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
