"""Rebuild the mini models: python -m tasks.mini.pretrain --help."""

from tasks.mini.pretrain.train import main

main()
