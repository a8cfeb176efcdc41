"""Named sizes of the encoder."""

from collections.abc import Mapping
from typing import Any

# tiny, mini and small follow "Well-Read Students Learn Better" (https://arxiv.org/abs/1908.08962), base the original
# BERT (https://arxiv.org/abs/1810.04805); compact is the default of `BertConfig`.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "compact": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
    "small": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
