"""Builds the backbone that a config names."""

from __future__ import annotations

from stages.model.config import BackboneConfig
from stages.model.fast_itpn import FastITPN
from stages.model.itpn import ITPN


def build_backbone(config: BackboneConfig) -> FastITPN | ITPN:
    """The backbone of the config's family, with published initialisation."""
    return FastITPN(config) if config.family == "fast_itpn" else ITPN(config)
