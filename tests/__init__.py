"""The same tree as the code, plus flows, architecture and bench."""
