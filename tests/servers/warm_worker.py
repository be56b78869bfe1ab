"""`python -m tests.servers.warm_worker ARGUMENTS` is `python ARGUMENTS` with its imports made.

pytest-xdist starts the processes of a run by it. It waits for the process and has its exit code.
"""

import sys

from tests.servers import warm_python

if __name__ == "__main__":
    sys.exit(warm_python.run_here([word for word in sys.argv[1:] if word != "-u"]))
