"""A host whose clock is wrong by $FAULTS_CLOCK seconds, for what this process does in Python."""

import os
import time

_shift, _time, _time_ns = float(os.environ.get('FAULTS_CLOCK', 0)), time.time, time.time_ns
time.time = lambda: _time() + _shift
time.time_ns = lambda: _time_ns() + int(_shift * 1e9)
