"""Transformers directories whose tokenizer cannot be used, and a checkpoint that is written with its tokenizer."""

import json
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from raybert.cli import run_app  # noqa: E402
from raybert.encode.encoders import open_encoder  # noqa: E402
from raybert.errors import InputError  # noqa: E402
from raybert.model.directory import SUMS, verify_files  # noqa: E402
from raybert.model.files import CONFIG, WEIGHTS, load  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "taxes", "will", "fall", "##s"]


@pytest.fixture
def bert(tmp_path) -> Path:
    """A small transformers BERT with a WordPiece tokenizer of nine tokens."""
    directory = tmp_path / "theirs"
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    transformers.BertForPreTraining(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    assert (directory / "tokenizer.json").exists()
    return directory


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_padding(directory: Path) -> None:
    change(directory / "tokenizer_config.json", pad_token=None)


def no_specials(directory: Path) -> None:
    change(directory / "tokenizer.json", post_processor=None)
    change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def no_unknown_token(directory: Path) -> None:
    """It fails at the first word that it does not know."""
    described = json.loads((directory / "tokenizer.json").read_text())
    described["model"]["unk_token"] = "[NONE]"
    (directory / "tokenizer.json").write_text(json.dumps(described))
    change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [(no_padding, "has no pad_token"), (no_specials, "does not put"), (no_unknown_token, "cannot be used")],
)
def test_a_directory_whose_tokenizer_cannot_be_used_is_not_probed(bert, spoil, sentence):
    spoil(bert)
    with pytest.raises(InputError, match=sentence):
        open_encoder(str(bert))


def test_a_checkpoint_has_checksums_of_its_tokenizer_too(bert, tmp_path):
    target = tmp_path / "ours"

    assert run_app(["import", str(bert), str(target)]) == 0
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert names == {CONFIG, WEIGHTS, SUMS, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    verify_files(str(target), [CONFIG, WEIGHTS])
    assert load(str(target)).tokenizer.encode("taxes fall") == [5, 7]
