"""What a new run's weights are before the first step."""

from raybert import storage
from raybert.config import Config
from raybert.model import files as checkpoints
from raybert.model.bert import Bert
from raybert.model.initialise import average_attention, extend_rows, use_vectors
from raybert.spectral import files
from raybert.storage import hub
from raybert.tokenizer import files as tokenizers
from raybert.train.complete import FAMILY, WEIGHTS


def begin(bert: Bert, config: Config, token_vectors: str) -> None:
    """Give a fresh model the weights that the settings ask for; those of the defaults it has already.

    Args:
        token_vectors: URI of what `raybert.spectral.table.for_run` made.

    Raises:
        InputError: the model that it starts from, or the token vectors, cannot be read.
    """
    if config.model.start_from:
        start_from(bert, read_model(config.model.start_from))
    if config.model.embedding_init == "spectral":
        use_vectors(bert, files.read(token_vectors, bert.config.hidden_size))
    if config.model.attention_init == "average":
        average_attention(bert, config.train.seed)


def start_from(bert: Bert, start: Bert) -> None:
    """Take another model's weights; tokens that only `bert` has, of an extended tokenizer, the mean of their pieces."""
    old, new = tokenizers.own_or(start.tokenizer), tokenizers.own_or(bert.tokenizer)
    if new.hash == old.hash:
        bert.load_state_dict(start.state_dict())
        return
    pieces = [old.encode(new.decode([number])) for number in range(old.size, new.size)]
    extend_rows(bert, start.state_dict(), pieces, old.size)


def read_model(where: str) -> Bert:
    """A checkpoint of raybert, or a transformers BERT (directory or Hub name), with its tokenizer.

    What a transformers directory lacks (the heads of one saved without them) is drawn at random, with a fixed seed.

    Raises:
        InputError: it is neither, or is damaged.
    """
    uri = hub.local(where, WEIGHTS)
    if storage.read_json(storage.join(uri, checkpoints.CONFIG)).get("model_type") != FAMILY:
        return checkpoints.load(uri)
    from raybert.model import interop

    with storage.local_copy(uri, list(WEIGHTS)) as directory:
        theirs, _ = interop.read_transformers(str(directory))
        model = interop.from_transformers(theirs)
    model.tokenizer = tokenizers.load(uri)
    return model
