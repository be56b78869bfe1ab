"""The entry point of every image: the command `serve` (see `ourvidz_serverless/__main__.py`).

python handler.py                                  one job from test_input.json, or RunPod's queue
python handler.py --test_input '{"input": {...}}'  one job from the command line
python handler.py --rp_serve_api                   RunPod's API on localhost:8000
SERVE=http python handler.py                       plain HTTP, for a load-balancing endpoint
"""

import sys

from ourvidz_serverless.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
