"""Write compose.env with random secrets, readable by its owner alone; an existing file is never replaced."""

import os
import secrets
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parent / "compose.env"
RANDOM = (
    "POSTGRES_PASSWORD",
    "S3_ADMIN_SECRET_KEY",
    "S3_LIKENESS_SECRET_KEY",
    "S3_MLFLOW_SECRET_KEY",
)


def main(path: Path = FILE) -> int:
    """Create the file."""
    lines = [f"{name}={secrets.token_urlsafe(32)}\n" for name in RANDOM]
    lines.append(f"PREFECT_AUTH_STRING=likeness:{secrets.token_urlsafe(24)}\n")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(f"{path} exists; the volumes of a running stack need its values", file=sys.stderr)
        return 1
    with os.fdopen(descriptor, "w") as file:
        file.writelines(lines)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
