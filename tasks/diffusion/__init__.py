"""Model families: one adapter file each."""

VERSION = 1
"""Covered by the keys of every stage that samples or trains: bump it where a change here alters what they compute."""
