"""Runs the script that is named, with its words, and says how threads wait when it first asks for torch: see
test_beside.py."""

import os
import runpy
import sys


class Asked:
    """A finder that comes before all others, and knows nothing but to say so."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch:", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)


sys.meta_path.insert(0, Asked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
