"""Runs a script, with its words, where modules cannot be imported: `without.py numpy,tqdm infer.py --help`;
see test_installed.py."""

import runpy
import sys

hidden, *sys.argv = sys.argv[1:]
sys.modules |= dict.fromkeys(filter(None, hidden.split(",")))
runpy.run_path(sys.argv[0], run_name="__main__")
