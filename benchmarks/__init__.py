"""Ourselves beside peers, measured in one run."""
