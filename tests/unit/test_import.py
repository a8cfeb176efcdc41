"""Directories whose tokenizer will not do: refused with a sentence, and nothing is written."""

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


def cut_off(directory: Path) -> None:
    content = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(content[: len(content) // 2])


def too_many_tokens(directory: Path) -> None:
    added = {"id": 40, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    described = json.loads((directory / "tokenizer.json").read_text())
    described["model"]["vocab"]["more"] = 40
    described["added_tokens"].append(added | {"normalized": False, "special": True, "content": "more"})
    (directory / "tokenizer.json").write_text(json.dumps(described))
    change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def not_fast(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    described = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (no_padding, "has no padding token"),
        (no_specials, "does not begin a text with"),
        (no_unknown_token, "cannot be used"),
        (cut_off, "cannot be used"),
        (too_many_tokens, "has ids up to 40 and its model a vocabulary of 9"),
        (not_fast, "not a fast one"),
    ],
)
def test_a_tokenizer_that_will_not_do_is_refused_before_anything_is_written(bert, spoil, sentence, tmp_path, capsys):
    spoil(bert)
    before = sorted(tmp_path.iterdir())
    assert run_app(["import", str(bert), str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert str(bert) in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("spoil", "sentence"), [(no_padding, "padding"), (no_unknown_token, "cannot be used")])
def test_the_directory_itself_is_not_probed_either(bert, spoil, sentence):
    spoil(bert)
    with pytest.raises(InputError, match=sentence):
        open_encoder(str(bert))


def test_a_checkpoint_has_its_tokenizer_from_the_moment_it_is_there(bert, tmp_path, monkeypatch):
    target = tmp_path / "ours"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            run_app(["import", str(bert), str(target)])
    assert not target.exists()

    assert run_app(["import", str(bert), str(target)]) == 0
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert names == {CONFIG, WEIGHTS, SUMS, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    verify_files(str(target), [CONFIG, WEIGHTS])
    assert load(str(target)).tokenizer("taxes fall")["input_ids"] == [2, 5, 7, 3]
