"""Appends a row to the file that is named, and is gone without closing it: see test_data.py."""

import os
import sys

from gramr2.extras.row_log import RowLog

log = RowLog(sys.argv[1], b'{"i": ')
log.write({"i": 1})
os._exit(9)
