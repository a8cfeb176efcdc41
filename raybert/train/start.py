"""What a new run's weights are before the first step."""

from raybert.config import Config
from raybert.model.bert import Bert
from raybert.model.files import load
from raybert.model.initialise import average_attention, use_vectors
from raybert.spectral import files


def begin(bert: Bert, config: Config, token_vectors: str) -> None:
    """Give a fresh model the weights that the settings ask for; those of the defaults it has already.

    Args:
        token_vectors: URI of what `raybert.spectral.table.for_run` made.

    Raises:
        InputError: the checkpoint that it starts from, or the token vectors, cannot be read.
    """
    if config.model.start_from:
        bert.load_state_dict(load(config.model.start_from).state_dict())
    if config.model.embedding_init == "spectral":
        use_vectors(bert, files.read(token_vectors, bert.config.hidden_size))
    if config.model.attention_init == "average":
        average_attention(bert, config.train.seed)
