"""Pretraining of the mini models; nothing at run time imports it."""
