"""What one pass of a role takes for itself on a device, with more or fewer layers recomputed."""

from __future__ import annotations

from trainer.plan.training import EngineTerms, Pass
from workers.engines.recompute import WORKING_LAYERS


def wanted_bytes(terms: EngineTerms, at_work: Pass, *, trains: bool) -> float:
    """Activations that an engine asks for: to recompute nothing, as it would like."""
    if not trains:
        return at_work.tokens * WORKING_LAYERS * terms.layer.whole
    return at_work.in_flight * (terms.num_layers + WORKING_LAYERS) * terms.layer.whole


def least_kept(terms: EngineTerms) -> int:
    """Layers that are recomputed where memory is shortest."""
    return 0 if terms.recompute is False else terms.num_layers


def taken_by(terms: EngineTerms, at_work: Pass, recomputed: int, gathered: bool, *, trains: bool) -> dict[str, int]:
    """What a pass needs for itself: at the output layer, or in the layer at work, whichever is more."""
    layer = terms.layer
    parameters = max(terms.gathered_all, terms.gathered) if gathered else terms.gathered
    if not trains:
        alone = int(at_work.tokens * layer.whole)
        return {"gradients": 0, "activations": max(0, alone - at_work.logits), "buffers": at_work.logits + parameters}
    kept = (terms.num_layers - recomputed) * layer.whole + recomputed * layer.input_only
    working = at_work.tokens * layer.whole * (2 if recomputed else 1)
    activations = at_work.in_flight * kept + max(0.0, working - at_work.logits)
    return {"gradients": terms.gradients, "activations": int(activations), "buffers": at_work.logits + parameters}


def idle_blocks(terms: EngineTerms, at_work: Pass, recomputed: int, *, trains: bool) -> int:
    """What it holds besides, where there is room: of the layer at work and the output layer each has blocks that the
    other has no use for, as a chunk of logits is larger than any of a layer's, and PyTorch keeps both."""
    working = at_work.tokens * terms.layer.whole * (2 if trains and recomputed else 1)
    return int(min(working, at_work.logits))
