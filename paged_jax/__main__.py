"""`python -m paged_jax`."""

import sys

from paged_jax.cli import main

sys.exit(main())
