"""Evaluation of trained models."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.eval.held_out import Answer, HeldOutEvaluation, ask_held_out, summary, table

__all__ = ["Answer", "HeldOutEvaluation", "ask_held_out", "summary", "table"]
