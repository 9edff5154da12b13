# SPDX-License-Identifier: Apache-2.0
"""The section `imported` of a size in params.yaml: a published network that is its teacher."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.sections import Model, problem

Format = Literal["edm", "edm2", "diffusers"]
UNDROPPED = {"edm2"}  # formats whose networks never saw a dropped label in training


class Imported(Model):
    """Where the weights of a teacher come from; its `network` says what they must turn out to be of."""

    file: Annotated[str, Field(min_length=1)]
    """A path, or a name in the folder of weights (SCM_WEIGHTS); of format diffusers a folder."""
    sha256: str
    """Of the file, or of the folder's weights file."""
    format: Format
    """edm and edm2: network pickles of these projects; diffusers: a folder with config.json and safetensors."""

    @model_validator(mode="after")
    def _digest(self) -> Imported:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            what = f"must be 64 hex digits (`python -m pipeline import {self.file}` prints them), got {self.sha256!r}"
            raise problem("sha256", what)
        return self
