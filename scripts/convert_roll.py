"""Write our YAML from ROLL's, as `--config-name roll` reads it: docs/roll.md.

python scripts/convert_roll.py rlvr_config.yaml [roll.KEY=value ...] [our overrides] > mine.yaml
python -m trainer.main --config-dir . --config-name mine
"""

import os
import sys

scripts = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(scripts)] + [p for p in sys.path if p != scripts]

from trainer.config.roll.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
