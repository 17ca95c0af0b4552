"""How the commands read --targets."""

from __future__ import annotations

import re

import click


def parse_targets(text: str | None) -> list[str | re.Pattern[str]] | None:
    """Comma-separated targets; `/…/` is a pattern. None where the option was not given.

    Raises:
        click.UsageError: nothing is named, or a pattern is none.
    """
    if text is None:
        return None
    found: list[str | re.Pattern[str]] = []
    for target in (part.strip() for part in text.split(",")):
        if len(target) > 2 and target[0] == target[-1] == "/":
            try:
                found.append(re.compile(target[1:-1]))
            except re.error as error:
                raise click.UsageError(f"--targets: {target} is no pattern: {error}.") from error
        elif target:
            found.append(target)
    if not found:
        raise click.UsageError("--targets is empty.")
    return found
