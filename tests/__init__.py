"""The tests. Like the command line, they run torch with threads that sleep while they wait."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
