"""The commands that use a trained encoder: `raybert embed`, `export` and `import`.

embed -> raybert.encode.job   export, import -> raybert.export.directories
"""

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raybert.console import errors
from raybert.errors import InputError

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog="Example: cat texts.txt | raybert embed runs/compact/checkpoints/best --input - --output vectors.npy"
)
def embed(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint at any URI, or a local transformers BERT directory")],
    input: Annotated[str, typer.Option(help="txt (one text per line), jsonl, csv or parquet at any URI; - is stdin")],
    output: Annotated[str, typer.Option(help="FILE.npy or FILE.parquet; or a directory, which a Ray Data job writes")],
    text_column: Annotated[str, typer.Option(help="column that holds the text")] = "text",
    pooling: Annotated[str, typer.Option(help="mean, cls or pooler")] = "mean",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: the faster one on this machine")] = "float32",
    workers: Annotated[int | None, typer.Option(help="encoders that run in parallel; default: as many as fit")] = None,
) -> None:
    """Turn texts into vectors.

    This process writes an --output that ends in .npy or .parquet. A Ray Data job writes any other output, a directory;
    rerun the same command to resume an interrupted job.
    """
    from raybert import cluster
    from raybert.encode import job as embedding

    settings = embedding.Settings(checkpoint, text_column, pooling, dtype)
    if output.endswith((".npy", ".parquet")):
        rows = embedding.embed_file(settings, input, output)
    elif input == embedding.STDIN:
        raise InputError("Texts from standard input need an --output that ends in .npy or .parquet.")
    else:
        cluster.connect()
        with Progress(
            TextColumn("pieces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=errors
        ) as bars:
            shown = bars.add_task("pieces", total=None)
            rows = embedding.embed_job(
                settings,
                input,
                output,
                workers=workers,
                progress=lambda done, total: bars.update(shown, completed=done, total=total),
            )
    print(f"wrote {rows:,} rows to {output}")


@app.command(epilog="Example: raybert export runs/compact/checkpoints/best compact-bert")
def export(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint directory, at any URI")],
    directory: Annotated[str, typer.Argument(help="local directory for the model, its tokenizer and its model card")],
    push: Annotated[str, typer.Option(help="also upload to the Hugging Face Hub: USER/NAME")] = "",
    revision: Annotated[
        str, typer.Option(help="branch to upload to; default: stepN for a checkpoint of step N, else main")
    ] = "",
) -> None:
    """Export a checkpoint for transformers.

    The directory opens in transformers and sentence-transformers, gives equal outputs, and has a model card.
    """
    from raybert.export import directories as exports

    revision = revision or exports.revision_of(checkpoint)
    exports.export_dir(checkpoint, directory, repository=push, revision=revision)
    print(directory)
    if push:
        print(exports.push(directory, push, revision))


@app.command(name="import", epilog="Example: raybert import my-bert-directory checkpoints/mine")
def import_(
    directory: Annotated[str, typer.Argument(help="local directory of a transformers BERT")],
    checkpoint: Annotated[str, typer.Argument(help="checkpoint to write, at any URI; default: DIRECTORY-raybert")] = "",
) -> None:
    """Import a transformers BERT as a checkpoint, with its tokenizer."""
    from raybert.export.directories import import_dir

    checkpoint = checkpoint or f"{directory.rstrip('/')}-raybert"
    missing = import_dir(directory, checkpoint)
    print(checkpoint)
    if missing:
        print(
            f"{directory} lacks {len(missing)} tensors of the heads, such as {missing[0]}; they are initialised "
            "at random"
        )
