"""Serve the mini vision server: python -m tasks.mini.vision_server --help."""

from tasks.mini.vision_server.server import main

main()
