"""Appends a row to the file that is named, and is gone without closing it: see test_row_log.py."""

import os
import sys

from gramr2.extras.row_log import RowLog

log = RowLog(sys.argv[1])
log.write({"i": 1})
os._exit(9)
