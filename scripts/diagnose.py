"""What is wrong with this installation and machine, and what to type: docs/diagnose.md.

python scripts/diagnose.py [--check-vllm-compatibility] [--json] [--fix [--yes]] [--deep]
"""

import os
import sys

scripts = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(scripts)] + [p for p in sys.path if p != scripts]

if sys.version_info < (3, 9):  # noqa: UP036 - what comes now is for those who run an older one
    said = "Python %d.%d is too old: Tandem needs 3.11 to 3.13" % sys.version_info[:2]  # noqa: UP031
    print('{"schema": 1, "error": "%s"}' % said if "--json" in sys.argv else "broken: " + said)  # noqa: UP031
    sys.exit(1)

from trainer.diagnosis.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
