"""Weights and configuration on disk: ``model.safetensors`` and ``config.json``. Reading them runs no code."""

import json
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raybert import storage
from raybert.errors import InputError
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.directory import CONFIG, SUMS, WEIGHTS, write_directory
from raybert.tokenizer import VOCAB_SIZE, TextTokenizer, Tokenizer
from raybert.tokenizer import files as tokenizers

TOKENIZER = tokenizers.DIRECTORY  # of a model whose tokenizer is another than raybert's own
TOKENIZER_FILES = (f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/tokenizer_config.json")
MODEL_TYPE = "raybert"
FORMAT = 1


def weights(model: Bert) -> dict[str, Tensor]:
    """Copies of all parameters in main memory, so that training can continue while they are written."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}


def write_weights(tensors: dict[str, Tensor], config: BertConfig, directory: Path) -> None:
    """Write both files into an existing local directory, the configuration last."""
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    described = {"model_type": MODEL_TYPE, "format": FORMAT, **asdict(config)}
    (directory / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def write_tokenizer(tokenizer: TextTokenizer | None, directory: Path) -> None:
    """Write a model's tokenizer into its local directory, unless it is raybert's own, which every process has."""
    if tokenizer is not None and not tokenizers.is_own(tokenizer):
        tokenizer.save(directory / TOKENIZER)


def save(model: Bert, uri: str) -> None:
    """Write the model as a weights-only checkpoint to a directory at any URI. It replaces an existing one.

    Raises:
        InputError: the directory holds anything else.
    """
    uri = storage.absolute(uri)
    _refuse_to_overwrite(uri)

    def fill(directory: Path) -> None:
        write_tokenizer(model.tokenizer, directory)
        write_weights(weights(model), model.config, directory)

    write_directory(uri, fill)


def _refuse_to_overwrite(uri: str) -> None:
    names = {found.rpartition("/")[2] for found in storage.list_dir(uri)}
    if not names:
        return
    # Weights alone, as `save` and a run's `best` are.
    known = {CONFIG, WEIGHTS, TOKENIZER, SUMS}
    described = {}
    if CONFIG in names:
        with suppress(ValueError):  # what is no JSON is not a checkpoint of ours
            described = storage.read_json(storage.join(uri, CONFIG))
    if names - known or not isinstance(described, dict) or described.get("model_type") != MODEL_TYPE:
        raise InputError(f"{uri} contains other files, which a checkpoint would replace; give a new directory.")


def load(uri: str) -> Bert:
    """Read a checkpoint directory at any URI. The model is in evaluation mode, on the CPU, in float32.

    Raises:
        InputError: there is no checkpoint, it has another kind or format, or its tensors do not fit its config.
    """
    with storage.local_copy(uri, [CONFIG, WEIGHTS, *TOKENIZER_FILES]) as directory:
        config = read_config(directory, uri)
        tensors = read_weights(directory, uri)
        tokenizer = read_tokenizer(directory, uri)
    model = Bert(config)
    model.tokenizer = Tokenizer() if tokenizer is None and config.vocab_size == VOCAB_SIZE else tokenizer
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(
                f"The checkpoint {uri} lacks the tensor {name}; it is damaged or belongs to another model."
            )
        if tensors[name].shape != shape:
            raise InputError(
                f"The tensor {name} in {uri} has shape {tuple(tensors[name].shape)}, but its config.json asks for "
                f"{tuple(shape)}."
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise InputError(f"The checkpoint {uri} contains the unknown tensor {unknown[0]}; it belongs to another model.")
    model.load_state_dict(tensors)
    return model.eval()


def read_config(directory: Path, name: str) -> BertConfig:
    """The configuration in a local checkpoint directory; `name` is what errors call it.

    Raises:
        InputError: it is missing, no JSON, or of another kind or format.
    """
    path = directory / CONFIG
    if not path.exists():
        raise InputError(f"{name} is not a checkpoint: it has no {CONFIG}.")
    try:
        described = json.loads(path.read_bytes())
        if described.pop("model_type", None) != MODEL_TYPE:
            raise InputError(
                f"{name} is not a raybert checkpoint; convert a transformers directory with `raybert import`."
            )
        if (found := described.pop("format", None)) != FORMAT:
            raise InputError(f"{name} has format {found}, but this version reads format {FORMAT}.")
        for dimension in fields(BertConfig):
            value = described.get(dimension.name, dimension.default)
            number = int | float if isinstance(dimension.default, float) else int
            if value is not None and (isinstance(value, bool) or not isinstance(value, number)):
                raise ValueError(f"{dimension.name} is {value!r}")
        return BertConfig(**described)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}/{CONFIG} cannot be read: {error}.") from error


def read_tokenizer(directory: Path, name: str | None = None) -> TextTokenizer | None:
    """The tokenizer that a checkpoint brings, None where there is none and raybert's own is meant.

    Args:
        name: what errors call the checkpoint.

    Raises:
        InputError: there is one, and it is damaged.
    """
    if not (directory / TOKENIZER).is_dir():
        return None
    paths = [directory / name for name in TOKENIZER_FILES]
    found = {path.name: path.read_bytes() for path in paths if path.exists()}
    return tokenizers.of_files(found, f"{name or directory}/{TOKENIZER}")


def read_weights(directory: Path, name: str | None = None) -> dict[str, Tensor]:
    """The tensors in a local checkpoint directory.

    Raises:
        InputError: the file is missing, or not safetensors (a pickle, say, which is never opened as one).
    """
    path = directory / WEIGHTS
    if not path.exists():
        raise InputError(f"{name or directory} is not a checkpoint: it has no {WEIGHTS}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{name or directory}/{WEIGHTS} is not a safetensors file: {error}.") from error
