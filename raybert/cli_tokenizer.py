"""`raybert tokenizer ...`: make a vocabulary.

train, extend -> raybert.tokenizer.train   the text -> raybert.data.text.sample
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from raybert import storage
from raybert.console import errors
from raybert.errors import InputError

if TYPE_CHECKING:
    from raybert.data.text.sample import Sample
    from raybert.tokenizer import TextTokenizer
    from raybert.tokenizer.fast import FastTokenizer

app = typer.Typer(
    name="tokenizer", help="Train a tokenizer, or add words to one.", no_args_is_help=True, rich_markup_mode=None
)

Input = Annotated[list[str], typer.Option(help="file, directory or glob of text, as prepare reads it; may be repeated")]
Output = Annotated[str, typer.Option(help="directory of the tokenizer, at any URI")]
TextColumn_ = Annotated[str, typer.Option("--text-column", help="column or field that holds the text")]
SplitTxt = Annotated[str, typer.Option(help="split .txt files into documents at blank-lines or lines")]
SampleTokens = Annotated[int, typer.Option(min=1, help="approximate number of tokens of text to read")]
KINDS = "bpe (byte-level, covers every text), wordpiece (BERT's) or word (frequent words as single tokens)"
Seed = Annotated[int, typer.Option(help="seed that selects the text to read")]


@app.command(epilog="Example: raybert tokenizer train --input gs://bucket/text --output my-tokenizer")
def train(
    input: Input,
    output: Output,
    vocab_size: Annotated[int, typer.Option(help="size of the vocabulary, special tokens included")] = 16_384,
    kind: Annotated[str, typer.Option(help=KINDS)] = "bpe",
    lowercase: Annotated[bool, typer.Option("--lowercase", help="treat upper case as lower case")] = False,
    sample_tokens: SampleTokens = 100_000_000,
    text_column: TextColumn_ = "text",
    split_txt: SplitTxt = "",
    seed: Seed = 0,
) -> None:
    """Train a tokenizer on text.

    The same input gives the same bytes. It prints how many tokens a word takes, compared with GPT-2, on held-out text.
    """
    from raybert.data.text import sample
    from raybert.tokenizer import train as learn

    output = _free(output)
    drawn = sample.draw(input, text_column, split_txt, tokens=sample_tokens, seed=seed)
    with _reading(drawn, passes=learn.PASSES.get(kind, 1)) as (bar, shown):
        made = learn.train(
            lambda: drawn.texts(lambda size: bar.advance(shown, size)),
            vocab_size=vocab_size,
            kind=kind,
            lowercase=lowercase,
        )
    _write(made, output, drawn, {})


@app.command(epilog="Example: raybert tokenizer extend my-bert --input gs://bucket/text --output my-tokenizer")
def extend(
    where: Annotated[str, typer.Argument(help="tokenizer to extend, as prepare --tokenizer takes it")],
    input: Input,
    output: Output,
    words: Annotated[int, typer.Option(help="maximum number of words to add")] = 1000,
    sample_tokens: SampleTokens = 100_000_000,
    text_column: TextColumn_ = "text",
    split_txt: SplitTxt = "",
    seed: Seed = 0,
) -> None:
    """Add words of a domain to a tokenizer.

    Adds the most frequent words of the text that the tokenizer splits into three or more pieces. With model.start_from,
    the vector of each new word starts as the mean of its pieces' vectors.
    """
    from raybert.data.text import sample
    from raybert.tokenizer import train as learn
    from raybert.tokenizer.files import load_for_training

    if words < 1:
        raise InputError(f"--words must be at least 1, not {words}.")
    base, output = load_for_training(where), _free(output)
    drawn = sample.draw(input, text_column, split_txt, tokens=sample_tokens, seed=seed)
    with _reading(drawn) as (bar, shown):
        counts = learn.count_words(drawn.texts(lambda size: bar.advance(shown, size)))
    made = learn.extend(base, counts, words)
    print(f"{made.size - base.size:,} words added, such as {', '.join(made.pieces(range(base.size, made.size))[:8])}")
    _write(made, output, drawn, {"before": base})


def _free(output: str) -> str:
    """Raises InputError where the output holds anything."""
    output = storage.absolute(output)
    storage.require_writable(output)
    if storage.list_dir(output):
        raise InputError(f"{output} contains other files; give a new directory for the tokenizer.")
    return output


@contextmanager
def _reading(drawn: "Sample", passes: int = 1) -> Iterator[tuple[Progress, TaskID]]:
    """A bar over the input's bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as bar:
        yield bar, bar.add_task("reading", total=passes * drawn.size)


def _write(made: "FastTokenizer", output: str, drawn: "Sample", beside: dict[str, "TextTokenizer"]) -> None:
    from raybert.data.text.inputs import sentence
    from raybert.tokenizer import Tokenizer
    from raybert.tokenizer.train import cost

    for name, content in made.files().items():
        storage.write_bytes(storage.join(output, name), content)
    if line := sentence(drawn.passed_over):
        print(line)
    if drawn.unseen:
        print(f"on {len(drawn.unseen):,} held-out documents:")
        for name, tokenizer in {"now": made, **beside, "GPT-2": Tokenizer()}.items():
            tokens, characters = cost(tokenizer, drawn.unseen)
            print(f"{name:>8}  {tokens:.3f} tokens per word, {characters:.2f} characters per token")
    print(f"{output}: {made.size:,} tokens")
