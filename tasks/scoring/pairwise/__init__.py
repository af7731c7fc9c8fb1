"""Pairwise comparison of models by the judge, outside of a run."""
