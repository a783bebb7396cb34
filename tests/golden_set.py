"""The golden cases: where they are and what they are called. EDMDISTILL_GOLDEN=DIR tests a larger set instead."""

import json
import os
import tarfile
from pathlib import Path

GOLDEN = Path(os.environ.get("EDMDISTILL_GOLDEN", Path(__file__).with_name("golden")))
NETWORKS = sorted(path.name for path in GOLDEN.glob("*.pkl*") if not path.name.startswith("bad-"))
BAD = sorted(json.loads((GOLDEN / "bad-index.json").read_text())["files"])


def unpack_bad(folder: Path) -> Path:
    """The folder that holds the bad pickles; those that ship here share most of their bytes, and one archive."""
    archive = GOLDEN / "bad.tar.xz"
    if not archive.exists():
        return GOLDEN
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder
