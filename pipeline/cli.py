# SPDX-License-Identifier: Apache-2.0
"""What the commands of `python -m pipeline` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from pipeline.errors import PipelineError, RegistryError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise PipelineError(f"{message}; see `{self.prog} --help`")


def axis_values(words: Sequence[str]) -> dict[str, str]:
    """The `axis=value` words of a command line as a dictionary."""
    axes: dict[str, str] = {}
    for word in words:
        axis, equals, value = word.partition("=")
        if not (axis and equals and value):
            raise RegistryError(f"{word}: not of the form axis=value; write for example size=S")
        if axis in axes:
            raise RegistryError(f"{axis}: is given twice ({axis}={axes[axis]} and {word}); give it once")
        axes[axis] = value
    return axes
