"""The command line, `mw VERB ...`: one file a verb, which reads its words and returns what to do.

stdout is the result, stderr the log. Nothing heavy is imported before the words have been read.
"""

from __future__ import annotations

from meshwright.cli.app import main

__all__ = ["main"]
