"""What every stage makes of the quick demo, committed: a change of it needs a new STAGE_VERSION.

    python -m tests.golden       runs the quick demo and writes this folder anew

Numbers and pictures are compared with tolerances: other CPUs round otherwise. What decides nothing (keys, digests,
times) is left out.
"""
