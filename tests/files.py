"""Files of the repository that tests read."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAYLOADS = ROOT / "tests" / "payloads"

#: The example bodies and the lists of the specification.
SPECIFICATION = json.loads((ROOT / "tests/data/specification.json").read_text())
