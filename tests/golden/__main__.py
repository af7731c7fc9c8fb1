"""Run the quick demo and write the golden files anew."""

import json
import tempfile
from pathlib import Path

from tasks.stage.digests import parse_json, verify_signed
from tests.golden.stages import FOLDER, KINDS, describe, join_pictures
from tests.support.cli_sandbox import CliSandbox


def main() -> None:
    """Write one JSON file per stage, and one picture where it makes any."""
    with tempfile.TemporaryDirectory() as name:
        sandbox = CliSandbox(Path(name))
        done = sandbox.run()
        if done.returncode:
            raise SystemExit(done.stderr)
        for stage, path in sandbox.newest()["paths"]["manifests"].items():
            manifest = Path(path)
            loaded = KINDS[stage].model_validate(verify_signed(parse_json(manifest.read_bytes())))
            text = json.dumps(describe(stage, loaded), indent=1, ensure_ascii=False)
            (FOLDER / f"{stage}.json").write_text(text + "\n")
            (FOLDER / f"{stage}.png").unlink(missing_ok=True)
            if stage in ("prior", "evaluation") and (picture := join_pictures(manifest.parent)):
                picture.save(FOLDER / f"{stage}.png", optimize=True)
            print(f"{stage}: version {describe(stage, loaded)['stage_version']}")


if __name__ == "__main__":
    main()
