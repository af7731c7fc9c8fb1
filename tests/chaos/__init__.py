"""Real servers and runs under a seeded schedule of faults: python -m tests.chaos --seed 0 --runs 20 --workers 2."""
