"""The help of the commands, in the user's language."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from lora_from_scratch.support.translation import translate


def parsers_in(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its subcommands, without repetition."""
    yield parser
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from parsers_in(inner)


def help_texts(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What the help of one command says, without usage line and examples."""
    yield from filter(None, [parser.description])
    yield from (group.title for group in parser._action_groups if group.title)
    for action in _described(parser):
        yield action.help or ""


def translate_help(parser: argparse.ArgumentParser) -> None:
    """Translate the help of a command and of its subcommands."""
    for one in parsers_in(parser):
        one.description = one.description and translate(one.description)
        for group in one._action_groups:
            group.title = group.title and translate(group.title)
        for action in _described(one):
            action.help = translate(action.help or "")


def _described(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options, arguments and subcommands that have a help text."""
    for action in parser._actions:
        inner = action._choices_actions if isinstance(action, argparse._SubParsersAction) else []
        yield from (one for one in [action, *inner] if one.help and one.help != argparse.SUPPRESS)
