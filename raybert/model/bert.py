"""The BERT encoder: embeddings, post-layer-norm transformer layers, and the two pre-training heads.

Shapes: B samples, T tokens, D hidden size, H heads, V vocabulary, M masked positions of the whole batch.
Paper: https://arxiv.org/abs/1810.04805
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raybert.model import layout as layouts
from raybert.model.attention import attention
from raybert.model.config import BertConfig
from raybert.model.dropout import Noise, dropout
from raybert.model.layout import Layout, Packed
from raybert.model.tied_embedding import TableGradient, lookup
from raybert.tokenizer import TextTokenizer

# Matrix products on GPUs and CPUs run best when the vocabulary dimension is a multiple of this.
VOCABULARY_MULTIPLE = 64


class Bert(nn.Module):
    """BERT with masked-language-model and next-sentence heads; the output embedding is the input embedding.

    The embedding table is padded to a multiple of 64 rows. The padding has no logits, does not enter the loss
    and is not exported.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # compute layers again on the way back instead of keeping their activations
        self.tokenizer: TextTokenizer | None = None  # of a model that was loaded or is trained; none: raybert's own
        rows = -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.word_embeddings = nn.Embedding(rows, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.nsp_head = nn.Linear(config.hidden_size, 2)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        """As the original: normal with standard deviation `initializer_range`, biases zero, norms one."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode and apply both heads.

        Args:
            input_ids: (B, T) integers below `vocab_size`.
            token_type_ids: (B, T) 0 for the first segment, 1 for the second; all 0 when None.
            attention_mask: (B, T) true (or 1) at tokens, false (or 0) at padding; all true when None.
            masked_positions: (B, P) positions whose tokens are to be predicted, -1 where a sample has fewer. When
                given, the MLM head runs on these alone, as in training: at this vocabulary the full head costs more
                than the encoder.

        Returns:
            last_hidden_state (B, T, D), pooler_output (B, D), nsp_logits (B, 2), and mlm_logits: (B, T, V), or with
            `masked_positions` (M, V) for the positions >= 0 in row-major order.

        Raises:
            ValueError: T is more than the positions that the model has.
        """
        hidden, pooled = self.encode(input_ids, token_type_ids, attention_mask)
        if masked_positions is None:
            mlm_logits = self.mlm_logits(hidden)
        else:
            mlm_logits = self.mlm_logits(gather_positions(hidden, masked_positions))
        return {
            "last_hidden_state": hidden,
            "pooler_output": pooled,
            "mlm_logits": mlm_logits,
            "nsp_logits": self.nsp_head(pooled),
        }

    def encode(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The encoder without its pre-training heads: last_hidden_state (B, T, D) and pooler_output (B, D)."""
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens does not fit the model's {self.config.max_position_embeddings} "
                "positions; truncate it"
            )
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = None if attention_mask is None else attention_mask.bool()
        own_noise = self.training and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        noise = Noise(int(torch.randint(2**63 - 1, ()))) if own_noise else None
        layout = layouts.padded(input_ids.shape[0], length, mask, noise)
        hidden, pooled = self.encode_tokens(input_ids, types, layout)
        return hidden.view(*input_ids.shape, -1), pooled

    def encode_tokens(
        self, input_ids: Tensor, token_type_ids: Tensor, layout: Layout, table: TableGradient | None = None
    ) -> tuple[Tensor, Tensor]:
        """The encoder over the N tokens of a layout of (B, T) inputs: hidden states (N, D) and pooler output (B, D).

        With `table`, the output layer's gradient is added in the backward pass.
        """
        batch, length = input_ids.shape
        ids = layout.pick(input_ids)
        words = self.word_embeddings(ids) if table is None else lookup(self.word_embeddings.weight, ids, table)
        hidden = words + self.token_type_embeddings(layout.pick(token_type_ids))
        if layout.tokens is None:
            hidden = (hidden.view(batch, length, -1) + self.position_embeddings.weight[:length]).flatten(0, 1)
        else:
            hidden = hidden + self.position_embeddings(layout.tokens % length)  # (N, D)
        first = layout.rows(torch.arange(0, batch * length, length, device=hidden.device))
        return self._transform(hidden, layout, first)

    def encode_packed(self, input_ids: Tensor, token_type_ids: Tensor, layout: Packed) -> tuple[Tensor, Tensor]:
        """The same over S packed sequences: (N,) ids and types -> hidden states (N, D) and pooler output (S, D)."""
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self._transform(hidden + self.position_embeddings(layout.positions), layout, layout.first)

    def _transform(self, hidden: Tensor, layout: Layout | Packed, first: Tensor) -> tuple[Tensor, Tensor]:
        """Summed embeddings (N, D) through norm and layers, and the pooler over the rows `first`."""
        rate = self.config.dropout if self.training else 0.0
        hidden = dropout(self.embedding_norm(hidden), rate, layout.keep(hidden.shape[1], rate))
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            hidden = _checkpointed(layer, hidden, layout) if again else layer(hidden, layout)
        return hidden, torch.tanh(self.pooler(hidden[first]))

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: str = "mean",
        device: torch.device | str | None = None,
        dtype: str = "float32",
        batch_tokens: int | None = None,
    ) -> np.ndarray:
        """Vectors of texts, float32 (N, D), in the order of the texts.

        Texts of similar length share a batch, so padding costs little. Each text is truncated to the model's positions.
        No gradient is kept, and dropout is off during the call.

        Args:
            texts: any number of texts.
            pooling: "mean" over the tokens of the last hidden state, its "cls" token, or the "pooler"'s output.
            device: moves the model there first; by default the model stays where it is.
            dtype: "float32"; "bfloat16"; or "auto", the one in which this machine is faster.
            batch_tokens: tokens of a batch, padding included; the default depends on the device.

        Raises:
            InputError: unknown pooling or dtype, or raybert's tokenizer does not fit the model's vocabulary.
            TypeError: `texts` is one text instead of a list of them.
        """
        # The one import that points up: texts are for `encode`, and users expect the method here.
        from raybert.encode.vectors import embed_texts

        return embed_texts(self, texts, pooling=pooling, device=device, dtype=dtype, batch_tokens=batch_tokens)

    def mlm_features(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D): the MLM head up to its output layer, which is the transposed embedding table."""
        return self.mlm_norm(F.gelu(self.mlm_transform(hidden)))

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        spare = self.word_embeddings.num_embeddings - self.config.vocab_size
        bias = F.pad(self.mlm_bias, (0, spare))
        return F.linear(self.mlm_features(hidden), self.word_embeddings.weight, bias)[..., : self.config.vocab_size]


def _checkpointed(layer: nn.Module, hidden: Tensor, layout: Layout | Packed) -> Tensor:
    """A layer whose activations are computed again on the way back, with the same dropout."""
    state = layout.noise_state()

    def compute(values: Tensor) -> Tensor:
        layout.set_noise_state(state)
        result: Tensor = layer(values, layout)
        return result

    result: Tensor = checkpoint(compute, hidden, use_reentrant=False)
    return result


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """(B, T, D) and (B, P) with -1 = none -> (M, D), row-major."""
    batch, length, size = hidden.shape
    rows = torch.arange(batch, device=hidden.device)[:, None] * length
    flat = (positions + rows)[positions >= 0]  # (M,)
    return hidden.reshape(batch * length, size).index_select(0, flat)


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and layer norm (post-layer-norm)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.dropout
        # Query, key and value in one matrix product; the export splits them.
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention_out = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, layout: Layout | Packed) -> Tensor:
        """(N, D) -> (N, D)"""
        size, rate = hidden.shape[1], self.dropout if self.training else 0.0
        mixed = self.attention_out(attention(self.qkv(hidden), self.heads, layout, rate))
        hidden = self.attention_norm(hidden + dropout(mixed, rate, layout.keep(size, rate)))
        widened = F.gelu(self.ffn_in(hidden))  # (N, 4D)
        return self.ffn_norm(hidden + dropout(self.ffn_out(widened), rate, layout.keep(size, rate)))


def flops_per_token(config: BertConfig, seq_len: int, masked_fraction: float = 0.15) -> float:
    """Floating-point operations of one training step (forward and backward) per token, padding counted as tokens.

    6 per weight of every matrix a token passes (2 forward, 4 backward; https://arxiv.org/abs/2001.08361), 12 L T D for
    the products of queries with keys and of attention with values (https://arxiv.org/abs/2204.02311, appendix B), and
    the MLM head for the masked fraction of the tokens alone.
    """
    size, depth = config.hidden_size, config.num_hidden_layers
    encoder = depth * (4 * size * size + 2 * size * config.intermediate_size)
    attention = 12 * depth * seq_len * size
    head = masked_fraction * (size * size + size * config.vocab_size)
    return 6 * encoder + attention + 6 * head
