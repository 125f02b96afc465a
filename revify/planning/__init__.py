"""Decisions: what was read of a model → blocks, stages, transitions, and so a `Plan`."""
