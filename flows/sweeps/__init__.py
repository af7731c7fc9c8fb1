"""Helpers of sweeps: study, trials, runners, pruning, report."""
