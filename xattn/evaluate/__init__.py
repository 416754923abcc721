"""Predictions to numbers: protocols, metrics, cost."""
