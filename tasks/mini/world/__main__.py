"""Draw photos of a subject of the drawn world: python -m tasks.mini.world subject --help."""

from tasks.mini.world.scenes import main

main()
