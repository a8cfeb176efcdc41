"""How the command line speaks: help that fits a screen, and one line on standard error for what went wrong."""

from typing import Any

import typer
import typer.core
from rich.console import Console

errors = Console(stderr=True)


def say(text: str, style: str = "none") -> None:
    """One line on standard error, whatever characters it holds and however long it is."""
    errors.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Commands(typer.core.TyperGroup):
    """The commands. `--show-completion` works and is not listed, so that the help fits a terminal of 24 lines."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would drop what it says
            say(f"interrupted: {error}" if str(error) else "interrupted")
            raise typer.Exit(130) from error

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)
        for option in found:
            if option.name == "show_completion":
                option.hidden = True
        return found
