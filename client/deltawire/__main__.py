"""`python -m deltawire` is the command `deltawire`."""

import sys

from deltawire._cli import main

if __name__ == "__main__":
    sys.exit(main())
