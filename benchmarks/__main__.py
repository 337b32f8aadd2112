"""Every figure: one folder each, whose `compare.py` prints ours, the peer's and the limit.

make bench
"""

import subprocess
import sys
from pathlib import Path

for script in sorted(Path(__file__).parent.glob("*/compare.py")):
    print(f"== {script.parent.name}", flush=True)
    status = subprocess.run([sys.executable, str(script)], check=False).returncode
    if status:
        sys.exit(status)
