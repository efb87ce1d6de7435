"""Secrets kept out of what is written down."""

import re
from collections.abc import Collection, Sequence
from typing import Any

# What an option or a variable is called that holds a secret, and what a token of the Hub looks like.
SECRET = re.compile(r"-{0,2}([\w-]+[_-])?(token|password|secret|api[_-]?key)", re.IGNORECASE)
HUB_SECRET = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{30,}")
SHORTEST_SECRET = 8
MASK = "<secret>"


def without_secrets(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """A command line in which `MASK` stands for the value of each option or variable that names a secret, such as
    `--hub_token X`, `--hub-token=X` or `HF_TOKEN=X`; and these values."""
    shown: list[str] = []
    secrets: set[str] = set()
    expected = False
    for argument in arguments:
        name, given, value = argument.partition("=")
        if expected and not argument.startswith("--"):
            secrets.add(argument)
            argument = MASK
        elif given and SECRET.fullmatch(name):
            secrets.add(value)
            argument = f"{name}={MASK}"
        expected = argument.startswith("-") and SECRET.fullmatch(argument) is not None
        shown.append(argument)
    return shown, secrets


def masked(value: Any, secrets: Collection[str]) -> Any:
    """Plain data with `MASK` in the place of secrets wherever they stand, in an address or inside of another option,
    and of whatever looks like a token of the Hub."""
    if isinstance(value, dict):
        return {name: masked(item, secrets) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:  # a shorter one is a part of many words
                value = value.replace(secret, MASK)
        return HUB_SECRET.sub(MASK, value)
    return value
