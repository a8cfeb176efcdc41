"""Pre-train a BERT encoder on Ray and watch its embeddings get better while it trains.

config = BertConfig(); model = Bert(config)
out = model(input_ids, token_type_ids, attention_mask)   # out["pooler_output"], out["mlm_logits"], out["nsp_logits"]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raybert import probe as probe
    from raybert.model.bert import Bert as Bert
    from raybert.model.config import BertConfig as BertConfig
    from raybert.model.files import load as load
    from raybert.model.files import save as save
    from raybert.model.interop import from_transformers as from_transformers
    from raybert.model.interop import to_transformers as to_transformers
    from raybert.tokenizer import Tokenizer as Tokenizer

# Imported when first used: the command line answers without waiting for torch.
_HOMES = {
    "Bert": "raybert.model.bert",
    "BertConfig": "raybert.model.config",
    "Tokenizer": "raybert.tokenizer",
    "load": "raybert.model.files",
    "save": "raybert.model.files",
    "to_transformers": "raybert.model.interop",
    "from_transformers": "raybert.model.interop",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "probe":
        return importlib.import_module("raybert.probe")
    raise AttributeError(f"module 'raybert' has no attribute {name!r}")
