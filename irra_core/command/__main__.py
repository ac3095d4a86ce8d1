"""`python -m irra_core.command` → the console script, where its folder is not on the PATH."""

import sys

from irra_core.command.main import main

sys.exit(main())
