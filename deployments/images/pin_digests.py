"""Write digests.env, which pins every image of images.txt to the digest that its tag has now. Needs `docker buildx`.

`docker compose` and `docker build` read the file; commit it, and run this again to take security fixes.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEADER = "# Written by deployments/images/pin_digests.py; do not edit.\n"
INSPECT = ("docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}")


def main() -> int:
    """Look all digests up before the file is replaced."""
    lines = [HEADER]
    for name, image in read_images():
        done = subprocess.run([*INSPECT, image], capture_output=True, text=True, check=False)
        digest = done.stdout.strip()
        if done.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            print(f"no digest of {image}: {done.stderr.strip() or digest or 'no output'}", file=sys.stderr)
            return 1
        # The base image's digest is a build argument of its own; the others are used as whole references.
        lines.append(f"{name}_DIGEST={digest}\n{name}_IMAGE={image}@{digest}\n")
    (FOLDER / "digests.env").write_text("".join(lines))
    print(f"wrote {len(lines) - 1} digests to deployments/images/digests.env")
    return 0


def read_images() -> list[tuple[str, str]]:
    """Return the variables and references of images.txt."""
    lines = (FOLDER / "images.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [(name, image) for name, image in pairs]


if __name__ == "__main__":
    sys.exit(main())
