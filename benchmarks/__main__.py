"""`python -m benchmarks`: see `suite/command.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from suite.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
