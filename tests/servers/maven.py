"""Where `install.sh` puts the servers that come from Maven."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaworks-servers"
