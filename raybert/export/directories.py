"""A checkpoint as a directory that `transformers` and `sentence-transformers` open, and one of theirs as a checkpoint.

DIR/config.json, model.safetensors      BertForPreTraining; AutoModel, BertForMaskedLM and the others read it too
DIR/tokenizer.json, tokenizer_config.json
DIR/modules.json, 1_Pooling/ ...        sentence-transformers: mean pooling over the tokens
DIR/README.md, *.png                    the model card
"""

import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from raybert import storage
from raybert.errors import InputError
from raybert.model import files
from raybert.model.bert import Bert
from raybert.tokenizer import VOCAB_SIZE, TextTokenizer
from raybert.tokenizer import files as tokenizers

# In config.json: they mark a directory that the next export may replace. transformers writes unknown keys again when
# somebody has trained on and saves, so the weights have to be those of the export.
MADE_BY, ITS_WEIGHTS = "raybert_version", "raybert_weights"
# What an imported tokenizer is tried on.
TRIED = ["", "a text", "Ünïcode, 日本語 and 🎈"]
# Of an export, those that the next one may be without.
PARTS = ("learning.png", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def export_dir(checkpoint: str, directory: str, *, repository: str = "", revision: str = "main") -> None:
    """Write a checkpoint as a directory for `transformers` and `sentence-transformers`, with equal outputs.

    For a checkpoint inside a run directory, the model card describes the run: data, steps, losses, probes.

    Args:
        repository: USER/NAME on the Hugging Face Hub, if the directory will be pushed; the model card's snippets open
            it at `revision`.

    Raises:
        InputError: there is no checkpoint, transformers is not installed, or the directory contains something else.
    """
    target = _local(directory)
    require_transformers()
    from raybert.export.card import write_card
    from raybert.model.interop import quiet_transformers, to_transformers

    _refuse_to_overwrite(target)
    model = files.load(checkpoint)
    theirs = to_transformers(model)
    for name in PARTS:
        (target / name).unlink(missing_ok=True)
    with quiet_transformers():
        theirs.save_pretrained(target)
    config = json.loads((target / files.CONFIG).read_bytes())
    config |= {MADE_BY: importlib.metadata.version("raybert"), ITS_WEIGHTS: _weights_digest(target)}
    (target / files.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(model, target)
    _write_sentence_transformer(model, target)
    write_card(checkpoint, model, target, repository=repository, revision=revision)


def import_dir(directory: str, checkpoint: str) -> list[str]:
    """Read a transformers BERT directory and write it, with its tokenizer, as a raybert checkpoint.

    Returns:
        The names of the tensors that the directory lacks and that start at random: those of heads it was saved without.

    Raises:
        InputError: it is not a BERT directory, it uses what raybert's encoder lacks, its tokenizer cannot be used, or
            transformers is missing. Nothing is written then.
    """
    directory = str(storage.local_path(directory, "copy the transformers directory to a local one first"))
    require_transformers()
    from raybert.model.interop import from_transformers, read_transformers

    theirs, missing = read_transformers(directory)
    model = from_transformers(theirs)
    model.tokenizer = _foreign_tokenizer(directory, model)
    files.save(model, checkpoint)
    return missing


def push(directory: str, repository: str, revision: str) -> str:
    """Upload an exported directory to the Hugging Face Hub as a revision (a branch) and return its address.

    Args:
        repository: USER/NAME; created as a private repository if it does not exist.
        revision: `main` or another branch; created if it does not exist.

    Raises:
        InputError: huggingface_hub is missing, you are not logged in, or the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise InputError("Pushing to the Hugging Face Hub needs: pip install 'raybert[hub]'.") from error
    if get_token() is None:
        raise InputError("You are not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        if revision != "main":
            hub.create_branch(repository, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=_local(directory),
            revision=revision,
            commit_message=f"raybert export: {revision}",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"The Hugging Face Hub refused {repository}: {' '.join(str(error).split())}") from error
    return f"{hub.endpoint}/{repository}/tree/{revision}"


def revision_of(checkpoint: str) -> str:
    """`step1000` for a checkpoint of step 1000, `main` for any other."""
    name = storage.absolute(checkpoint).rpartition("/")[2]
    step = name.removeprefix("step-")
    return f"step{int(step)}" if step != name and step.isdecimal() else "main"


def require_transformers() -> None:
    """Raises InputError when transformers is not installed."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        raise InputError("This needs the package transformers: pip install 'raybert[hf]'.")


def _local(directory: str) -> Path:
    return storage.local_path(directory, "export to a local directory and copy it there")


def _refuse_to_overwrite(target: Path) -> None:
    """An earlier export is replaced; any other files are not."""
    config = target / files.CONFIG
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a directory for the export.")
    if config.exists():
        try:
            described = json.loads(config.read_bytes())
        except ValueError:  # cut off, say
            described = {}
        if not isinstance(described, dict) or MADE_BY not in described:
            raise InputError(f"{target} contains a model that raybert did not export; give a new directory.")
        if described.get(ITS_WEIGHTS) != _weights_digest(target):
            raise InputError(f"{target} contains an export that was modified afterwards; give a new directory.")
    if not config.exists() and target.exists() and any(target.iterdir()):
        raise InputError(f"{target} contains other files; give a new directory for the export.")


def _weights_digest(directory: Path) -> str:
    path = directory / files.WEIGHTS
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _foreign_tokenizer(directory: str, model: Bert) -> TextTokenizer | None:
    """The directory's tokenizer; none where there is none.

    Raises:
        InputError: it cannot be read, or does not fit the model or a checkpoint.
    """
    from raybert.model.interop import has_tokenizer, open_tokenizer

    if not has_tokenizer(directory):
        if Path(directory, "tokenizer_config.json").exists():
            raise InputError(
                f"{directory} has a tokenizer_config.json but no vocabulary that can be imported (tokenizer.json "
                "or vocab.txt); save its tokenizer as a fast tokenizer of transformers first."
            )
        return None  # a model alone; with raybert's vocabulary size it takes raybert's tokenizer
    return _kept(open_tokenizer(directory, model.config.vocab_size), directory)


def _kept(theirs: Any, directory: str) -> TextTokenizer:
    """A tokenizer of transformers as a checkpoint keeps it, tried out.

    Raises:
        InputError: it is not a fast one, or is another once it was saved and read again.
    """
    if not theirs.is_fast:
        raise InputError(
            f"The tokenizer in {directory} ({type(theirs).__name__}) is not a fast tokenizer, which is what a "
            "checkpoint stores; save it as a fast tokenizer of transformers first."
        )
    with tempfile.TemporaryDirectory(prefix="raybert-") as place:
        try:
            theirs.save_pretrained(place)
        except OSError as error:
            raise InputError(f"The tokenizer in {directory} cannot be saved: {error}") from error
        found = {name: Path(place, name).read_bytes() for name in tokenizers.FILES if Path(place, name).exists()}
    kept = tokenizers.of_files(found, directory)
    if kept.encode_batch(TRIED) != theirs(TRIED, add_special_tokens=False)["input_ids"]:
        raise InputError(f"The tokenizer in {directory} gives different ids after it is saved and loaded again.")
    return kept


def _write_tokenizer(model: Bert, target: Path) -> None:
    from raybert.model.interop import fast_tokenizer

    if model.tokenizer is not None and not tokenizers.is_own(model.tokenizer):
        model.tokenizer.save(target)
    elif model.config.vocab_size == VOCAB_SIZE:
        fast_tokenizer(model.config.max_position_embeddings).save_pretrained(target)
        # The name that transformers 4 knows too; 5 takes it for the same.
        path = target / "tokenizer_config.json"
        described = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(described, indent=2) + "\n")


def _write_sentence_transformer(model: Bert, target: Path) -> None:
    pooling = target / "1_Pooling"
    pooling.mkdir(exist_ok=True)
    described: dict[Path, Any] = {
        target / "modules.json": MODULES,
        target / "sentence_bert_config.json": {
            "max_seq_length": model.config.max_position_embeddings,
            "do_lower_case": False,
        },
        pooling / "config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    for path, value in described.items():
        path.write_text(json.dumps(value, indent=2) + "\n")
