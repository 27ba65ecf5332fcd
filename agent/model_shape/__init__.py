"""The shape of a model, from its config.json.

config       which keys are read, wherever a config keeps them
families     the decoders whose formulas are known
shape        parameters, FLOP and bytes by these formulas
"""

from __future__ import annotations

from kvtally.agent.model_shape.config import UnknownArchitecture, shape_text
from kvtally.agent.model_shape.shape import ModelShape, shape_of

__all__ = ["ModelShape", "UnknownArchitecture", "shape_of", "shape_text"]
