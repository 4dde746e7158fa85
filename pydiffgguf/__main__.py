"""``python -m pydiffgguf`` is the command ``pydiffgguf``."""

import sys

from pydiffgguf.cli import main

sys.exit(main())
