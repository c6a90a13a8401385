"""Write Geometry3k's files to the default folder of verl's example; otherwise the same as ``sdpo data geo3k``."""

from __future__ import annotations

import argparse
import sys

from sdpo.errors import SDPOError
from sdpo.report.console import ConsoleCallback
from sdpo.rewards.geo3k.data import DATA_SOURCE, prepare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_save_dir", default="~/data/geo3k", help="folder for train.parquet and test.parquet")
    parser.add_argument("--source", default=DATA_SOURCE, help="name on the Hugging Face hub, or a folder with a copy")
    arguments = parser.parse_args()
    try:
        with ConsoleCallback(0) as progress:
            prepare(arguments.local_save_dir, arguments.source, progress)
    except SDPOError as error:
        sys.exit(f"error: {error}")
