"""Configuration: Hydra composes the values, the dataclasses are the schema and check them."""

from megamed.config.compose import compose, to_yaml
from megamed.config.load import load

__all__ = ["compose", "load", "to_yaml"]
